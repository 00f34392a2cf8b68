"""Per-token statistics of the logits and the one rule that joins them.

A statistic of a set of vocabulary rows is kept relative to that set's own maximum, so that
joining two disjoint sets is exact for logits of any size. The same `merge` joins strips of one
rank and the ranks of a group. The packed form, (rows, N), is what crosses the wire.

Legend: N tokens, K parts to join.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor


class StatRows(NamedTuple):
    """The optional statistics of a call, and where each sits in the packed (rows, N) tensor.

    Rows 0 to 2 are always there: the maximum logit m, the sum of exp(x - m), and the target's logit
    (0 where the target is not among the rows seen).
    """

    logit_sum: bool = False  # sum of x: label smoothing
    entropy: bool = False  # sum of exp(x - m) * (x - m)
    argmax: bool = False  # global id of the maximum, lowest id first

    MAX = 0
    SUM_EXP = 1
    TARGET = 2

    @property
    def logit_sum_row(self) -> int:
        return 3

    @property
    def entropy_row(self) -> int:
        return 3 + self.logit_sum

    @property
    def argmax_row(self) -> int:
        return 3 + self.logit_sum + self.entropy

    @property
    def count(self) -> int:
        return 3 + self.logit_sum + self.entropy + self.argmax


class LossStats(NamedTuple):
    """Statistics of the logits over the whole (global) vocabulary, with the shape of `target` where
    not said otherwise.

    No gradient flows through them; they are the same bits on every rank of the group.

    Attributes:
        lse: natural log-sum-exp, fp32 (fp64 for fp64 inputs).
        target_logit: logit of the target; 0 for an ignored token.
        max_logit: largest logit.
        argmax: int64 global id of the largest logit; the lowest id among equals.
        entropy: entropy of the softmax in nats, where it was asked for, else None.
        tiles_kept: () share of the (global) vocabulary's tiles that GradFilter.far_field keeps;
            None with other filters.
        far_mass: () probability mass left to the far field, on average over the tokens that are
            not ignored; None with other filters.
        far_deviation: () at most how much of a token's probability differs from what the far field
            puts in its place, on the same average; None with other filters.
    """

    lse: Tensor
    target_logit: Tensor
    max_logit: Tensor
    argmax: Tensor
    entropy: Tensor | None = None
    tiles_kept: Tensor | None = None
    far_mass: Tensor | None = None
    far_deviation: Tensor | None = None


def _index_dtype(dtype: torch.dtype) -> torch.dtype:
    return torch.int64 if dtype == torch.float64 else torch.int32


def pack_ids(ids: Tensor, dtype: torch.dtype) -> Tensor:
    """Reinterpret integer ids as floats of the packed tensor's dtype: bits, not values."""
    return ids.to(_index_dtype(dtype)).view(dtype)


def unpack_ids(row: Tensor) -> Tensor:
    """Inverse of `pack_ids`, as int64."""
    return row.view(_index_dtype(row.dtype)).long()


def merge(parts_KRN: Tensor, rows: StatRows) -> Tensor:
    """Join the statistics of K disjoint sets of vocabulary rows.

    Args:
        parts_KRN: (K, rows, N) packed statistics, fp32 or fp64. An empty set has maximum -inf and
            sums 0.
        rows: which rows are present.

    Returns:
        (rows, N) packed statistics of the union. The result depends on the order of the parts
        only by rounding, so ranks that merge in the same order hold the same bits.
    """
    max_KN, sum_KN = parts_KRN[:, StatRows.MAX], parts_KRN[:, StatRows.SUM_EXP]
    max_N = max_KN.amax(dim=0)
    # -inf only where no part has a finite logit: keep -inf - (-inf) out of the exponent.
    base_N = torch.where(max_N == -torch.inf, 0.0, max_N)
    shift_KN = max_KN - base_N
    weight_KN = shift_KN.exp()
    merged = [
        max_N,
        (weight_KN * sum_KN).sum(dim=0),
        parts_KRN[:, StatRows.TARGET].sum(dim=0),
    ]
    if rows.logit_sum:
        merged.append(parts_KRN[:, rows.logit_sum_row].sum(dim=0))
    if rows.entropy:
        moved_KN = weight_KN * (parts_KRN[:, rows.entropy_row] + shift_KN * sum_KN)
        # What weighs nothing may be far enough away for 0 * -inf.
        merged.append(torch.where(weight_KN == 0, 0.0, moved_KN).sum(dim=0))
    if rows.argmax:
        ids_KN = unpack_ids(parts_KRN[:, rows.argmax_row])
        no_id = torch.iinfo(torch.int32).max
        winner_N = torch.where(max_KN == max_N, ids_KN, no_id).amin(dim=0)
        merged.append(pack_ids(winner_N, parts_KRN.dtype))
    return torch.stack(merged)


def empty_statistics(
    num_tokens: int, rows: StatRows, *, like: Tensor, dtype: torch.dtype
) -> Tensor:
    """Packed statistics of no vocabulary rows at all: what an empty shard contributes."""
    packed = torch.zeros((rows.count, num_tokens), dtype=dtype, device=like.device)
    packed[StatRows.MAX] = -torch.inf
    if rows.argmax:
        no_id = torch.full((num_tokens,), torch.iinfo(torch.int32).max, device=like.device)
        packed[rows.argmax_row] = pack_ids(no_id, dtype)
    return packed
