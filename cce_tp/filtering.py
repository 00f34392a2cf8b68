"""What the backward pass may leave out, and in which order it walks the vocabulary."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from cce_tp.problem import statistics_dtype
from cce_tp.products import add_product, copies_operands
from cce_tp.workspace import blocks

# Peak bytes per row of making and holding the order: keys and values of a radix sort, the inverse.
BYTES_PER_ORDERED_ROW = 48

# Tokens from which the variance of a row's logit is estimated; with one more row for the average,
# a product of 64 rows reads the weight as fast as one row would.
_SAMPLED_TOKENS = 63

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
        all mass, and until no token has more than 2^-6 in any of them. A tile that is not kept
        contributes its exact mass, times the mean of its classifier rows to dE, and spread evenly
        over its rows to dC; targets in it are exact. Stateless and deterministic;
        docs/far-field.md derives it and bounds the error.
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
    average_V = torch.mv(weight_VD, _mean(input_ND))
    if bias_V is not None:
        average_V = average_V + bias_V
    return torch.sort(average_V, descending=True, stable=True).indices


def _mean(input_ND: Tensor) -> Tensor:
    """(D,) mean over the tokens."""
    # A product with a constant vector, not mean(): that takes a buffer as large as input on CUDA.
    share_N = input_ND.new_full((input_ND.shape[0],), 1 / input_ND.shape[0])
    return torch.mv(input_ND.t(), share_N)


def mass_order(
    input_ND: Tensor,
    weight_VD: Tensor,
    bias_V: Tensor | None,
    logit_scale: float,
    workspace_bytes: int,
) -> Tensor:
    """Local rows of the shard sorted by an estimate of their probability mass, highest first.

    The estimate of log mean exp(y_nv) over the tokens n is the average of y_v plus half of its
    variance (the first two cumulants), the latter from a strided sample of tokens. Measured on a
    model in training, the variance lowers the error of the far field by a fifth where the same
    number of rows is kept. It costs no more than the average alone: both read the weight once.
    Stateless and deterministic; local to the rank. The softcap does not enter.

    Args:
        input_ND: (N, D), the same on every rank.
        weight_VD: (V, D), this rank's rows.
        bias_V: (V,) or None.
        logit_scale: factor on E C^T + bias.
        workspace_bytes: cap on the logits of the sample.

    Returns:
        (V,) int64, a permutation of the local row numbers.
    """
    num_tokens, vocab = input_ND.shape[0], weight_VD.shape[0]
    sample = input_ND[:: -(-num_tokens // _SAMPLED_TOKENS)]
    probes = torch.cat([_mean(input_ND)[None], sample])
    dtype = statistics_dtype(input_ND.dtype)
    key_V = torch.empty(vocab, dtype=dtype, device=weight_VD.device)
    row = dtype.itemsize * (2 * len(probes) + copies_operands(weight_VD) * weight_VD.shape[1])
    step = max(1024, workspace_bytes // row)
    for start, stop in blocks(vocab, step):
        logits = probes.new_empty(len(probes), stop - start, dtype=dtype)
        add_product(logits, probes, weight_VD[start:stop].t(), accumulate=False)
        average, sampled = logits[0] * logit_scale, logits[1:]
        sampled -= logits[0]
        deviation = torch.linalg.vector_norm(sampled, dim=0) * logit_scale
        key_V[start:stop] = average + 0.5 / len(sampled) * deviation * deviation
    if bias_V is not None:
        key_V += logit_scale * bias_V
    return torch.sort(key_V, descending=True, stable=True).indices
