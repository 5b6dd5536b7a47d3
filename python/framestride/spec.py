"""The shape of one model's attention."""

from __future__ import annotations

import ctypes
import functools
import operator
import os
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal, TypeVar

from . import _library
from ._library import SpecDetails, Status, refuse

_KINDS: tuple[Literal["rms"], Literal["layer"]] = ("rms", "layer")
_OVERS: tuple[Literal["head"], Literal["heads"]] = ("head", "heads")
_PAIRS: tuple[Literal["interleaved"], Literal["half"]] = ("interleaved", "half")
_DTYPES: tuple[Literal["bf16"], Literal["f16"]] = ("bf16", "f16")
Compute = Literal["dtype", "e4m3"]
_COMPUTES: tuple[Compute, ...] = ("dtype", "e4m3")
_SPATIAL, _TEMPORAL = 1, 2


@dataclass(frozen=True)
class Width:
    """The width of a mask, given in exactly one way. A query sees the keys nearer than a half width."""

    density: float | None = None
    """Visible pairs over all S x S pairs, above 0 and at most 1. The nearest half width is taken."""
    half_width: int | None = None
    """Tokens, 1 to N."""
    half_width_frames: float | None = None
    """Frames' worth of tokens."""


@dataclass(frozen=True)
class QkNorm:
    """The norm of Q and K before RoPE. Its weights are given at each call."""

    kind: Literal["rms", "layer"]
    over: Literal["head", "heads"] = "head"
    """What one statistic covers: the D channels of each head, or all H x D channels of a token."""
    eps: float = 1e-6


@dataclass(frozen=True)
class Rope:
    """The rotary embedding of Q and K. Its cosines and sines are given at each call."""

    pairs: Literal["interleaved", "half"]
    """Which channels rotate together: (2i, 2i + 1), or (i, i + channels / 2)."""
    channels: int | None = None
    """How many leading channels of a head are rotated; by default all D."""
    before: bool = False
    """Whether text before the video is rotated too."""
    after: bool = False
    """Whether text after the video is rotated too."""
    per_head: bool = False
    """Whether each head has its own tables."""


@dataclass(frozen=True)
class Schedule:
    """Which calls of a video's denoising stay dense."""

    steps: int
    layers: int
    dense_steps: int = 0
    """How many leading steps stay dense."""
    dense_layers: int = 0
    """How many leading layers stay dense in every step."""

    def is_dense(self, step: int, layer: int) -> bool:
        """Whether the call of `layer` in `step` stays dense. Both count from 0."""
        return step < self.dense_steps or layer < self.dense_layers


