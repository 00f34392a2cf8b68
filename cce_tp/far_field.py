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

import functools
from dataclasses import dataclass
from typing import TYPE_CHECKING, NamedTuple

import torch
from torch import Tensor

from cce_tp import replay
from cce_tp.problem import (
    KeptLogits,
    LocalLogits,
    LogitGradient,
    LossTerms,
    memory_of,
    statistics_dtype,
)
from cce_tp.products import add_product
from cce_tp.replay import Kind
from cce_tp.stats import StatRows
from cce_tp.workspace import ALIGNMENT, aligned, for_buffers, gradient_pitch

if TYPE_CHECKING:
    from cce_tp.backend import Backend

# Tokens from which the variance of a row's logit is estimated; with one more row for the average,
# a product of 64 rows reads the weight as fast as one row would.
_SAMPLED_TOKENS = 63
# Of the budget, what goes to the ranks by the rows that they have and not by the mass in them.
_SHARE_BY_ROWS = 0.25
# Wave quantisation: a gather of fewer rows is accepted for fuller waves, down to this share.
_LEAST_GATHER = 0.5
# Where dC's memory holds logits of the first rows of the order: of so many of all rows. A model in
# training keeps 10% to 14%, next to all of them first in the order. What is left of that memory
# holds gathered rows: at 8192 x 1536 x 131072 a seventh would make six launches, this makes four.
_KEPT_SHARE = 0.135
# And they and the sum of dE take at most so much of that memory.
_LATE_SHARE = 0.9
# Of the rows whose logits are kept, what the backward pass is likely to walk over.
_LIKELY_SHARE = 3 / 4
# There must be room for so many rows of dC beside those that are held.
_LEAST_STRIP = 1024


