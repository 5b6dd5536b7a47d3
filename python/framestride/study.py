"""What sparse attention would cost each layer and head of a model, and the schedule that follows from it."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from pathlib import Path
from typing import Any, Protocol, get_args

from . import _library
from ._library import Error, refuse
from .spec import Compute

Place = str | os.PathLike[str]
Models = tuple[tuple[str, int], ...]

_VERSION = 1


@dataclass(frozen=True)
class Study:
    """What profiling found in steps that stayed dense: numbers for each step, layer, head, mask and density.

    The relative error of a head is the root of the mean squared error of its mask over the sampled rows, as
    part of the root mean square of its dense output. That of a layer is the same over all its heads, each
    with its better mask: how far the output lies from the dense one, as part of its length. Errors in 8 bits
    are those of mask and rounding together, over all rows.

    `error` of the methods is the relative error that a layer may have; by default the one that the study was
    made with.
    """

    text: str
    """All of it as JSON, which `save` writes."""

    def __post_init__(self) -> None:
        # The library checks the text here.
        self._ask("study_schedule", None)

    @cached_property
    def numbers(self) -> dict[str, Any]:
        """The study as plain values.

        `numbers["steps"][step]["layers"][layer]` has `size`, the mean square of the dense output of each head,
        and `errors[density][head]`, the mean squared errors of the spatial and of the temporal mask. It is None
        where the step did not call the layer, and so is an error at a density that the mask cannot have.
        Where 8 bits were tried, `eight_bits[density][head]` are the mean squared errors in them, each head with
        its better mask, and those of dense attention behind the last density.
        """
        found: dict[str, Any] = json.loads(self.text)
        return found

    def table(self, *, error: float | None = None, heads: bool = False) -> str:
        """The relative error of each layer at each density, and the density that it needs; with `heads`, the
        relative error of each head under each mask, and the bits that it needs where 8 were tried."""
        return _text(self._ask("study_table", error, int(heads)))

    def plot(self, *, error: float | None = None) -> bytes:
        """A picture as the bytes of a PNG file: density against error, and at each density the heads of all
        layers, which mask is better and how large its error is. Several steps are one, by root mean squares.
        Where 8 bits were tried, it also shows in how many steps a head stays in 16."""
        return self._ask("study_plot", error, capacity=1 << 20)

    def schedule(self, error: float | None = None) -> DensitySchedule:
        """The least density of each layer and step with which the layer is within `error`. Where none that was
        tried suffices, it is 1, which is dense attention. Where 8 bits were tried, a layer has them if that takes
        less time, but for the fewest heads that must stay in 16 so that the layer is within `error`."""
        return DensitySchedule.from_json(_text(self._ask("study_schedule", error)))

    def save(self, path: Place) -> None:
        """Writes a file that `load` reads."""
        Path(path).write_text(self.text, encoding="utf-8")

    @staticmethod
    def load(path: Place) -> Study:
        """Reads a file of `save`, or one that the command `framestride study` wrote."""
        return Study(Path(path).read_text(encoding="utf-8"))

    def __repr__(self) -> str:
        steps = [step["index"] for step in self.numbers["steps"]]
        return f"Study({_shown(_models(self.numbers))}, steps {steps}, densities {self.numbers['densities']})"

    def _ask(self, function: str, error: float | None, *options: int, capacity: int = 1 << 14) -> bytes:
        if error is not None:
            _check_error(error)
        encoded = self.text.encode()
        return _library.contents(function, encoded, len(encoded), error or 0.0, *options, capacity=capacity)


class Step(Protocol):
    """A step of a denoising, such as `framestride.diffusers.Step`."""

    @property
    def index(self) -> int: ...
    @property
    def count(self) -> int: ...
    @property
    def noise(self) -> float | None: ...


@dataclass(frozen=True)
class ScheduledStep:
    """The densities of one step that was studied."""

    index: int
    """Its number, from 0."""
    count: int
    """How many steps the denoising had."""
    noise: float | None
    """The noise of its input, from 1 to 0, where that is known."""
    density: tuple[float | None, ...]
    """The density of each layer, 1 for dense attention. None where the step did not call the layer."""
    compute: tuple[Compute | None, ...] | None = None
    """What tensor cores multiply in each layer. None where that is not the schedule's to say."""
    heads_in_16_bits: tuple[tuple[int, ...] | None, ...] | None = None
    """The numbers of the heads of each layer that stay in 16 bits where its compute is e4m3, from 0. None where
    no layer has any."""

    def place(self, by_noise: bool) -> float:
        """Where in the denoising it is, from 0 to 1."""
        return 1 - self.noise if by_noise and self.noise is not None else self.index / self.count