@dataclass(frozen=True, eq=False)
class Spec:
    """The shape of one model's attention.

    The sequence is [before | video | after]: S = before + N + after rows, where N = frames x
    tokens_per_frame. What can differ from call to call is not in it: batch, valid lengths of text,
    strides, heads, and other densities.

    Two specs are equal that say the same, in whichever way. A mistake raises an `Error` that names every
    key, what is allowed, and how to mend it.
    """

    frames: int
    """Latent frames."""
    tokens_per_frame: int
    """Patches of one latent frame."""
    heads: int
    """Heads of the model. A call may have another number, unless a norm covers all of them."""
    head_dim: int
    """D, the channels of a head: 64 or 128."""
    spatial: float | Width
    """The mask of spatial heads. A number is a density."""
    temporal: float | Width
    """The mask of temporal heads. A number is a density."""
    dtype: Literal["bf16", "f16"] = "bf16"
    """The type of Q, K, V and the output."""
    before: int = 0
    """The most text tokens there can be before the video, padding included."""
    after: int = 0
    """The most text tokens there can be after the video, padding included."""
    qk_norm: QkNorm | None = None
    rope: Rope | None = None
    sink_frames: int = 0
    """Leading frames that every query sees."""
    grid: tuple[int, int] | None = None
    """Height and width of a frame in patches, for pictures."""
    batch: int = 1
    """The batch that `describe` assumes. A call may have another."""
    profile_rows: int | None = None
    """Query rows that profiling samples from each head, 1 to 1024; by default 64."""
    profile_seed: int = 0
    """Seed of their draw, where a call gives none."""
    schedule: Schedule | None = None
    name: str = "unnamed"
    """What messages call it: 1 to 64 characters of a-z, 0-9 and _."""
    compute: Compute = "dtype"
    """What tensor cores multiply: the type of the tensors, or 8 bits (`"e4m3"`: head dim 128, on a Hopper)."""
    largest_error: float | None = None
    """For `"e4m3"`: the largest relative error of a head in 8 bits, above 0 and at most 1. Heads beyond it are
    computed in the type of the tensors. Without it, no head is. See `attention`."""
    toml: str = field(init=False, repr=False)
    """The spec as TOML text, as the library and the `framestride` command read it."""
    video_tokens: int = field(init=False, repr=False)
    """N = frames x tokens_per_frame."""
    sequence: int = field(init=False, repr=False)
    """S = before + N + after."""
    rope_shape: tuple[int, ...] | None = field(init=False, repr=False)
    """The shape of the cosines, and of the sines: [rows, channels / 2], or [rows, H, channels / 2] where each
    head has its own tables. None without RoPE. Rows are those of the video and of text that is rotated too."""

    def __post_init__(self) -> None:
        _check_kind("qk_norm", self.qk_norm, QkNorm)
        _check_kind("rope", self.rope, Rope)
        _check_kind("schedule", self.schedule, Schedule)
        object.__setattr__(self, "toml", _write(self))
        # The library checks the text here.
        object.__setattr__(self, "rope_shape", _rope_shape(self.toml))
        object.__setattr__(self, "video_tokens", self.frames * self.tokens_per_frame)
        object.__setattr__(self, "sequence", self.before + self.video_tokens + self.after)

    def __eq__(self, other: object) -> bool:
        return isinstance(other, Spec) and _said(self.toml) == _said(other.toml)

    def __hash__(self) -> int:
        return hash(_said(self.toml))

    @staticmethod
    def shipped(name: str) -> Spec:
        """A spec that the library ships, such as `"hunyuan_video_720p"`."""
        return _spec("spec_shipped", name)

    @staticmethod
    def shipped_names() -> tuple[str, ...]:
        """The names of the specs that the library ships."""
        return tuple(_library.contents("spec_names").removesuffix(b"\0").decode().split())

    @staticmethod
    def from_toml(text: str) -> Spec:
        """Reads TOML text."""
        return _spec("spec_parse", text)

    @staticmethod
    def from_file(path: str | os.PathLike[str]) -> Spec:
        """Reads a TOML file."""
        return _spec("spec_parse", Path(path).read_text(encoding="utf-8"))

    def half_widths(self, density: float | tuple[float, float] | None = None) -> tuple[int, int]:
        """The half widths of the spatial and the temporal band in tokens: the spec's, or those whose
        densities are nearest to `density`.

        Text, sinks and each token itself take a least part of all pairs. A density below it is an `Error`.
        """
        if density is None:
            return _half_widths(self.toml)
        spatial, temporal = density if isinstance(density, tuple) else (density, density)
        return _half_widths(self.toml, float(spatial), float(temporal))


def describe(spec: Spec, *, gpu: str | None = None) -> str:
    """What the command `framestride describe` prints: sequence, tiles, exact densities, workspace, arithmetic,
    and what the spec is estimated to gain over dense attention.

    `gpu` is `"h100"` or `"h200"`. By default it is the first GPU of this machine, or both.
    """
    text = _library.contents("describe", handle_of(spec.toml), None if gpu is None else gpu.encode())
    return text.removesuffix(b"\0").decode()


