"""Sparse attention in the video models of diffusers.

    handle = framestride.diffusers.apply(pipe)
    video = pipe(prompt).frames[0]

`apply` gives the attention of the pipeline's transformers other processors, and changes nothing
else. `reach` says what it can do for a model. README.md beside this file tells the rest.
"""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

import inspect
import os
import warnings
from collections.abc import Callable
from fnmatch import fnmatchcase
from functools import partial
from numbers import Real
from typing import Any, get_args

try:
    import diffusers  # noqa: F401
    import torch
    from torch import nn
except ImportError as error:
    raise ImportError(
        f"framestride.diffusers needs PyTorch and diffusers ({error}): pip install torch diffusers", name=error.name
    ) from error

from framestride.diffusers import backend
from framestride.diffusers.families import FAMILIES, Family
from framestride.diffusers.processors import DENSE, Joint, Model
from framestride.diffusers.schedule import Step, Warmup, Watch
from framestride.spec import Compute
from framestride.study import DensitySchedule

__all__ = ["Handle", "Step", "Warmup", "apply", "backend", "cp_plan", "reach", "restore"]

# What a schedule says of a layer in a step: its density, or that and what tensor cores multiply there, and also
# which heads stay in 16 bits where that is e4m3.
Chosen = float | tuple[float | None, Compute | None] | tuple[float | None, Compute | None, list[int] | tuple[int, ...]] | None
Densities = Callable[[Step, int], Chosen]


def apply(
    target: Any,
    density: float = 0.25,
    schedule: Densities | str | os.PathLike[str] | None = None,
    *,
    compute: Compute = "dtype",
    largest_error: float | None = None,
    scheduler: Any = None,
) -> "Handle":
    """Makes attention over video sparse in a pipeline, or in one transformer.

    `density` is the part of all pairs of rows that a head sees, above 0 and at most 1. With 1 all
    heads are dense. `schedule` says which calls stay dense, a `Warmup` or a function. Without it,
    a share of the first steps does: of Wan 0.3, of CogVideoX 0.2, of others 0.1. The schedule of a
    `framestride.study`, or the file of one, says the density of each layer and step.

    With `compute="e4m3"` attention is computed in 8 bits: sparse or dense, in every layer that a schedule
    does not keep in 16. Layers for which there are no such kernels stay in 16 bits, which is said through
    `warnings`: those of head dim 64, and all on other GPUs than a Hopper. `largest_error` is the relative
    error that a head may have in them, above 0 and at most 1. The first sparse step of a video finds the
    heads beyond it, and these stay in 16 bits in that step and all later ones. Dense steps before it are in
    16 bits. A schedule may say by itself which heads stay in 16 bits, as one of a study does. Then there is no
    `largest_error`.

    Steps are those of the pipeline's scheduler. For a transformer alone, give its `scheduler`, or call
    `Handle.step` before each step. Until then no step is known, and only a schedule's layers are
    dense.

    An `apply` of before is undone first, and stays so if this one raises.

    A model that is not known but calls the dispatcher of diffusers gets dense attention of
    framestride. What is out of reach stays as it was, and is said through `warnings`.

    Raises `ValueError` where there is no transformer, or its weights are f32, for a density, a compute, a head or
    an error that is none, for an error beside a schedule that names heads, and for the schedule of another model.
    """
    if not is_part(density):
        raise ValueError(f"density is {density!r}. It is a part of all pairs: above 0, and at most 1")
    check_compute(compute)
    if not (largest_error is None or is_part(largest_error)):
        raise ValueError(f"largest_error is {largest_error!r}. It is a part of a head's output: above 0, and at most 1")
    models = transformers(target)
    if isinstance(schedule, (str, os.PathLike)):
        schedule = DensitySchedule.load(schedule)
    if not (schedule is None or callable(schedule)):
        raise ValueError(f"schedule is {schedule!r}. It is a Warmup, a function of a step and a layer, a study's schedule or its file")
    restore(target)
    scheduler = scheduler or getattr(target, "scheduler", None)
    handle = Handle(density, compute, largest_error)
    try:
        for model in models:
            handle.take_any(model)
        if isinstance(schedule, DensitySchedule):
            schedule.check(tuple(handle.models))
            if largest_error is not None and any(step.heads_in_16_bits for step in schedule.steps):
                raise ValueError(BOTH)
            for step in schedule.steps:
                for layer, heads in enumerate(step.heads_in_16_bits or ()):
                    handle.layers[layer].check_heads(layer, heads or ())
        shares = [FAMILIES[type(model).__name__].dense_steps for model in models if type(model).__name__ in FAMILIES]
        handle.schedule = schedule or Warmup(steps=max(shares, default=0.0))
        if scheduler is None:
            handle.at(Step())
        elif handle.layers:
            watch = Watch(scheduler, handle.at)
            handle.undo.append(watch.end)
            watch.begin()
    except BaseException:
        handle.restore()
        raise
    return handle


