"""Attention of the real classes of diffusers, as their modules compute it and as our processors do.

tests/diffusers/compare.py builds the modules, says how far a row may lie away, and knows what the
module would give with a step left out. Its tolerances and controls are used here.
"""

import math

import pytest
import torch
from diffusers_models import compare, position_codes
from torch import Tensor, nn

import framestride
from framestride.diffusers.families import FAMILIES
from framestride.diffusers.processors import DENSE, Model

FOUND = [family for family in compare.FAMILIES if family.build()[0].__class__.__name__ in FAMILIES]


@pytest.fixture(params=FOUND, ids=lambda family: family.name)
def block(request):
    return Block(request.param)


class Block:
    """An attention module in f32, whose projections are rounded to 16 bits, and our processor for it."""

    def __init__(self, family: compare.Family):
        self.family = family
        self.captured = captured = compare.Captured(family)
        ours = FAMILIES[captured.model]
        self.model = Model(captured.model, ours.sinks, alone=False)
        self.processor = ours.processor(self.model, captured.attention.processor, captured.attention)
        lengths = family.lengths or [None] * compare.BATCH
        self.rows = [None if length is None else compare.VIDEO + length for length in lengths]

    def valid(self, items: Tensor | list[Tensor]) -> Tensor:
        """The rows that are no padding, which comes last."""
        return torch.cat([item[:rows] for item, rows in zip(items, self.rows, strict=True)])

    def theirs(self) -> Tensor:
        return self.valid(self.captured.output())

    def ours(self, density: str) -> Tensor:
        captured, attention = self.captured, self.captured.attention
        self.processor.density, captured.widens, attention.processor = density, False, self.processor
        self.model.begin((compare.FRAMES, compare.HEIGHT, compare.WIDTH))
        try:
            return self.valid(captured.output())
        finally:
            captured.widens, attention.processor = True, self.processor.original

    def away(self, output: Tensor, theirs: Tensor, calls: list[tuple] | None = None) -> float:
        """The largest distance of a row, in tolerances."""
        allowed = self.valid(compare.tolerances(calls or self.captured.scores_inputs(), self.family))
        return ((output - theirs).norm(dim=-1) / allowed).max().item()

    def plant(self):
        """Makes the first head spatial and the second temporal."""
        codes = position_codes(self.family.says.head_dim).to(self.captured.dtype)
        attention, text = self.captured.attention, self.family.says.text

        def hook(module: nn.Module, inputs: tuple, output: Tensor) -> Tensor:
            planted = output.clone()
            rows = planted.shape[1]
            # The video is all rows but the text, which may stand before it or behind it.
            first = rows - compare.VIDEO if text == "first" else 0
            if rows >= compare.VIDEO:
                planted[:, first : first + compare.VIDEO] = codes.to(output.dtype)
            return planted

        for role in ("query", "key"):
            compare.part(attention, f"to_{role[0]}", f"to_{role}").register_forward_hook(hook)

    def calls(self, seen: Tensor | None = None) -> list[tuple]:
        """What attention of each batch item gets in the module: Q, K and V, [1, H, rows, D], and a mask.

        `seen`, [H, rows, rows], is another mask that these have then too.
        """
        items = []
        for query, key, value, mask in self.captured.scores_inputs():
            for item in range(len(query)):
                rows = query.shape[2]
                all_seen = torch.ones(1, 1, rows, rows, dtype=torch.bool)
                kept = all_seen if mask is None else all_seen & mask[item : item + 1]
                # Without its padding, text behind the video has fewer rows.
                kept = kept if seen is None else kept & seen[:, :rows, :rows]
                items.append((*(tensor[item : item + 1] for tensor in (query, key, value)), kept))
        return items


def attended(calls: list[tuple]) -> list[Tensor]:
    """The output of each batch item, [rows, H, D]."""
    outputs = []
    for query, key, value, mask in calls:
        scores = query.double() @ key.double().mT / math.sqrt(query.shape[-1])
        weights = scores.masked_fill(~mask, -math.inf).softmax(-1)
        outputs.append((weights @ value.double())[0].transpose(0, 1))
    return outputs


def masks(spec: framestride.Spec, half_widths: tuple[int, int]) -> Tensor:
    """Which row sees which in a spatial and a temporal head, from the rule of specs: [2, S, S]."""
    video, tokens, frames = torch.arange(spec.video_tokens), spec.tokens_per_frame, spec.frames
    before, after = spec.before, spec.after
    sink = video < spec.sink_frames * tokens
    seen = torch.ones(2, *[before + len(video) + after] * 2, dtype=torch.bool)
    rows = slice(before, before + len(video))
    for mask, half_width, position in zip(seen, half_widths, (video, video % tokens * frames + video // tokens)):
        mask[rows, rows] = ((position[:, None] - position).abs() < half_width) | sink
    return seen


def test_dense_is_what_the_module_computes(block, recwarn):
    theirs, ours = block.theirs(), block.ours(DENSE)
    assert not [warning for warning in recwarn if "framestride" in str(warning.message)]
    assert block.away(ours, theirs) <= 1
    # What the comparison would not see is not proven by it.
    for missing, output in block.captured.controls().items():
        assert block.away(block.valid(output), theirs) >= 2, missing


def test_sparse_heads_see_what_their_masks_allow(block):
    block.plant()
    ours = block.ours("0.5")
    (plan,) = block.model.plans.values()
    seen = masks(plan.spec, plan.half_widths)
    assert seen.float().mean((1, 2)).tolist() == pytest.approx([0.5, 0.5], abs=0.01)

    dense, expected = attended(block.calls()), attended(block.calls(seen))
    assert block.away(ours, block.valid(expected), block.calls(seen)) <= 1
    # The heads were planted so that little is lost. With their types exchanged, much more would be.
    exchanged = attended(block.calls(seen.flip(0)))
    lost, other = ((block.valid(outputs) - block.valid(dense)).norm() for outputs in (expected, exchanged))
    assert lost < other / 2
    assert block.away(block.valid(exchanged), block.valid(expected), block.calls(seen)) >= 2
