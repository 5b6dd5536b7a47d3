#!/usr/bin/env python3
"""Runs `framestride.study` on diffusers' real transformers on one GPU, and times it against the dense steps that it runs on.

Each model has its full size and random weights, but only a few of its layers. Its steps run dense by diffusers, then dense by
framestride, then as a study with five densities, and all of it again, which is what is timed. It fails where
* a study takes more than 3 times the time of framestride's dense steps, or keeps memory of the GPU;
* the error that was sampled of a layer is not the one of its sparse output against its dense one, over all rows of the video.

    python3 bench/study_gpu.py               # a Hopper GPU, PyTorch 2.11, diffusers 0.42.1: two or three minutes
    python3 bench/study_gpu.py --tiny        # any machine: tiny models on the emulator, to see that it works
"""

import argparse
import gc
import pathlib
import sys
import tempfile
import time
import warnings
from collections.abc import Callable
from dataclasses import dataclass

import diffusers
import torch
from diffusers_step import CASES, Shape, cut, loaded

import framestride
import framestride.diffusers

DENSITIES = (0.1, 0.15, 0.25, 0.35, 0.5)
# A study may take so many times the time of the dense steps.
MOST = 3.0
# How far a sampled error of a layer may lie from the whole one. It is of 64 rows of each head.
SAMPLING = 0.25


class Pipeline:
    """A loop over steps, as pipelines of diffusers have it."""

    def __init__(self, model, inputs: dict, calls: int):
        self.transformer, self.inputs, self.calls = model, inputs, calls
        self.components = {"transformer": model}
        self.scheduler = diffusers.FlowMatchEulerDiscreteScheduler(shift=5.0)

    def __call__(self, num_inference_steps: int):
        self.scheduler.set_timesteps(num_inference_steps)
        sample = torch.zeros(1, 4, 1, 2, 2, device=self.inputs["hidden_states"].device)
        for step in self.scheduler.timesteps:
            for _ in range(self.calls):
                self.transformer(**self.inputs, return_dict=False)
            sample = self.scheduler.step(sample, step, sample).prev_sample


@dataclass
class Run:
    """Milliseconds, the most bytes of the GPU that there were meanwhile, those that are kept, and the result."""

    milliseconds: float
    peak: int
    kept: int
    result: object


def measured(work: Callable[[], object]) -> Run:
    cuda = torch.cuda.is_available()
    if cuda:
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated() if cuda else 0
    began = time.perf_counter()
    result = work()
    if cuda:
        torch.cuda.synchronize()
    milliseconds = 1e3 * (time.perf_counter() - began)
    peak, after = (torch.cuda.max_memory_allocated(), torch.cuda.memory_allocated()) if cuda else (0, 0)
    return Run(milliseconds, peak - before, after - before, result)


def whole_errors(pipe: Pipeline, density: float) -> list[float]:
    """The relative error of each layer's output over all rows of the video, in one call of the model."""
    errors, attention = [], framestride.attention

    def compared(q, k, v, spec, **options):
        out = attention(q, k, v, spec=spec, **options)
        sparse = {name: value for name, value in options.items() if name != "head_types"}
        video = slice(spec.before, spec.before + spec.video_tokens)
        other = attention(q, k, v, spec=spec, half_widths=spec.half_widths(density), **sparse)[:, video]
        norms = [torch.linalg.vector_norm(x, dtype=torch.float32) for x in (other.float() - out[:, video].float(), out[:, video])]
        errors.append((norms[0] / norms[1]).item())
        return out

    handle = framestride.diffusers.apply(pipe, density=1.0)
    framestride.attention = compared
    try:
        pipe.transformer(**pipe.inputs, return_dict=False)
    finally:
        framestride.attention = attention
        handle.restore()
    return errors


def measure(name: str, args: argparse.Namespace) -> bool:
    case = CASES[name]
    shape = Shape(5, 4, 6, 12, case.shape.sound and 8) if args.tiny else case.shape
    densities = (0.6, 0.8) if args.tiny else DENSITIES
    with torch.device("cpu" if args.tiny else "cuda"):
        model = loaded(case, args)
        pipe = Pipeline(model, case.inputs(case, shape, model), case.calls)

    def dense_by_framestride():
        handle = framestride.diffusers.apply(pipe, density=1.0)
        try:
            pipe(args.steps)
        finally:
            handle.restore()

    with cut(model, case, args.shares):
        for _ in range(2):
            theirs, dense = measured(lambda: pipe(args.steps)), measured(dense_by_framestride)
            studied = measured(lambda: framestride.study(pipe, args.steps, densities=densities, compute=args.compute))
        density = densities[len(densities) // 2]
        errors = whole_errors(pipe, density)
        study = studied.result
        with tempfile.TemporaryDirectory() as folder:
            path = pathlib.Path(folder, "schedule.json")
            study.schedule(0.5).save(path)
            framestride.diffusers.apply(pipe, schedule=path).restore()
    print(study.table())
    picture = args.out / f"study_{name}.png"
    picture.write_bytes(study.plot())
    at = study.numbers["densities"].index(density)
    sampled = [
        (sum(map(min, layer["errors"][at])) / sum(layer["size"])) ** 0.5 for layer in study.numbers["steps"][0]["layers"]
    ]
    ratios = [one / other for one, other in zip(sampled, errors, strict=True)]
    over = {"framestride's": studied.milliseconds / dense.milliseconds, "diffusers'": studied.milliseconds / theirs.milliseconds}
    print(f"{name}: {args.steps} steps of {len(errors)} layers, {case.calls} calls each; {picture}")
    for who, run in (("dense by diffusers", theirs), ("dense by framestride", dense), ("study", studied)):
        print(f"    {who}: {run.milliseconds:.0f} ms, at most {run.peak / 2**30:.2f} GiB beside the model, {run.kept} bytes kept")
    print("    study over dense steps: " + ", ".join(f"{who} {ratio:.2f}" for who, ratio in over.items()))
    print(f"    sampled over whole errors at density {density}: {min(ratios):.3f} to {max(ratios):.3f}")
    # The emulator's times say nothing, and 8 bits take their own.
    quick = args.tiny or args.compute != "dtype" or over["framestride's"] <= MOST
    right = all(abs(ratio - 1) <= SAMPLING for ratio in ratios)
    passed = quick and right and studied.kept <= 1 << 20
    print(f"    {'passed' if passed else 'FAILED'}", flush=True)
    return passed


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--models", default="hunyuan_video_720p,wan_14b_720p", help=f"names, with commas, of {', '.join(CASES)}")
    parser.add_argument("--shares", type=int, default=2, help="how many shares of its layers a model has")
    parser.add_argument("--steps", type=int, default=2)
    parser.add_argument("--compute", default="dtype", help="e4m3 studies 8 bits too")
    parser.add_argument("--tiny", action="store_true", help="tiny models on the emulator")
    parser.add_argument("--out", type=pathlib.Path, default=pathlib.Path("."), help="folder for the pictures")
    args = parser.parse_args()
    diffusers.utils.logging.set_verbosity_error()
    warnings.filterwarnings("ignore", "In CPU autocast")
    torch.set_grad_enabled(False)
    torch.manual_seed(0)
    print(f"{'tiny' if args.tiny else torch.cuda.get_device_name()}, PyTorch {torch.__version__}, diffusers {diffusers.__version__}")
    failed = []
    for name in args.models.split(","):
        if not measure(name, args):
            failed.append(name)
        gc.collect()
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
    return len(failed)


if __name__ == "__main__":
    sys.exit(main())