def restore(target: Any) -> None:
    """Gives a pipeline, or a transformer, its own processors back."""
    for model in transformers(target):
        if (handle := vars(model).get("_framestride")) is not None:
            handle.restore()


def reach(model: Any) -> str:
    """What `apply` can do for a transformer.

    "sparse": its attention over video becomes sparse. "dense": it calls the dispatcher of diffusers,
    and its attention becomes framestride's, but stays dense. "none": it is out of reach.
    """
    model = plain(model)
    if type(model).__name__ in FAMILIES:
        return "sparse"
    return "dense" if dispatching(model) else "none"


def cp_plan(model: Any) -> dict:
    """How diffusers shares the rows of a transformer among GPUs, for `enable_parallelism(cp_plan=...)`.

    Where diffusers has a plan of its own, it is that. Other models need one of framestride's, which holds
    while the model has its processors: between `apply` and `restore`.

    Raises `ValueError` where there is none.
    """
    model = plain(model)
    family = FAMILIES.get(type(model).__name__)
    if model._cp_plan is not None:
        return model._cp_plan
    if family is None or family.plan is None:
        raise ValueError(f"there is no plan to share the rows of {type(model).__name__} among GPUs")
    if model.config.get("image_condition_type") == "token_replace":
        raise ValueError(
            f"the first frame of this {type(model).__name__} is modulated apart, so its rows cannot be shared among GPUs"
        )
    return family.plan(model)


