"""What the backward pass may leave out, and in which order it walks the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

# Peak bytes per row of making and holding the order: keys and values of a radix sort, the inverse.
BYTES_PER_ORDERED_ROW = 48

# A tile in which any token has more of its probability than this is never left to the far field.
LARGEST_FAR_MASS = 2.0**-6


@dataclass(frozen=True, slots=True)
class GradFilter:
    """Policy of the backward pass. Build it with `exact()`, `paper()` or `far_field()`.

    Attributes:
        kind: "exact" keeps every element; "paper" skips tiles; "far-field" replaces them by their
            mean.
        eps: for "paper": a (token block, vocabulary tile) is skipped when every |d loss_n / d
            y_v| in it is below eps, y being the logit before the cap and after the scale. The
            derivative is that of the token's own loss, before the upstream gradient, so the
            choice does not depend on the reduction or on a loss scale.
        budget: for "far-field": how much of a token's probability, on average, may differ from
            what the far field puts in its place.
    """

    kind: Literal["exact", "paper", "far-field"] = "exact"
    eps: float | None = None
    budget: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in ("exact", "paper", "far-field"):
            raise ValueError(
                f"kind: expected 'exact', 'paper' or 'far-field', got {self.kind!r}; "
                "use GradFilter.exact(), .paper() or .far_field()"
            )
        if self.eps is not None and self.kind != "paper":
            raise ValueError(f"eps: expected None for kind {self.kind!r}, got {self.eps!r}")
        if self.budget is not None and self.kind != "far-field":
            raise ValueError(f"budget: expected None for kind {self.kind!r}, got {self.budget!r}")
        if self.kind == "paper" and not (
            isinstance(self.eps, (int, float)) and 0 <= self.eps < math.inf
        ):
            raise ValueError(f"eps: expected a finite number >= 0, got {self.eps!r}")
        if self.kind == "far-field" and not (
            isinstance(self.budget, (int, float)) and 0 <= self.budget < 1
        ):
            raise ValueError(f"budget: expected a number in [0, 1), got {self.budget!r}")

    @classmethod
    def exact(cls) -> GradFilter:
        """Every gradient element is computed. Deterministic."""
        return cls("exact")

    @classmethod
    def paper(cls, eps: float = 2.0**-12) -> GradFilter:
        """The filter of "Cut Your Losses" (arXiv 2411.09009, section 4.3 and 5.2).

        The vocabulary is sorted by average logit inside each shard, and tiles in which every
        element of the logits' gradient is below `eps` are left out of both dE and dC. What is
        left out mostly has one sign, so dE's error adds up to far more than eps suggests.
        """
        return cls("paper", eps=eps)

    @classmethod
    def far_field(cls, budget: float = 0.005) -> GradFilter:
        """Keep the heavy tiles of the sorted vocabulary; replace the others by mass times mean.

        The vocabulary is sorted by estimated mass inside each shard. The forward pass learns the
        probability mass of every (token, vocabulary tile), and a bound on how far the probabilities
        are from that mass spread evenly over the tile: min(sqrt(B sum (p - mean p)^2), 2 mass), B
        being the rows of a tile, is at least sum |p - mean p|. Tiles are kept, for all tokens,
        those of the largest bound first, until those of the others sum to at most `budget` times
        the number of tokens (a rank has its part of that), and until no token has more than 2^-6 in
        any of them. A tile that is not kept contributes its exact mass, times the mean of its
        classifier rows to dE, and spread evenly over its rows to dC; targets in it are exact.
        Stateless and deterministic; docs/far-field.md derives it and bounds the error.
        """
        return cls("far-field", budget=budget)


def vocabulary_order(input_ND: Tensor, weight_VD: Tensor, bias_V: Tensor | None) -> Tensor:
    """Local rows of the shard sorted by their average logit over the batch, highest first.

    The average over tokens of E_n . C_v is C_v . mean(E): one matrix-vector product. Stateless
    and deterministic (stable sort); local to the rank. The logit scale does not change how rows
    group, and the softcap is monotone, so neither enters.

    Args:
        input_ND: (N, D), the same on every rank.
        weight_VD: (V, D), this rank's rows.
        bias_V: (V,) or None.

    Returns:
        (V,) int64, a permutation of the local row numbers.
    """
    # A product with a constant vector, not mean(): that takes a buffer as large as input on CUDA.
    share_N = input_ND.new_full((input_ND.shape[0],), 1 / input_ND.shape[0])
    average_V = torch.mv(weight_VD, torch.mv(input_ND.t(), share_N))
    if bias_V is not None:
        average_V = average_V + bias_V
    return torch.sort(average_V, descending=True, stable=True).indices
