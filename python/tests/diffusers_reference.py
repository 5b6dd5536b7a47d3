"""What `framestride.attention` computes, in torch and f32, straight from the spec.

Heads get the type whose mask errs less over all rows, where kernels look at sampled ones.
"""

import math
import tomllib

import torch
from torch import Tensor

F32 = torch.float32


def normed(x: Tensor, norm: dict, weights, over_heads: bool) -> Tensor:
    """The norm of [B, S, H, D] in f32."""
    weight, bias = weights if isinstance(weights, tuple) else (weights, None)
    shape = x.shape
    x = x.flatten(2) if over_heads else x
    if norm["kind"] == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x * torch.rsqrt(x.square().mean(-1, keepdim=True) + norm.get("eps", 1e-6))
    x = x if weight is None else x * weight
    x = x if bias is None else x + bias
    return x.view(shape)


def turned(x: Tensor, rope: dict, tables: tuple[Tensor, Tensor]) -> Tensor:
    """RoPE of [B, rows, H, D] in f32."""
    cos, sin = (table if table.ndim > 2 else table[:, None] for table in tables)
    half = cos.shape[-1]
    y = x.clone()
    places = (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    if rope["pairs"] == "half":
        places = (slice(0, half), slice(half, 2 * half))
    a, b = (x[..., place] for place in places)
    y[..., places[0]], y[..., places[1]] = a * cos - b * sin, a * sin + b * cos
    return y


def masks(spec: dict, half_widths: tuple[int, int]) -> Tensor:
    """Which row sees which in a spatial and a temporal head, [2, S, S], all text valid."""
    before, after = (spec.get(side, {}).get("tokens", 0) for side in ("before", "after"))
    frames, tokens = spec["video"]["frames"], spec["video"]["tokens_per_frame"]
    video = torch.arange(frames * tokens)
    sink = video < spec.get("sink", {}).get("frames", 0) * tokens
    result = torch.ones(2, *[before + len(video) + after] * 2, dtype=torch.bool)
    positions = (video, video % tokens * frames + video // tokens)
    rows = slice(before, before + len(video))
    for mask, position, half_width in zip(result, positions, half_widths, strict=True):
        mask[rows, rows] = ((position[:, None] - position).abs() < half_width) | sink
    return result


def half_widths(text: str, density: float) -> tuple[int, int]:
    """The half widths whose densities are nearest."""
    spec = tomllib.loads(text)
    count = spec["video"]["frames"] * spec["video"]["tokens_per_frame"]
    found = []
    for mask in range(2):
        low, high = 1, count
        size = lambda width: masks(spec, (width, width))[mask].float().mean().item()
        if size(1) > density:
            raise ValueError(f"no half width has a density of {density}; the least is {size(1)}")
        while low < high:
            middle = (low + high + 1) // 2
            low, high = (middle, high) if size(middle) <= density else (low, middle - 1)
        found.append(min((low, min(low + 1, count)), key=lambda width: abs(size(width) - density)))
    return tuple(found)


def attention(
    q, k, v, spec_text, q_norm=None, k_norm=None, rope=None, before=None, after=None, head_types="profile",
    half_widths=None, scale=None,
) -> tuple[Tensor, Tensor]:
    """The output, [B, S, H, D] in f32, and the types of heads, [B, H]: 0 dense, 1 spatial, 2 temporal."""
    spec = tomllib.loads(spec_text)
    norm, turns = spec.get("qk_norm"), spec.get("rope")
    sides = [(side, text) for side, text in (("before", before), ("after", after)) if text is not None and text.q is not None]
    over = bool(norm) and norm.get("over") == "heads"

    def rows(q, k, v, q_norm, k_norm):
        q, k, v = q.to(F32), k.to(F32), v.to(F32)
        return (normed(q, norm, q_norm, over), normed(k, norm, k_norm, over), v) if norm else (q, k, v)

    video = rows(q, k, v, q_norm, k_norm)
    if turns:
        # Rows before the video that are rotated lie in the same tensors here.
        video = (turned(video[0], turns, rope), turned(video[1], turns, rope), video[2])
    parts = {"video": video} | {side: rows(text.q, text.k, text.v, text.q_norm, text.k_norm) for side, text in sides}
    q, k, v = (torch.cat([parts[name][i] for name in ("before", "video", "after") if name in parts], 1) for i in range(3))
    batch, length, heads, head_dim = q.shape

    valid = torch.ones(batch, length, dtype=torch.bool)
    for side, text in sides:
        if text.lengths is not None:
            tokens = text.q.shape[1]
            kept = torch.arange(tokens) < text.lengths[:, None]
            place = slice(0, tokens) if side == "before" else slice(length - tokens, length)
            valid[:, place] = kept
    scores = torch.einsum("bqhd,bkhd->bhqk", q, k) * (scale or 1 / math.sqrt(head_dim))
    scores = scores.masked_fill(~valid[:, None, None], -math.inf)
    values = v.transpose(1, 2)

    def attend(mask):
        return scores.masked_fill(~mask, -math.inf).softmax(-1) @ values

    dense = attend(torch.ones(1, dtype=torch.bool))
    types = torch.zeros(batch, heads, dtype=torch.int32)
    out = dense
    if head_types == "profile":
        sparse = torch.stack([attend(mask) for mask in masks(spec, half_widths)])
        errors = (sparse - dense).mul(valid[:, None, :, None]).square().mean((-1, -2))
        best = errors.argmin(0)
        types = best.to(torch.int32) + 1
        out = torch.where(best[..., None, None] == 0, sparse[0], sparse[1])
    return out.transpose(1, 2) * valid[:, :, None, None], types
