"""Attention over video in xfuser (xDiT), by framestride.

    framestride_xfuser.register(density=0.25)

From then on xfuser has an attention backend FRAMESTRIDE. It gets Q, K and V after norm and RoPE, and the
size of the video where a model says it.
"""

import functools
import logging
import math

import torch
from xfuser.core.distributed import get_runtime_state
from xfuser.core.distributed.attention_backend import (
    ATTENTION_FUNCTION_REGISTRY,
    AttentionBackendType,
    register_attention_function,
)

import framestride

NAME = "FRAMESTRIDE"
DTYPES = {torch.bfloat16: "bf16", torch.float16: "f16"}
HEAD_DIMS = (64, 128)


def register(density: float = 0.25, compute: str = "dtype") -> AttentionBackendType:
    """Adds the backend, or gives it other options.

    `density` is the part of all pairs of rows that a head sees. With `compute="e4m3"` attention is computed
    in 8 bits, where there are such kernels: for head dim 128, on a Hopper.
    """
    if not 0 < density <= 1:
        raise ValueError(f"density is {density}. It is a part of all pairs: above 0, and at most 1")
    if compute not in ("dtype", "e4m3"):
        raise ValueError(f"compute is {compute!r}. It is 'dtype' or 'e4m3'")
    if NAME not in AttentionBackendType.__members__:
        # The backends are an enum, which has no way to add one.
        member = object.__new__(AttentionBackendType)
        member._name_, member._value_ = NAME, "framestride"
        AttentionBackendType._member_map_[NAME] = member
        AttentionBackendType._member_names_.append(NAME)
        AttentionBackendType._value2member_map_[member._value_] = member
    backend = AttentionBackendType[NAME]
    register_attention_function(backend)(functools.partial(attention, density, compute))
    return backend


def attention(density, compute, query, key, value, dropout_p, is_causal, attention_kwargs=None):
    """Attention of [B, H, S, D], and the log-sum-exp of each row, [B, H, S]."""
    given = attention_kwargs or {}
    known = query.dtype in DTYPES and query.shape[3] in HEAD_DIMS and query.shape == key.shape == value.shape
    # A mask by rows, packed keys, or 8-bit inputs.
    asked = [given.get(name) for name in ("attn_mask", "indices_k", "pre_quantized")]
    if not known or is_causal or dropout_p > 0 or any(part is not None and part is not False for part in asked):
        return other()(query, key, value, dropout_p=dropout_p, is_causal=is_causal, attention_kwargs=attention_kwargs)
    batch, heads, rows, head_dim = query.shape
    grid, text = given.get("thw"), given.get("encoder_sequence_length") or 0
    if grid is None or math.prod(grid) + text != rows:
        # Of other rows, or a part of them in a ring, nothing is known. Heads stay dense.
        grid, text, density = (1, 1, rows), 0, 1.0
    shape = (tuple(grid), text, heads, head_dim, DTYPES[query.dtype], compute, query.device)
    spec, options = plan(density, *shape)
    mask = given.get("text_mask")
    if text and mask is not None and mask.shape == (batch, text):
        options = options | {"after": framestride.Text(lengths=mask.sum(dim=1, dtype=torch.int32))}
    rows_first = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = framestride.attention(*rows_first, spec, return_lse=True, **options)
    return out.transpose(1, 2), lse


def other():
    """The function of the backend that xfuser would choose by itself."""
    return ATTENTION_FUNCTION_REGISTRY[get_runtime_state()._select_attention_backend()]


@torch.compiler.assume_constant_result
def plan(density: float, *shape):
    """A spec, and the arguments that give its heads a density. `shape` has the arguments of `make_spec`."""
    spec = make_spec(*shape)
    if density < 1:
        try:
            return spec, {"half_widths": spec.half_widths(density)}
        except framestride.Error as error:
            warn_once("stays dense", str(error))
    return spec, {"head_types": "dense"}


@functools.lru_cache(maxsize=64)
def make_spec(
    grid: tuple, text: int, heads: int, head_dim: int, dtype: str, compute: str, device: torch.device
) -> framestride.Spec:
    """The spec of a video with text behind it."""
    frames, height, width = grid
    widest = framestride.Width(half_width=math.prod(grid))
    spec = framestride.Spec(
        name="xfuser", frames=frames, tokens_per_frame=height * width, grid=(height, width), after=text,
        heads=heads, head_dim=head_dim, dtype=dtype, spatial=widest, temporal=widest,
        # Wan has no text beside the video, and all of its rows see the first frame.
        sink_frames=1 if text == 0 and frames > 1 else 0,
    )
    if compute == "e4m3":
        return framestride.in_8_bits(spec, device, functools.partial(warn_once, "is in 16 bits"))
    return spec


@functools.lru_cache(maxsize=64)
def warn_once(what: str, reason: str) -> None:
    """Says why attention is not as it was asked for, such as a density that is less than what text alone takes."""
    logging.getLogger("framestride").warning("attention %s: %s", what, reason)