class Handle:
    """Framestride in some transformers, until `restore`."""

    def __init__(self, density: float, compute: Compute = "dtype", largest_error: float | None = None):
        self.density = density
        self.compute = compute
        self.largest_error = largest_error
        self.schedule: Densities = Warmup()
        self.told: Step | None = None
        self.layers: list[Any] = []
        # The classes whose layers these are, and how many each has.
        self.models: list[tuple[str, int]] = []
        self.undo: list[Callable[[], None]] = []

    def step(self, index: int, count: int, noise: float | None = None) -> None:
        """Tells which step comes next, where no scheduler does: its number from 0, and of how many.

        `noise` is the part of its input that is noise, from 1 to 0.
        """
        if not 0 <= index < count:
            raise ValueError(f"step {index} of {count}. Steps count from 0, and are fewer than their number")
        self.at(Step(index, count, noise))

    def restore(self) -> None:
        """Leaves everything as it was before `apply`."""
        while self.undo:
            self.undo.pop()()

    def at(self, step: Step):
        """Every processor gets its density and its compute, outside any traced code."""
        # A step may be told again before its second call.
        begins, self.told = step != self.told, step
        for layer, processor in enumerate(self.layers):
            chosen = self.schedule(step, layer)
            said = chosen if isinstance(chosen, tuple) else (chosen, None)
            if len(said) not in (2, 3) or not isinstance(said[0], Real | None):
                raise ValueError(
                    f"the schedule says {chosen!r} of layer {layer}. It says a density or None, or a tuple of that, a compute "
                    "or None, and the heads in 16 bits where that is 'e4m3'"
                )
            density, compute, *heads = said
            density = self.density if density is None else density
            processor.density = DENSE if density >= 1 else repr(float(density))
            processor.compute = self.compute if compute is None else check_compute(compute)
            in_16_bits = heads[0] if heads and processor.compute == "e4m3" else ()
            if in_16_bits and self.largest_error is not None:
                raise ValueError(BOTH)
            processor.begin_step(layer, begins, step.index == 0, in_16_bits)

    def take_any(self, model: Any) -> None:
        """Takes what can be taken of a model."""
        name = type(model).__name__
        kind = reach(model)
        if kind == "sparse":
            self.take(model, FAMILIES[name])
        elif kind == "dense":
            self.take_dense(model)
        else:
            warnings.warn(f"{name} is out of reach, and stays as it was: it calls no dispatcher", stacklevel=3)

    def take(self, model: Any, family: Family):
        """Takes the attention over video of a model that is known."""
        shared = Model(type(model).__name__, family.sinks, alone=issubclass(family.processor, Joint))
        names = [name for path in family.attention for name, _ in model.named_modules() if fnmatchcase(name, path)]
        for attn in map(model.get_submodule, names):
            weight = next(attn.parameters())
            if weight.dtype == torch.float32:
                raise ValueError(
                    f"{shared.name} is in float32, and the kernels compute in bfloat16 and float16: "
                    "load it with torch_dtype=torch.bfloat16"
                )
            processor = family.processor(shared, attn.processor, attn)
            processor.largest_error = None if self.largest_error is None else repr(float(self.largest_error))
            self.layers.append(processor)
            shared.layers.append(processor)
            self.exchange(attn, processor)
        self.models.append((shared.name, len(names)))

        # A plan of framestride's leaves text whole on every GPU, and so is attention to it.
        whole: list[Any] = []
        if family.plan is not None:
            others = (getattr(module, "processor", None) for module in model.modules())
            whole = [other for other in others if hasattr(other, "_parallel_config") and other not in self.layers]
        config = dict(model.config)
        parameters = tuple(inspect.signature(type(model).forward).parameters)[1:]

        def begin(module: nn.Module, positional: tuple, named: dict):
            arguments = dict(zip(parameters, positional)) | named
            for processor in whole:
                if processor._parallel_config is not None:
                    processor._parallel_config = None
            shared.begin(family.video(config, arguments), model._parallel_config)

        def end(module: nn.Module, positional: tuple, output: object):
            shared.begin(None)

        hooks = (model.register_forward_pre_hook(begin, with_kwargs=True), model.register_forward_hook(end))
        self.undo += [hook.remove for hook in hooks]
        self.mark(model)

    def exchange(self, attn: Any, processor: Any):
        original, attn.processor = attn.processor, processor

        def back():
            # Somebody else's processor stays.
            if attn.processor is processor:
                attn.processor = original

        self.undo.append(back)

    def take_dense(self, model: Any):
        """Gives a model that calls the dispatcher the backend, and leaves alone what the process has active."""
        if self.compute != "dtype":
            name = type(model).__name__
            warnings.warn(f"framestride computes attention of {name} in 16 bits: it knows no layers of it", stacklevel=4)
        for processor in dispatching(model):
            self.undo.append(partial(setattr, processor, "_attention_backend", processor._attention_backend))
            processor._attention_backend = backend.name()
        self.mark(model)

    def mark(self, model: Any):
        model._framestride = self
        self.undo.append(partial(delattr, model, "_framestride"))


BOTH = "a largest_error was given, and the schedule says by itself which heads stay in 16 bits. Leave one of them out"


def is_part(value: Any) -> bool:
    return isinstance(value, Real) and 0 < float(value) <= 1


def check_compute(compute: str) -> str:
    if compute not in get_args(Compute):
        raise ValueError(f"compute is {compute!r}. It is one of {', '.join(map(repr, get_args(Compute)))}")
    return compute


def transformers(target: Any) -> list[Any]:
    """The transformers of a pipeline, or the one that was given."""
    if isinstance(target, nn.Module):
        return [plain(target)]
    found = [part for name, part in target.components.items() if name.startswith("transformer")]
    found = [plain(part) for part in found if isinstance(part, nn.Module)]
    if not found:
        raise ValueError(f"{type(target).__name__} has no transformer that is loaded")
    return found


def plain(model: Any) -> Any:
    """The model within what `torch.compile` returned."""
    return getattr(model, "_orig_mod", model)


def dispatching(model: nn.Module) -> list[Any]:
    """The processors that call the dispatcher: those that know of backends."""
    processors = (getattr(module, "processor", None) for module in model.modules())
    return [processor for processor in processors if hasattr(processor, "_attention_backend")]
