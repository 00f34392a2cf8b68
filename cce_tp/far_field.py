"""The sorted far field: the backward pass on the heavy tiles of the sorted vocabulary alone.

Forward: the local rows are sorted by an estimate of their probability mass, the statistics are
taken tile by tile in that order, and once the global log-sum-exp is known each (token, tile) has
its mass. Tiles are kept by `GradFilter.far_field`'s rule. Backward: the kept tiles' rows
are walked as the exact pass walks all rows; every other tile stands for its rows with their mean
(for dE) and spreads its gradient evenly over them (for dC); one-hots in it are added apart, in
fp32 and before anything is rounded. docs/far-field.md has the derivation.

Legend: N tokens, V vocabulary rows of this rank, D hidden size, B rows per tile, T tiles.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cce_tp.filtering import mass_order
from cce_tp.problem import LocalLogits, LogitGradient, LossTerms, statistics_dtype
from cce_tp.products import add_product
from cce_tp.stats import StatRows
from cce_tp.workspace import for_buffers

if TYPE_CHECKING:
    from cce_tp.backend import Backend

# With more of the rows than this kept, the exact pass is as fast, and it is exact.
_MOSTLY = 0.75
# Wave quantisation: a gather of fewer rows is accepted for fuller waves, down to this share.
_LEAST_GATHER = 0.5


class SortedStatistics(NamedTuple):
    """What the forward pass over the sorted vocabulary makes.

    Attributes:
        packed: (rows, N) statistics as of `stats`.
        tiles: (T, tile rows, N) statistics per tile, the backend's own layout.
        means: (T, D) mean classifier row of each tile, operands' dtype.
    """

    packed: Tensor
    tiles: Tensor
    means: Tensor


class TileMasses(NamedTuple):
    """Attributes:
    mass: (T, N) each tile's softmax mass per token; with a cap, weighted by its derivative.
    slope: (T, N) sum of the cap's derivative, or (0, N) where nothing needs it.
    totals: (2, T) fp32, over the tokens that count: probability mass in each tile; and a bound on
        its distance from the mass spread evenly over the tile's rows.
    kept: (T,) int32, 1 for a tile that is kept.
    """

    mass: Tensor
    slope: Tensor
    totals: Tensor
    kept: Tensor


class FarField(NamedTuple):
    """What the forward pass leaves for the filtered backward pass, local to this rank.

    Attributes:
        order: (V,) int64 local rows, the likeliest first.
        place: (N,) int64 place of the target's row in the order, or -1 if it is not here.
        target_logit: (N,) fp32 logit of the target.
        means: (T, D) mean row of each tile.
        mass, slope, totals, kept: as in `TileMasses`.
    """

    order: Tensor
    place: Tensor
    target_logit: Tensor
    means: Tensor
    mass: Tensor
    slope: Tensor
    totals: Tensor
    kept: Tensor

    @property
    def masses(self) -> TileMasses:
        return TileMasses(self.mass, self.slope, self.totals, self.kept)

    @property
    def nbytes(self) -> int:
        return sum(each.nbytes for each in self)


def mass_dtype(dtype: torch.dtype) -> torch.dtype:
    """Masses are kept in 16 bits for 16-bit operands; bf16 also for fp16, for its range."""
    return torch.bfloat16 if dtype.itemsize == 2 else dtype


def rows_per_gather(
    available: int, row_bytes: int, tile: int, vocab: int, token_blocks: int, programs: int
) -> int:
    """Rows to gather at a time: a multiple of the tile that fits and fills the last wave best.

    Args:
        available: bytes for the gathered rows; one tile is taken even if it does not fit.
        row_bytes: bytes of one of them.
        tile: B.
        vocab: V.
        token_blocks: tiles of the logits that share a vocabulary tile.
        programs: how many tiles are worked on at a time.
    """
    most = max(1, min(available // (row_bytes * tile), -(-vocab // tile)))

    def filled(tiles: int) -> float:
        work = tiles * token_blocks
        return work / (-(-work // programs) * programs)

    least = max(1, int(_LEAST_GATHER * most))
    return tile * max(range(most, least - 1, -1), key=filled)


class Ordered(NamedTuple):
    """Forward pass over the sorted vocabulary, before the global normaliser is known.

    Attributes:
        statistics: of this rank.
        order, place: as in `FarField`.
    """

    statistics: SortedStatistics
    order: Tensor
    place: Tensor

    def choose(
        self,
        backend: Backend,
        logits: LocalLogits,
        packed_RN: Tensor,
        normaliser_2N: Tensor,
        terms: LossTerms,
        budget: float,
    ) -> FarField:
        """The masses under the global normaliser, and the tiles to keep.

        Args:
            packed_RN, normaliser_2N: of the global vocabulary.
        """
        masses = backend.tile_masses(
            self.statistics.tiles,
            normaliser_2N,
            logits.target,
            logits,
            ignore_index=terms.ignore_index,
            budget=budget,
            slopes=_needs_slopes(logits, terms.label_smoothing > 0),
        )
        target_logit = packed_RN[StatRows.TARGET].clone()
        return FarField(self.order, self.place, target_logit, self.statistics.means, *masses)


def _needs_slopes(logits: LocalLogits, smoothing: bool) -> bool:
    """Whether the uniform part of a tile's gradient is not the same for all tokens."""
    return logits.logit_softcap is not None and smoothing


