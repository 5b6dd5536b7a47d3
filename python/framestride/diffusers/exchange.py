"""Several GPUs share the heads of a layer (Ulysses).

Outside attention each GPU has some rows of the video, and within it all rows of some heads. Text that
stands beside the video is on every GPU whole: of its Q, K and V a GPU takes its heads, and only its
output is exchanged. So nobody has to sort rows and masks.
"""

# Most of diffusers has no types to build on.
# mypy: allow-untyped-defs, allow-incomplete-defs, allow-untyped-calls, allow-untyped-decorators
# mypy: allow-any-generics, no-warn-return-any

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as distributed
import torch.distributed._functional_collectives as collectives
from torch import Tensor


@dataclass(frozen=True)
class Gpus:
    """The GPUs that share a layer. One process has each."""

    count: int = 1
    # diffusers' `ulysses_anything`: rows and heads may be no multiple of the GPUs.
    uneven: bool = False
    rank: int = 0
    mesh: Any = None

    def shares(self, size: int) -> list[int]:
        """How many of so many rows or heads each GPU has. The first ones have one more."""
        return [size // self.count + (gpu < size % self.count) for gpu in range(self.count)]

    def heads(self, x: Tensor, dim: int = 2) -> Tensor:
        """This GPU's heads of [B, rows, H, D], or of another tensor with heads in a dimension."""
        return x if self.count == 1 else x.split(self.shares(x.shape[dim]), dim=dim)[self.rank]

    def gathered(self, own: Any) -> list[Any]:
        """What each GPU has in place of `own`, in their order. It waits for all of them."""
        if self.count == 1:
            return [own]
        found: list[Any] = [None] * self.count
        distributed.all_gather_object(found, own, group=self.mesh.get_group())
        return found

    def exchange(self, x: Tensor, sent: list[int], received: list[int]) -> Tensor:
        """Sends some rows of x to each GPU, and gets as many from it as `received` says."""
        return collectives.all_to_all_single(x, received, sent, self.mesh.get_group())

    def attend(
        self, q: Tensor, k: Tensor, v: Tensor, rows: int, attention: Callable[..., Tensor], before: int = 0,
        after: int = 0,
    ) -> Tensor:
        """Attention of this GPU's rows of [B, rows, H, D], among `rows` of all GPUs.

        `attention` gets all rows of this GPU's heads, and returns those, with so much text before them
        and after them. What comes back are the text, the rows, the text, with all heads.
        """
        own, heads = self.shares(rows), self.shares(q.shape[2])
        # In flight together.
        parts = [self.exchange(*self.by_heads(x, own, heads)) for x in (q, k, v)]
        shape = (rows, q.shape[0], heads[self.rank], q.shape[3])
        out = attention(*(collectives.wait_tensor(part).view(shape).transpose(0, 1) for part in parts))

        first, shared, last = out.transpose(0, 1).split([before, rows, after])
        sent = torch.cat([part for share in shared.split(own) for part in (first, share, last)])
        # Each row of this GPU and each row of text, by the heads of one GPU after the other.
        row = q.shape[0] * q.shape[3]
        counts = [before + share + after for share in own]
        got = [counts[self.rank] * row * share for share in heads]
        found = self.exchange(sent.flatten(), [count * row * heads[self.rank] for count in counts], got)
        parts = collectives.wait_tensor(found).split(got)
        shape = (counts[self.rank], q.shape[0], -1, q.shape[3])
        return torch.cat([part.view(shape) for part in parts], dim=2).transpose(0, 1)

    def by_heads(self, x: Tensor, own: list[int], heads: list[int]) -> tuple[Tensor, list[int], list[int]]:
        """What `exchange` gets to exchange rows of all heads for all rows of some heads."""
        parts = x.transpose(0, 1).split(heads, dim=2)
        row = x.shape[0] * x.shape[3]
        sent = [own[self.rank] * row * share for share in heads]
        received = [share * row * heads[self.rank] for share in own]
        if sent == sent[:1] * self.count:
            # One copy makes it, and not two.
            return torch.cat(parts).flatten(), sent, received
        return torch.cat([part.flatten() for part in parts]), sent, received


ALONE = Gpus()


def gpus_of(parallel: Any) -> Gpus | None:
    """The GPUs of diffusers' config of parallelism. None where they share a layer in another way."""
    config = getattr(parallel, "context_parallel_config", None)
    if config is None:
        return ALONE
    if config.ring_degree > 1:
        return None
    return Gpus(config.ulysses_degree, config.ulysses_anything, config._ulysses_local_rank, config._ulysses_mesh)
