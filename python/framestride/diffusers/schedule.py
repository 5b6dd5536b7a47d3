"""Which calls stay dense, and how the step is known.

The step comes from the scheduler of the pipeline, outside the model's forward. So it is right under
`torch.compile`, with guidance as two calls or one, and where a step cache leaves calls out.
"""

import functools
import types
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class Step:
    """A step of a video's denoising: what a schedule is asked about."""

    index: int = 0
    """Its number, from 0."""
    count: int = 0
    """How many steps there are. 0 where no scheduler says it."""
    noise: float | None = None
    """The noise of its input, from 1 to 0. None where no scheduler says it."""


@dataclass(frozen=True)
class Warmup:
    """Dense for a share of the steps, or down to some noise, and in the first layers of all steps.

    Early steps decide what a video shows, and need all of attention. A share of steps is rounded
    down, so 0.1 keeps 5 of 50 steps dense and none of 4. For models of few steps `noise` says it
    better: with 0.95, each step stays dense whose input has at least that much noise.

    A function may stand in its place: from a `Step` and the number of a layer, it returns the
    density of that layer, or None for the one that `apply` got.
    """

    steps: float = 0.0
    noise: float | None = None
    layers: int = 0

    def __post_init__(self) -> None:
        if not 0 <= self.steps <= 1:
            raise ValueError(f"steps is {self.steps}. It is a share of all steps: from 0 to 1, such as 0.1")
        if self.noise is not None and not 0 <= self.noise <= 1:
            raise ValueError(f"noise is {self.noise}. It is a part of a step's input: from 1, the first, to 0")
        if self.layers < 0 or self.layers != int(self.layers):
            raise ValueError(f"layers is {self.layers}. It is how many of the first layers stay dense: 0 or more")

    def __call__(self, step: Step, layer: int) -> float | None:
        early = step.index < int(self.steps * step.count)
        noisy = self.noise is not None and step.noise is not None and step.noise >= self.noise
        return 1.0 if early or noisy or layer < self.layers else None


class Watch:
    """Tells of every step of a scheduler.

    Three methods of this one scheduler object tell it when they were called. A copy of the scheduler
    tells nothing.
    """

    def __init__(self, scheduler: Any, tell: Callable[[Step], None]) -> None:
        self.scheduler = scheduler
        self.tell = tell
        self.done = 0
        self.noise: list[float] = []
        self.watched: dict[str, types.MethodType] = {}

    def begin(self) -> None:
        """Tells of the step that the scheduler is at, and of those that follow."""
        for name in ("set_timesteps", "set_begin_index", "step"):
            if hasattr(self.scheduler, name):
                self.watched[name] = self.telling(name)
                setattr(self.scheduler, name, self.watched[name])
        self.read_timesteps()

    def telling(self, name: str) -> types.MethodType:
        method = getattr(type(self.scheduler), name)

        @functools.wraps(method)
        def call(scheduler: Any, *arguments: Any, **named: Any) -> Any:
            result = method(scheduler, *arguments, **named)
            if scheduler is self.scheduler:
                self.called(name)
            return result

        # A copy of the scheduler binds its copy of this method to itself.
        return types.MethodType(call, self.scheduler)

    def called(self, name: str) -> None:
        if name == "set_timesteps":
            self.read_timesteps()
        else:
            self.done += name == "step"
            self.tell_step()

    def read_timesteps(self) -> None:
        """Before the first step. The times may be on a GPU, so they are read once for all steps."""
        times = getattr(self.scheduler, "timesteps", None)
        times = [] if times is None else [float(time) for time in times]
        times = [time / self.scheduler.config.get("num_train_timesteps", 1) for time in times]
        # Most schedulers count down with the noise. MiniMax-H3 counts up from 0.
        self.noise = [1 - time for time in times] if times[1:] and times[0] < times[-1] else times
        self.done = 0
        self.tell_step()

    def tell_step(self) -> None:
        begin = getattr(self.scheduler, "begin_index", None) or 0
        noise = self.noise[begin:]
        self.tell(Step(self.done, len(noise), noise[min(self.done, len(noise) - 1)] if noise else None))

    def end(self) -> None:
        """Leaves the scheduler as it was."""
        for name, method in self.watched.items():
            if vars(self.scheduler).get(name) == method:
                delattr(self.scheduler, name)
