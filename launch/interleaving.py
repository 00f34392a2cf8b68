"""Ids interleaved over W ranks: rank r holds the ids r, r + W, r + 2 W, ... of a vocabulary.

A softmax is the same in any order of its entries, so the ids are renumbered and the shards stay
contiguous: id v becomes the place s(v mod W) + v div W, where s(r) is the first row of rank r in
`VocabShard.even`. That is a bijection of [0, V) for every V, since rank r of an even cut has as
many rows as there are ids that leave the remainder r.

Legend: V vocabulary, W ranks.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class Interleaving:
    """The ids of a vocabulary, interleaved.

    Attributes:
        vocab: V.
        ranks: W; 1 leaves every id where it is.
    """

    vocab: int
    ranks: int

    def __str__(self) -> str:
        return (
            f"{self.vocab} ids, padding included, interleaved over the {self.ranks} ranks of "
            "tensor_model_parallel_size"
        )

    def places(self, ids: Tensor) -> Tensor:
        """Natural ids -> their places; what is not in [0, V), such as an ignored target, stays."""
        base, extra = divmod(self.vocab, self.ranks)
        rank = ids % self.ranks
        turn = ids.div(self.ranks, rounding_mode="floor")
        placed = rank * base + rank.clamp(max=extra) + turn
        return torch.where((ids >= 0) & (ids < self.vocab), placed, ids)

    def natural_ids(self, device: torch.device | str = "cpu") -> Tensor:
        """(V,) int64: the natural id at each place. `rows[natural_ids()]` interleaves rows."""
        ids = torch.arange(self.vocab, device=device)
        return torch.cat([ids[rank :: self.ranks] for rank in range(self.ranks)])


def describe(ids: Interleaving | None) -> str:
    """In words, for a message; None: natural order."""
    return "ids in natural order" if ids is None else str(ids)