def plot(spec: Spec) -> bytes:
    """What the command `framestride plot` draws: the masks of each type of head in model order and in packed
    order, as the bytes of a PNG file.
    """
    return _library.contents("plot", handle_of(spec.toml), capacity=1 << 20)


T = TypeVar("T")


def constant(function: T) -> T:
    """Makes `torch.compile` call a function of constants when it traces, as a constant of the graph."""
    function._dynamo_marked_constant = True  # type: ignore[attr-defined]
    return function


def _spec(function: str, text: str) -> Spec:
    """Makes a spec by a function of the library's. It is built of constants, so tracing may build it too."""
    first, spatial, temporal, sides, norm, rotation, others, dense, *named = _values(function, text)
    masks = Width(*spatial), Width(*temporal)
    qk_norm = QkNorm(*norm) if norm else None
    rope = Rope(*rotation) if rotation else None
    schedule = Schedule(*dense) if dense else None
    fields: list[Any] = [*first, *masks, *sides, qk_norm, rope, *others, schedule, *named]
    return Spec(*fields)


@constant
def _values(function: str, text: str) -> tuple[Any, ...]:
    """The values of a spec, in the order of its fields."""
    encoded = text.encode()
    spec = _library.handle(function, encoded, *([len(encoded)] if function == "spec_parse" else []))
    try:
        d = SpecDetails()
        _library.call("spec_info", spec, ctypes.byref(d))
    finally:
        _library.call("spec_free", spec)
    flags = bool(d.rope_before), bool(d.rope_after), bool(d.rope_per_head)
    grid = (d.grid_height, d.grid_width) if d.grid_height else None
    schedule = (d.schedule_steps, d.schedule_layers, d.schedule_dense_steps, d.schedule_dense_layers)
    return (
        (d.frames, d.tokens_per_frame, d.heads, d.head_dim),
        _width(d.spatial),
        _width(d.temporal),
        (_DTYPES[d.dtype], d.before_tokens, d.after_tokens),
        (_KINDS[d.norm_kind - 1], _OVERS[d.norm_over], d.norm_eps) if d.norm_kind else (),
        (_PAIRS[d.rope_pairs - 1], d.rope_channels, *flags) if d.rope_pairs else (),
        (d.sink_frames, grid, d.batch, d.profile_rows, d.profile_seed),
        schedule if d.schedule_steps else (),
        d.name.decode(),
        _COMPUTES[d.compute],
        d.largest_error or None,
    )


@constant
@functools.lru_cache(maxsize=1024)
def _said(toml: str) -> tuple[Any, ...]:
    """What the text of a spec says."""
    return _values("spec_parse", toml)


