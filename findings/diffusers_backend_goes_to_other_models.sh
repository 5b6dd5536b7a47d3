#!/bin/sh
# Expected: model.set_attention_backend("flex") makes that model's attention use FlexAttention and no other model's;
#   model.reset_attention_backend() undoes it ("following calls to forward will use the environment default, if set,
#   or the torch native scaled dot product attention").
# Happens: CogVideoX never calls the dispatcher, so its attention stays as it was, silently. But the same call also sets
#   the backend of the whole process: a Wan model that nobody touched runs on FlexAttention from then on. Neither
#   model's reset takes that back.
# Seen: diffusers 0.42.1, torch 2.15.0, CPU, one-block models, calls of flex_attention in one forward:
#   at first: CogVideoX 0, Wan 0; after cogvideox.set_attention_backend("flex"): 0, 2;
#   after cogvideox.reset_attention_backend(): 0, 2; after wan.reset_attention_backend(): 0, 2
# Why it matters: a benchmark of backends on CogVideoX measures one and the same kernel under each name, and a model
#   that is timed or tested after it in the same process runs on a backend that nothing in its own code names. Known
#   in part: huggingface/diffusers#14249 (the way to other models); not that the model itself may stay out, and that
#   reset does not help.
# Needs: python3 with venv and pip, about 6 GB of disk, 5 minutes. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.15.0 numpy==2.4.6 diffusers==0.42.1 transformers==5.24.0
unset DIFFUSERS_ATTN_BACKEND || true
cat >"$dir/finding.py" <<'END'
import sys

import torch
from diffusers import CogVideoXTransformer3DModel, WanTransformer3DModel
from torch.nn.attention import flex_attention

calls = 0
attention = flex_attention.flex_attention


def counted(*args, **kwargs):
    global calls
    calls += 1
    return attention(*args, **kwargs)


flex_attention.flex_attention = counted

size = dict(num_attention_heads=2, attention_head_dim=16, in_channels=4, out_channels=4, num_layers=1)
cogvideox = CogVideoXTransformer3DModel(
    **size, time_embed_dim=8, text_embed_dim=8, max_text_seq_length=8,
    sample_width=8, sample_height=8, sample_frames=9,
)
wan = WanTransformer3DModel(**size, text_dim=8, freq_dim=16, ffn_dim=32, rope_max_seq_len=32)
frames, text, step = torch.randn(1, 3, 4, 8, 8), torch.randn(1, 8, 8), torch.tensor([5])


@torch.no_grad()
def flex_calls():
    global calls
    counts = []
    for model, video in ((cogvideox, frames), (wan, frames.transpose(1, 2))):
        calls = 0
        model(hidden_states=video, encoder_hidden_states=text, timestep=step)
        counts.append(calls)
    return counts


seen = []


def note(when):
    seen.append(flex_calls())
    print("{}: CogVideoX {}, Wan {}".format(when, *seen[-1]))


note("at first")
cogvideox.set_attention_backend("flex")
note('after cogvideox.set_attention_backend("flex")')
cogvideox.reset_attention_backend()
note("after cogvideox.reset_attention_backend()")
wan.reset_attention_backend()
note("after wan.reset_attention_backend()")
if seen != [[0, 0], [0, 2], [0, 2], [0, 2]]:
    sys.exit("Changed: the backend set on CogVideoX reaches CogVideoX, or leaves Wan alone.")
END
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
