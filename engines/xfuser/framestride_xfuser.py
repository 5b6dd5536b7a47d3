"""Attention over video in xfuser (xDiT), by framestride.

    framestride_xfuser.register(density=0.25)

From then on xfuser has an attention backend FRAMESTRIDE. It gets Q, K and V after norm and RoPE, and the
size of the video where a model says it.
"""

import functools
import math

import torch
from xfuser.core.distributed import get_runtime_state
from xfuser.core.distributed.attention_backend import (
    ATTENTION_FUNCTION_REGISTRY,
    AttentionBackendType,
    register_attention_function,
)

import framestride
from framestride import backends

NAME = "FRAMESTRIDE"


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
    # A mask by rows, packed keys, or 8-bit inputs.
    asked = [given.get(name) for name in ("attn_mask", "indices_k", "pre_quantized")]
    is_asked = is_causal or dropout_p > 0 or any(part is not None and part is not False for part in asked)
    if is_asked or not backends.takes(query, key, value):
        return other()(query, key, value, dropout_p=dropout_p, is_causal=is_causal, attention_kwargs=attention_kwargs)
    batch, heads, rows, head_dim = query.shape
    grid, text = given.get("thw"), given.get("encoder_sequence_length") or 0
    if grid is None or math.prod(grid) + text != rows:
        # Of other rows, or a part of them in a ring, nothing is known. Heads stay dense.
        grid, text, density = (1, 1, rows), 0, 1.0
    # Wan has no text beside the video, and all of its rows see the first frame.
    shape = ("xfuser", tuple(grid), heads, head_dim, query.dtype, 0, text, 1 if text == 0 else 0)
    spec, options = backends.plan(density, compute, query.device, *shape)
    mask = given.get("text_mask")
    if text and mask is not None and mask.shape == (batch, text):
        options = options | {"after": framestride.Text(lengths=mask.sum(dim=1, dtype=torch.int32))}
    rows_first = (x.transpose(1, 2) for x in (query, key, value))
    out, lse = framestride.attention(*rows_first, spec, return_lse=True, **options)
    return out.transpose(1, 2), lse


def other():
    """The function of the backend that xfuser would choose by itself."""
    return ATTENTION_FUNCTION_REGISTRY[get_runtime_state()._select_attention_backend()]
