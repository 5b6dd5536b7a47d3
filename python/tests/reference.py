"""Attention as the README describes it, in f64 and in no hurry; and random inputs for it."""

from typing import Any

import torch
from torch import Tensor

from framestride import Spec, Text

DTYPES = {"bf16": torch.bfloat16, "f16": torch.float16}


def inputs(spec: Spec, batch: int = 2, device: str = "cpu", apart: bool = False) -> tuple[list[Tensor], dict[str, Any]]:
    """Random Q, K and V, and everything else that a spec takes, with an item whose text is not all valid.

    With `apart`, the rows of each text side are tensors of their own.
    """
    heads, dim = spec.heads, spec.head_dim

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, device=device) + 0.5

    def projections(rows: int) -> list[Tensor]:
        shape = (batch, rows, heads, dim)
        return [torch.randn(shape, device=device).to(DTYPES[spec.dtype]) for _ in range(3)]

    def norm() -> Any:
        if spec.qk_norm is None:
            return None
        length = dim * (heads if spec.qk_norm.over == "heads" else 1)
        weight = uniform(length)
        return (weight, uniform(length) - 1) if spec.qk_norm.kind == "layer" else weight

    options: dict[str, Any] = {"q_norm": norm(), "k_norm": norm()}
    for side, tokens in (("before", spec.before), ("after", spec.after)):
        if tokens:
            lengths = torch.randint(1, tokens, (batch,), dtype=torch.int32, device=device)
            own = dict(zip("qkv", projections(tokens))) if apart else {}
            options[side] = Text(**own, lengths=lengths, q_norm=norm(), k_norm=norm())
    if spec.rope_shape is not None:
        angles = uniform(batch, *spec.rope_shape) * 6
        options["rope"] = angles.cos(), angles.sin()
    options["head_types"] = torch.randint(0, 3, (batch, heads), dtype=torch.int32, device=device)
    rows = spec.video_tokens if apart else spec.sequence
    return projections(rows), options


def attention(q: Tensor, k: Tensor, v: Tensor, spec: Spec, **options: Any) -> tuple[Tensor, Tensor]:
    """The output [B, S, H, D], and the log-sum-exp [B, H, S], with given or dense head types."""
    before, after = options.get("before") or Text(), options.get("after") or Text()
    raw = [
        torch.cat([part for part in parts if part is not None], dim=1).double()
        for parts in ((before.q, q, after.q), (before.k, k, after.k), (before.v, v, after.v))
    ]
    batch, sequence, heads, dim = raw[0].shape
    device = q.device
    sides = [(before, slice(0, spec.before)), (after, slice(sequence - spec.after, sequence))]
    rows = []
    for name, projected in (("q_norm", raw[0]), ("k_norm", raw[1])):
        normed = normalised(projected, spec, options.get(name))
        for side, where in sides:
            if getattr(side, name) is not None:
                normed[:, where] = normalised(projected[:, where], spec, getattr(side, name))
        if spec.rope is not None:
            rotate(normed, spec, *options["rope"])
        rows.append(normed)
    rows.append(raw[2])
    valid = torch.ones(batch, sequence, dtype=torch.bool, device=device)
    for side, where in sides:
        if side.lengths is not None:
            tokens = torch.arange(where.stop - where.start, device=device)
            valid[:, where] = tokens < side.lengths[:, None]
    head_types = options.get("head_types", "dense")
    if isinstance(head_types, str):
        head_types = torch.zeros(batch, heads, dtype=torch.int32, device=device)
    half_widths = options.get("half_widths") or spec.half_widths(options.get("density"))
    masks = torch.stack([visible(spec, kind, half_widths, device) for kind in range(3)])
    out = torch.zeros(batch, sequence, heads, dim, dtype=torch.float64, device=device)
    lse = torch.zeros(batch, heads, sequence, dtype=torch.float64, device=device)
    scale = options.get("scale") or dim**-0.5
    for item in range(batch):
        for head in range(heads):
            query, key, value = (tensor[item, :, head] for tensor in rows)
            seen = masks[head_types[item, head]] & valid[item]
            scores = (query @ key.T * scale).masked_fill(~seen, float("-inf"))
            out[item, :, head] = scores.softmax(1) @ value * valid[item, :, None]
            lse[item, head] = scores.logsumexp(1).masked_fill(~valid[item], 0)
    return out, lse


def normalised(rows: Tensor, spec: Spec, weights: Any) -> Tensor:
    """Rows [B, rows, H, D] after the QK-norm."""
    if spec.qk_norm is None:
        return rows.clone()
    x = rows.flatten(2) if spec.qk_norm.over == "heads" else rows
    if spec.qk_norm.kind == "layer":
        x = x - x.mean(-1, keepdim=True)
    x = x / (x.square().mean(-1, keepdim=True) + spec.qk_norm.eps).sqrt()
    weight, bias = weights if isinstance(weights, tuple) else (weights, None)
    x = x if weight is None else x * weight
    return (x if bias is None else x + bias).reshape(rows.shape)


def rotate(rows: Tensor, spec: Spec, cos: Tensor, sin: Tensor) -> None:
    """Rotates the rows of the video, and those of text that the spec rotates."""
    rope, shape = spec.rope, spec.rope_shape
    assert rope is not None and shape is not None
    if not rope.per_head:
        # One table for all heads.
        cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)
    first = 0 if rope.before else spec.before
    channels = rope.channels or spec.head_dim
    x = rows[:, first : first + shape[0], :, :channels]
    pairs = (slice(0, None, 2), slice(1, None, 2))
    if rope.pairs == "half":
        pairs = (slice(0, channels // 2), slice(channels // 2, None))
    a, b = x[..., pairs[0]].clone(), x[..., pairs[1]].clone()
    x[..., pairs[0]], x[..., pairs[1]] = a * cos - b * sin, b * cos + a * sin


def visible(spec: Spec, head_type: int, half_widths: tuple[int, int], device: Any) -> Tensor:
    """Which keys (columns) each query (rows) of a head sees, when all text is valid."""
    index = torch.arange(spec.video_tokens, device=device)
    frame, place = index // spec.tokens_per_frame, index % spec.tokens_per_frame
    seen = torch.ones(spec.sequence, spec.sequence, dtype=torch.bool, device=device)
    if head_type > 0:
        position = index if head_type == 1 else place * spec.frames + frame
        near = (position[:, None] - position).abs() < half_widths[head_type - 1]
        video = slice(spec.before, spec.before + spec.video_tokens)
        seen[video, video] = near | (frame < spec.sink_frames)
    return seen


def check(
    found: tuple[Tensor, Tensor], expected: tuple[Tensor, Tensor], spec: Spec, scale: float | None = None
) -> None:
    """Compares an output and its log-sum-exp with those of the reference.

    Queries, keys, weights and the output are rounded to 16 bits, which makes the errors seen here: about
    0.0035 of the output in bf16, and an eighth of it in f16. Those of scores grow with the softmax scale.
    """
    default = spec.head_dim**-0.5
    rounding = (1.0 if spec.dtype == "bf16" else 0.125) * max(1.0, (scale or default) / default)
    error = ((found[0].double() - expected[0]).norm() / expected[0].norm()).item()
    assert error < 0.006 * rounding, f"relative error {error:.6f}"
    valid = expected[1] != 0
    error = (found[1].double() - expected[1])[valid].abs().max().item()
    assert error < 0.02 * rounding, f"error of the log-sum-exp {error:.6f}"
