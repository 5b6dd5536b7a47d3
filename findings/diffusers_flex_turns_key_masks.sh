#!/bin/sh
# Expected: dispatch_attention_fn of diffusers reads a bool mask of shape [batch, keys] as a mask of keys on every
#   backend that takes it: the native one does, and by their code those for flash, sage, xformers and NPU.
# Happens: the `flex` backend views it as [batch, 1, tokens, 1], a mask of queries. With as many queries as keys, as in
#   self attention, the shapes fit: all valid tokens see the padding, and the rows of padding come out as 0. (With
#   fewer queries than keys the same mask raises a RuntimeError of expand.)
# Seen: diffusers 0.42.1, torch 2.15.0, CPU, 128 tokens of which the last 32 are padding, largest distance in the rows
#   of valid tokens from attention over the 96 valid keys alone:
#   native 0.0e+00, flex 9.8e-01; flex with the mask from flex without any: 0.0e+00
# Why it matters: set_attention_backend("flex") lets padding take part in the attention, and the error is as large as
#   the output; nothing is raised, and no value is NaN.
# Needs: python3 with venv and pip, about 6 GB of disk, 5 minutes. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.15.0 numpy==2.4.6 diffusers==0.42.1
cat >"$dir/finding.py" <<'END'
import sys

import torch
from diffusers.models.attention_dispatch import dispatch_attention_fn

torch.manual_seed(0)
query, key, value = (torch.randn(2, 128, 2, 64) for _ in range(3))
mask = (torch.arange(128) < 96).repeat(2, 1)
alone = dispatch_attention_fn(query, key[:, :96], value[:, :96], backend="native")


def distance(one, other):
    return (one - other)[:, :96].abs().max().item()


native = dispatch_attention_fn(query, key, value, attn_mask=mask, backend="native")
flex = dispatch_attention_fn(query, key, value, attn_mask=mask, backend="flex")
unmasked = dispatch_attention_fn(query, key, value, backend="flex")
distances = [distance(native, alone), distance(flex, alone), distance(flex, unmasked)]
print("native {:.1e}, flex {:.1e}, flex with and without the mask {:.1e}".format(*distances))
print("largest value in the rows of padding under flex:", flex[:, 96:].abs().max().item())
# Sums of 128 products of unit normals in f32 differ by far less than 1e-4; the padding's share is far more.
if not (distances[0] < 1e-4 < distances[1] and distances[2] < 1e-4):
    sys.exit("Changed: native hides the padded keys and flex shows them no more.")
END
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