def sorted_statistics(
    backend: Backend, logits: LocalLogits, rows: StatRows, workspace_bytes: int
) -> Ordered:
    """Statistics of this rank's logits, over its vocabulary in sorted order."""
    vocab = logits.weight.shape[0]
    available = for_buffers(workspace_bytes, logits.target.shape[0])
    order = mass_order(logits.input, logits.weight, logits.bias, logits.logit_scale, available)
    places = torch.empty_like(order)
    places.scatter_(0, order, torch.arange(vocab, device=order.device))
    column = logits.target - logits.first_id
    local = (column >= 0) & (column < vocab)
    place = torch.where(local, places[torch.where(local, column, 0)], -1)
    target = torch.where(local, place + logits.first_id, -1)
    made = backend.sorted_statistics(logits, order, target, rows, available)
    return Ordered(made, order, place)


def totals(far: FarField | None, like: Tensor) -> Tensor:
    """(4,) of one rank: tiles kept, tiles, and of the others their mass and their deviation."""
    if far is None:
        return like.new_zeros(4)
    kept = far.kept.sum(dtype=like.dtype)
    left = torch.where(far.kept != 0, 0.0, far.totals).sum(dim=1, dtype=like.dtype)
    return torch.cat([torch.stack([kept, kept.new_full((), far.kept.shape[0])]), left])


