"""Attention processors: what attention modules compute once framestride has been applied.

A processor gets what the model's own processor gets. It projects with the model's layers, gives raw
projections, norm weights, RoPE tables and text to `framestride.attention`, and projects what comes
back. What it does not know how to compute goes to the model's own processor instead, and is said
once through `warnings`.

`Processor` has what all models share. Each class below it says what one family of models calls its
layers, and how it lays out RoPE tables and masks.

`torch.compile` traces everything here but `Model.plan` and `Model.refuse`. These run while tracing,
and their answers are constants of the graph. So they get numbers and text alone. `operator.index`
makes a plain number of one that torch holds as a symbol, and another size then has a graph of its
own. A density is text, since torch would make a symbol of it.
"""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

import math
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from operator import index
from typing import Any

import torch
from diffusers.models import normalization
from torch import Tensor, nn

import framestride
from framestride.backends import DTYPES, HEAD_DIMS, make_spec
from framestride.diffusers.exchange import ALONE, Gpus, gpus_of
from framestride.study import is_whole

# Stands for the density of a dense head.
DENSE = "dense"

# The norms that the kernels compute, as a spec names them. Any other is called as a module.
NORMS = {
    nn.RMSNorm: "rms",
    normalization.RMSNorm: "rms",
    normalization.MochiRMSNorm: "rms",
    nn.LayerNorm: "layer",
    normalization.FP32LayerNorm: "layer",
}


@dataclass(frozen=True)
class Plan:
    """What a call of one shape needs."""

    spec: framestride.Spec
    # Half widths of the spatial and the temporal mask in tokens. None stands for dense heads.
    half_widths: tuple[int, int] | None


class Model:
    """A transformer with attention of framestride: what its layers share."""

    def __init__(self, name: str, sinks: int, alone: bool):
        self.name = name
        self.sinks = sinks
        # Whether only framestride can share attention among GPUs, and not the model's own processors.
        self.alone = alone
        # Latent frames, and height and width of a frame in patches. None outside a forward, and in one
        # whose arguments do not say it.
        self.video: tuple[int, int, int] | None = None
        # None where GPUs share a layer in a way that is not known.
        self.gpus: Gpus | None = ALONE
        self.made: list[tuple[Tensor, Any]] = []
        self.plans: dict[tuple, Plan | None] = {}
        self.layers: list["Processor"] = []
        self.said: set[str] = set()

    def begin(self, video: tuple[int, int, int] | None, parallel: Any = None):
        """A forward begins, with diffusers' config of parallelism, or it ends, without a video."""
        self.video = video
        self.gpus = gpus_of(parallel)
        self.made = []

    def once(self, source: Tensor, make: Callable[[], Any]) -> Any:
        """What `make` makes of a tensor that all layers get. A compiler sees itself that it is the same."""
        if torch.compiler.is_compiling():
            return make()
        for known, made in self.made:
            # Where GPUs share rows, each layer may get another view of the same numbers.
            if known is source or (known.data_ptr(), known.shape) == (source.data_ptr(), source.shape):
                return made
        made = make()
        self.made.append((source, made))
        return made

    @torch.compiler.assume_constant_result
    def refuse(self, reason: str) -> None:
        """Says once why attention stays as it was.

        Raises `ValueError` where it cannot stay so, since the model's own processors would attend to
        wrong rows.
        """
        if self.alone and self.gpus is not ALONE:
            raise ValueError(f"framestride cannot share attention of {self.name} among GPUs: {reason}")
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"framestride leaves attention of {self.name} as it was: {reason}", stacklevel=2)

    def stay_in_16_bits(self, reason: str) -> None:
        """Says once why attention is computed in 16 bits, where 8 were asked for."""
        if reason not in self.said:
            self.said.add(reason)
            warnings.warn(f"framestride computes attention of {self.name} in 16 bits: {reason}", stacklevel=2)

    @torch.compiler.assume_constant_result
    def plan(self, density: str, compute: str, bound: str | None, device: torch.device, *shape) -> Plan | None:
        """The plan of a call, whose shape has the arguments of `make_spec`. None where there can be none."""
        key = (density, compute, bound, device, shape)
        if key not in self.plans:
            try:
                video, heads, head_dim, dtype, batch, before, after, norm, rope = shape
                sides = (before, after, self.sinks)
                spec = make_spec("diffusers", video, heads, head_dim, dtype, *sides, batch=batch, norm=norm, rope=rope)
                if compute == "e4m3":
                    largest_error = None if bound is None else float(bound)
                    spec = framestride.in_8_bits(spec, device, self.stay_in_16_bits, largest_error)
                self.plans[key] = Plan(spec, None if density == DENSE else spec.half_widths(float(density)))
            except framestride.Error as error:
                self.plans[key] = self.refuse(str(error))
        return self.plans[key]

    @torch.compiler.assume_constant_result
    def hold_bits(self, device: torch.device) -> None:
        """Gives each layer memory for the bits of its heads, unless it has some there.

        A tensor that traced code made would lie in the memory of a CUDA graph, which the next replay writes
        over. All layers get theirs at once, so that blocks which are compiled one by one share their graphs.
        """
        for layer in self.layers:
            if layer.bits is None or layer.bits.device != device:
                with torch.inference_mode(False):
                    layer.bits = torch.empty(layer.count, dtype=torch.int32, device=device)
                # A CUDA graph then writes to it, and needs no copy.
                torch._dynamo.mark_static_address(layer.bits)
                layer.write_bits()