@constant
def _rope_shape(toml: str) -> tuple[int, ...] | None:
    details = details_of(toml)
    if not details.rope_channels:
        return None
    heads = [details.heads] if details.rope_per_head else []
    return (details.rope_rows, *heads, details.rope_channels // 2)


@constant
def _half_widths(toml: str, spatial: float | None = None, temporal: float | None = None) -> tuple[int, int]:
    return half_widths_of(toml, spatial, temporal)


@functools.lru_cache(maxsize=1024)
def half_widths_of(toml: str, spatial: float | None = None, temporal: float | None = None) -> tuple[int, int]:
    """Half widths for the text of a spec: those of densities, or the spec's."""
    details = details_of(toml)
    found = []
    for head_type, density, own in (
        (_SPATIAL, spatial, details.spatial_half_width),
        (_TEMPORAL, temporal, details.temporal_half_width),
    ):
        half_width = ctypes.c_uint32(own)
        if density is not None:
            _library.call("half_width", handle_of(toml), head_type, density, ctypes.byref(half_width))
        found.append(half_width.value)
    return found[0], found[1]


@functools.cache
def handle_of(toml: str) -> int:
    """A handle of the library's for the text of a spec. It is never freed."""
    encoded = toml.encode()
    return _library.handle("spec_parse", encoded, len(encoded))


@functools.cache
def details_of(toml: str) -> SpecDetails:
    """What follows from the text of a spec."""
    details = SpecDetails()
    _library.call("spec_info", handle_of(toml), ctypes.byref(details))
    return details


def _width(width: _library.Width) -> tuple[float | None, ...]:
    """The fields of a `Width`."""
    value = int(width.value) if width.unit == 1 else width.value
    return tuple(value if width.unit == unit else None for unit in range(3))


def _check_kind(name: str, value: object, kind: type) -> None:
    if value is not None and not isinstance(value, kind):
        allowed = f"a framestride.{kind.__name__}, or None"
        raise refuse(name, repr(value), allowed, f"Pass {kind.__name__}(...)", Status.INVALID_SPEC)


def _write(spec: Spec) -> str:
    """The TOML text of a spec."""
    rope, norm, schedule = spec.rope, spec.qk_norm, spec.schedule
    text = _line("name", spec.name)
    text += "[video]\n" + _line("frames", spec.frames) + _line("tokens_per_frame", spec.tokens_per_frame)
    text += _line("grid", spec.grid)
    if spec.before != 0:
        text += "[before]\n" + _line("tokens", spec.before)
    if spec.after != 0:
        text += "[after]\n" + _line("tokens", spec.after)
    text += "[attention]\n" + _line("heads", spec.heads) + _line("head_dim", spec.head_dim)
    text += _line("dtype", spec.dtype) + _line("batch", spec.batch) + _line("compute", spec.compute)
    if norm is not None:
        text += "[qk_norm]\n" + _line("kind", norm.kind) + _line("over", norm.over) + _line("eps", norm.eps)
    if rope is not None:
        text += "[rope]\n" + _line("pairs", rope.pairs) + _line("channels", rope.channels)
        text += _line("before", rope.before) if rope.before else ""
        text += _line("after", rope.after) if rope.after else ""
        text += _line("per_head", rope.per_head)
    for name, mask in (("spatial", spec.spatial), ("temporal", spec.temporal)):
        width = mask if isinstance(mask, Width) else Width(density=mask)
        text += "[masks." + name + "]\n" + _line("density", width.density) + _line("half_width", width.half_width)
        text += _line("half_width_frames", width.half_width_frames)
    text += "[sink]\n" + _line("frames", spec.sink_frames)
    text += "[profile]\n" + _line("rows", spec.profile_rows) + _line("seed", spec.profile_seed)
    if spec.largest_error is not None:
        text += "[precision]\n" + _line("largest_error", spec.largest_error)
    if schedule is not None:
        text += "[schedule]\n" + _line("steps", schedule.steps) + _line("layers", schedule.layers)
        text += _line("dense_steps", schedule.dense_steps) + _line("dense_layers", schedule.dense_layers)
    return text


def _number(key: str, value: Any) -> str:
    """A number of another type, such as those of NumPy."""
    for convert in (operator.index, float):
        try:
            return str(convert(value))
        except (TypeError, ValueError):
            pass
    raise refuse(key, repr(value), "a number or a text", "See help(framestride.Spec)", Status.INVALID_SPEC)


def _line(key: str, value: object) -> str:
    """One line of TOML. A value that is None has none, and a wrong one is the library's to refuse, if it is
    a number, a text or some of them."""
    if value is None:
        return ""
    if isinstance(value, bool):
        shown = "true" if value else "false"
    elif isinstance(value, int):
        # An index is no symbol: tracing takes the number of the shape that it sees.
        shown = str(operator.index(value))
    elif isinstance(value, str):
        # The library refuses whatever is quoted here, and says it.
        shown = '"' + value.replace("\\", "\\\\").replace('"', '\\"').replace("\n", "\\n") + '"'
    elif isinstance(value, (tuple, list)):
        shown = "[" + ", ".join([str(part) for part in value]) + "]"
    elif isinstance(value, float):
        shown = str(value)
    else:
        shown = _number(key, value)
    return key + " = " + shown + "\n"
