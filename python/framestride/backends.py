"""What backends for engines share: the spec of a call that says where its video lies, and its density."""

from __future__ import annotations

import functools
import logging
import math
from typing import Any, Literal

import torch
from torch import Tensor

from ._library import Error
from .module import in_8_bits
from .spec import QkNorm, Rope, Spec, Width, constant

DTYPES: dict[torch.dtype, Literal["bf16", "f16"]] = {torch.bfloat16: "bf16", torch.float16: "f16"}
HEAD_DIMS = (64, 128)


def takes(query: Tensor, key: Tensor, value: Tensor) -> bool:
    """Whether there are kernels for tensors like these, whose last dimension are the channels of a head."""
    return query.dtype in DTYPES and query.shape[-1] in HEAD_DIMS and query.shape == key.shape == value.shape


def make_spec(
    name: str,
    video: tuple[int, int, int],
    heads: int,
    head_dim: int,
    dtype: torch.dtype,
    before: int = 0,
    after: int = 0,
    sinks: int = 0,
    *,
    batch: int = 1,
    norm: tuple[Any, ...] | None = None,
    rope: tuple[Any, ...] | None = None,
) -> Spec:
    """A spec whose calls give half widths of their own. `video` are its frames, and their height and width in
    patches; `norm` and `rope` the arguments of `QkNorm` and `Rope`."""
    frames, height, width = video
    widest = Width(half_width=math.prod(video))
    return Spec(
        name=name,
        frames=frames,
        tokens_per_frame=height * width,
        grid=(height, width),
        before=before,
        after=after,
        heads=heads,
        head_dim=head_dim,
        dtype=DTYPES[dtype],
        batch=batch,
        qk_norm=QkNorm(*norm) if norm else None,
        rope=Rope(*rope) if rope else None,
        spatial=widest,
        temporal=widest,
        sink_frames=min(sinks, frames - 1),
    )


# Where an engine compiles, it is a constant of the graph.
@constant
def plan(density: float, compute: str, device: torch.device, *shape: Any) -> tuple[Spec, dict[str, Any]]:
    """The spec of a call, and the arguments that give its heads a density. `shape` has the first arguments of
    `make_spec`. What cannot be had is said once through `logging`: 8 bits, or a density below what text and
    sinks alone take."""
    spec = _spec(compute, device, *shape)
    if density < 1:
        try:
            return spec, {"half_widths": spec.half_widths(density)}
        except Error as error:
            _warn_once("stays dense", str(error))
    return spec, {"head_types": "dense"}


@functools.lru_cache(maxsize=64)
def _spec(compute: str, device: torch.device, *shape: Any) -> Spec:
    spec = make_spec(*shape)
    return in_8_bits(spec, device, functools.partial(_warn_once, "is in 16 bits")) if compute == "e4m3" else spec


@functools.lru_cache(maxsize=64)
def _warn_once(what: str, reason: str) -> None:
    logging.getLogger("framestride").warning("attention %s: %s", what, reason)
