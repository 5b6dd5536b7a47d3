#!/usr/bin/env python3
"""Attention in 8 bits beside that of 16, in one run on a GPU: errors against f64 on inputs that random values hide, and times.

Errors are relative, of 96 rows of two dense heads of head dim 128. Inputs have means, outliers, one key that dominates, or flat weights.
Times are of `framestride bench`, of a spec and of the same with compute = "e4m3", in turns.

    PYTHONPATH=python FRAMESTRIDE_LIBRARY=libframestride.so FRAMESTRIDE=target/release/framestride python3 bench/e4m3.py

It needs PyTorch 2.11 and takes two minutes on an H200. It fails if 8 bits give V = 1 as anything else, or N(0, 1) an error above .055.
"""

import argparse
import json
import os
import subprocess
import tempfile
from dataclasses import replace
from pathlib import Path

import framestride
import torch

SHAPES = ["hunyuan_video_720p", "wan_14b_720p", "minimax_h3_14s_768x1344"]
LENGTHS = [(16, 512), (33, 3600)]
ROWS = 96


def inputs(name, q, k, v):
    """Q, K and V of a kind."""
    if name == "V = 1":
        return q, k, torch.ones_like(v)
    if name == "V ~ N(1, 1)":
        return q, k, v + 1
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
    "V ~ N(4, 1)",
    "V ~ 1e-4 N(0, 1)",
    "flat weights (Q = 0)",
    "one key dominates",
    "K with a mean and an outlier",
]


def reference(q, k, v, rows):
    """Dense attention of some rows in f64, [rows, H, D]."""
    heads = []
    for head in range(q.shape[2]):
        scores = q[0, rows, head].double() @ k[0, :, head].double().T / q.shape[3] ** 0.5
        heads.append(torch.softmax(scores, -1) @ v[0, :, head].double())
    return torch.stack(heads, 1)


def relative(found, expected):
    return ((found - expected).norm() / expected.norm()).item()


def errors(frames, tokens):
    """The relative errors of each kind of input, in 16 and in 8 bits."""
    shape = {"frames": frames, "tokens_per_frame": tokens, "heads": 2, "head_dim": 128, "spatial": 0.25, "temporal": 0.25}
    spec = framestride.Spec(**shape)
    sequence = frames * tokens
    q, k, v = (torch.randn(1, sequence, 2, 128, device="cuda", dtype=torch.bfloat16) for _ in range(3))
    rows = torch.arange(0, sequence, sequence // ROWS, device="cuda")[:ROWS]
    for kind in KINDS:
        own = inputs(kind, q, k, v)
        expected = reference(*own, rows)
        found = []
        for compute in ("dtype", "e4m3"):
            out = framestride.attention(*own, replace(spec, compute=compute), head_types="dense")
            found.append(relative(out[0, rows].double(), expected))
        yield kind, found, out


def timed(command, spec, rounds):
    done = subprocess.run([command, "bench", spec, "--rounds", str(rounds), "--device", "gpu", "--json"], capture_output=True, text=True)
    if done.returncode != 0:
        raise SystemExit(f"{command} bench {spec} failed:\n{done.stderr}")
    return json.loads(done.stdout)


def main():
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--shapes", default=",".join(SHAPES), help="shipped specs of head dim 128")
    parser.add_argument("--rounds", type=int, default=3)
    options = parser.parse_args()
    print(f"{torch.cuda.get_device_name()}, torch {torch.__version__}, seed {torch.initial_seed()}")
    failed = []
    for frames, tokens in LENGTHS:
        print(f"\nrelative errors at S = {frames * tokens}\n{'':32}{'16 bits':>10}{'8 bits':>10}")
        for kind, (half, byte), out in errors(frames, tokens):
            print(f"{kind:32}{half:10.5f}{byte:10.5f}", flush=True)
            if kind == "V = 1" and not bool((out == 1).all()):
                failed.append("V = 1 is not 1")
            if kind == "N(0, 1)" and byte > 0.055:
                failed.append(f"N(0, 1) has an error of {byte}")
    command = os.environ.get("FRAMESTRIDE", "target/release/framestride")
    models = Path(__file__).resolve().parent.parent / "shapes/models"
    with tempfile.TemporaryDirectory() as folder:
        for name in options.shapes.split(","):
            text = (models / f"{name}.toml").read_text()
            spec = Path(folder) / f"{name}_e4m3.toml"
            spec.write_text(text.replace(f'"{name}"', f'"{name}_e4m3"').replace("[attention]", '[attention]\ncompute = "e4m3"'))
            half, byte = (timed(command, path, options.rounds) for path in (str(models / f"{name}.toml"), str(spec)))
            print(f"\n{name:32}{'16 bits':>12}{'8 bits':>12}{'':>10}")
            for before, after in zip(half["rows"], byte["rows"]):
                label = f"{before['what']} {before.get('mask') or ''}, ms"
                print(f"{label:32}{before['ms']:12.4f}{after['ms']:12.4f}{before['ms'] / after['ms']:9.2f}x")
    if failed:
        raise SystemExit("; ".join(failed))


if __name__ == "__main__":
    main()
