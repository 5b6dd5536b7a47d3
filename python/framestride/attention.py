"""Attention on tensors of PyTorch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal, NamedTuple, TypedDict, Union, overload

from ._library import refuse
from .arrays import Array, taking_arrays
from .spec import Spec

if TYPE_CHECKING:
    from torch import Tensor
    from typing_extensions import Unpack

Norm = Union["Tensor", tuple["Tensor", "Tensor"], None]
HeadTypes = Union[Literal["profile", "dense"], "Tensor"]


@dataclass(frozen=True)
class Text:
    """The text on one side of the video."""

    q: Tensor | None = None
    """Its rows of Q [B, tokens, H, D], where they lie in a tensor of their own. `q`, `k` and `v` are given,
    or none of them."""
    k: Tensor | None = None
    v: Tensor | None = None
    lengths: Tensor | None = None
    """How many tokens of each item are valid, int32 [B]. Valid ones come first. Without it all are, as they
    are where a number is negative or above the tokens: nobody reads it before the GPU does."""
    q_norm: Norm = None
    """The norm weights of these rows of Q. Without them, the rows have those of the video."""
    k_norm: Norm = None


class Profile(NamedTuple):
    """What profiling found."""

    head_types: Tensor
    """int32 [B, H]: 1 for spatial, 2 for temporal heads."""
    errors: Tensor
    """float32 [B, H, 2]: mean squared errors over sampled rows of the spatial and of the temporal mask."""
    precisions: Tensor | None = None
    """int32 [B, H]: in how many bits the head multiplies, 8 or 16. `attention` finds it for a spec with a
    `largest_error`, where no precisions are given."""
    precision_errors: Tensor | None = None
    """float32 [B, H]: what 8 bits change of the sampled rows, as the norm of the difference to 16 bits over the
    norm in 16 bits, under the mask of the head's type. NaN where that is no number."""


class _Inputs(TypedDict, total=False):
    """What `attention` and `profile` take beside Q, K, V and spec."""

    q_norm: Norm
    k_norm: Norm
    rope: tuple[Tensor, Tensor] | None
    before: Text | None
    after: Text | None
    density: float | tuple[float, float] | None
    half_widths: tuple[int, int] | None
    scale: float | None
    seed: int | None


class _Options(_Inputs, total=False):
    head_types: HeadTypes
    precisions: Tensor | None


@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    return_lse: Literal[False] = False,
    return_profile: Literal[False] = False,
    **options: Unpack[_Options],
) -> Tensor: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    return_lse: Literal[True],
    return_profile: Literal[False] = False,
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    return_lse: Literal[False] = False,
    return_profile: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Profile]: ...
@overload
def attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    return_lse: Literal[True],
    return_profile: Literal[True],
    **options: Unpack[_Options],
) -> tuple[Tensor, Tensor, Profile]: ...
@overload
def attention(q: Array, k: Array, v: Array, spec: Spec, **options: Any) -> Any: ...
@taking_arrays  # type: ignore[misc]
def attention(
    q: Any,
    k: Any,
    v: Any,
    spec: Spec,
    *,
    q_norm: Norm = None,
    k_norm: Norm = None,
    rope: tuple[Tensor, Tensor] | None = None,
    before: Text | None = None,
    after: Text | None = None,
    head_types: HeadTypes = "profile",
    precisions: Tensor | None = None,
    density: float | tuple[float, float] | None = None,
    half_widths: tuple[int, int] | None = None,
    scale: float | None = None,
    seed: int | None = None,
    return_lse: bool = False,
    return_profile: bool = False,
) -> Any:
    """One layer of attention, from the projections to the output: norm, RoPE, profiling, sparse attention.

    It runs on the GPU of its tensors, on PyTorch's current stream, and can be captured in a CUDA graph.
    Tensors of the CPU run on the emulator, which is exact and slow. It computes no gradients.

    Arrays of CuPy, JAX and NumPy do as well, if all of a call are: they share their memory through DLPack, and
    the outputs are arrays of the library of `q`. `jax.jit` cannot trace it.

    Args:
        q, k, v: [B, S, H, D] in the type of the spec, as the projections left them, neither normalised nor
            rotated. S = before + N + after rows; rows of text that is given in `before` or `after` are left
            out. The last dimension is contiguous, other strides are free: transposed and packed
            projections and slices need no copy. B and H may differ from the spec's.
        spec: the shape of the model's attention.
        q_norm, k_norm: the weights of the QK-norm, or (weight, bias): [D], or [H * D] where the norm covers all
            heads. Without them, weights are one and biases zero.
        rope: (cos, sin) of `spec.rope_shape`, with as many rows or more. A leading dimension of B gives each
            item tables of its own.
        before, after: the text on each side of the video, where it has lengths, norms or tensors of its own.
        head_types: `"profile"` finds the type of each head in this call, `"dense"` is full attention, and a
            tensor int32 [B, H] gives the types: 1 spatial, 2 temporal, any other number dense.
        precisions: in how many bits each head multiplies, int32 [B, H], for a spec with a `largest_error`: 8, or
            any other number for the type of the tensors. They may be those of an earlier call's `Profile`, so
            that no head is computed twice. Without them, a call that profiles computes all heads in 8 bits, and
            those again in 16 whose error is larger; another call computes all heads in 16 bits.
        density: visible pairs over all S x S pairs, of both masks or (spatial, temporal). By default the spec's.
        half_widths: the half widths of the spatial and the temporal band in tokens, instead of a density.
        scale: softmax scale; by default 1 / sqrt(D).
        seed: seed of the rows that profiling samples; by default the spec's. A CUDA graph keeps it.
        return_lse: also return the natural log-sum-exp of each row's scaled scores, -inf in rows of invalid text.
        return_profile: also return what profiling found.

    Norm weights and tables are f32. Those of another type are converted at each call, as are lengths and head
    types of another integer type, and those that are not contiguous are copied.

    A NaN or an infinity in V may reach rows of its head that do not see it, since keys are read in tiles.

    Returns:
        The output [B, S, H, D], all rows of text included and contiguous. Rows of invalid text are zero. With
        `return_lse` or `return_profile` it is a tuple of the output, the log-sum-exp float32 [B, H, S], and a
        `Profile`.

    Raises:
        Error: what was found, what is allowed, how to mend it. Nothing was launched.
    """
    from . import _op

    bits = None if precisions is None else _op.converted("precisions", precisions, "int32")
    given = None if isinstance(head_types, str) else _op.converted("head_types", head_types, "int32")
    if isinstance(head_types, str) and head_types not in ("profile", "dense"):
        raise refuse("head_types", repr(head_types), '"profile", "dense" or a tensor', "Pass one of them")
    profiled = given is None and head_types == "profile"
    if return_profile and not profiled:
        raise refuse(
            "return_profile", "True, where heads are not profiled", 'head_types="profile"', "Leave one of them out"
        )
    inputs = _inputs(q, k, v, spec, q_norm, k_norm, rope, before, after, density, half_widths, scale, seed)
    out, lse, *found = _op.ops.attention(*inputs, given, bits, profiled, return_lse, return_profile)
    if spec.largest_error is None or bits is not None:
        found = found[:2]
    if return_lse and return_profile:
        return out, lse, Profile(*found)
    if return_lse:
        return out, lse
    if return_profile:
        return out, Profile(*found)
    return out


