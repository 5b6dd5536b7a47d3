#!/bin/sh
# Expected: attention whose V is 1 everywhere gives 1, whatever Q and K are, since weights add up to 1. Sums are in f32, so over 118784
#   keys it should be 1 to within a unit in the last place of the output; in 8 bits 1 is exact too.
# Happens: the tensor cores of a Hopper cut towards zero what they add to an accumulator, some bits below its last place. The larger it is,
#   the more of every product is lost, and with products of one sign all losses add up. In f16, SDPA is too small by one unit, with
#   FlashAttention-2 as with cuDNN. In 8 bits, whose products keep fewer bits, cuDNN's sdpa_fp8 returns a third of V,
#   and over 4096 keys 15/16 of it.
# Seen: torch 2.11.0+cu130 (cuDNN 9.19.0), nvidia-cudnn-frontend 1.32.0, an H200 with driver 580.159.04:
#   FlashAttention-2, f16, 4096 keys: mean of the output 1.00000
#   cuDNN, f16, 4096 keys: mean of the output 1.00000
#   cuDNN, e4m3, 4096 keys: mean of the output 0.93750
#   FlashAttention-2, f16, 118784 keys: mean of the output 0.99951
#   cuDNN, f16, 118784 keys: mean of the output 0.99951
#   cuDNN, e4m3, 118784 keys: mean of the output 0.35248
# Why it matters: V of a model has a mean in many channels, and a sequence of video has 30000 to 120000 keys. The error has one sign, so it
#   does not average out over layers, and tests with normal values do not show it.
# Needs: an H100 or H200 with a driver for CUDA 13, python3 with venv and pip, 8 GB of disk, 5 minutes. PYTHON may name a python3 that
#   has these packages already; then nothing is installed.
set -eu
dir=$(mktemp -d)
trap 'rm -rf "$dir"' EXIT
if [ -z "${PYTHON:-}" ]; then
    python3 -m venv "$dir/venv"
    PYTHON=$dir/venv/bin/python
    "$PYTHON" -m pip install -q --no-compile torch==2.11.0 nvidia-cudnn-frontend==1.32.0
fi
cat >"$dir/finding.py" <<'PYTHON'
import importlib.metadata
import math
import sys

import cudnn
import torch
import torch.nn.functional as F
from torch.nn.attention import SDPBackend, sdpa_kernel

versions = torch.__version__.split("+")[0], importlib.metadata.version("nvidia-cudnn-frontend")
if versions != ("2.11.0", "1.32.0"):
    sys.exit(f"torch and nvidia-cudnn-frontend are {versions}, and the finding is about 2.11.0 and 1.32.0")
if not torch.cuda.is_available() or torch.cuda.get_device_capability() != (9, 0):
    sys.exit("there is no Hopper GPU")


def fp8(q, k, v):
    """sdpa_fp8 on tensors of e4m3, with all scales 1 but that of the weights, which are at most 1."""
    kinds = cudnn.data_type
    graph = cudnn.pygraph(io_data_type=kinds.FP8_E4M3, intermediate_data_type=kinds.FLOAT, compute_data_type=kinds.FLOAT)
    given = {}

    def tensor(name, values, kind):
        handle = graph.tensor(name=name, dim=list(values.shape), stride=list(values.stride()), data_type=kind)
        given[handle] = values
        return handle

    def number(name, value):
        return tensor(name, torch.full((1, 1, 1, 1), value, device="cuda"), kinds.FLOAT)

    rows = {name: tensor(name, x.to(torch.float8_e4m3fn), kinds.FP8_E4M3) for name, x in (("q", q), ("k", k), ("v", v))}
    scales = {"descale_q": 1.0, "descale_k": 1.0, "descale_v": 1.0, "descale_s": 1 / 448, "scale_s": 448.0, "scale_o": 1.0}
    scales = {name: number(name, value) for name, value in scales.items()}
    out, _, *largest = graph.sdpa_fp8(**rows, **scales, attn_scale=1 / math.sqrt(q.shape[-1]), generate_stats=False, name="sdpa")
    found = torch.empty_like(given[rows["q"]])
    out.set_output(True).set_dim(list(q.shape)).set_stride(list(found.stride())).set_data_type(kinds.FP8_E4M3)
    given[out] = found
    for one in largest:
        one.set_output(True).set_dim([1, 1, 1, 1]).set_stride([1, 1, 1, 1]).set_data_type(kinds.FLOAT)
        given[one] = torch.empty(1, 1, 1, 1, device="cuda")
    graph.validate()
    graph.build_operation_graph()
    graph.create_execution_plans([cudnn.heur_mode.A, cudnn.heur_mode.FALLBACK])
    graph.check_support()
    graph.build_plans()
    graph.execute(given, torch.empty(graph.get_workspace_size(), device="cuda", dtype=torch.uint8))
    return found.float()


torch.manual_seed(0)
means = {}
for keys in (4096, 118784):
    q, k = (torch.randn(1, 1, keys, 128, device="cuda", dtype=torch.float16) for _ in range(2))
    v = torch.ones_like(q)
    for name, backend in (("FlashAttention-2, f16", SDPBackend.FLASH_ATTENTION), ("cuDNN, f16", SDPBackend.CUDNN_ATTENTION)):
        with sdpa_kernel(backend):
            means[name, keys] = F.scaled_dot_product_attention(q, k, v).double().mean().item()
    means["cuDNN, e4m3", keys] = fp8(q, k, v).double().mean().item()
for (name, keys), mean in means.items():
    print(f"{name}, {keys} keys: mean of the output {mean:.5f}")
fp16 = [means[name, 118784] for name in ("FlashAttention-2, f16", "cuDNN, f16")]
if not all(0.999 < mean < 0.9999 for mean in fp16):
    sys.exit("in f16 the mean of V is kept now, or lost further")
if not (means["cuDNN, e4m3", 4096] > 0.9 and means["cuDNN, e4m3", 118784] < 0.5):
    sys.exit("in 8 bits the mean of V is kept now, or lost with fewer keys")
PYTHON
"$PYTHON" "$dir/finding.py"