@dataclass(frozen=True)
class DensitySchedule:
    """Densities by step and layer, which `framestride.diffusers.apply` takes.

    Steps are compared by their noise, so another number of steps has densities too, and a model of few steps.
    Where the noise is not known, they are compared by their share of all steps. A step between two that were
    studied has the larger density of both, and 8 bits if both have, but for the heads that stay in 16 in one of
    them. One before the first is dense and in 16 bits, and one after the last is as the last. Where no step is
    known, a layer has the largest of its densities, and 8 bits if it has them in all steps.
    """

    models: Models
    """The class of each transformer, and how many layers of it have attention over video."""
    error: float
    """The relative error that each layer was within."""
    steps: tuple[ScheduledStep, ...]

    def __call__(self, step: Step, layer: int) -> float | tuple[float, Compute, tuple[int, ...]]:
        """The density of a layer in a step. Where the schedule says what tensor cores multiply there, that and
        the heads that stay in 16 bits stand behind it. Layers count from 0, through all transformers."""
        near = self._near(step, [scheduled for scheduled in self.steps if scheduled.density[layer] is not None], layer)
        density = max((scheduled.density[layer] or 1.0 for scheduled in near), default=1.0)
        if any(scheduled.compute is None for scheduled in self.steps):
            return density
        computes = {scheduled.compute[layer] for scheduled in near if scheduled.compute is not None}
        if computes != {"e4m3"}:
            return density, "dtype", ()
        heads = {head for scheduled in near for head in (scheduled.heads_in_16_bits or {layer: ()})[layer] or ()}
        return density, "e4m3", tuple(sorted(heads))

    def _near(self, step: Step, known: list[ScheduledStep], layer: int) -> list[ScheduledStep]:
        """The steps of those that are known whose densities decide about a step."""
        by_noise = step.noise is not None and all(scheduled.noise is not None for scheduled in known)
        if not by_noise and step.count == 0:
            return known
        here = ScheduledStep(step.index, step.count, step.noise, ()).place(by_noise)
        known = sorted(known, key=lambda scheduled: (scheduled.place(by_noise), scheduled.density[layer]))
        before = [scheduled for scheduled in known if scheduled.place(by_noise) <= here + 1e-6]
        after = [scheduled for scheduled in known if scheduled.place(by_noise) >= here - 1e-6]
        return [before[-1], *after[:1]] if before else []

    def check(self, models: Models) -> None:
        """Raises an `Error` unless the schedule is one of these transformers."""
        if self.models != models:
            raise refuse(
                "schedule",
                f"a schedule of {_shown(self.models)}",
                f"one of {_shown(models)}, as the pipeline has it",
                "Study this model: framestride.study(pipe, ...).schedule()",
            )

    def save(self, path: Place) -> None:
        """Writes a file that `load` and `framestride.diffusers.apply` read: JSON, with a line for each step."""
        keys: dict[str, Any] = {
            "framestride_schedule": _VERSION,
            "models": [{"name": name, "layers": layers} for name, layers in self.models],
            "error": self.error,
        }
        head = "".join(f'  "{key}": {json.dumps(value)},\n' for key, value in keys.items())
        own = ("compute", "heads_in_16_bits")
        said = [{key: value for key, value in vars(step).items() if key not in own or value} for step in self.steps]
        steps = ",\n".join(f"    {json.dumps(step)}" for step in said)
        Path(path).write_text(f'{{\n{head}  "steps": [\n{steps}\n  ]\n}}\n', encoding="utf-8")

    @staticmethod
    def load(path: Place) -> DensitySchedule:
        """Reads a file of `save`, or one that the command `framestride study` wrote."""
        try:
            text = Path(path).read_text(encoding="utf-8")
        except UnicodeDecodeError as error:
            raise _no_schedule(str(path), f"no text in UTF-8 ({error.reason})", "a schedule in JSON") from None
        return DensitySchedule.from_json(text, str(path))

    @staticmethod
    def from_json(text: str, subject: str = "schedule") -> DensitySchedule:
        """Reads the text of a file, which messages call `subject`."""

        wrong = partial(_no_schedule, subject)
        try:
            data = json.loads(text)
        except ValueError as error:
            raise wrong(f"no JSON ({error})", "a schedule in JSON") from None
        version = data.get("framestride_schedule") if isinstance(data, dict) else None
        if version != _VERSION:
            found = "no key framestride_schedule" if version is None else f"a schedule of version {version}"
            raise wrong(found, f"version {_VERSION}")
        try:
            del data["framestride_schedule"]
            models, allowed = _models(data), data["error"]
            scheduled = tuple(ScheduledStep(**{key: _frozen(step[key]) for key in step}) for step in data["steps"])
            unknown = set(data) - {"models", "error", "steps"}
        except (KeyError, TypeError, ValueError) as error:
            raise wrong(f"{type(error).__name__}: {error}", "the keys of a schedule") from None
        if unknown:
            raise wrong(f"key {min(unknown)}", "the keys of a schedule")
        for name, count in models:
            if not is_whole(count):
                raise wrong(f"{count!r} layers of {name}", "an integer from 0")
        layers = sum(layers for _, layers in models)
        if not scheduled or layers == 0:
            raise wrong("no steps or no layers", "one of each at least")
        if not (_is_number(allowed) and 0 < allowed < 1):
            raise wrong(f"error {allowed!r}", "a part of the output's size, above 0 and below 1")
        for step in scheduled:
            if not (is_whole(step.index) and is_whole(step.count) and step.index < step.count):
                raise wrong(f"step {step.index!r} of {step.count!r}", "steps that count from 0")
            if step.noise is not None and not (_is_number(step.noise) and 0 <= step.noise <= 1):
                raise wrong(f"noise {step.noise!r} in step {step.index}", "a number from 1 to 0, or null")
            for what in ("density", "compute", "heads_in_16_bits"):
                values = getattr(step, what)
                if values is None and what != "density":
                    continue
                if not isinstance(values, tuple) or len(values) != layers:
                    found = f"{len(values)} values" if isinstance(values, tuple) else repr(values)
                    raise wrong(f"{found} of {what} in step {step.index}", f"a list of {layers}, one for each layer")
            for density in step.density:
                if density is not None and not (_is_number(density) and 0 < density <= 1):
                    raise wrong(f"density {density!r} in step {step.index}", "densities above 0 and at most 1, or null")
            for compute in step.compute or ():
                if compute not in (None, *get_args(Compute)):
                    raise wrong(f"compute {compute!r} in step {step.index}", '"dtype", "e4m3" or null')
            for layer, heads in enumerate(step.heads_in_16_bits or ()):
                if heads is not None and not (isinstance(heads, tuple) and all(map(is_whole, heads))):
                    raise wrong(f"heads {heads!r} in step {step.index}", "lists of numbers from 0, or null")
                if heads and (step.compute or {layer: None})[layer] != "e4m3":
                    found = f"heads in 16 bits of layer {layer} in step {step.index}"
                    raise wrong(found, "such heads where the compute of a layer is e4m3")
        return DensitySchedule(models, allowed, scheduled)


