"""The operators of PyTorch: `framestride::attention`, on a GPU and on the emulator."""

from __future__ import annotations

import ctypes
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from . import _library, module
from ._library import Call, NormWeights, Status, TextSide, refuse
from .spec import details_of, half_widths_of

try:
    import torch
    from torch import Tensor
    from torch.autograd import forward_ad
except ImportError as error:
    raise refuse(
        "torch", f"no PyTorch ({error})", "PyTorch 2.4 or later", "pip install torch", Status.UNSUPPORTED
    ) from None

_DTYPES = (torch.bfloat16, torch.float16)
_PROFILED, _DENSE, _GIVEN = 0, 1, 2
_LINE_END = "; "

ops = torch.ops.framestride
Outputs = tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]

_SIDE = "Tensor[] {0}, Tensor? {0}_lengths, Tensor[] {0}_q_norm, Tensor[] {0}_k_norm, "
_INPUTS = (
    "Tensor q, Tensor k, Tensor v, str spec, Tensor[] q_norm, Tensor[] k_norm, Tensor[] rope, "
    + _SIDE.format("before")
    + _SIDE.format("after")
    + "float[] density, int[] half_widths, float? scale, int? seed"
)
torch.library.define(
    "framestride::attention",
    f"({_INPUTS}, Tensor? head_types, Tensor? precisions, bool profiled, bool with_lse, bool with_profile)"
    " -> (Tensor out, Tensor lse, Tensor found_head_types, Tensor found_errors, Tensor found_precisions,"
    " Tensor found_precision_errors)",
    tags=(torch.Tag.pt2_compliant_tag,),
)
torch.library.define(
    "framestride::profile",
    f"({_INPUTS}) -> (Tensor head_types, Tensor errors)",
    tags=(torch.Tag.pt2_compliant_tag,),
)


def on_one_line(toml: str) -> str:
    """The text of a spec as operators get it. Names in it have no semicolon.

    On a GPU, Inductor of PyTorch 2.11 writes the arguments of operators into comments of the code that it
    generates. There, a line end in a string would end the comment.
    """
    return toml.replace("\n", _LINE_END)


def converted(name: str, tensor: Tensor, dtype: str) -> Tensor:
    """A contiguous tensor of a type: the same one, if it is that already."""
    _check_kind(name, tensor)
    if dtype == "int32":
        if tensor.is_floating_point():
            raise refuse(name, _shown(tensor), "integers", f"Pass {name}.to(torch.int32)")
        if tensor.dtype != torch.int32:
            # A number that int32 does not hold must not become a good one.
            tensor = tensor.long().clamp(torch.iinfo(torch.int32).min, torch.iinfo(torch.int32).max)
    return tensor.to(getattr(torch, dtype)).contiguous()


def converted_tables(tables: Sequence[Tensor], per_head: bool) -> list[Tensor]:
    """Tables of RoPE in f32. Those of several items may overlap, so they are not copied apart where
    both have the same strides."""
    for table in tables:
        _check_kind("rope", table)
    dims = 3 if per_head else 2
    tables = [table.float() for table in tables]
    tables = [table if _is_contiguous(table, dims) else table.contiguous() for table in tables]
    same = len({_stride(table, 0) for table in tables if table.dim() > dims}) < 2
    return tables if same else [table.contiguous() for table in tables]


def is_tensor(value: Any) -> bool:
    return isinstance(value, Tensor)


def of_array(array: Any) -> Tensor:
    """An array of any library as a tensor, which shares its memory."""
    return array if isinstance(array, Tensor) else torch.utils.dlpack.from_dlpack(array)


def _check_kind(name: str, tensor: Tensor) -> None:
    if not isinstance(tensor, Tensor):
        raise refuse(name, type(tensor).__name__, "a tensor of PyTorch", "Make a tensor of it, where q lies")
    if tensor.is_complex():
        raise refuse(name, "complex numbers", "real ones", "RoPE takes (freqs.real, freqs.imag) of complex factors")