def norm_size(norm: Any) -> int:
    """How many channels a norm takes together."""
    return (norm.normalized_shape if hasattr(norm, "normalized_shape") else norm.dim)[-1]


def norm_of_kernels(norm: Any, heads: int, head_dim: int) -> tuple[str, str, float] | None:
    """Kind, extent and eps of a norm. None where there is none, or where it must be called.

    A module with hooks is called, since they may bring its weights from elsewhere.
    """
    if type(norm) not in NORMS or norm_size(norm) not in (head_dim, heads * head_dim):
        return None
    if norm._forward_pre_hooks or norm._forward_hooks or hasattr(norm, "_hf_hook") or hasattr(norm, "_diffusers_hook"):
        return None
    over = "head" if norm_size(norm) == head_dim else "heads"
    # torch takes the distance of f32 numbers near 1 where a norm has no eps of its own.
    return NORMS[type(norm)], over, norm.eps or torch.finfo(torch.float32).eps


def norm_weights(norm: Any) -> Tensor | tuple[Tensor, Tensor] | None:
    """The weight of a norm, with its bias where it has one."""
    bias = getattr(norm, "bias", None)
    return norm.weight if bias is None else (norm.weight, bias)


def rotated(x: Tensor, cos: Tensor, sin: Tensor, pairs: str) -> Tensor:
    """RoPE of [B, S, H, D], with tables as `framestride.attention` takes them."""
    cos, sin = (table if table.ndim > 2 else table[:, None] for table in (cos, sin))
    channels = 2 * cos.shape[-1]
    turning, rest = x[..., :channels].float(), x[..., channels:]
    interleaved = pairs == "interleaved"
    a, b = (turning[..., ::2], turning[..., 1::2]) if interleaved else turning.chunk(2, dim=-1)
    pair = (a * cos - b * sin, a * sin + b * cos)
    turned = torch.stack(pair, dim=-1).flatten(-2) if interleaved else torch.cat(pair, dim=-1)
    return torch.cat((turned.to(x.dtype), rest), dim=-1)


@dataclass
class Rows:
    """Projections of some rows, [B, rows, H, D], and the norms that Q and K have yet to get."""

    q: Tensor
    k: Tensor
    v: Tensor
    norms: tuple[Any, ...]