def study(
    pipe: Any,
    *inputs: Any,
    steps: Sequence[int] | None = None,
    densities: Sequence[float] = (0.1, 0.15, 0.25, 0.35, 0.5),
    error: float = 0.05,
    compute: Compute = "dtype",
    **arguments: Any,
) -> Study:
    """Runs some steps of a pipeline of diffusers dense, and finds what masks would cost each layer and head.

    Args:
        pipe: a pipeline with a transformer that `framestride.diffusers.apply` makes sparse. It is left as it
            was before, but for an `apply` of before, which is undone.
        inputs, arguments: what the pipeline is called with, such as a prompt and `num_inference_steps`.
        steps: the numbers of the steps to study, from 0; by default all. The pipeline runs up to the last of
            them, and is stopped there: it paints no frames.
        densities: those to try, above 0 and at most 1.
        error: the relative error that a layer may have in tables, pictures and schedules, unless these are
            asked for another one.
        compute: with `"e4m3"`, 8 bits are tried too, and schedules have them where they are within the error
            and take less time, but for the heads that must stay in 16.

    Every layer is dense, by framestride. In a studied step, each also profiles its heads once for every
    density, from some sampled rows. That takes a fraction of dense attention, and all steps together less
    than three times the time of dense ones. Of each layer only numbers are kept. Where 8 bits are tried, a
    layer is computed in them dense and at every density as well, and its outputs are compared over all rows.

    Several transformers, guidance by a batch or by two calls, models of few steps, offloading and compiled
    transformers (which run uncompiled meanwhile) work as with `apply`. So does Ulysses: each process studies its
    heads, and gets the numbers of all.

    A bar of tqdm shows the progress, where that is installed, unless `pipe.set_progress_bar_config(disable=True)`
    was called.

    Raises:
        Error: what was found, what is allowed, and how to mend it. Whatever the pipeline raises comes through.
    """
    chosen = None if steps is None else sorted(set(steps))
    if chosen is not None and not (chosen and all(isinstance(step, int) and step >= 0 for step in chosen)):
        raise refuse("steps", repr(steps), "numbers of steps, from 0", "Leave it out to study all of them")
    tried = sorted(set(densities))
    if not tried or not all(0 < density <= 1 for density in tried):
        raise refuse("densities", repr(densities), "parts of all pairs, above 0 and at most 1", "Leave it out")
    _check_error(error)
    if compute not in get_args(Compute):
        raise refuse("compute", repr(compute), '"dtype" or "e4m3"', "Leave it out to study 16 bits alone")
    from framestride.diffusers.recorder import record

    numbers: dict[str, Any] = {"framestride_study": _VERSION, "densities": tried, "error": error}
    numbers |= record(pipe, inputs, arguments, chosen, tried, compute)
    return Study(json.dumps(numbers))


def is_whole(number: object) -> bool:
    """Whether it is an integer from 0, such as the number of a head."""
    return isinstance(number, int) and not isinstance(number, bool) and number >= 0


def _is_number(value: object) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _frozen(value: Any) -> Any:
    """Lists as tuples, lists in lists too."""
    return tuple(map(_frozen, value)) if isinstance(value, list) else value


def _no_schedule(subject: str, found: str, allowed: str) -> Error:
    return refuse(subject, found, allowed, "Write it again: framestride.study(pipe, ...).schedule().save(path)")


def _check_error(error: float) -> None:
    if not 0 < error < 1:
        raise refuse("error", str(error), "a part of the output's size, above 0 and below 1", "Name one, such as 0.05")


def _models(data: dict[str, Any]) -> Models:
    return tuple((str(model["name"]), model["layers"]) for model in data["models"])


def _shown(models: Models) -> str:
    return ", ".join(f"{name} ({layers} layers)" for name, layers in models) or "no transformer"


def _text(answer: bytes) -> str:
    return answer.removesuffix(b"\0").decode()
