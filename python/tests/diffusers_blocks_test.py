"""Attention of the real classes of diffusers, as their modules compute it and as our processors do.

tests/diffusers/compare.py builds the modules, says how far a row may lie away, and knows what the
module would give with a step left out. Its tolerances and controls are used here.
"""

import diffusers_models
import pytest
import torch
from diffusers_models import compare

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
        self.model = Model(captured.model, ours.sinks)
        self.processor = ours.processor(self.model, captured.attention.processor, captured.attention)
        lengths = family.lengths or [None] * compare.BATCH
        self.rows = [None if length is None else compare.VIDEO + length for length in lengths]

    def valid(self, items) -> torch.Tensor:
        """The rows that are no padding, which comes last."""
        return torch.cat([item[:rows] for item, rows in zip(items, self.rows, strict=True)])

    def theirs(self) -> torch.Tensor:
        return self.valid(self.captured.output())

    def ours(self, density: str) -> torch.Tensor:
        captured, attention = self.captured, self.captured.attention
        self.processor.density, captured.widens, attention.processor = density, False, self.processor
        self.model.begin((compare.FRAMES, compare.HEIGHT, compare.WIDTH))
        try:
            return self.valid(captured.output())
        finally:
            captured.widens, attention.processor = True, self.processor.original

    def away(self, output: torch.Tensor, theirs: torch.Tensor) -> float:
        """The largest distance of a row, in tolerances."""
        allowed = self.valid(compare.tolerances(self.captured.scores_inputs(), self.family))
        return ((output - theirs).norm(dim=-1) / allowed).max().item()


def test_dense_is_what_the_module_computes(block, recwarn):
    theirs, ours = block.theirs(), block.ours(DENSE)
    assert not [warning for warning in recwarn if "framestride" in str(warning.message)]
    assert block.away(ours, theirs) <= 1
    # What the comparison would not see is not proven by it.
    for missing, output in block.captured.controls().items():
        assert block.away(block.valid(output), theirs) >= 2, missing
