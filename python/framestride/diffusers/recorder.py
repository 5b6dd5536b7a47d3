"""What a study records while a pipeline runs.

Each layer that was studied leaves sums on its device, and a step leaves numbers. No Q, K or V is kept.
"""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

import contextlib
import importlib.util
import math
import warnings
from functools import partial
from typing import Any

import torch
from torch import Tensor

import framestride
from framestride._library import refuse
from framestride.diffusers import apply
from framestride.diffusers.exchange import ALONE, Gpus
from framestride.diffusers.schedule import Step
from framestride.spec import Compute, details_of

tqdm: Any = importlib.import_module("tqdm.auto").tqdm if importlib.util.find_spec("tqdm") else None


class Finished(Exception):
    """The last step of a study is done, and nobody needs what the pipeline would do next."""


class Recorder:
    """A schedule that keeps all layers dense, and records those of some steps."""

    def __init__(self, chosen: list[int] | None, densities: list[float], compute: Compute, bar_options: dict):
        self.chosen = chosen
        self.densities = densities
        self.compute = compute
        self.bar_options = bar_options
        self.bar: Any = None
        self.step = Step()
        # How many there are: 0 before the pipeline runs.
        self.layers = 0
        # Of the step that runs: of each layer that was called, its numbers, and how many items these are of.
        self.sums: dict[int, tuple[dict[str, Tensor], int]] = {}
        self.gpus = ALONE
        self.said: set[str] = set()
        self.steps: list[dict] = []
        self.spec: framestride.Spec | None = None

    def __call__(self, step: Step, layer: int) -> float:
        if step is not self.step:
            self.begin(step)
        return 1.0

    def begin(self, step: Step):
        self.end()
        self.step = step
        if self.layers == 0:
            # The scheduler may have the steps of an earlier video.
            return
        if self.chosen is not None and step.count and self.chosen[-1] >= step.count:
            allowed = f"0 to {step.count - 1}: there are {step.count} steps"
            raise refuse("steps", self.chosen[-1], allowed, "Name earlier steps, or raise num_inference_steps")
        last = step.count - 1 if self.chosen is None else self.chosen[-1]
        if step.count and step.index > last:
            raise Finished

    def end(self):
        """A step ends. This waits for the GPU, and where GPUs share heads for all of them."""
        if not self.sums:
            return
        layers: list[dict | None] = [None] * self.layers
        means = {
            layer: {name: (tensor / items).cpu() for name, tensor in sums.items()}
            for layer, (sums, items) in self.sums.items()
        }
        # Each GPU has some of the heads.
        of_gpus = self.gpus.gathered(means)
        for layer, names in means.items():
            joined = {name: [means[layer][name] for means in of_gpus] for name in names}
            layers[layer] = {name: numbers(torch.cat(parts, min(parts[0].ndim - 1, 1))) for name, parts in joined.items()}
        self.sums = {}
        self.steps.append(vars(self.step) | {"layers": layers})

    def look(self, layer: int, gpus: Gpus, out: Tensor, q: Tensor, k: Tensor, v: Tensor, spec, head_types, **options):
        """Records a layer from its dense output, and from what `framestride.attention` got for it: the heads of
        this GPU."""
        if self.step.count == 0 or not (self.chosen is None or self.step.index in self.chosen):
            return
        self.spec, self.gpus = spec, gpus
        batch, _, heads, head_dim = out.shape

        def squares(rows: Tensor) -> Tensor:
            """The mean square of each head over the rows of the video, summed over the items."""
            video = rows[:, spec.before : spec.before + spec.video_tokens]
            norms = torch.linalg.vector_norm(video, dim=(1, 3), dtype=torch.float32)
            return norms.square().sum(dim=0) / (spec.video_tokens * head_dim)

        size = squares(out)
        sums = {"size": size, "errors": size.new_full((len(self.densities), heads, 2), math.nan)}
        tried = spec if self.compute == "dtype" else framestride.in_8_bits(spec, out.device, self.stay_in_16_bits)
        if tried.compute == "e4m3":
            sums["eight_bits"] = size.new_full((len(self.densities) + 1, heads), math.nan)
            in_8_bits = framestride.attention(q, k, v, tried, head_types="dense", **options)
            sums["eight_bits"][-1] = squares(in_8_bits - out)
        for number, density in enumerate(self.densities):
            with contextlib.suppress(framestride.Error):
                # Text alone may take more than a density.
                given = options | {"half_widths": spec.half_widths(density)}
                found = framestride.profile(q, k, v, spec, **given)
                sums["errors"][number] = found.errors.sum(dim=0)
                if tried.compute == "e4m3":
                    in_8_bits = framestride.attention(q, k, v, tried, head_types=found.head_types, **given)
                    sums["eight_bits"][number] = squares(in_8_bits - out)
        if layer in self.sums:
            # Another call of the same step, as guidance makes it.
            before, items = self.sums[layer]
            self.sums[layer] = ({name: before[name] + tensor for name, tensor in sums.items()}, items + batch)
        else:
            self.sums[layer] = (sums, batch)
            self.show()

    def stay_in_16_bits(self, reason: str):
        """Says once why a layer has no numbers of 8 bits."""
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"framestride studies layers in 16 bits alone: {reason}", stacklevel=2)

    def show(self):
        if tqdm is None or self.gpus.rank > 0:
            return
        if self.bar is None:
            steps = self.step.count if self.chosen is None else len(self.chosen)
            options = {"desc": "study", "unit": "layer"} | self.bar_options
            self.bar = tqdm(total=steps * self.layers, **options)
        self.bar.update()


