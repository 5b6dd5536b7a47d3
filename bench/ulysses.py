#!/usr/bin/env python3
"""Compares and times diffusers' transformers whose heads are shared by the GPUs of this machine (Ulysses), through NCCL.

Each model has its full size, random weights and a few layers. First each GPU computes all of it alone. Then each has a part of the
rows, and the processors of `framestride.diffusers` exchange heads. The dense outputs must be the same within the rounding of 16 bits.
At a density of 0.25, whose heads each GPU profiles by itself, the time of both ways is measured, and the part of it that NCCL takes.

    python3 bench/ulysses.py        # two or more Hopper GPUs, PyTorch 2.11, diffusers 0.42.1: a minute
"""

import argparse
import contextlib
import json
import os
import statistics
import tempfile
import types

import diffusers
import torch
import torch.distributed as dist
from diffusers_step import CASES, loaded
from torch.profiler import ProfilerActivity, profile

from framestride.diffusers import apply, restore

DENSITY = 0.25
# Both ways round Q, K, V and outputs at other places, in every layer. Random numbers add up to far less.
MOST_DISTANCE = 0.02


@contextlib.contextmanager
def framestride_at(model, density):
    apply(model, density=density)
    try:
        yield
    finally:
        restore(model)


def milliseconds(call, rounds):
    """The median time of a call that has run before."""
    times = []
    for _ in range(rounds):
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        dist.barrier()
        begin.record()
        call()
        end.record()
        torch.cuda.synchronize()
        times.append(begin.elapsed_time(end))
    return statistics.median(times)


def nccl_share(call):
    """The part of the time on the GPU in which NCCL's kernels run."""
    with profile(activities=[ProfilerActivity.CUDA]) as profiled:
        call()
        torch.cuda.synchronize()
    events = [event for event in profiled.events() if event.device_type == torch.autograd.DeviceType.CUDA]
    of = lambda chosen: sum(event.device_time for event in chosen)
    return of(event for event in events if "nccl" in event.name.lower()) / of(events)


def measure(name, args, rank, ranks):
    case = CASES[name]
    torch.manual_seed(0)
    with torch.device("cuda", rank):
        model = loaded(case, args)
        inputs = case.inputs(case, case.shape, model)
    call = lambda: model(**inputs, return_dict=False)[0]
    row = {"model": name, "gpus": ranks, "shares": args.shares, "density": DENSITY}
    with framestride_at(model, 1.0):
        alone = call()
    with framestride_at(model, DENSITY):
        call()
        row["alone_ms"] = milliseconds(call, args.rounds)
    model.enable_parallelism(config=diffusers.ContextParallelConfig(ulysses_degree=ranks))
    with framestride_at(model, 1.0):
        shared = call()
    row["distance"] = ((shared - alone).float().norm() / alone.float().norm()).item()
    with framestride_at(model, DENSITY):
        call()
        row["shared_ms"] = milliseconds(call, args.rounds)
        row["nccl_share"] = nccl_share(call)
    return row


def one_rank(rank, ranks, args, folder):
    torch.cuda.set_device(rank)
    dist.init_process_group("nccl", init_method=f"file://{folder}/meeting", rank=rank, world_size=ranks, device_id=torch.device("cuda", rank))
    rows = []
    with torch.no_grad():
        for name in args.models.split(","):
            rows.append(measure(name, args, rank, ranks))
            if rank == 0:
                print(json.dumps(rows[-1]), flush=True)
            torch.cuda.empty_cache()
    dist.destroy_process_group()
    wrong = [row["model"] for row in rows if not row["distance"] < MOST_DISTANCE]
    if wrong:
        raise SystemExit(f"not the output of one GPU: {', '.join(wrong)}")


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="wan_14b_720p,minimax_h3_5s_768x1344", help="names of diffusers_step.py, with commas")
    parser.add_argument("--shares", type=int, default=2, help="shares of the layers that are computed")
    parser.add_argument("--rounds", type=int, default=5)
    args = types.SimpleNamespace(**vars(parser.parse_args()), tiny=False)
    ranks = torch.cuda.device_count()
    if ranks < 2:
        parser.error(f"{ranks} GPU is here, and at least 2 are needed")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (ranks, args, folder), nprocs=ranks)


if __name__ == "__main__":
    main()