def empty(logits: LocalLogits, tile: int, *, slopes: bool) -> list[Tensor]:
    """Unfilled fields of a FarField."""
    num_tokens, (vocab, hidden) = logits.target.shape[0], logits.weight.shape
    num_tiles, made = -(-vocab // tile), logits.input.new_empty
    dtype = mass_dtype(logits.input.dtype)
    slope_tiles = num_tiles if _needs_slopes(logits, slopes) else 0
    return [
        made(vocab, dtype=torch.int64),
        made(num_tokens, dtype=torch.int64),
        made(num_tokens, dtype=statistics_dtype(logits.input.dtype)),
        made((num_tiles, hidden)),
        made((num_tiles, num_tokens), dtype=dtype),
        made((slope_tiles, num_tokens), dtype=dtype),
        made((2, num_tiles), dtype=torch.float32),
        made(num_tiles, dtype=torch.int32),
    ]


@dataclass(frozen=True, slots=True, kw_only=True)
class FarGradient:
    """The far field's part of dC and of the bias gradient.

    Attributes:
        tile: B.
        order, kept: as in `FarField`.
        weight: (T, D) fp32 far part of dC summed over the rows of each tile; zeros if kept; or
            None where dC is not wanted.
        is_target: (V,) uint8, 1 for a row outside the kept tiles that is some token's target.
        sorted_rows: (N,) int64 those rows, one entry per token, ascending, -1 for other tokens.
        sorted_tokens: (N,) int64 the token of each entry.
        tile_of_target: (N,) int64 tile of each token's target, or -1.
        factors: (N,) fp32 one-hot part of each token's gradient of its target's logit.
    """

    tile: int
    order: Tensor
    kept: Tensor
    weight: Tensor | None
    is_target: Tensor
    sorted_rows: Tensor
    sorted_tokens: Tensor
    tile_of_target: Tensor
    factors: Tensor


class FarBackward:
    """The far field in one backward pass: which rows are walked, and what is added for the rest.

    Attributes:
        rows: (K,) int64 local rows of the kept tiles, in sorted order.
        column: (N,) int64 the target's place among them, or -1.
        late: how many of them are at `first_late_row` or after it.
        nbytes: of all that lives during the whole pass, beside its strips.
    """

    def __init__(
        self,
        backend: Backend,
        far: FarField,
        tiles: Tensor,
        late: int,
        logits: LocalLogits,
        upstream: LogitGradient,
        unscale: Tensor | None,
    ) -> None:
        self._backend, self._far, self._logits, self._unscale = backend, far, logits, unscale
        self._tile = tile = backend.tile_rows(logits.input)
        self.late = late
        vocab = logits.weight.shape[0]
        count = tiles.shape[0] * tile - (far.kept.shape[0] * tile - vocab)
        in_tile = torch.arange(tile, device=tiles.device)
        self.rows = far.order[(tiles[:, None] * tile + in_tile).view(-1)[:count]]
        slot = torch.cumsum(far.kept, dim=0) - 1
        self._tile_of_target = torch.div(far.place, tile, rounding_mode="floor")
        safe = self._tile_of_target.clamp(min=0)
        here = far.place >= 0
        kept = here & (far.kept[safe] != 0)
        self.column = torch.where(kept, slot[safe] * tile + far.place % tile, -1)
        self._row = torch.where(here & ~kept, logits.target - logits.first_id, -1)
        factor = upstream.grad * (-upstream.onehot_weight * logits.logit_scale)
        if logits.logit_softcap is not None:
            factor = factor * (1 - (far.target_logit / logits.logit_softcap) ** 2)
        # A masked token has gradient exactly 0 even where its logits are not finite.
        self._factor = torch.where(upstream.grad == 0, 0.0, factor)
        self._summed = backend.far_gradient(far.masses, upstream, logits, logits.input.dtype)
        num_tiles, hidden = far.means.shape
        far_weight = num_tiles * hidden * statistics_dtype(logits.input.dtype).itemsize
        self.nbytes = far.nbytes + self._summed.nbytes + far_weight + 9 * vocab

    def start_input(self, out: Tensor, tokens: tuple[int, int]) -> None:
        """out (n, D) = the tiles' gradients times their mean rows."""
        n0, n1 = tokens
        add_product(out, self._summed[:, n0:n1].t(), self._far.means, accumulate=False)

    def finish_input(self, out: Tensor, tokens: tuple[int, int]) -> None:
        """out (n, D) fp32 += the one-hots whose rows are not walked."""
        n0, n1 = tokens
        weight = self._logits.weight
        self._backend.add_target_rows(out, weight, self._row[n0:n1], self._factor[n0:n1])

    def write_weight(self, out: Tensor | None, bias: Tensor | None, *, accumulate: bool) -> None:
        """Rows of dC (overwritten, or added to) and of the bias gradient that are not walked."""
        if out is None and bias is None:
            return
        far, num_tiles = self._far, self._far.kept.shape[0]
        vocab, hidden = self._logits.weight.shape
        wide = statistics_dtype(self._logits.input.dtype)
        factors, weight = self._factor, None
        if out is not None:
            weight = torch.empty((num_tiles, hidden), dtype=wide, device=out.device)
            add_product(weight, self._summed, self._logits.input, accumulate=False)
        if self._unscale is not None:
            factors = factors * self._unscale
            if weight is not None:
                weight *= self._unscale
        if bias is not None:
            self._add_bias(bias)
        sorted_rows, sorted_tokens = torch.sort(self._row, stable=True)
        is_target = torch.zeros(vocab + 1, dtype=torch.uint8, device=factors.device)
        is_target.index_fill_(0, torch.where(self._row >= 0, self._row, vocab), 1)
        gradient = FarGradient(
            tile=self._tile,
            order=far.order,
            kept=far.kept,
            weight=weight,
            is_target=is_target,
            sorted_rows=sorted_rows,
            sorted_tokens=sorted_tokens,
            tile_of_target=self._tile_of_target,
            factors=factors,
        )
        self._backend.write_far_rows(gradient, self._logits.input, out, bias, accumulate=accumulate)

    def _add_bias(self, bias: Tensor) -> None:
        """Each tile's gradient, evenly over its rows."""
        num_tiles, vocab = self._far.kept.shape[0], bias.shape[0]
        per_tile = self._summed.sum(dim=1, dtype=bias.dtype)
        if self._unscale is not None:
            per_tile *= self._unscale
        rows_left = vocab - self._tile * torch.arange(num_tiles, device=bias.device)
        share = per_tile / rows_left.clamp(max=self._tile)
        spread = share.repeat_interleave(self._tile, output_size=num_tiles * self._tile)[:vocab]
        bias.index_add_(0, self._far.order, spread)  # a permutation: no two meet


def begin(
    backend: Backend,
    far: FarField,
    logits: LocalLogits,
    upstream: LogitGradient,
    unscale: Tensor | None,
) -> FarBackward | None:
    """The far field of a backward pass, or None where so much is kept that exact is as good.

    The one host synchronisation of the filtered pass: the numbers of kept tiles and of late rows
    decide the sizes of all that follows."""
    tile, vocab = backend.tile_rows(logits.input), logits.weight.shape[0]
    is_late = far.order >= first_late_row(vocab)
    kept_rows = far.kept.repeat_interleave(tile, output_size=len(far.kept) * tile)[:vocab]
    late = torch.where(is_late, kept_rows, 0).sum(dtype=torch.int32)
    *kept, late = torch.cat([far.kept, late[None]]).tolist()
    if sum(kept) * tile > _MOSTLY * vocab:
        return None
    numbers = torch.tensor(kept, dtype=torch.int64).nonzero().view(-1)
    tiles = numbers.to(far.kept.device, non_blocking=True)
    return FarBackward(backend, far, tiles, late, logits, upstream, unscale)


def first_late_row(vocab: int) -> int:
    """From this local row on, the memory of dC may hold something else during the walk."""
    return vocab - vocab // 4
