#!/usr/bin/env python3
"""Compares and times diffusers' transformers whose heads are shared by the GPUs of this machine (Ulysses), through NCCL.

Each model has its full size, random weights and a few layers. First each GPU computes all of it alone. Then each has a part of the
rows, by diffusers' plan or by framestride's, and the processors of `framestride.diffusers` exchange heads. The dense outputs must be
the same within the rounding of 16 bits. At a density of 0.25, whose heads each GPU profiles by itself, the time of both ways is
measured, and the part of it that NCCL takes.

    python3 bench/ulysses.py        # two or more Hopper GPUs, PyTorch 2.11, diffusers 0.42.1: a minute or two
    python3 bench/ulysses.py --nproc 2 --heads 23 --models hunyuan_video_720p        # shares that differ
"""

import argparse
import contextlib
import dataclasses
import json
import os
import statistics
import tempfile
import types

import diffusers
import torch
import torch.distributed as dist
from diffusers_step import CASES, loaded
from timing import milliseconds
from torch.profiler import ProfilerActivity, profile

from framestride.diffusers import apply, cp_plan, restore

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


def median_of(call, rounds):
    """The median time of a call that has run before. All GPUs begin together."""
    times = []
    for _ in range(rounds):
        dist.barrier()
        times.append(milliseconds(call))
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
    if args.heads:
        case = dataclasses.replace(case, config=case.config | {"num_attention_heads": args.heads})
    torch.manual_seed(0)
    with torch.device("cuda", rank):
        model = loaded(case, args)
        inputs = case.inputs(case, case.shape, model)
    call = lambda: model(**inputs, return_dict=False)[0]
    heads = model.config.num_attention_heads
    row = {"model": name, "gpus": ranks, "heads": heads, "shares": args.shares, "density": DENSITY}
    with framestride_at(model, 1.0):
        alone = call()
    with framestride_at(model, DENSITY):
        call()
        row["alone_ms"] = median_of(call, args.rounds)
    config = diffusers.ContextParallelConfig(ulysses_degree=ranks, ulysses_anything=heads % ranks > 0)
    model.enable_parallelism(config=config, cp_plan=cp_plan(model))
    with framestride_at(model, 1.0):
        shared = call()
    row["distance"] = ((shared - alone).float().norm() / alone.float().norm()).item()
    with framestride_at(model, DENSITY):
        call()
        row["shared_ms"] = median_of(call, args.rounds)
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
    models = "hunyuan_video_720p,wan_14b_720p,minimax_h3_5s_768x1344"
    parser.add_argument("--models", default=models, help="names of diffusers_step.py, with commas")
    parser.add_argument("--shares", type=int, default=2, help="shares of the layers that are computed")
    parser.add_argument("--heads", type=int, help="heads of each model, in place of its own")
    parser.add_argument("--nproc", type=int, default=torch.cuda.device_count(), help="how many GPUs; by default all")
    parser.add_argument("--rounds", type=int, default=5)
    args = types.SimpleNamespace(**vars(parser.parse_args()), tiny=False)
    if not 2 <= args.nproc <= torch.cuda.device_count():
        parser.error(f"--nproc {args.nproc}: at least 2, and here are {torch.cuda.device_count()} GPUs")
    os.environ.setdefault("MASTER_ADDR", "localhost")
    with tempfile.TemporaryDirectory() as folder:
        torch.multiprocessing.spawn(one_rank, (args.nproc, args, folder), nprocs=args.nproc)


if __name__ == "__main__":
    main()