@taking_arrays
def profile(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    *,
    q_norm: Norm = None,
    k_norm: Norm = None,
    rope: tuple[Tensor, Tensor] | None = None,
    before: Text | None = None,
    after: Text | None = None,
    density: float | tuple[float, float] | None = None,
    half_widths: tuple[int, int] | None = None,
    scale: float | None = None,
    seed: int | None = None,
) -> Profile:
    """Finds the types of the heads and computes no attention. Arguments and errors are those of `attention`."""
    from . import _op

    inputs = _inputs(q, k, v, spec, q_norm, k_norm, rope, before, after, density, half_widths, scale, seed)
    return Profile(*_op.ops.profile(*inputs))


def _inputs(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    spec: Spec,
    q_norm: Norm,
    k_norm: Norm,
    rope: tuple[Tensor, Tensor] | None,
    before: Text | None,
    after: Text | None,
    density: float | tuple[float, float] | None,
    half_widths: tuple[int, int] | None,
    scale: float | None,
    seed: int | None,
) -> tuple[Any, ...]:
    """The leading arguments of the operators, which are flat."""
    from . import _op

    if density is not None and half_widths is not None:
        raise refuse("density", f"{density}, and half_widths {half_widths}", "one of the two", "Leave one of them out")
    if not isinstance(spec, Spec):
        raise refuse("spec", type(spec).__name__, "a framestride.Spec", "Spec.shipped(name) and Spec.from_file make one")
    if seed is not None and not (hasattr(seed, "__index__") and 0 <= seed < 1 << 63):
        raise refuse("seed", repr(seed), "an integer from 0 to 2^63 - 1", "Leave it out for the spec's own")
    densities = [] if density is None else list(density) if isinstance(density, (tuple, list)) else [density, density]
    if not all(isinstance(part, (int, float)) for part in densities):
        raise refuse("density", repr(density), "a number, or (spatial, temporal)", "Leave it out for the spec's own")
    sides: list[Any] = []
    for name, side in (("before", before), ("after", after)):
        side = Text() if side is None else side
        if not isinstance(side, Text):
            raise refuse(name, type(side).__name__, "a framestride.Text", "Pass Text(lengths=...) or Text(q=, k=, v=)")
        rows = [tensor for tensor in (side.q, side.k, side.v) if tensor is not None]
        lengths = None if side.lengths is None else _op.converted(f"{name}.lengths", side.lengths, "int32")
        sides += [rows, lengths, _norm(f"{name}.q_norm", side.q_norm), _norm(f"{name}.k_norm", side.k_norm)]
    per_head = spec.rope is not None and spec.rope.per_head
    if rope is not None and not isinstance(rope, (tuple, list)):
        raise refuse("rope", type(rope).__name__, "(cos, sin)", "Pass the two tables")
    tables = [] if rope is None else _op.converted_tables(rope, per_head)
    if half_widths is not None and not isinstance(half_widths, (tuple, list)):
        raise refuse("half_widths", repr(half_widths), "(spatial, temporal)", "Leave them out for the spec's own")
    widths = [] if half_widths is None else list(half_widths)
    return (
        q,
        k,
        v,
        _op.on_one_line(spec.toml),
        _norm("q_norm", q_norm),
        _norm("k_norm", k_norm),
        tables,
        *sides,
        densities,
        widths,
        scale,
        seed,
    )


def _norm(name: str, norm: Norm) -> list[Tensor]:
    """The weight of a norm, and its bias."""
    from . import _op

    parts = () if norm is None else norm if isinstance(norm, tuple) else (norm,)
    return [_op.converted(name, part, "float32") for part in parts]
