#!/bin/sh
# Expected: after model.to(torch.bfloat16), RoPE is off by no more than the rounding of its cosines and sines to bf16,
#   2^-9 = 0.002. The warning of to() names what suffers from the cast: time embeddings and modulation.
# Happens: Kandinsky 5 and 6 keep position x frequency as a buffer, and to() rounds these angles to 8 bits before the
#   cosine is taken. From position 256 on, neighbours have one angle in the fastest channels. Wan and SkyReels-V2 keep
#   finished cosines, and name "rope" in _keep_in_fp32_modules.
# Seen: diffusers 0.42.1, torch 2.15.0, CPU, largest error of a cosine or sine, both models alike: text of 256 tokens
#   0.47, of 512 tokens 0.96, video of 31 x 48 x 80 tokens 0.10 (Kandinsky 5, head dim 64) and 0.12 (6); tables that
#   are cast when they are finished: 0.002.
# Why it matters: from_pretrained(torch_dtype=torch.bfloat16) keeps the angles in f32, so the same weights place
#   tokens elsewhere when a script casts the model itself. Nothing is raised, and by the warning's list RoPE is safe.
# Needs: python3 with venv and pip, about 6 GB of disk, 5 minutes. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.15.0 numpy==2.4.6 diffusers==0.42.1
cat >"$dir/finding.py" <<'END'
import sys

import torch
from diffusers import Kandinsky5Transformer3DModel, Kandinsky6Transformer3DModel

TINY = dict(in_visual_dim=4, out_visual_dim=4, in_text_dim=32, in_text_dim2=32, time_dim=32, ff_dim=32)
GRID = [torch.arange(31), torch.arange(48), torch.arange(80)]


def tables(model):
    is_5 = isinstance(model, Kandinsky5Transformer3DModel)
    text = model.text_rope_embeddings if is_5 else model.video_text_rope_embeddings
    video = model.visual_rope_embeddings
    return text(torch.arange(512)).float(), (video((1, 31, 48, 80), GRID) if is_5 else video(GRID)).float()


changed = False
for model in (
    Kandinsky5Transformer3DModel(model_dim=128, num_text_blocks=1, num_visual_blocks=1, **TINY),
    Kandinsky6Transformer3DModel(model_dim=256, num_text_blocks=1, num_visual_blocks=1, **TINY),
):
    before = tables(model)
    after = tables(model.to(torch.bfloat16))
    (text, video), finished = [(b - a).abs() for a, b in zip(before, after)], (before[0].bfloat16() - before[0]).abs()
    name, first = type(model).__name__, text[:256].max()
    print(f"{name}: text of 256 {first:.2f}, of 512 {text.max():.2f}, video {video.max():.2f}")
    print(f"{name}: tables cast when they are finished {finished.max():.3f}")
    # An angle is up to 511, where bf16 has steps of 2, and a cosine changes by up to 1 when its angle does by 1.
    changed = changed or not (text.max() > 0.5 and video.max() > 0.05 and finished.max() < 0.01)
if changed:
    sys.exit("Changed: the angles keep their precision.")
END
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