class Processor:
    """Attention of one module. Models call the `__call__` of a class below this one."""

    # What the module calls its layers: those of its rows, and those of text that has some of its own.
    projections = ("to_q", "to_k", "to_v")
    norms = ("norm_q", "norm_k")
    text_projections = ("add_q_proj", "add_k_proj", "add_v_proj")
    text_norms = ("norm_added_q", "norm_added_k")
    heads = "heads"
    # Where the text stands that the module gets beside its rows.
    side = "after"
    # Which channels RoPE rotates together.
    pairs = "interleaved"
    # Rows that are no video stand before it in the module's rows, and are rotated too.
    leading_rows = False

    def __init__(self, model: Model, original: Any, attn: Any):
        self.model = model
        self.original = original
        # The density of the masks in this layer and step, as text, and what tensor cores multiply.
        self.density = DENSE
        self.compute = "dtype"
        # The largest error of a head in 8 bits, as text: what `apply` got, and what the spec of a call has.
        self.largest_error: str | None = None
        self.bound: str | None = None
        # In some step calls find which heads exceed it, and later ones get the bits of each head. Or a schedule
        # names the heads that stay in 16 bits.
        self.judging = True
        self.has_bits = False
        self.in_16_bits: tuple[int, ...] = ()
        # A tensor from `hold_bits`: one address for all calls, which CUDA graphs write to and read from.
        self.bits: Any = None
        # How many heads there are on all GPUs.
        self.count = getattr(attn, self.heads)
        # What sees the output and all that was computed from, in a study.
        self.look: Callable[..., None] | None = None

    def check_heads(self, layer: int, in_16_bits: Any):
        """Refuses what is no list of heads of this layer, which is number `layer`."""
        known = isinstance(in_16_bits, (list, tuple)) and all(map(is_whole, in_16_bits))
        if not known or max(in_16_bits, default=0) >= self.count:
            allowed = f"a list of numbers from 0 to {self.count - 1}"
            raise ValueError(f"the heads of layer {layer} in 16 bits are {in_16_bits!r} in the schedule. They are {allowed}")

    def begin_step(self, layer: int, begins: bool, first: bool, in_16_bits: Any):
        """A step begins, or is told again, outside any traced code. `in_16_bits` are the heads that a schedule
        keeps in 16 bits."""
        self.check_heads(layer, in_16_bits)
        if self.largest_error is None:
            self.has_bits, self.judging = bool(in_16_bits), False
            # With any bound there are kernels of both kinds. It decides about no head, since bits are given.
            self.bound = "1.0" if in_16_bits else None
            if self.in_16_bits != (in_16_bits := tuple(in_16_bits)):
                self.in_16_bits = in_16_bits
                self.write_bits()
            return
        self.bound = self.largest_error
        if begins:
            # The first step forgets what was found.
            self.has_bits = self.has_bits and not first
            if first:
                self.write_bits()
            self.judging = not self.has_bits

    def write_bits(self):
        """Writes the bits of all heads, 8 but for those that a schedule keeps in 16."""
        if self.bits is not None:
            self.bits.copy_(torch.tensor([16 if head in self.in_16_bits else 8 for head in range(self.count)]))

    # What diffusers sets from outside belongs to the model's own processor, which comes back.

    @property
    def _attention_backend(self):
        return self.original._attention_backend

    @_attention_backend.setter
    def _attention_backend(self, backend):
        self.original._attention_backend = backend

    @property
    def _parallel_config(self):
        return self.original._parallel_config

    @_parallel_config.setter
    def _parallel_config(self, config):
        self.original._parallel_config = config

    # What a family says.

    def tables(self, rope: tuple[Tensor, Tensor], heads: int) -> tuple[Tensor, Tensor]:
        """Cosines and sines, as `framestride.attention` takes them, but of any type and strides."""
        cos, sin = rope
        return cos[:, ::2], sin[:, ::2]

    def valid_text(self, mask: Tensor, tokens: int) -> Tensor:
        """Which text is valid, [B, tokens]."""
        return mask

    def normed(self, norm: Any, x: Tensor) -> Tensor:
        """A norm of [B, S, H, D], as the model's own processor calls it."""
        return norm(x) if norm_size(norm) == x.shape[-1] else norm(x.flatten(2)).view(x.shape)

    def finish(self, attn: Any, out: Tensor, hidden_states: Tensor) -> Tensor:
        """The output projection of [B, S, H x D]."""
        return attn.to_out[1](attn.to_out[0](out))

    # What all share.

    def attend(
        self, attn: Any, hidden_states: Tensor, arguments: dict, rope, text: Tensor | None = None,
        mask: Tensor | None = None, unknown: tuple = (),
    ) -> Tensor | tuple[Tensor, Tensor]:
        """What the module returns.

        `arguments` are those that the model's own processor gets beside the rows. `unknown` are those
        of them that have no meaning here.
        """
        out = None
        if all(argument is None for argument in unknown):
            out = self.attention(attn, hidden_states, rope, text, mask)
        else:
            self.model.refuse("a call has arguments that the kernels know nothing of, such as a mask")
        if out is None:
            return self.original(attn, hidden_states, **arguments)
        if text is None:
            return self.finish(attn, out, hidden_states)
        # Text shares all projections of the video, or it has its own.
        shares = getattr(attn, self.text_projections[0], None) is None
        if shares and attn.to_out is not None:
            out = self.finish(attn, out, hidden_states)
        video, text = self.parted(out, hidden_states.shape[1], text.shape[1])
        if not shares:
            video = self.finish(attn, video, hidden_states)
            if getattr(attn, "to_add_out", None) is not None:
                text = attn.to_add_out(text)
        return video, text

    def parted(self, out: Tensor, video: int, text: int) -> tuple[Tensor, Tensor]:
        """The rows of video and text in an output."""
        if self.side == "before":
            return out[:, text:], out[:, :text]
        return out[:, :video], out[:, video:]

    def attention(self, attn: Any, hidden_states: Tensor, rope, text: Tensor | None, mask: Tensor | None):
        """Attention up to the output projection, [B, S, H x D]. None where it is left as it was."""
        model, gpus = self.model, self.model.gpus
        if gpus is None:
            return model.refuse("of the ways in which GPUs share a layer, framestride knows Ulysses alone")
        if model.video is None:
            return model.refuse("the arguments do not say how many frames the video has, and their height and width")
        rows = index(hidden_states.shape[1])
        found = f"{rows} rows" + (f" on one of {gpus.count} GPUs" if gpus.count > 1 else "")
        if not gpus.uneven:
            rows *= gpus.count
        elif rows == gpus.shares(math.prod(model.video))[gpus.rank]:
            rows = math.prod(model.video)
        leading = rows - math.prod(model.video)
        if leading < 0 or (leading > 0 and not self.leading_rows) or (gpus.uneven and leading != 0):
            return model.refuse(f"there are {found}, and not {' x '.join(map(str, model.video))}")

        heads = getattr(attn, self.heads)
        video = self.project(attn, hidden_states, self.projections, self.norms)
        sides = [video]
        if text is not None:
            shares = getattr(attn, self.text_projections[0], None) is None
            names = (self.projections, self.norms) if shares else (self.text_projections, self.text_norms)
            sides.append(self.project(attn, text, *names))
        if gpus.count > heads or (heads % gpus.count > 0 and not gpus.uneven):
            return model.refuse(f"there are {heads} heads for {gpus.count} GPUs, which ulysses_anything may allow")
        batch, _, _, head_dim = video.q.shape
        if video.q.dtype not in DTYPES or head_dim not in HEAD_DIMS:
            found = f"heads have {head_dim} channels of {video.q.dtype}"
            return model.refuse(f"{found}, and kernels know 64 and 128 of bf16 and f16")

        # The kernels have one kind of norm for all rows. Where heads are exchanged, it comes before.
        kinds = [norm_of_kernels(norm, heads, head_dim) for side in sides for norm in side.norms]
        kind = kinds[0] if gpus.count == 1 and all(kind == kinds[0] for kind in kinds) else None
        if kind is None:
            for side in sides:
                side.q, side.k = (
                    x if norm is None else self.normed(norm, x).to(x.dtype)
                    for x, norm in zip((side.q, side.k), side.norms, strict=True)
                )
        tables, form = None, None
        if rope is not None:
            first = rope if isinstance(rope, Tensor) else rope[0]
            tables = model.once(first, lambda: tuple(x.float().contiguous() for x in self.tables(rope, heads)))
            # Rows before the video are rotated too, and none after it.
            form = (self.pairs, 2 * index(tables[0].shape[-1]), self.leading_rows, False, tables[0].ndim > 2)
        if gpus.count > 1:
            form = None

        tokens = index(text.shape[1]) if text is not None else 0
        before, after = (tokens, 0) if self.side == "before" else (leading, tokens)
        shape = (model.video, heads, index(head_dim), video.q.dtype, index(batch), before, after, kind, form)
        plan = model.plan(self.density, self.compute, self.bound, video.q.device, *shape)
        if plan is None:
            return None
        options: dict[str, Any] = {"spec": plan.spec}
        options |= {"head_types": "dense"} if plan.half_widths is None else {"half_widths": plan.half_widths}
        if kind is not None:
            options |= zip(("q_norm", "k_norm"), map(norm_weights, video.norms), strict=True)
        if text is not None:
            lengths = None
            if mask is not None:
                lengths = model.once(mask, lambda: self.valid_text(mask, tokens).sum(dim=1, dtype=torch.int32))
            q_norm, k_norm = map(norm_weights, sides[1].norms) if kind is not None else (None, None)
            q, k, v = map(gpus.heads, (sides[1].q, sides[1].k, sides[1].v))
            options[self.side] = framestride.Text(q=q, k=k, v=v, lengths=lengths, q_norm=q_norm, k_norm=k_norm)
        if gpus.count == 1:
            return self.heads_of(video.q, video.k, video.v, rope=tables, **options).flatten(2)
        if tables is not None:
            video.q, video.k = (rotated(x, tables[0], tables[1], self.pairs) for x in (video.q, video.k))
        attend = partial(self.heads_of, **options)
        first, last = (tokens, 0) if self.side == "before" else (0, tokens)
        return gpus.attend(video.q, video.k, video.v, rows, attend, first, last).flatten(2)

    def heads_of(self, q: Tensor, k: Tensor, v: Tensor, spec: framestride.Spec, **options) -> Tensor:
        """`framestride.attention` of this GPU's heads, with the bits that they were found to need."""
        gpus = self.model.gpus or ALONE
        if spec.largest_error is None:
            out = framestride.attention(q, k, v, spec=spec, **options)
            if self.look is not None:
                self.look(gpus, out, q, k, v, spec=spec, **options)
            return out
        self.model.hold_bits(q.device)
        bits = gpus.heads(self.bits, dim=0)
        if self.judging and "head_types" not in options:
            out, found = framestride.attention(q, k, v, spec=spec, return_profile=True, **options)
            # Where one item or one call needs 16 bits, all get them.
            bits.copy_(torch.maximum(bits, found.precisions.amax(dim=0)))
            self.has_bits = True
            return out
        if self.has_bits:
            options["precisions"] = bits.expand(q.shape[0], -1)
        return framestride.attention(q, k, v, spec=spec, **options)

    def project(self, attn: Any, x: Tensor, projections: tuple, norms: tuple) -> Rows:
        """Q, K and V of some rows, by the model's layers."""
        if projections is self.projections and getattr(attn, "fused_projections", False):
            qkv = attn.to_qkv(x).chunk(3, dim=-1)
        else:
            qkv = [getattr(attn, name)(x) for name in projections]
        q, k, v = (projected.unflatten(2, (getattr(attn, self.heads), -1)) for projected in qkv)
        return Rows(q, k, v, tuple(getattr(attn, name, None) for name in norms))