def numbers(tensor: Tensor) -> Any:
    """A tensor as lists, with None for what is no number."""

    def plain(value):
        if isinstance(value, list):
            return [plain(part) for part in value]
        return value if math.isfinite(value) else None

    return plain(tensor.tolist())


def record(
    pipe: Any, inputs: tuple, arguments: dict, chosen: list[int] | None, densities: list[float], compute: Compute
) -> dict:
    """Runs a pipeline dense up to the last of the chosen steps, and returns what a study has beside its options."""
    if not callable(pipe) or getattr(pipe, "components", None) is None or getattr(pipe, "scheduler", None) is None:
        raise refuse(
            "pipe",
            type(pipe).__name__,
            "a pipeline of diffusers, with a scheduler",
            "Pass the pipeline, and what it is called with",
        )
    recorder = Recorder(chosen, densities, compute, getattr(pipe, "_progress_bar_config", None) or {})
    handle = apply(pipe, density=1.0, schedule=recorder)
    try:
        if not handle.layers:
            raise refuse(
                "pipe",
                f"{type(pipe).__name__}, of whose transformers none becomes sparse",
                "a model of the table in framestride/diffusers/README.md",
                "framestride.diffusers.reach(transformer) says what can be done for a model",
            )
        recorder.layers = len(handle.layers)
        for number, processor in enumerate(handle.layers):
            processor.look = partial(recorder.look, number)
        with uncompiled():
            try:
                pipe(*inputs, **arguments)
            except Finished:
                # The pipeline had no chance to do it.
                if hasattr(pipe, "maybe_free_model_hooks"):
                    pipe.maybe_free_model_hooks()
        recorder.end()
    finally:
        handle.restore()
        if recorder.bar is not None:
            recorder.bar.close()
    if recorder.spec is None:
        raise refuse(
            "pipe",
            "no call of a layer whose attention framestride computes",
            "a model and a call that apply makes sparse",
            "Look at the warnings, which say what was left as it was",
        )
    spec = recorder.spec
    return {
        "models": [{"name": name, "layers": layers} for name, layers in handle.models],
        "video": [spec.frames, *(spec.grid or (1, spec.tokens_per_frame))],
        "sampled_rows": details_of(spec.toml).profile_rows,
        "steps": recorder.steps,
    }


def uncompiled() -> contextlib.AbstractContextManager:
    """Compiled models run as they are written meanwhile. What is recorded is no part of a graph."""
    # PyTorch 2.6 and later have it.
    stance = getattr(torch.compiler, "set_stance", None)
    return contextlib.nullcontext() if stance is None else stance("force_eager")
