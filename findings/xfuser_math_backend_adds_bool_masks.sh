#!/bin/sh
# Expected: xfuser's SDPA_MATH backend, offered as the plain one, gives what its SDPA backend gives. For the bool key
#   mask that xfuser's own make_attn_mask_with_meta builds ("True = attend, False = pad") that is: padding is hidden.
# Happens: SDPA_MATH hands the mask to aten._scaled_dot_product_attention_math, which adds it to the scores as 0 and 1.
#   (F.scaled_dot_product_attention turns bool into 0 and -inf before it gets there.) Padding stays visible.
# Seen: xfuser 0.7.0, torch 2.15.0, CPU, 64 keys of which the last 16 are padding, largest distance from attention
#   over the 48 valid keys alone, and from SDPA with the mask given as the numbers 0 and 1:
#   SDPA 0.0e+00 and 5.9e-01; SDPA_MATH 5.9e-01 and 5.2e-07
# Why it matters: SDPA_MATH is the backend to compare others with. Krea 2's runner lists it among those that "can
#   correctly exclude padding key positions", and its transformer passes this very mask. The result is finite and
#   wrong; nothing is raised.
# Needs: python3 with venv and pip, about 6 GB of disk, 5 minutes. No GPU.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
python3 -m venv "$dir/venv"
"$dir/venv/bin/pip" install -q --no-compile torch==2.15.0 xfuser==0.7.0 yunchang==0.6.4 distvae==0.1.0 \
    diffusers==0.42.1 transformers==5.24.0 accelerate==1.15.0 peft==0.21.2
cat >"$dir/finding.py" <<'END'
import sys

import torch
from xfuser.core.distributed.attention_backend import ATTENTION_FUNCTION_REGISTRY, AttentionBackendType
from xfuser.model_executor.layers.attention_mask import make_attn_mask_with_meta

torch.manual_seed(0)
query, key, value = (torch.randn(1, 2, 64, 32) for _ in range(3))
valid = torch.arange(64)[None] < 48
mask = make_attn_mask_with_meta(valid).attn_mask


def attend(backend, key, value, **kwargs):
    out, _ = ATTENTION_FUNCTION_REGISTRY[backend](query, key, value, 0.0, False, kwargs)
    return out


sdpa, math = AttentionBackendType.SDPA, AttentionBackendType.SDPA_MATH
hidden = attend(sdpa, key[:, :, :48], value[:, :, :48])
added = attend(sdpa, key, value, attn_mask=mask.float())
distances = {}
for backend in (sdpa, math):
    out = attend(backend, key, value, attn_mask=mask)
    distances[backend] = [(out - other).abs().max().item() for other in (hidden, added)]
    print("{}: {:.1e} from valid keys alone, {:.1e} from a mask of 0 and 1".format(backend.name, *distances[backend]))
# Sums of 64 products of unit normals in f32 differ by far less than 1e-4; the padding's share is far more.
if not (distances[sdpa][0] < 1e-4 < distances[math][0] and distances[math][1] < 1e-4):
    sys.exit("Changed: SDPA hides the padding and SDPA_MATH adds the mask no more.")
END
"$dir/venv/bin/python" -W ignore "$dir/finding.py"