# One class for each way in which models call their processors. Every argument has its name here, since
# diffusers drops those that a signature does not have.


class Joint(Processor):
    """Video and text in one attention, with the text as a tensor of its own behind the video."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        return self.attend(attn, hidden_states, arguments, image_rotary_emb, encoder_hidden_states, attention_mask)


class HunyuanVideo(Joint):
    def valid_text(self, mask, tokens):
        # [B, 1, 1, S], of all rows.
        return mask[:, 0, 0, -tokens:]


class CogVideoX(Joint):
    side = "before"


class Mochi(Joint):
    def tables(self, rope, heads):
        return rope


class LTXVideo(Processor):
    """RoPE is over the channels of all heads, and batch items have tables of their own."""

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, image_rotary_emb=None
    ):
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "image_rotary_emb": image_rotary_emb,
        }
        unknown = (encoder_hidden_states, attention_mask)
        return self.attend(attn, hidden_states, arguments, image_rotary_emb, unknown=unknown)

    def tables(self, rope, heads):
        return tuple(table[..., ::2].unflatten(2, (heads, -1)) for table in rope)


class LTX2(LTXVideo):
    """Since LTX-2.3, RoPE rotates halves, and each head has a gate."""

    def __init__(self, model, original, attn):
        super().__init__(model, original, attn)
        if attn.rope_type == "split":
            self.pairs = "half"

    def __call__(
        self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, query_rotary_emb=None,
        key_rotary_emb=None, perturbation_mask=None, all_perturbed=None,
    ):
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "query_rotary_emb": query_rotary_emb,
            "key_rotary_emb": key_rotary_emb,
        }
        # Only one of the model's two processors has these.
        if perturbation_mask is not None or all_perturbed is not None:
            arguments |= {"perturbation_mask": perturbation_mask, "all_perturbed": all_perturbed}
        unknown = (encoder_hidden_states, attention_mask, key_rotary_emb, perturbation_mask, all_perturbed or None)
        return self.attend(attn, hidden_states, arguments, query_rotary_emb, unknown=unknown)

    def tables(self, rope, heads):
        # [B, H, S, pairs] of halves.
        return tuple(table.transpose(1, 2) for table in rope) if self.pairs == "half" else super().tables(rope, heads)

    def finish(self, attn, out, hidden_states):
        if attn.to_gate_logits is not None:
            gates = 2.0 * torch.sigmoid(attn.to_gate_logits(hidden_states))
            out = (out.unflatten(2, (attn.heads, -1)) * gates.unsqueeze(-1)).flatten(2)
        return super().finish(attn, out, hidden_states)


class Wan(Processor):
    def __call__(self, attn, hidden_states, encoder_hidden_states=None, attention_mask=None, rotary_emb=None):
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "attention_mask": attention_mask,
            "rotary_emb": rotary_emb,
        }
        unknown = (encoder_hidden_states, attention_mask)
        return self.attend(attn, hidden_states, arguments, rotary_emb, unknown=unknown)

    def tables(self, rope, heads):
        # [1, S, 1, D], with the cosine of a pair at its first place, and the sine at its second.
        cos, sin = rope
        return cos[0, :, 0, ::2], sin[0, :, 0, 1::2]


class Kandinsky5(Processor):
    projections = ("to_query", "to_key", "to_value")
    norms = ("query_norm", "key_norm")
    heads = "num_heads"

    def __call__(self, attn, hidden_states, encoder_hidden_states=None, rotary_emb=None, sparse_params=None):
        arguments = {
            "encoder_hidden_states": encoder_hidden_states,
            "rotary_emb": rotary_emb,
            "sparse_params": sparse_params,
        }
        unknown = (encoder_hidden_states, sparse_params)
        return self.attend(attn, hidden_states, arguments, rotary_emb, unknown=unknown)

    def tables(self, rope, heads):
        # [B, S, 1, pairs, 2, 2] of [[cos, -sin], [sin, cos]], the same for all items.
        return rope[0, :, 0, :, 0, 0], rope[0, :, 0, :, 1, 0]

    def normed(self, norm, x):
        return super().normed(norm, x.float())

    def finish(self, attn, out, hidden_states):
        return attn.out_layer(out)


class MiniMaxH3(Processor):
    """Prompt, conditions and sound stand before the video, and all rows are rotated."""

    pairs = "half"
    leading_rows = True

    def __call__(self, attn, hidden_states, rotary_emb=None, attention_mask=None):
        arguments = {"rotary_emb": rotary_emb, "attention_mask": attention_mask}
        return self.attend(attn, hidden_states, arguments, rotary_emb, unknown=(attention_mask,))

    def tables(self, rope, heads):
        # [S, channels], of which both halves are the same.
        return tuple(table[:, : table.shape[-1] // 2] for table in rope)