class LateRows(NamedTuple):
    """The last rows of dC, in whose memory something else lies until all of dC is written.

    Without kept logits it holds the gradient of the logits during the walk; with them, from the
    forward pass on, the logits, which make place for their gradient, and in front of them, in the
    backward pass, the sum of dE and the gradient of the far field's tiles.

    Attributes:
        first_row: the first late row.
        columns: how many logits per token are kept, whole tiles, of the first rows of the order.
        sum_byte: where in dC's memory the sum of dE may begin, (N, D) in fp32; -1 without logits.
        far_byte: where the tiles' gradient may begin, (T, N) in the operands' dtype; its last row
            ends where the logits begin. -1 without logits.
        first_byte: where the logits or their gradient begin.
    """

    first_row: int
    columns: int
    sum_byte: int
    far_byte: int
    first_byte: int

    @classmethod
    def without_logits(cls, weight: Tensor, itemsize: int) -> LateRows:
        """Args:
        weight: (V, D) local rows.
        itemsize: bytes of a number of dC.
        """
        vocab, hidden = weight.shape
        first_row = vocab - vocab // 4
        return cls(first_row, 0, -1, -1, aligned(first_row * hidden * itemsize))

    @classmethod
    def with_logits(
        cls, num_tokens: int, weight: Tensor, itemsize: int, tile: int
    ) -> LateRows | None:
        """As many logits as are worth it and fit; None for none.

        Args:
            num_tokens: N.
            weight, itemsize: as above.
            tile: B.
        """
        vocab, hidden = weight.shape
        row, column = hidden * itemsize, 2 * gradient_pitch(num_tokens)
        far_bytes = -(-vocab // tile) * column
        sums = aligned(4 * num_tokens * hidden) + far_bytes + 3 * ALIGNMENT
        tiles = min(
            max(1, int(_KEPT_SHARE * vocab) // tile),
            vocab // tile,
            int(_LATE_SHARE * vocab * row - sums) // (column * tile) if column else 0,
        )
        if tiles <= 0 or row % 4:  # the sum's rows would not start at whole numbers
            return None
        first_row = vocab - -(-(sums + tiles * tile * column) // row)
        sum_byte = aligned(first_row * row)
        first_byte = sum_byte + aligned(4 * num_tokens * hidden + far_bytes)
        return cls(first_row, tiles * tile, sum_byte, first_byte - far_bytes, first_byte)

    def tile_gradients(
        self, grad_weight: Tensor, dtype: torch.dtype, shape: tuple[int, int]
    ) -> Tensor:
        """(T, N) in front of the logits; with more rows, the logits' memory too."""
        return memory_of(grad_weight, self.far_byte, shape, dtype, gradient_pitch(shape[1]))

    def kept(self, grad_weight: Tensor, tile_max: Tensor, tile: int) -> KeptLogits:
        """The kept logits, their maxima being `tile_max`, (columns / B, N) fp32."""
        return KeptLogits.inside(grad_weight, tile_max, tile, self.first_byte)


def lend(
    logits: LocalLogits, dtype: torch.dtype, tile: int, workspace_bytes: int
) -> tuple[Tensor, KeptLogits] | tuple[None, None]:
    """dC's memory, not yet written, and room for logits in it; Nones if none fit, or if the
    backward pass would have no use for them.

    Args:
        logits: of all tokens.
        dtype: of dC.
        tile: B.
        workspace_bytes: cap of the backward pass.
    """
    num_tokens, vocab, hidden = logits.shape
    late = LateRows.with_logits(num_tokens, logits.weight, dtype.itemsize, tile)
    if late is None:
        return None, None
    # Late rows of dC are held in the workspace: those of as many kept rows as are likely.
    held = int(_LIKELY_SHARE * late.columns) * (vocab - late.first_row) // vocab
    taken = _bytes_of_a_pass(logits, tile) + 4 * num_tokens * late.columns // tile
    needed = (held + min(_LEAST_STRIP, late.columns)) * hidden * dtype.itemsize
    if for_buffers(workspace_bytes, num_tokens) < taken + needed:
        return None, None
    made = logits.input.new_empty
    lent = made(logits.weight.shape, dtype=dtype)
    tile_max = made((late.columns // tile, num_tokens), dtype=torch.float32)
    return lent, late.kept(lent, tile_max, tile)


def _bytes_of_a_pass(logits: LocalLogits, tile: int) -> int:
    """What a backward pass from kept logits on has beside its strips: of a FarField, without a
    cap's slopes, and of a FarBackward; and the mean rows once more, in front of gathered ones."""
    (num_tokens, vocab, hidden), itemsize = logits.shape, logits.weight.itemsize
    per_tile = 2 * num_tokens + hidden * (4 + 2 * itemsize)
    return -(-vocab // tile) * per_tile + (8 + 27) * vocab + 12 * num_tokens


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


class RankBudget(NamedTuple):
    """What one rank's tiles may leave to the far field, of all tokens that count.

    The ranks' parts add up to the whole budget, without a word between them: the masses in the
    shards add up to the number of tokens, and so do the shards' shares of the rows. A shard of rare
    ids, with next to no mass, would keep most of its tiles for a part of that mass alone.

    Attributes:
        by_mass: of the mass in the shard.
        by_rows: per token.
    """

    by_mass: float
    by_rows: float

    @classmethod
    def of(cls, budget: float, rows: int, vocab_size: int) -> RankBudget:
        """For a rank with so many of the global vocabulary's rows."""
        by_rows = _SHARE_BY_ROWS * budget * rows / vocab_size
        return cls((1 - _SHARE_BY_ROWS) * budget, by_rows)

    @property
    def is_zero(self) -> bool:
        return self.by_mass == 0


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


def rounds_gradient(dtype: torch.dtype) -> bool:
    """Whether G of operands of this dtype has fewer bits than the sums it goes into."""
    return dtype.itemsize == 2


def row_pitch(hidden: int, itemsize: int) -> int:
    """Elements from one gathered row to the next: rows start at whole units of 16 bytes."""
    step = 16 // itemsize
    return -(-hidden // step) * step


@functools.lru_cache(maxsize=256)
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
        kept: KeptLogits | None,
    ) -> FarField:
        """The masses under the global normaliser, and the tiles to keep.

        Args:
            packed_RN, normaliser_2N: of the global vocabulary.
            kept: logits that are kept, or None.
        """
        masses = backend.tile_masses(
            self.statistics.tiles,
            normaliser_2N,
            logits.target,
            logits,
            ignore_index=terms.ignore_index,
            budget=RankBudget.of(budget, logits.shape[1], terms.vocab_size),
            slopes=_needs_slopes(logits, terms.label_smoothing > 0),
            leading=0 if kept is None else len(kept.tile_max),
        )
        target_logit = packed_RN[StatRows.TARGET].clone()
        return FarField(self.order, self.place, target_logit, self.statistics.means, *masses)


def _needs_slopes(logits: LocalLogits, smoothing: bool) -> bool:
    """Whether the uniform part of a tile's gradient is not the same for all tokens."""
    return logits.logit_softcap is not None and smoothing


def sorted_statistics(
    backend: Backend,
    logits: LocalLogits,
    rows: StatRows,
    workspace_bytes: int,
    lent: Tensor | None,
    kept: KeptLogits | None,
) -> Ordered:
    """Statistics of this rank's logits, over its vocabulary in sorted order.

    Args:
        lent, kept: of `lend`. What of dC's memory is not for logits holds rows meanwhile.
    """
    num_tokens, hidden = logits.input.shape
    available = for_buffers(workspace_bytes, num_tokens)
    order = _mass_order(backend, logits)
    place, target = backend.target_places(order, logits.target, logits.first_id)
    free = None
    if lent is not None and kept is not None:
        itemsize = logits.weight.itemsize
        late = LateRows.with_logits(num_tokens, logits.weight, lent.itemsize, kept.tile)
        assert late is not None
        pitch = row_pitch(hidden, itemsize)
        shape = (late.first_byte // (pitch * itemsize), hidden)
        free = memory_of(lent, 0, shape, logits.weight.dtype, pitch)
    made = backend.sorted_statistics(logits, order, target, rows, available, free, kept)
    return Ordered(made, order, place)


def _mass_order(backend: Backend, logits: LocalLogits) -> Tensor:
    """(V,) local rows sorted by an estimate of their probability mass, highest first.

    The estimate of log mean exp(y_nv) over the tokens n is the average of y_v plus half of its
    variance (the first two cumulants), the latter from a strided sample of tokens. Measured on a
    model in training, the variance lowers the error of the far field by a fifth where the same
    number of rows is kept. It costs no more than the average alone: both read the weight once.
    Stateless and deterministic (stable sort); local to the rank. The softcap does not enter.
    """
    input, weight = logits.input, logits.weight
    num_tokens, vocab = input.shape[0], weight.shape[0]
    probes = backend.probes(input, -(-num_tokens // _SAMPLED_TOKENS))
    # 16 bits are sorted in half as many passes, and tell logits of 8 to 16 apart by 2^-7.
    key_dtype = torch.float16 if input.itemsize == 2 else statistics_dtype(input.dtype)
    key_V = torch.empty(vocab, dtype=key_dtype, device=weight.device)
    backend.mass_key(weight, probes, logits.bias, logits.logit_scale, key_V)
    return torch.sort(key_V, descending=True, stable=True).indices


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


class KeptRows(NamedTuple):
    """The rows of the kept tiles, in sorted order, on the device.

    Which rows are late: `LateRows`. What is left of a list is -1, of `home` anything.

    Attributes:
        rows: (V,) int64 local rows.
        slot: (T,) int32 number of a kept tile among them; of others anything.
        numbers: (3,) int32: how many tiles are kept, how many of their rows are late, and how many
            tiles come before the first that is not kept.
        direct: (V,) int64 `rows`, but -1 for late ones.
        held: (V,) int64 a late row's number among the late ones, -1 for others.
        home: (V - first late row,) int64 the late rows.
    """

    rows: Tensor
    slot: Tensor
    numbers: Tensor
    direct: Tensor
    held: Tensor
    home: Tensor

    def first(self, count: int, late: int) -> KeptRows:
        """With lists of `count` rows, of which `late` are late."""
        rows, direct, held = (each[:count] for each in (self.rows, self.direct, self.held))
        return self._replace(rows=rows, direct=direct, held=held, home=self.home[:late])


class TargetPlan(NamedTuple):
    """What becomes of each token's one-hot, local to this rank.

    Attributes:
        column: (N,) int64 the target's place among the kept rows, or -1.
        row: (N,) int64 the target's local row where that is not kept, or -1.
        tile: (N,) int64 the target's tile, or -1.
        factor: (N,) fp32 one-hot part of the gradient of the target's logit.
        is_target: (V,) uint8, 1 for a row in `row`.
        remainder: (N,) fp32 what dE takes of the target's row beside all products: of a row that is
            not kept the factor; of a kept one, where G is rounded to 16 bits, the gradient of its
            logit less what G holds of it (`FarBackward.subtract_stored`); else 0.
    """

    column: Tensor
    row: Tensor
    tile: Tensor
    factor: Tensor
    is_target: Tensor
    remainder: Tensor


@dataclass(frozen=True, slots=True, kw_only=True)
class FarGradient:
    """The far field's part of dC and of the bias gradient.

    Attributes:
        tile: B.
        order, kept: as in `FarField`.
        weight: (T, D) fp32 far part of dC summed over the rows of each tile; zeros if kept; or
            None where dC is not wanted.
        targets: of the tokens, with factors as dC needs them.
    """

    tile: int
    order: Tensor
    kept: Tensor
    weight: Tensor | None
    targets: TargetPlan


class _Started(NamedTuple):
    """What does not depend on the number of kept tiles.

    Attributes:
        kept, targets: as there.
        summed: (T, N) gradient of the logits summed over each tile; 0 for kept ones.
        by_tile: (T,) its sums over the tokens, if the bias gradient is wanted.
        weight: of the `FarGradient`.
        factor: of the targets, as dC needs it.
    """

    kept: KeptRows
    targets: TargetPlan
    summed: Tensor
    by_tile: Tensor | None
    weight: Tensor | None
    factor: Tensor


class FarBackward:
    """The far field in one backward pass: which rows are walked, and what is added for the rest.

    Made, it has enqueued all that does not depend on the number of kept tiles. `wait`, for that
    number, is the one host synchronisation of the filtered pass.

    Attributes:
        late: what dC's memory holds meanwhile.
        kept: the rows of the kept tiles, in sorted order; after `wait` no more than those.
        column: (N,) int64 the target's place among them, or -1.
        waited: whether that is known.
        tiles: (T,) int32, 1 for a kept tile.
        run: after `wait`, how many of the rows whose logits are kept come before the first tile
            that is not.
        nbytes: of what is made for the whole pass, beside its strips.
    """

    def __init__(
        self,
        backend: Backend,
        far: FarField,
        logits: LocalLogits,
        upstream: LogitGradient,
        unscale: Tensor | None,
        *,
        late: LateRows,
        weight: Tensor | None,
        accumulate: bool,
        bias: bool,
        kind: Kind,
    ) -> None:
        """
        Args:
            late: those of dC.
            weight: dC, (V, D), or None if it is not wanted.
            accumulate: add to `weight`.
            bias: whether the bias gradient is wanted.
            kind: of the call.
        """
        self._backend, self._far, self._logits, self._unscale = backend, far, logits, unscale
        self._weight, self._accumulate, self.late, self.run = weight, accumulate, late, 0
        self._tile, self.tiles, self.waited = backend.tile_rows(logits.input), far.kept, False
        self._wants_bias, self._written = bias, 0
        operands = logits.input, logits.weight, logits.bias, logits.target
        per_token = upstream.grad, upstream.max_logit, upstream.log_sum
        made: _Started = kind.call(
            "far field",
            (*operands, *far, *per_token, unscale, weight),
            lambda: self._start(upstream),
            self._copy_numbers,
        )
        self.kept, self._targets, self._summed, self._bias_T = made[:4]
        self.column = self._targets.column
        self._gradient = self._far_gradient(made)
        if not accumulate:
            self._written = late.first_row
        vocab, inside = logits.weight.shape[0], late.far_byte >= 0
        self.nbytes = (0 if inside else self._summed.nbytes) + _nbytes(made.weight) + 27 * vocab

    def _copy_numbers(self, numbers: Tensor) -> None:
        self._numbers = _HostCopy(numbers)

    def _start(self, upstream: LogitGradient) -> _Started:
        backend, far, logits, late = self._backend, self._far, self._logits, self.late
        kept = backend.kept_rows(far.kept, far.order, self._tile, late.first_row)
        replay.outside(self._copy_numbers, kept.numbers)
        targets = backend.plan_targets(far, kept.slot, upstream, logits)
        weight, inside, unscale = self._weight, None, self._unscale
        if late.far_byte >= 0:
            assert weight is not None
            shape = (len(far.kept), logits.shape[0])
            inside = late.tile_gradients(weight, logits.input.dtype, shape)
        summed = backend.far_gradient(far.masses, upstream, logits, inside)
        by_tile = far_weight = None
        wide, factor = statistics_dtype(logits.input.dtype), targets.factor
        if self._wants_bias:  # before dC is written over it
            by_tile = summed.sum(dim=1, dtype=wide)
            if unscale is not None:
                by_tile *= unscale
        if weight is not None:
            shape = (far.kept.shape[0], logits.shape[2])
            far_weight = torch.empty(shape, dtype=wide, device=weight.device)
            add_product(far_weight, summed, logits.input, accumulate=False)
            if unscale is not None:
                far_weight *= unscale
        if unscale is not None:
            factor = factor * unscale
        made = _Started(kept, targets, summed, by_tile, far_weight, factor)
        # Nobody reads these rows before all of dC is written, whichever way.
        if not self._accumulate:
            self._write_weight(self._far_gradient(made), (0, late.first_row), targets=False)
        return made

    def wait(self) -> None:
        """Until the host knows how many rows are kept."""
        self.waited = True
        vocab, tile = self._logits.weight.shape[0], self._tile
        kept_tiles, late_rows, run = self._numbers.wait().tolist()
        # The last tile is kept if it is not full.
        count = kept_tiles * tile - (self.tiles.shape[0] * tile - vocab)
        self.kept = self.kept.first(count, late_rows)
        self.run = min(run * tile, self.late.columns)

    def _far_gradient(self, made: _Started) -> FarGradient:
        return FarGradient(
            tile=self._tile,
            order=self._far.order,
            kept=self._far.kept,
            weight=made.weight,
            targets=made.targets._replace(factor=made.factor),
        )

    def leave_weight(self) -> None:
        """Take what lies in dC's memory out of it: dC may be written before it is read again."""
        if self.late.far_byte >= 0:
            self._summed = self._summed.clone()
            self.nbytes += self._summed.nbytes

    @property
    def means(self) -> Tensor:
        """(T, D) mean row of each tile."""
        return self._far.means

    def with_means(self, count: int) -> Tensor:
        """(T + count, D): the tiles' mean rows, then the first of the kept rows.

        What belongs to the former of the gradient lies in front of that of the latter: one product
        makes both parts of dE."""
        means, weight = self._far.means, self._logits.weight
        num_tiles, hidden = means.shape
        pitch = row_pitch(hidden, weight.itemsize)
        out = weight.new_empty(num_tiles + count, pitch)[:, :hidden]
        out[:num_tiles].copy_(means)
        self._backend.gather_rows(weight, self.kept.rows[:count], out=out[num_tiles:])
        return out

    def start_input(self, out: Tensor, tokens: tuple[int, int]) -> None:
        """out (n, D) = the tiles' gradients times their mean rows."""
        n0, n1 = tokens
        add_product(out, self._summed[:, n0:n1].t(), self._far.means, accumulate=False)

    def subtract_stored(self, grad_KN: Tensor, first: int, tokens: tuple[int, int]) -> None:
        """Take what G holds of the targets' gradient off what is added for them at the end.

        By far the most of what rounding G does to dE is at the targets, whose gradient is the
        largest: left as it is, dE of a model in training errs by a sixth more.

        Args:
            grad_KN: (K, n) G^T of some of the kept rows.
            first: number of the first of them.
            tokens: which of the tokens; each pair of a row and a token comes once.
        """
        if not rounds_gradient(grad_KN.dtype):
            return
        n0, n1 = tokens
        remainder, column = self._targets.remainder[n0:n1], self.column[n0:n1]
        self._backend.subtract_stored(remainder, column, first, grad_KN)

    def finish_input(self, out: Tensor, tokens: tuple[int, int]) -> None:
        """out (n, D) fp32 += what the products lack of the targets' rows."""
        n0, n1 = tokens
        logits, remainder = self._logits.tokens(n0, n1), self._targets.remainder[n0:n1]
        self._backend.add_target_rows(out, logits.weight, logits.target, logits.first_id, remainder)

    def finish_weight(self, bias: Tensor | None) -> None:
        """The rows of dC and of the bias gradient that are not walked, as far as not written yet.

        Args:
            bias: (V,) fp32, added to, or None."""
        stop = self._logits.weight.shape[0]
        self._write_weight(self._gradient, (self._written, stop), targets=True)
        self._written = stop
        if bias is not None:
            self._add_bias(bias)

    def _write_weight(self, gradient: FarGradient, rows: tuple[int, int], *, targets: bool) -> None:
        """The rows of dC that are not written yet; those that are targets, which take a kernel of
        their own, at the end."""
        if self._weight is not None:
            self._backend.write_far_rows(
                gradient,
                self._logits.input,
                self._weight,
                None,
                rows,
                targets=targets,
                accumulate=self._accumulate,
            )

    def _add_bias(self, bias: Tensor) -> None:
        """Each tile's gradient, evenly over its rows, and the targets'."""
        num_tiles, vocab = self._far.kept.shape[0], bias.shape[0]
        assert self._bias_T is not None
        rows_left = vocab - self._tile * torch.arange(num_tiles, device=bias.device)
        share = self._bias_T / rows_left.clamp(max=self._tile)
        spread = share.repeat_interleave(self._tile, output_size=num_tiles * self._tile)[:vocab]
        bias.index_add_(0, self._far.order, spread)  # a permutation: no two meet
        self._backend.write_far_rows(
            self._gradient,
            self._logits.input,
            None,
            bias,
            (0, vocab),
            targets=True,
            accumulate=True,
        )


class _HostCopy:
    """A small tensor on its way to the host; what is enqueued meanwhile is not waited for."""

    def __init__(self, tensor: Tensor) -> None:
        self._host = tensor.to("cpu", non_blocking=True)
        self._done = None
        if tensor.is_cuda:
            self._done = torch.cuda.Event()
            self._done.record()

    def wait(self) -> Tensor:
        if self._done is not None:
            self._done.synchronize()
        return self._host


def _nbytes(tensor: Tensor | None) -> int:
    return 0 if tensor is None else tensor.nbytes
