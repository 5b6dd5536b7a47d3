#!/bin/sh
# Expected: a model in float32 or float16 attends with float32 or float16 queries and keys.
# Happens: Kandinsky 5 rounds them to bf16 after RoPE whatever the model's type is, and casts them back
#   (apply_rotary ends in .to(torch.bfloat16)). Their dtype shows nothing of it. Kandinsky 6 casts to the type of x.
# Seen: diffusers 0.42.1, torch 2.15.0, CPU, self-attention of 2 heads over 256 tokens, norm weights of 3, relative
#   error of the output against float64 with the same weights: Kandinsky 5 has 6.5e-3 in float32 and 6.8e-3 in
#   float16, Kandinsky 6 1.4e-6 and 1.9e-3
# Why it matters: float16 is chosen on GPUs without bf16, and float32 for a reference, and both get the 8 bits of bf16
#   here. Who compares another implementation with the float32 model looks for a fault that is not theirs.
# Needs: python3 with venv and pip, about 6 GB of disk, 5 minutes. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.15.0 numpy==2.4.6 diffusers==0.42.1
cat >"$dir/finding.py" <<'END'
import copy
import sys

import torch
from diffusers.models.transformers import transformer_kandinsky, transformer_kandinsky6

torch.manual_seed(0)
FRAMES, HEIGHT, WIDTH = 4, 8, 8
grid = [torch.arange(size) for size in (FRAMES, HEIGHT, WIDTH)]
rope = transformer_kandinsky.Kandinsky5RoPE3D((16, 24, 24))((1, FRAMES, HEIGHT, WIDTH), grid).flatten(1, 3)
five = transformer_kandinsky.Kandinsky5Attention(128, 64)
for norm in (five.query_norm, five.key_norm):
    torch.nn.init.constant_(norm.weight, 3)
six = transformer_kandinsky6.Kandinsky6Attention(128, 64)
six.load_state_dict(five.state_dict())
hidden_states = torch.randn(1, FRAMES * HEIGHT * WIDTH, 128)


def attend(attention, dtype):
    """The output, and whether all queries and keys hold numbers of bf16."""
    seen = []
    torch_attention = torch.nn.functional.scaled_dot_product_attention

    def watched(query, key, value, **options):
        seen.extend((query, key))
        return torch_attention(query, key, value, **options)

    torch.nn.functional.scaled_dot_product_attention = watched
    try:
        with torch.no_grad():
            output = copy.deepcopy(attention).to(dtype)(hidden_states.to(dtype), rotary_emb=rope)
    finally:
        torch.nn.functional.scaled_dot_product_attention = torch_attention
    return output.double(), all(torch.equal(x, x.bfloat16().to(dtype)) for x in seen)


exact, _ = attend(six, torch.float64)
errors = {}
for dtype in (torch.float32, torch.float16):
    for name, attention in (("Kandinsky 5", five), ("Kandinsky 6", six)):
        output, is_bf16 = attend(attention, dtype)
        errors[name, dtype] = ((output - exact).norm() / exact.norm()).item()
        print(f"{dtype}, {name}: queries and keys of bf16 {is_bf16}, error {errors[name, dtype]:.1e}")
# Rounding to 8 bits is an error of about 2^-9 = 2e-3 of each query and key, and f32's is 2^-24.
if not errors["Kandinsky 5", torch.float32] > 100 * errors["Kandinsky 6", torch.float32]:
    sys.exit("Changed: queries and keys of a float32 model keep their precision.")
END
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
