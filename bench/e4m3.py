#!/usr/bin/env python3
"""Errors of attention in 8 bits against f64 on a GPU, on inputs that random values hide, beside those of 16 bits and of peers.

Errors are relative, of 96 rows of two dense heads of head dim 128. Inputs have means, outliers, one key that dominates, or flat weights.
Where V has a mean, the **bias** stands below: how much too large the output is on average, compared with the rounded reference.
Peers get the same bf16 tensors; fp8_peers.py says what they need, and those that are missing show nan.

    PYTHONPATH=python FRAMESTRIDE_LIBRARY=libframestride.so python3 bench/e4m3.py

It needs PyTorch 2.11 and takes a minute. It fails if 8 bits give V = 1 as anything else, or N(0, 1) an error above .055, and if 16 bits have
a bias above 1e-4. `bench.py --e4m3` takes times, and `render.py` draws both.
"""

import argparse
import datetime
import math
import re
from dataclasses import replace
from pathlib import Path

import framestride
import torch
import torch.nn.functional as F
from bench import OURS, OURS_FP8, output_of, write
from fp8_peers import BlockSparseFp8, CudnnFp8
from timing import own_command
from torch.nn.attention import SDPBackend, sdpa_kernel

# As bench.py calls them.
WHO = ["cuDNN", OURS, OURS_FP8, "cuDNN FP8", "block-sparse FP8"]
LENGTHS = [(16, 512), (32, 3712)]
ROWS = 96


def inputs(name, q, k, v):
    """Q, K and V of a kind."""
    if name == "V = 1":
        return q, k, torch.ones_like(v)
    if name == "V ~ N(1, 1)":
        return q, k, v + 1
    if name == "V ~ N(1 to 2, 1)":
        # Each channel has a mean of its own, so that outputs lie anywhere between two bf16.
        return q, k, v + torch.linspace(1, 2, v.shape[3], device=v.device).to(v.dtype)
    if name == "V ~ N(4, 1)":
        return q, k, v + 4
    if name == "flat weights (Q = 0)":
        return q * 0, k, v
    if name == "K with a mean and an outlier":
        k = k.clone()
        k[..., :8] += 4
        k[..., 9] *= 20
        return q, k, v
    if name == "one key dominates":
        query = q[:, 5]
        k = k.clone()
        k[:, k.shape[1] // 3] = 2 * query
        return (q * 0 + query[:, None]), k, v
    if name == "V ~ 1e-4 N(0, 1)":
        return q, k, v * 1e-4
    return q, k, v


KINDS = [
    "N(0, 1)",
    "V = 1",
    "V ~ N(1, 1)",
    "V ~ N(1 to 2, 1)",
    "V ~ N(4, 1)",
    "V ~ 1e-4 N(0, 1)",
    "flat weights (Q = 0)",
    "one key dominates",
    "K with a mean and an outlier",
]


# Kinds whose bias is looked at.
WITH_A_MEAN = ["V ~ N(1, 1)", "V ~ N(1 to 2, 1)", "V ~ N(4, 1)"]


def reference(q, k, v, rows):
    """Dense attention of some rows in f64, [rows, H, D]."""
    heads = []
    for head in range(q.shape[2]):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T / q.shape[3] ** 0.5
        heads.append(torch.softmax(scores, -1) @ v[0, :, head].double())
    return torch.stack(heads, 1)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def bias(found, expected):
    """The mean error, relative to the output's size, and positive where the output is too large."""
    error = found.double() - expected.to(found.dtype).double()
    return ((error * expected.sign()).sum() / expected.abs().sum()).item()


def errors(frames, tokens):
    """For each kind of input, the relative errors and the biases of all, and the output in 8 bits."""
    shape = {"frames": frames, "tokens_per_frame": tokens, "heads": 2, "head_dim": 128, "spatial": 0.25, "temporal": 0.25}
    spec = framestride.Spec(**shape)
    sequence = frames * tokens
    q, k, v = (torch.randn(1, sequence, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rows = torch.arange(0, sequence, sequence // ROWS, device="cuda")[:ROWS]
    for kind in KINDS:
        own = inputs(kind, q, k, v)
        heads_first = [x.transpose(1, 2).contiguous() for x in own]
        with sdpa_kernel(SDPBackend.CUDNN_ATTENTION):
            outs = [F.scaled_dot_product_attention(*heads_first).transpose(1, 2)]
        for compute in ("dtype", "e4m3"):
            outs.append(framestride.attention(*own, replace(spec, compute=compute), head_types="dense"))
        for peer in (lambda: CudnnFp8(*heads_first).output(), lambda: BlockSparseFp8(*heads_first, 1.0)()):
            outs.append(attempt(peer))
        expected = reference(*own, rows)
        found = [math.nan if out is None else relative(out[0, rows].double(), expected) for out in outs]
        biases = [math.nan if out is None else bias(out[0, rows], expected) for out in outs]
        yield kind, found, biases, outs[WHO.index(OURS_FP8)]


def attempt(peer):
    """The output of a peer as [B, S, H, D], or None with the reason printed."""
    try:
        return peer().transpose(1, 2)
    except Exception as error:  # A peer that is missing, or does not run here, is left out.
        print(f"  {type(error).__name__}: {str(error).strip().splitlines()[:1]}")
        return None


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path(__file__).resolve().parent / "results", help="folder for the results")
    options = parser.parse_args()
    gpu = torch.cuda.get_device_name()
    driver = output_of(["nvidia-smi", "--query-gpu=driver_version", "--format=csv,noheader"])
    print(f"{gpu}, torch {torch.__version__}, seed {torch.initial_seed()}")
    failed, rows = [], []
    for frames, tokens in LENGTHS:
        print(f"\nrelative errors at S = {frames * tokens}\n{'':32}{''.join(f'{who:>20}' for who in WHO)}")
        for kind, found, biases, ours in errors(frames, tokens):
            print(f"{kind:32}{''.join(f'{error:20.5f}' for error in found)}", flush=True)
            has_mean = kind in WITH_A_MEAN
            if has_mean:
                print(f"{'    bias':32}{''.join(f'{bias:+20.1e}' for bias in biases)}", flush=True)
            for who, error, own in zip(WHO, found, biases):
                row = {"sequence": frames * tokens, "inputs": kind, "who": who, "error": None if math.isnan(error) else error}
                rows.append(row | ({"bias": None if math.isnan(own) else own} if has_mean else {}))
            if has_mean and abs(biases[WHO.index(OURS)]) > 1e-4:
                failed.append(f"{kind} has a bias of {biases[WHO.index(OURS)]:.1e} in 16 bits")
            if kind == "V = 1" and not bool((ours == 1).all()):
                failed.append("V = 1 is not 1")
            if kind == "N(0, 1)" and found[WHO.index(OURS_FP8)] > 0.055:
                failed.append(f"N(0, 1) has an error of {found[WHO.index(OURS_FP8)]}")
    results = {
        "date": datetime.datetime.now(datetime.UTC).date().isoformat(),
        "gpu": gpu,
        "driver": driver and driver.splitlines()[0],
        "versions": {"torch": torch.__version__, "cudnn": torch.backends.cudnn.version()},
        "command": own_command(),
        "errors": rows,
    }
    write(options.out / f"{re.sub('[^a-z0-9]+', '_', gpu.lower())}_e4m3_errors.json", results)
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