@dataclass(frozen=True)
class Side:
    """The text on one side of the video, as an operator gets it."""

    name: str
    tokens: int
    rows: list[Tensor]
    lengths: Tensor | None
    q_norm: list[Tensor]
    k_norm: list[Tensor]


class Inputs:
    """The inputs of an operator, checked as far as the library cannot: it sees addresses and no shapes."""

    def __init__(
        self, inputs: Sequence[Any], head_types: Tensor | None = None, precisions: Tensor | None = None
    ) -> None:
        q, k, v, spec, q_norm, k_norm, rope, *sides, density, half_widths, scale, seed = inputs
        self.spec: str = spec.replace(_LINE_END, "\n")
        self.details = details_of(self.spec)
        self.rows: list[Tensor] = [q, k, v]
        self.q_norm: list[Tensor] = q_norm
        self.k_norm: list[Tensor] = k_norm
        self.rope: list[Tensor] = rope
        self.sides = [
            Side("before", self.details.before_tokens, *sides[:4]),
            Side("after", self.details.after_tokens, *sides[4:]),
        ]
        self.scale: float | None = scale
        self.seed: int | None = seed
        self.head_types = head_types
        self.precisions = precisions
        if q.dim() != 4:
            raise refuse("q", _shown(q), "[B, S, H, D]", "Split the heads, and add a batch dimension")
        self.batch, self.heads = q.shape[0], q.shape[2]
        self.half_widths = self._half_widths(density, half_widths)
        self._check()

    def _half_widths(self, density: list[float], half_widths: list[int]) -> tuple[int, int]:
        if half_widths:
            most = self.details.video_tokens
            if len(half_widths) != 2 or not all(1 <= half_width <= most for half_width in half_widths):
                raise refuse(
                    "half_widths",
                    half_widths,
                    f"two numbers of tokens, spatial and temporal, 1 to {most}",
                    "Leave them out for the spec's own",
                )
            return half_widths[0], half_widths[1]
        if density and len(density) != 2:
            raise refuse("density", density, "a number, or (spatial, temporal)", "Leave it out for the spec's own")
        return half_widths_of(self.spec, *density)

    def _check(self) -> None:
        d = self.details
        for side in self.sides:
            if not side.tokens and (side.rows or side.q_norm or side.k_norm or side.lengths is not None):
                raise refuse(
                    side.name,
                    "text",
                    f"none: spec {d.name.decode()} has no text {side.name} the video",
                    f"Leave them out, or set {side.name} in the spec",
                )
            if len(side.rows) not in (0, 3):
                raise refuse(side.name, f"{len(side.rows)} of q, k, v", "all three, or none", "Give the others too")
            shape = [self.batch, side.tokens, self.heads, d.head_dim]
            for name, tensor in zip("qkv", side.rows):
                self._check_rows(f"{side.name}.{name}", tensor, shape, f"{shape}: as many rows as the spec has")
            if side.lengths is not None:
                self._check_exact(f"{side.name}.lengths", side.lengths, torch.int32, [self.batch], "[B]")
        own = sum(side.tokens for side in self.sides if side.rows)
        rows = d.sequence - own
        shape = [self.batch, rows, self.heads, d.head_dim]
        about = f"{shape}: B and H of q, and the rows and channels of spec {d.name.decode()}"
        if own:
            about += f" ({own} rows of text have tensors of their own)"
        for name, tensor in zip("qkv", self.rows):
            self._check_rows(name, tensor, shape, about)
        norms = [("q_norm", self.q_norm), ("k_norm", self.k_norm)]
        for side in self.sides:
            norms += [(f"{side.name}.q_norm", side.q_norm), (f"{side.name}.k_norm", side.k_norm)]
        length = d.head_dim * (self.heads if d.norm_over else 1)
        for name, norm in norms:
            if norm and not d.norm_kind:
                allowed = f"None: spec {d.name.decode()} has no QK-norm"
                raise refuse(name, "a weight", allowed, "Leave it out, or set qk_norm in the spec")
            if len(norm) > 2:
                raise refuse(name, f"{len(norm)} tensors", "a weight, or (weight, bias)", "Pass one or two")
            for part in norm:
                self._check_exact(name, part, torch.float32, [length], "[H * D]" if d.norm_over else "[D]")
        if len(self.rope) not in ((0, 2) if not d.rope_channels else (2,)):
            needs = "(cos, sin)" if d.rope_channels else "None"
            found = f"{len(self.rope)} of them" if self.rope else "None"
            raise refuse("rope", found, f"{needs}, as spec {d.name.decode()} has it", "Pass it, or change the spec")
        for name, table in zip(("cos", "sin"), self.rope):
            self._check_table(name, table)
        if self.rope:
            cos, sin = self.rope
            own = cos.dim() > (3 if d.rope_per_head else 2)
            if cos.shape != sin.shape or (own and _stride(cos, 0) != _stride(sin, 0)):
                raise refuse("sin", _shown(sin), f"{_shown(cos)}, as cos, and its strides", "Make the two tables alike")
        for name, words in ("head_types", self.head_types), ("precisions", self.precisions):
            if words is not None:
                self._check_exact(name, words, torch.int32, [self.batch, self.heads], "[B, H]")
        if self.scale is not None and ctypes.c_float(self.scale).value == 0:
            raise refuse("scale", self.scale, "a number above 0", "Leave it out for 1 / sqrt(D)")

    def _check_rows(self, name: str, tensor: Tensor, shape: list[int], about: str) -> None:
        if list(tensor.shape) != shape:
            heads_first = len(tensor.shape) == 4 and list(tensor.transpose(1, 2).shape[1::2]) == shape[1::2]
            mend = "Give the rows that the spec has, or make another spec"
            raise refuse(name, _shown(tensor), about, f"Pass {name}.transpose(1, 2)" if heads_first else mend)
        dtype = _DTYPES[self.details.dtype]
        if tensor.dtype != dtype:
            other = ", or make another spec" if tensor.dtype in _DTYPES else ""
            raise refuse(name, _shown(tensor), str(dtype), f"Pass {name}.to({dtype}){other}")
        if tensor.stride(3) != 1:
            strides = tuple(tensor.stride())
            raise refuse(name, f"strides {strides}", "a contiguous last dimension", f"Pass {name}.contiguous()")
        self._check_device(name, tensor)

    def _check_table(self, name: str, table: Tensor) -> None:
        d, shape = self.details, list(table.shape)
        inner = [self.heads, d.rope_channels // 2] if d.rope_per_head else [d.rope_channels // 2]
        dims = 1 + len(inner)
        right = shape[-len(inner) :] == inner and shape[:-dims] in ([], [self.batch])
        if not right or len(shape) < dims or shape[-dims] < d.rope_rows:
            allowed = f"{[d.rope_rows, *inner]}, more rows, or such a table for each of {self.batch} items"
            raise refuse(name, _shown(table), allowed, "Give a column for each pair of channels that are rotated")
        if table.dtype != torch.float32 or not _is_contiguous(table, dims):
            raise refuse(name, _shown(table), "float32, each table contiguous", f"Pass {name}.float().contiguous()")
        self._check_device(name, table)

    def _check_exact(self, name: str, tensor: Tensor, dtype: torch.dtype, shape: list[int], about: str) -> None:
        if list(tensor.shape) != shape or tensor.dtype != dtype or not tensor.is_contiguous():
            raise refuse(name, _shown(tensor), f"{dtype} {about} = {shape}, contiguous", "Give it this shape and type")
        self._check_device(name, tensor)

    def _check_device(self, name: str, tensor: Tensor) -> None:
        device = self.rows[0].device
        if tensor.device != device:
            raise refuse(name, f"a tensor on {tensor.device}", f"{device}, where q lies", f'Pass it .to("{device}")')

    def empty(self, shape: list[int], dtype: torch.dtype, wanted: bool = True) -> Tensor:
        """An output, of no elements where it is not wanted."""
        return self.rows[0].new_empty(shape if wanted else [0], dtype=dtype)

    def profile(self, wanted: bool = True) -> tuple[Tensor, Tensor]:
        """What profiling finds: head types and errors."""
        heads = [self.batch, self.heads]
        return self.empty(heads, torch.int32, wanted), self.empty([*heads, 2], torch.float32, wanted)

    def outputs(self, lse: bool, profile: bool) -> Outputs:
        """The output, the log-sum-exp, and what profiling finds: types and precisions, each with errors."""
        d, heads = self.details, [self.batch, self.heads]
        out = self.empty([self.batch, d.sequence, self.heads, d.head_dim], self.rows[0].dtype)
        lse_out = self.empty([*heads, d.sequence], torch.float32, lse)
        judged = profile and d.largest_error > 0 and self.precisions is None
        precisions = self.empty(heads, torch.int32, judged), self.empty(heads, torch.float32, judged)
        return out, lse_out, *self.profile(profile), *precisions

    def call(self, head_types_from: int) -> Call:
        """The structure of the C interface, without outputs and workspace."""
        q, k, v = map(_tensor, self.rows)
        # The kernels read 16 bytes at a time. What is copied lives as long as these inputs.
        for norm in self.q_norm, self.k_norm, *(norm for side in self.sides for norm in (side.q_norm, side.k_norm)):
            norm[:] = map(_aligned, norm)
        if not all(_is_aligned(table) for table in self.rope):
            self.rope = [table.clone(memory_format=torch.contiguous_format) for table in self.rope]
        before, after = map(_side, self.sides)
        cos, sin = self.rope if self.rope else (None, None)
        table_dims = 3 if self.details.rope_per_head else 2
        return Call(
            q=q,
            k=k,
            v=v,
            q_norm=_weights(self.q_norm),
            k_norm=_weights(self.k_norm),
            before=before,
            after=after,
            cos=_address(cos),
            sin=_address(sin),
            rope_batch=_stride(cos, 0) if cos is not None and cos.dim() > table_dims else 0,
            head_types=_address(self.head_types),
            head_types_from=head_types_from,
            spatial_half_width=self.half_widths[0],
            temporal_half_width=self.half_widths[1],
            scale=self.scale or 0.0,
            has_seed=self.seed is not None,
            seed=self.seed or 0,
            precisions=_address(self.precisions),
        )

    def launch(self, function: str, call: Call) -> None:
        """Runs a function of the library on the current stream of the device of q."""
        q = self.rows[0]
        name, stream = str(q.device), None
        if q.is_cuda:
            stream = torch.cuda.current_stream(q.device).cuda_stream
            if torch.cuda.is_current_stream_capturing() and not module.is_loaded(self.spec, name):
                raise refuse(
                    "spec",
                    f"{self.details.name.decode()}, whose kernels are not loaded, while a CUDA graph is captured",
                    "kernels that are loaded before",
                    f"Call framestride.load(spec, {name!r}) before the capture",
                )
        plan = module.plan(self.spec, name, self.batch, self.heads)
        # PyTorch aligns memory of a GPU to 512 bytes, that of the CPU to less than the workspace needs.
        workspace = q.new_empty(plan.workspace_bytes + 255, dtype=torch.uint8)
        call.workspace = (workspace.data_ptr() + 255) // 256 * 256
        call.workspace_bytes = plan.workspace_bytes
        _library.call(function, plan.handle, ctypes.byref(call), stream)


def _is_contiguous(table: Tensor, dims: int) -> bool:
    """Whether a table of `dims` dimensions is contiguous, or each of several tables is."""
    return (table[0] if table.dim() > dims else table).is_contiguous()


def _is_aligned(tensor: Tensor) -> bool:
    return tensor.data_ptr() % 16 == 0


def _aligned(tensor: Tensor) -> Tensor:
    return tensor if _is_aligned(tensor) else tensor.clone()


def _shown(tensor: Tensor) -> str:
    return f"{list(tensor.shape)} {str(tensor.dtype).removeprefix('torch.')}"


def _address(tensor: Tensor | None) -> int | None:
    return None if tensor is None else tensor.data_ptr()


def _stride(tensor: Tensor, dim: int) -> int:
    """The stride of a dimension. That of a dimension of one element is any number, and nobody needs it."""
    return tensor.stride(dim) if tensor.shape[dim] > 1 else 0


def _tensor(tensor: Tensor) -> _library.Tensor:
    return _library.Tensor(tensor.data_ptr(), _stride(tensor, 0), _stride(tensor, 1), _stride(tensor, 2))


def _weights(norm: list[Tensor]) -> NormWeights:
    return NormWeights(*(part.data_ptr() for part in norm))


def _side(side: Side) -> TextSide:
    text = TextSide(
        lengths=_address(side.lengths),
        q_norm=_weights(side.q_norm),
        k_norm=_weights(side.k_norm),
        has_q_norm=bool(side.q_norm),
        has_k_norm=bool(side.k_norm),
    )
    if side.rows:
        text.q, text.k, text.v = map(_tensor, side.rows)
    return text


def _refusing_gradients(name: str) -> None:
    """Gives an operator what comes before it where gradients could be wanted, torch.func's too.

    Without it they would be zeros.
    """
    operator = getattr(ops, name)

    def check(*arguments: Any) -> Any:
        tensors = _tensors(arguments)
        wanted = torch.is_grad_enabled() and any(tensor.requires_grad for tensor in tensors)
        if wanted or (forward_ad._current_level >= 0 and any(map(_has_tangent, tensors))):
            raise refuse(
                "gradients",
                "an input that requires them",
                "inference: framestride computes no gradients",
                "Call it under torch.no_grad() or torch.inference_mode(), or detach the inputs",
            )
        with torch._C._AutoDispatchBelowAutograd():
            return operator(*arguments)

    torch.library.impl(f"framestride::{name}", "Autograd")(check)


def _has_tangent(tensor: Tensor) -> bool:
    return forward_ad.unpack_dual(tensor).tangent is not None  # type: ignore[no-untyped-call]


_refusing_gradients("attention")
_refusing_gradients("profile")


def _fake_attention(*arguments: Any) -> Outputs:
    *inputs, head_types, precisions, _, with_lse, with_profile = arguments
    return Inputs(inputs, head_types, precisions).outputs(with_lse, with_profile)


torch.library.register_fake("framestride::attention", _fake_attention)


@torch.library.impl("framestride::attention", ("cpu", "cuda"))
def _attention(*arguments: Any) -> Outputs:
    *inputs, head_types, precisions, profiled, with_lse, with_profile = arguments
    checked = Inputs(inputs, head_types, precisions)
    out, lse, *found = outputs = checked.outputs(with_lse, with_profile)
    call = checked.call(_PROFILED if profiled else _DENSE if head_types is None else _GIVEN)
    call.out = _tensor(out)
    if with_lse:
        call.lse = lse.data_ptr()
    if with_profile:
        # What is not found has no elements, and NULL as its address.
        addresses = [words.data_ptr() if words.numel() else None for words in found]
        call.found_head_types, call.found_errors, call.found_precisions, call.found_precision_errors = addresses
    checked.launch("forward", call)
    return outputs


def _fake_profile(*inputs: Any) -> tuple[Tensor, Tensor]:
    return Inputs(inputs).profile()


torch.library.register_fake("framestride::profile", _fake_profile)


@torch.library.impl("framestride::profile", ("cpu", "cuda"))
def _profile(*inputs: Any) -> tuple[Tensor, Tensor]:
    checked = Inputs(inputs)
    head_types, errors = checked.profile()
    call = checked.call(_PROFILED)
    call.found_head_types, call.found_errors = head_types.data_ptr(), errors.data_ptr()
    checked.launch("profile", call)
    return head_types, errors


def _tensors(arguments: Sequence[Any]) -> list[Tensor]:
    flat: list[Tensor] = []
    for argument in arguments:
        parts = argument if isinstance(argument, list) else [argument]
        flat += [part for part in parts if isinstance(part, Tensor)]
    return flat
