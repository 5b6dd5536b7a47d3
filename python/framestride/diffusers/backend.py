"""Dense attention as a backend of diffusers, for models of which framestride knows nothing more.

diffusers calls a backend with Q, K and V after norm and RoPE. Where the kernels take them,
framestride computes, and else torch does: from one sequence to another, with a mask, or in f32.
"""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

from functools import partial
from operator import index
from typing import Any

import torch
from diffusers.models import attention_dispatch
from diffusers.models.attention_dispatch import AttentionBackendName, _AttentionBackendRegistry
from torch import Tensor

import framestride
from framestride.backends import make_spec, takes
from framestride.diffusers.exchange import gpus_of

NAME = "framestride"

specs: dict[tuple, framestride.Spec] = {}


@torch.compiler.assume_constant_result
def dense_spec(*shape) -> framestride.Spec:
    """A spec from the arguments of `make_spec`."""
    if shape not in specs:
        specs[shape] = make_spec("diffusers", *shape)
    return specs[shape]


def attention(
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attn_mask: Tensor | None = None,
    dropout_p: float = 0.0,
    is_causal: bool = False,
    scale: float | None = None,
    enable_gqa: bool = False,
    _parallel_config: Any = None,
) -> Tensor:
    """Attention of [B, S, H, D], as diffusers calls it."""
    gpus = gpus_of(_parallel_config)
    _, rows, heads, head_dim = map(index, query.shape)
    if gpus is None or gpus.uneven or not takes(query, key, value) or attn_mask is not None or dropout_p > 0 or is_causal:
        return attention_dispatch._native_attention(
            query, key, value, attn_mask, dropout_p, is_causal, scale, enable_gqa, _parallel_config=_parallel_config
        )
    spec = dense_spec((1, 1, rows * gpus.count), heads, head_dim, query.dtype)
    options: dict[str, Any] = {"spec": spec, "head_types": "dense"}
    if scale is not None:
        options["scale"] = scale
    attend = partial(framestride.attention, **options)
    if gpus.count > 1:
        return gpus.attend(query, key, value, rows * gpus.count, attend)
    return attend(query, key, value)


def name() -> AttentionBackendName:
    """The backend's name, which diffusers knows from now on. What is active stays so."""
    if NAME not in AttentionBackendName._value2member_map_:
        # The names are an enum, which has no way to add one.
        member = str.__new__(AttentionBackendName, NAME)
        member._name_, member._value_ = NAME.upper(), NAME
        AttentionBackendName._member_map_[member._name_] = member
        AttentionBackendName._member_names_.append(member._name_)
        AttentionBackendName._value2member_map_[NAME] = member
        _AttentionBackendRegistry.register(member, supports_context_parallel=True)(attention)
    return AttentionBackendName(NAME)
