"""Backward pass of one rank: dE, dC and the bias gradient from strips of the logits' gradient.

For each strip of the vocabulary the backend writes G^T, G = d loss / d (E C^T), to a small buffer
or to a part of dC that is still to be written; then dC_strip = G^T E is complete at once and
dE += G C_strip is summed in fp32. Deterministic. With the paper's filter the strips are cut from
the sorted vocabulary and the products skip the dropped tiles; with the far field they are cut from
the rows of the kept tiles, and `far_field` adds the rest.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_tp.backend import Backend
from cce_tp.far_field import FarBackward, FarField, KeptRows, LateRows
from cce_tp.filtering import BYTES_PER_ORDERED_ROW, vocabulary_order
from cce_tp.problem import (
    KeptLogits,
    LocalLogits,
    LogitGradient,
    memory_of,
    rows_of,
    statistics_dtype,
)
from cce_tp.products import InputSum, add_product, copies_operands, row_sums, weight_product
from cce_tp.replay import Kind
from cce_tp.sharding import TokenGather
from cce_tp.workspace import (
    BackwardSizes,
    PrefixWalk,
    StripWalk,
    TailWalk,
    TokenWalk,
    Walk,
    WholeWalk,
    aligned,
    blocks,
    borrowed_tokens,
    gradient_pitch,
    pays,
    plan_backward,
    plan_head,
    plan_kept,
    plan_rest,
    plan_run,
    rows_ahead,
)

# Where dC is made in a temporary before it is stored, pieces are of this many bytes, or an eighth
# of the workspace: they stay in the L2 cache, and make one tile of a product for each
# multiprocessor of a large GPU.
_PIECE_BYTES = 16 << 20


class GradientSinks(NamedTuple):
    """Where the gradients go; None for one that is not wanted.

    Attributes:
        input: (N, D), overwritten with this rank's part of dE.
        weight: (V, D), overwritten, or added to with `accumulate_weight`.
        bias: (V,) fp32 or fp64, zeros beforehand, added to.
        accumulate_weight: add to `weight`.
        input_done: called once, when `input` is complete and what is left concerns dC alone.
    """

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    accumulate_weight: bool
    input_done: Callable[[], None]


class _Strip(NamedTuple):
    """Vocabulary columns of one step: a slice of the local rows, or a gathered list of them."""

    start: int
    stop: int
    rows: Tensor | None


class _Loan:
    """The last rows of dC, lent to G^T and perhaps dE's sum in a walk over rows that are listed.

    Those of the listed rows that lie there are held elsewhere until the walk is done."""

    def __init__(self, backend: Backend, grad_weight: Tensor, kept: KeptRows) -> None:
        self._backend, self._out, self._kept = backend, grad_weight, kept
        self._held = grad_weight.new_empty(kept.home.shape[0], grad_weight.shape[1])

    def store(self, start: int, value: Tensor) -> None:
        """Listed rows from `start` on = value."""
        stop = start + value.shape[0]
        scatter = self._backend.scatter_rows
        scatter(self._out, self._kept.direct[start:stop], value, accumulate=False)
        scatter(self._held, self._kept.held[start:stop], value, accumulate=False)

    def settle(self) -> None:
        """Put the held rows where they belong."""
        self._backend.scatter_rows(self._out, self._kept.home, self._held, accumulate=False)


@dataclass(slots=True)
class _Head:
    """What was done before the number of rows to walk was known.

    Attributes:
        columns: how many columns were taken, from the first on; if there are not as many, the
            others were zeros.
        total: dE so far.
        weight: (columns, D) their rows of dC, until they are stored; None where they are already.
        loan: where rows of dC are stored, if late ones are held already.
    """

    columns: int
    total: InputSum
    weight: Tensor | None
    loan: _Loan | None = None


class _Begun(NamedTuple):
    """What a walk over a run of kept logits has before the number of kept rows is known.

    Attributes:
        held: (N, D) takes the sum of dE.
        gathered: (T + K', D) the tiles' mean rows, then the first of the kept rows.
        grad_KN: (K, N) G^T of all rows whose logits are kept.
        all_KN: (T + K, N) that of the tiles, and then the same.
    """

    held: Tensor
    gathered: Tensor
    grad_KN: Tensor
    all_KN: Tensor


class _Columns:
    """Cuts this rank's logits into strips: of its rows as they are, or of a list of them.

    Attributes:
        count: number of columns.
    """

    def __init__(
        self, logits: LocalLogits, rows: Tensor | None = None, position: Tensor | None = None
    ) -> None:
        """
        Args:
            logits: all tokens against all local rows.
            rows: (K,) the local rows to take, in this order; None for all as they are.
            position: (N,) the target's place among them, or -1.
        """
        self._logits, self._rows, self._position = logits, rows, position
        self.count = logits.shape[1] if rows is None else rows.shape[0]

    @classmethod
    def ordered(cls, logits: LocalLogits) -> _Columns:
        """All rows, sorted by their average logit."""
        order = vocabulary_order(logits.input, logits.weight, logits.bias)
        position = torch.empty_like(order)
        position[order] = torch.arange(len(position), device=position.device)
        column = logits.target - logits.first_id
        local = (column >= 0) & (column < len(position))
        return cls(logits, order, torch.where(local, position[torch.where(local, column, 0)], -1))

    def strip(self, start: int, stop: int) -> tuple[_Strip, LocalLogits]:
        if self._rows is None or self._position is None:
            return _Strip(start, stop, None), self._logits.columns(start, stop)
        rows = self._rows[start:stop]
        part = self._logits.gathered(rows, self._position)
        return _Strip(start, stop, rows), part._replace(first_id=start)


class _BackwardPass:
    """State of one backward call; `run` walks the plan."""

    def __init__(
        self,
        backend: Backend,
        logits: LocalLogits,
        upstream: LogitGradient,
        sinks: GradientSinks,
        eps: float | None,
        state: FarField | None,
        kept: KeptLogits | None,
        arriving: TokenGather | None,
        kind: Kind,
    ) -> None:
        self.backend = backend
        self.kind = kind
        self.arriving = arriving
        self.finished = 0  # tokens whose dE is complete
        if eps is not None or state is not None:
            self._await_input()  # the order of the rows, or of the work, follows from it
        self.kept = kept
        self.logits = logits
        self.sinks = sinks
        self.eps = eps
        self.upstream, self.unscale = _into_range(logits, upstream)
        self.sum_dtype = statistics_dtype(logits.input.dtype)
        # Of what the forward pass left: there until the call ends, used or not.
        self.left_bytes = 0 if kept is None or not kept.in_grad else kept.tile_max.nbytes
        self.far: FarBackward | None = None
        if state is not None:
            self.far = FarBackward(
                backend,
                state,
                logits,
                self.upstream,
                self.unscale,
                late=self._late(logits, sinks.weight),
                weight=sinks.weight,
                accumulate=sinks.accumulate_weight,
                bias=sinks.bias is not None,
                kind=kind,
            )
            self.left_bytes += state.nbytes
        if eps is not None:
            self.columns = _Columns.ordered(logits)
        else:
            self.columns = _Columns(logits)
        self.copies = copies_operands(logits.input)
        self._look_at_operands()

    def _late(self, logits: LocalLogits, grad_weight: Tensor | None) -> LateRows:
        """What dC's memory holds during a walk over the rows that the far field keeps."""
        itemsize = logits.weight.itemsize if grad_weight is None else grad_weight.itemsize
        if self.kept is None:
            return LateRows.without_logits(logits.weight, itemsize)
        num_tokens, tile = logits.shape[0], self.kept.tile
        late = LateRows.with_logits(num_tokens, logits.weight, itemsize, tile)
        assert late is not None
        return late

    def _look_at_operands(self) -> None:
        """What is asked at every step."""
        # Whether strips are of gathered rows.
        self.gathers = self.eps is not None or self.far is not None
        # Whether the paper's filter's tiles are listed, and their tokens.
        tile = 0 if self.eps is None else self.backend.filter_tokens(self.logits.input)
        self.lists_tiles, self.tile = tile > 0, max(tile, 1)
        # Whether even a dE or a dC that one product makes needs a temporary.
        self.apart = self.gathers or self.copies or self.unscale is not None
        out = self.sinks.weight
        native = out is not None and out.dtype in (self.logits.input.dtype, self.sum_dtype)
        # Whether a product can write its rows of dC without a temporary.
        self.direct = native and not self.apart
        # Whether the temporary is of a few rows at a time: as long as they are in their own order.
        self.in_pieces = not (self.direct or self.gathers or self.copies)

    def run(self, workspace_bytes: int) -> None:
        self.piece_bytes = min(_PIECE_BYTES, workspace_bytes // 8)
        kept = self.kept
        if self.far is not None:
            if self._walk_far(self.far, workspace_bytes):
                self.far.finish_weight(self.sinks.bias)
                return
            self.far = None
            self.columns = _Columns(self.logits)
            self._look_at_operands()
        elif kept is not None and kept.in_grad and self._walk_over_kept(kept, workspace_bytes):
            return
        self._walk_all(workspace_bytes)

    def _walk_far(self, far: FarBackward, workspace_bytes: int) -> bool:
        """Walk over the rows that the far field keeps, if that pays; nothing is done if not."""
        if self.kept is not None:
            kept, self.kept = self.kept, None
            done = self._walk_run(far, kept, workspace_bytes)
            if done is not None:
                return done
            far.leave_weight()
        head = None
        if not far.waited:
            head = self._head_start(far, workspace_bytes)
            far.wait()
            self.columns = _Columns(self.logits, far.kept.rows, far.column)
        sizes = self._sizes(taken=0 if head is None else head.columns)
        # Planned afresh while the device waits, if the sizes were new in every call.
        similar = sizes.rounded()
        if head is None:
            walks = plan_backward(similar, workspace_bytes)
        else:
            walks = (plan_rest(similar, workspace_bytes, len(head.total.parts) > 1),)
        if not pays(sizes, walks, self.logits.shape[1]):
            return False
        self._walk(walks, sizes, head)
        return True

    def _walk_run(self, far: FarBackward, kept: KeptLogits, workspace_bytes: int) -> bool | None:
        """Walk where dC's memory holds the logits of the first rows; whether that pays, or None
        where the workspace is too small for it. In both cases the logits are gone, and of dE and dC
        nothing is written that stays.

        G^T of those rows, in place of their logits, makes their part of dE and with it the far
        field's, then their rows of dC; then come the other rows that are kept, over G^T's memory.
        """
        grad_input, grad_weight = self.sinks.input, self.sinks.weight
        assert grad_input is not None and grad_weight is not None
        sizes, num_tiles = self._sizes(late=0), len(far.tiles)
        beside = sizes._replace(fixed=sizes.fixed + num_tiles * sizes.strip_row)
        ahead = rows_ahead(beside, workspace_bytes, kept.columns)
        if ahead is None:
            return None
        num_tokens, vocab, _ = self.logits.shape
        # Before the host waits: what the device does meanwhile.
        upstream = self.upstream.grad, self.upstream.max_logit, self.upstream.log_sum
        rows = far.means, far.kept.rows, far.column, far.tiles
        begun: _Begun = self.kind.call(
            "run",
            (*self.logits[:4], *kept[:2], grad_weight, *rows, *upstream),
            lambda: self._begin_run(far, kept, grad_weight, ahead),
        )
        total = InputSum(grad_input, self.sum_dtype, in_place=False, borrow=False, held=begun.held)
        ((_, _, out),) = total.parts
        gathered, grad_KN, all_KN = begun.gathered, begun.grad_KN, begun.all_KN
        del begun  # it would hold the gathered rows, which are let go below
        far.wait()
        self.columns = _Columns(self.logits, far.kept.rows, far.column)
        known, run = far.run, self.columns.count
        if run > min(kept.columns, ahead):
            run = known  # else the few others join it
        sizes = self._sizes(taken=run)
        plan = plan_run(sizes.rounded(), workspace_bytes, run, self.columns.count - run)
        if plan is None:
            return None
        if not pays(sizes, () if plan.rest is None else (plan.rest,), vocab, run=run):
            return False
        if known < run:
            # In the place of G^T of rows that are not kept.
            rows, column = far.kept.rows[known:run], far.column
            # No name for the gathered rows: they are let go below.
            logits = self.logits.gathered(
                rows, column, gathered[num_tiles + known : num_tiles + run]
            )._replace(first_id=known)
            self.backend.grad_logits(logits, self.upstream, grad_KN[known:run], None)
            del logits
        self._add_bias(_Strip(0, run, far.kept.rows[:run]), grad_KN[:run])
        assert run > 0  # the first tile is always kept; so the product that comes first is made
        for start, stop in blocks(run, ahead):
            if start == 0:
                part_KN = all_KN[: num_tiles + stop]
            else:
                gathered = self.backend.gather_rows(self.logits.weight, far.kept.rows[start:stop])
                part_KN = grad_KN[start:stop]
            self._product(out, part_KN, gathered[: len(part_KN)], None, start > 0)
            del gathered  # before the next ones
        far.subtract_stored(grad_KN[:run], 0, (0, num_tokens))
        if plan.rest is None:
            self._finish_input(total, (0, num_tokens))
        loan = _Loan(self.backend, grad_weight, far.kept) if plan.held else None
        for start, stop in blocks(run, plan.strip):
            part = self._weight_part(grad_KN[start:stop], self.logits.input)
            if loan is None:
                self.backend.scatter_rows(grad_weight, far.kept.rows, part, accumulate=False)
            else:
                loan.store(start, part)
            del part  # before the next one is allocated
        if loan is not None:
            if plan.rest is not None:
                self._token_walk(plan.rest, sizes, _Head(run, total, None, loan))
            loan.settle()
        return True

    def _begin_run(
        self, far: FarBackward, kept: KeptLogits, grad_weight: Tensor, ahead: int
    ) -> _Begun:
        num_tokens, _, hidden = self.logits.shape
        late, dtype = far.late, self.logits.input.dtype
        gathered = far.with_means(ahead)
        grad_KN = kept.below_max.view(dtype)
        logits = self.logits.columns(0, kept.columns)._replace(target=far.column, first_id=0)
        self.backend.grad_kept(kept, 0, logits, self.upstream, grad_KN, far.tiles)
        shape = (len(far.tiles) + kept.columns, num_tokens)
        return _Begun(
            memory_of(grad_weight, late.sum_byte, (num_tokens, hidden), self.sum_dtype, hidden),
            gathered,
            grad_KN,
            late.tile_gradients(grad_weight, dtype, shape),
        )

    def _head_start(self, far: FarBackward, workspace_bytes: int) -> _Head | None:
        """Take the first columns before their number is known, so that the device has work while
        the host waits for that number; if they turn out to be fewer, G of the others is 0."""
        grad_input, grad_weight = self.sinks.input, self.sinks.weight
        if grad_input is None or grad_weight is None or self.sinks.bias is not None:
            return None
        sizes = self._sizes(late=0)
        plan = plan_head(sizes, workspace_bytes, self.backend.tile_rows(self.logits.input))
        if plan is None:
            return None
        num_tokens = self.logits.shape[0]
        total = InputSum(grad_input, self.sum_dtype, in_place=False, borrow=plan.borrow)
        for t0, t1, part in total.parts:
            far.start_input(part, (t0, t1))
        rows = far.kept.rows[: plan.columns]
        logits = self.logits.gathered(
            rows, far.column, self.backend.gather_rows(self.logits.weight, rows)
        )
        if sizes.loan_columns > 0:
            buffer = self._late_rows(plan.columns)
        else:
            buffer = self._buffer(plan.columns, num_tokens)
        grad_VN = buffer[:, :num_tokens]
        self.backend.grad_logits(logits, self.upstream, grad_VN, None)
        # Not G of a row of zeros, which is infinite where all logits are far below 0.
        grad_VN.masked_fill_((rows < 0)[:, None], 0.0)
        far.subtract_stored(grad_VN, 0, (0, num_tokens))
        for t0, t1, part in total.parts:
            self._product(part, grad_VN[:, t0:t1], logits.weight, None, True)
        del logits  # gathered rows, before the temporary of dC is made
        return _Head(plan.columns, total, self._weight_part(grad_VN, self.logits.input))

    def _walk_over_kept(self, kept: KeptLogits, workspace_bytes: int) -> bool:
        """Walk from the logits in dC's memory on; or forget them, where the workspace is too small
        for that."""
        some = kept.columns < self.columns.count
        sizes = self._sizes(taken=kept.columns if some else 0)
        walk = plan_kept(sizes, workspace_bytes)
        if walk is None:
            self.kept = None
        elif isinstance(walk, WholeWalk):
            self._whole_walk(walk, sizes)
        else:
            self._token_walk(walk.rest, sizes, self._prefix(kept, walk, sizes))
        return walk is not None

    def _prefix(self, kept: KeptLogits, walk: PrefixWalk, sizes: BackwardSizes) -> _Head:
        """G^T in place of the kept logits; their part of dE from all of it, then dC over it."""
        grad_input = self.sinks.input
        assert grad_input is not None
        total = InputSum(grad_input, self.sum_dtype, in_place=False, borrow=walk.rest.borrow)
        everything = _Strip(0, kept.columns, None)
        logits = self.logits.columns(0, kept.columns)
        out = kept.below_max.view(self.logits.input.dtype)
        _, grad_VN, _ = self._gradient(everything, logits, (0, out.shape[1]), out)
        for t0, t1, part in total.parts:
            self._product(part, _columns_of(grad_VN, t0, t1), logits.weight, None, False)
        strips = walk.strips(sizes, kept.columns)
        self._weight_over(grad_VN, strips, walk.strip)
        return _Head(kept.columns, total, None)

    def _walk_all(self, workspace_bytes: int) -> None:
        sizes = self._sizes()
        self._walk(plan_backward(sizes, workspace_bytes), sizes, None)

    def _walk(self, walks: tuple[Walk, ...], sizes: BackwardSizes, head: _Head | None) -> None:
        for walk in walks:
            if isinstance(walk, TokenWalk):
                self._token_walk(walk, sizes, head)
            elif isinstance(walk, WholeWalk):
                self._whole_walk(walk, sizes)
            elif isinstance(walk, TailWalk):
                self._tail_walk(walk, sizes)
            else:
                self._strip_walk(walk, bias=not sizes.need_input)

    def _sizes(self, *, taken: int = 0, late: int | None = None) -> BackwardSizes:
        """
        Args:
            taken: columns that are done already.
            late: rows of the far field's walk that its loan must hold; None if they are known.
        """
        num_tokens, _, hidden = self.logits.shape
        vocab = max(0, self.columns.count - taken)
        itemsize, wide = self.logits.input.element_size(), self.sum_dtype.itemsize
        dE, dC = self.sinks.input, self.sinks.weight
        gathers, copies = self.gathers, self.copies
        fixed = self.backend.tile_bytes(self.logits)
        fixed += self.left_bytes + (0 if self.far is None else self.far.nbytes)
        if self.eps is not None:
            fixed += BYTES_PER_ORDERED_ROW * vocab
        weight_row = lent_row = loan_columns = loan_bytes = 0
        gradient_row = gradient_pitch(num_tokens) * itemsize
        if dC is not None:
            if self.in_pieces:
                fixed += self._piece_rows(dC) * hidden * self._product_dtype(dC).itemsize
            elif not (self.direct or self.lists_tiles):
                weight_row = hidden * self._product_dtype(dC).itemsize
            fits = dC.is_contiguous() and hidden * dC.itemsize % itemsize == 0
            if fits and not (copies or self.sinks.accumulate_weight):
                if not gathers:
                    lent_row = hidden * dC.itemsize
                elif self.far is not None:
                    first_byte = self.far.late.first_byte
                    loan_columns = max(0, dC.nbytes - first_byte) // gradient_row
                    held = self.far.kept.home.shape[0] if late is None else late
                    loan_bytes = held * hidden * dC.itemsize
        sums_apart = dE is not None and dE.dtype != self.sum_dtype
        # The rows of dC as rows of the accumulator.
        holds = lent_row > 0 and weight_row == 0 and lent_row % wide == 0
        sum_row = hidden * wide * (sums_apart + copies)
        return BackwardSizes(
            tokens=num_tokens,
            vocab=vocab,
            hidden=hidden,
            element=itemsize + copies * wide,
            token_row=sum_row,
            single_row=sum_row if self.apart else 0,
            can_borrow=sums_apart and InputSum.can_borrow(dE, self.sum_dtype),
            token_tile=self.tile,
            can_hold=sums_apart and holds,
            strip_row=hidden * (gathers * itemsize + copies * wide),
            weight_row=weight_row,
            weight_accumulator=hidden * wide,
            weight_accumulates=dC is not None and dC.dtype == self.sum_dtype,
            lent_row=lent_row,
            gradient_row=gradient_row,
            loan_columns=loan_columns,
            loan_bytes=loan_bytes,
            sequential=self.far is not None,
            fixed=fixed,
            known=0 if self.kept is None or taken else min(self.kept.columns, vocab),
            need_input=dE is not None,
            need_weight=dC is not None,
        )

    def _product_dtype(self, grad_weight: Tensor) -> torch.dtype:
        """Of a temporary for a strip's rows of dC: dC's own if they are but copied."""
        untouched = self.unscale is None and self.eps is None and not self.sinks.accumulate_weight
        if untouched and not self.copies:
            return (
                grad_weight.dtype
                if grad_weight.dtype == self.logits.input.dtype
                else self.sum_dtype
            )
        return self.sum_dtype

    def _token_walk(self, walk: TokenWalk, sizes: BackwardSizes, head: _Head | None) -> None:
        """Token chunks outside, strips inside: dE and the bias gradient, and dC if it is asked."""
        grad_input, grad_weight = self.sinks.input, self.sinks.weight if walk.weight else None
        assert grad_input is not None
        vocab = self.columns.count
        loan = None if head is None else head.loan
        own_loan = loan is None and walk.loan
        if own_loan:
            assert grad_weight is not None and self.far is not None
            loan = _Loan(self.backend, grad_weight, self.far.kept)
        taken = 0
        if head is not None:
            taken = min(head.columns, vocab)
            if head.weight is not None:
                self._store_head(head, taken, loan)
        buffer = self._late_rows(walk.strip) if walk.loan else self._buffer(walk.strip, walk.chunk)
        single = walk.strip >= vocab and not self.apart
        chunks = self._token_chunks(walk.chunk)
        for n0, n1 in chunks:
            if head is not None:
                total = head.total
            else:
                part = rows_of(grad_input, n0, n1)
                total = InputSum(
                    part, self.sum_dtype, in_place=single, borrow=walk.borrow, tile=self.tile
                )
                if self.far is not None:
                    for t0, t1, part in total.parts:
                        self.far.start_input(part, (n0 + t0, n0 + t1))
            if taken == vocab:
                self._finish_input(total, (n0, n1))
            for start, stop in walk.strips(sizes):
                start, stop = start + taken, stop + taken
                strip, logits = self.columns.strip(start, stop)
                out = self._lent(start, stop) if stop - start > walk.strip else buffer
                logits, grad_VN, kept = self._gradient(strip, logits, (n0, n1), out)
                if self.far is not None:
                    self.far.subtract_stored(grad_VN, start, (n0, n1))
                if grad_weight is None or loan is not None:
                    self._add_bias(strip, grad_VN)  # else it comes with dC
                add = start > 0 or self.far is not None  # from a prefix on, `start` is not 0
                for t0, t1, part in total.parts:
                    tiles = kept if len(total.parts) == 1 or kept is None else kept.tokens(t0, t1)
                    self._product(part, _columns_of(grad_VN, t0, t1), logits.weight, tiles, add)
                if stop == vocab:
                    self._finish_input(total, (n0, n1))
                inputs = logits.input
                del logits  # gathered rows, before the temporaries of dC are made
                if loan is not None:
                    loan.store(start, self._weight_part(grad_VN, inputs))
                elif grad_weight is not None:
                    later = (n0, n1) != chunks[0] or self.sinks.accumulate_weight
                    self._add_weight(grad_weight, strip, grad_VN, inputs, kept, accumulate=later)
            del total  # before the next chunk's is allocated
        if loan is not None and own_loan:
            loan.settle()

    def _store_head(self, head: _Head, columns: int, loan: _Loan | None) -> None:
        """Put the rows of dC that the head made where they belong."""
        grad_weight, far, value = self.sinks.weight, self.far, head.weight
        assert grad_weight is not None and far is not None and value is not None
        head.weight, value = None, value[:columns]
        if loan is not None:
            loan.store(0, value)
            return
        accumulate = self.sinks.accumulate_weight
        self.backend.scatter_rows(
            grad_weight, far.kept.rows[:columns], value, accumulate=accumulate
        )

    def _finish_input(self, total: InputSum, tokens: tuple[int, int]) -> None:
        """Complete dE of a token chunk."""
        n0, n1 = tokens
        if self.far is not None:
            for t0, t1, part in total.parts:
                self.far.finish_input(part, (n0 + t0, n0 + t1))
        total.finish(self.unscale)
        self.finished += n1 - n0
        if self.finished == self.logits.shape[0]:
            self.sinks.input_done()

    def _token_chunks(self, width: int) -> list[tuple[int, int]]:
        """All tokens in chunks; that with the most of the tokens that are here comes first."""
        chunks = blocks(self.logits.shape[0], width)
        if self.arriving is None or len(chunks) == 1:
            return chunks
        own = self.arriving.own
        first = max(chunks, key=lambda each: min(each[1], own[1]) - max(each[0], own[0]))
        return [first, *(each for each in chunks if each != first)]

    def _whole_walk(self, walk: WholeWalk, sizes: BackwardSizes) -> None:
        """G^T at the end of dC's memory; dE from all of it, then dC over it, strip by strip."""
        grad_input, grad_weight = self.sinks.input, self.sinks.weight
        assert grad_input is not None and grad_weight is not None
        num_tokens, vocab, hidden = self.logits.shape
        everything = _Strip(0, vocab, None)
        first = vocab * (hidden * grad_weight.itemsize - sizes.gradient_row)
        shape, pitch = (vocab, num_tokens), gradient_pitch(num_tokens)
        out = memory_of(grad_weight, first, shape, self.logits.input.dtype, pitch)
        _, grad_VN, _ = self._gradient(everything, self.logits, (0, num_tokens), out)
        for n0, n1 in blocks(num_tokens, walk.chunk):
            part = rows_of(grad_input, n0, n1)
            total = InputSum(part, self.sum_dtype, in_place=not self.apart, borrow=False)
            for t0, t1, part in total.parts:
                strip_Vn = _columns_of(grad_VN, n0 + t0, n0 + t1)
                add_product(part, strip_Vn.t(), self.logits.weight, accumulate=False)
            total.finish(self.unscale)
            del total, part  # before dC's temporaries are allocated
        self.sinks.input_done()
        self._weight_over(grad_VN, walk.strips(sizes), walk.strip)

    def _weight_over(
        self, grad_VN: Tensor, strips: Iterable[tuple[int, int, bool]], width: int
    ) -> None:
        """dC of the first columns, in whose memory their G^T lies.

        Args:
            strips: (start, stop, whether G^T is copied out first).
            width: columns that are copied out at once.
        """
        grad_weight, num_tokens = self.sinks.weight, grad_VN.shape[1]
        assert grad_weight is not None
        buffer = None
        for start, stop, copied in strips:
            part = rows_of(grad_VN, start, stop)
            if copied:
                if buffer is None:
                    buffer = self._buffer(min(width, grad_VN.shape[0]), num_tokens)
                part = buffer[: stop - start, :num_tokens].copy_(part)
            strip = _Strip(start, stop, None)
            self._add_weight(grad_weight, strip, part, self.logits.input, None, accumulate=False)

    def _tail_walk(self, walk: TailWalk, sizes: BackwardSizes) -> None:
        """dE's sum in the last rows of dC; their part of dE first, their part of dC last."""
        grad_input, grad_weight = self.sinks.input, self.sinks.weight
        assert grad_input is not None and grad_weight is not None
        num_tokens, vocab, hidden = self.logits.shape
        apart = num_tokens - (borrowed_tokens(num_tokens) if walk.borrow else 0)
        first = aligned((vocab - walk.tail) * hidden * grad_weight.itemsize)
        held = memory_of(grad_weight, first, (apart, hidden), self.sum_dtype, hidden)
        total = InputSum(grad_input, self.sum_dtype, in_place=False, borrow=walk.borrow, held=held)
        tokens, buffer = (0, num_tokens), self._buffer(walk.strip, num_tokens)
        steps = [(start, stop, True) for start, stop in walk.ahead(sizes)]
        steps += [(start, stop, False) for start, stop in walk.front(sizes)]
        for start, stop, ahead in steps:
            strip, logits = self.columns.strip(start, stop)
            if ahead:
                out = self._lent_rows(0, stop - start)
            else:
                out = self._lent(start, stop) if stop - start > walk.strip else buffer
            logits, grad_VN, _ = self._gradient(strip, logits, tokens, out)
            add = (start, stop, ahead) != steps[0]
            for t0, t1, part in total.parts:
                self._product(part, _columns_of(grad_VN, t0, t1), logits.weight, None, add)
            if (start, stop, ahead) == steps[-1]:
                self._finish_input(total, tokens)
            if not ahead:
                self._add_weight(grad_weight, strip, grad_VN, logits.input, None, accumulate=False)
        for start, stop in walk.behind(sizes):
            strip, logits = self.columns.strip(start, stop)
            out = self._lent(start, stop) if stop - start > walk.strip else buffer
            logits, grad_VN, _ = self._gradient(strip, logits, tokens, out)
            self._add_weight(grad_weight, strip, grad_VN, logits.input, None, accumulate=False)

    def _strip_walk(self, walk: StripWalk, *, bias: bool) -> None:
        """Strips outside, token chunks inside: dC (and the bias gradient) with a sum in fp32."""
        grad_weight = self.sinks.weight
        num_tokens, _, hidden = self.logits.shape
        vocab = self.columns.count
        buffer = self._buffer(walk.strip, walk.chunk)
        whole = walk.chunk >= num_tokens
        for start, stop in blocks(vocab, walk.strip):
            strip, columns = self.columns.strip(start, stop)
            total = None
            if grad_weight is not None and not whole:
                shape = (stop - start, hidden)
                total = torch.zeros(shape, dtype=self.sum_dtype, device=grad_weight.device)
            for n0, n1 in blocks(num_tokens, walk.chunk):
                logits, grad_VN, kept = self._gradient(strip, columns, (n0, n1), buffer)
                if bias and (grad_weight is None or total is not None):
                    self._add_bias(strip, grad_VN)
                if total is not None:
                    self._weight_product(total, grad_VN, logits.input, kept, accumulate=True)
                elif grad_weight is not None:
                    add = self.sinks.accumulate_weight
                    inputs = logits.input
                    del logits, columns  # gathered rows, before the temporaries of dC are made
                    self._add_weight(
                        grad_weight, strip, grad_VN, inputs, kept, accumulate=add, bias=bias
                    )
            if total is not None and grad_weight is not None:
                if self.unscale is not None:
                    total *= self.unscale
                self._store(strip, grad_weight, total, accumulate=self.sinks.accumulate_weight)

    def _buffer(self, strip: int, chunk: int) -> Tensor:
        return self.logits.input.new_empty(strip, gradient_pitch(chunk))

    def _lent(self, start: int, stop: int) -> Tensor:
        """(stop - start, N) in the memory of the rows of dC after `stop`."""
        return self._lent_rows(stop, stop - start)

    def _late_rows(self, columns: int) -> Tensor:
        """(columns, N) in the memory of the late rows of dC."""
        assert self.far is not None
        return self._in_grad_weight(self.far.late.first_byte, columns)

    def _lent_rows(self, first_row: int, columns: int) -> Tensor:
        out = self.sinks.weight
        assert out is not None
        return self._in_grad_weight(aligned(first_row * out.shape[1] * out.itemsize), columns)

    def _in_grad_weight(self, first_byte: int, columns: int) -> Tensor:
        out = self.sinks.weight
        assert out is not None
        shape = (columns, self.logits.shape[0])
        return memory_of(out, first_byte, shape, self.logits.input.dtype, gradient_pitch(shape[1]))

    def _gradient(
        self, strip: _Strip, columns: LocalLogits, tokens: tuple[int, int], buffer: Tensor
    ) -> tuple[LocalLogits, Tensor, Any]:
        """The rectangle of a step, its gradient, and the backend's record of kept tiles."""
        logits = columns.tokens(*tokens)
        grad_VN = _columns_of(
            rows_of(buffer, 0, strip.stop - strip.start), 0, tokens[1] - tokens[0]
        )
        upstream, known, width = self.upstream.tokens(*tokens), 0, grad_VN.shape[0]
        if self.kept is not None and strip.start < self.kept.columns:
            known = min(self.kept.columns - strip.start, width)
            part = self.kept.tokens(*tokens)
            out = rows_of(grad_VN, 0, known)
            self.backend.grad_kept(part, strip.start, logits.columns(0, known), upstream, out, None)
            if known == width:
                return logits, grad_VN, None
        rest = logits.columns(known, width)
        out = rows_of(grad_VN, known, width)
        if self.arriving is None:
            return logits, grad_VN, self.backend.grad_logits(rest, upstream, out, self.eps)
        for start, stop, input in self.arriving.pieces(*tokens):
            start, stop = start - tokens[0], stop - tokens[0]
            piece = rest.tokens(start, stop)._replace(input=input)
            part = _columns_of(out, start, stop)
            self.backend.grad_logits(piece, upstream.tokens(start, stop), part, None)
        self.arriving = None
        return logits, grad_VN, None

    def _await_input(self) -> None:
        """Before the hidden states are read: all tokens must be there."""
        if self.arriving is not None:
            self.arriving.wait()
            self.arriving = None

    def _product(
        self, out: Tensor, grad_VN: Tensor, other: Tensor, kept: Any, accumulate: bool
    ) -> None:
        """out = or += G @ other."""
        if kept is None:
            add_product(out, grad_VN.t(), other, accumulate=accumulate)
        else:
            self.backend.sparse_product(
                out, grad_VN, other, kept, of_input=True, accumulate=accumulate
            )

    def _weight_product(
        self,
        out: Tensor,
        grad_VN: Tensor,
        inputs: Tensor,
        kept: Any,
        *,
        accumulate: bool,
        sums: Tensor | None = None,
    ) -> None:
        """out = or += G^T @ inputs, in the scale of G; sums += those of G^T's rows."""
        self._await_input()
        if kept is not None:
            self.backend.sparse_product(
                out, grad_VN, inputs, kept, of_input=False, accumulate=accumulate
            )
            return
        # A kernel's launch is worked out once for a size, and how many rows are gathered depends on
        # the data.
        product = weight_product if self.gathers else self.backend.weight_product
        product(out, grad_VN, inputs, accumulate=accumulate, sums=sums)

    def _add_weight(
        self,
        grad_weight: Tensor,
        strip: _Strip,
        grad_VN: Tensor,
        inputs: Tensor,
        kept: Any,
        *,
        accumulate: bool,
        bias: bool = True,
    ) -> None:
        """The strip's rows of dC = or += unscale * G^T E; and those of the bias gradient, if it is
        wanted and with `bias`."""
        if self.direct:
            part = rows_of(grad_weight, strip.start, strip.stop)
            sums = self.sinks.bias if bias else None
            if sums is not None:
                sums = rows_of(sums, strip.start, strip.stop)
            self._weight_product(part, grad_VN, inputs, None, accumulate=accumulate, sums=sums)
            return
        if bias:
            self._add_bias(strip, grad_VN)
        if self.in_pieces:
            for v0, v1 in blocks(grad_VN.shape[0], self._piece_rows(grad_weight)):
                rows = grad_weight[strip.start + v0 : strip.start + v1]
                self._add_piece(rows, grad_VN[v0:v1], inputs, accumulate=accumulate)
            return
        if kept is not None:
            self.backend.sparse_product(
                grad_weight, grad_VN, inputs, kept, of_input=False, accumulate=accumulate,
                rows=strip.rows, factor=self.unscale,
            )  # fmt: skip
            return
        part = self._weight_part(grad_VN, inputs)
        self._store(strip, grad_weight, part, accumulate=accumulate)

    def _piece_rows(self, grad_weight: Tensor) -> int:
        """Rows of dC that are made at once: whole tiles of a product, or as many as fit."""
        row = grad_weight.shape[1] * self._product_dtype(grad_weight).itemsize
        # Few rows make many products: twice the bytes before less than 16 rows.
        rows = max(self.piece_bytes // row, min(16, 2 * self.piece_bytes // row), 1)
        rows = min(rows, grad_weight.shape[0])
        return rows - rows % 128 if rows > 128 else rows

    def _add_piece(self, out: Tensor, grad_Vn: Tensor, inputs: Tensor, *, accumulate: bool) -> None:
        """Some rows of dC = or += unscale * G^T E: scaled, added and rounded in one go."""
        part = torch.empty(out.shape, dtype=self._product_dtype(out), device=out.device)
        self._weight_product(part, grad_Vn, inputs, None, accumulate=False)
        if self.unscale is None:
            out.add_(part) if accumulate else out.copy_(part)
        elif not accumulate:
            torch.mul(part, self.unscale, out=out)
        elif out.dtype == part.dtype:
            out.addcmul_(part, self.unscale)
        else:
            out.add_(part.mul_(self.unscale))

    def _weight_part(self, grad_VN: Tensor, inputs: Tensor) -> Tensor:
        """unscale * G^T E of a strip, in a tensor of its own."""
        assert self.sinks.weight is not None
        dtype = self._product_dtype(self.sinks.weight)
        shape = (grad_VN.shape[0], inputs.shape[1])
        part = torch.empty(shape, dtype=dtype, device=grad_VN.device)
        self._weight_product(part, grad_VN, inputs, None, accumulate=False)
        if self.unscale is not None:
            part *= self.unscale
        return part

    def _store(self, strip: _Strip, sink: Tensor, value: Tensor, *, accumulate: bool) -> None:
        """sink[rows of the strip] = or += value."""
        if strip.rows is not None:
            # Added in the wider dtype, rounded once.
            self.backend.scatter_rows(sink, strip.rows, value, accumulate=accumulate)
        elif accumulate:
            sink[strip.start : strip.stop].add_(value)
        else:
            sink[strip.start : strip.stop].copy_(value)

    def _add_bias(self, strip: _Strip, grad_VN: Tensor) -> None:
        if self.sinks.bias is None:
            return
        part = row_sums(grad_VN, self.sum_dtype)
        if self.unscale is not None:
            part *= self.unscale
        if strip.rows is None:
            self.sinks.bias[strip.start : strip.stop] += part
        else:
            self.sinks.bias.index_add_(0, strip.rows, part)  # distinct rows: no two meet


def _columns_of(matrix: Tensor, start: int, stop: int) -> Tensor:
    """matrix[:, start:stop], or the matrix itself where that is all."""
    return matrix if stop - start == matrix.shape[1] else matrix[:, start:stop]


def _into_range(
    logits: LocalLogits, upstream: LogitGradient
) -> tuple[LogitGradient, Tensor | None]:
    """Scale fp16's upstream gradient by a power of two into range; and the inverse factor.

    G is about grad / N, which fp16 would flush to zero. The largest |G| possible goes to about
    2^14; the factor stays on the device (no host sync)."""
    if logits.input.dtype != torch.float16 or logits.input.shape[0] == 0:
        return upstream, None
    lse_N = upstream.max_logit + upstream.log_sum
    bound_N = upstream.grad.abs() * (1 + (1 + 2 * upstream.z_loss * lse_N).abs())
    bound_N = torch.where(bound_N.isfinite(), bound_N, 0.0)
    bound = (bound_N * abs(logits.logit_scale)).amax().clamp(min=2.0**-100)
    scale = torch.exp2(14 - torch.ceil(torch.log2(bound)))
    return upstream.scaled(scale), 1 / scale


def gradients(
    backend: Backend,
    logits: LocalLogits,
    upstream: LogitGradient,
    sinks: GradientSinks,
    *,
    eps: float | None,
    far: FarField | None,
    kept: KeptLogits | None,
    arriving: TokenGather | None,
    workspace_bytes: int,
    kind: Kind,
) -> None:
    """Write this rank's gradients into `sinks`.

    Args:
        backend: tile functions to use.
        logits: all N tokens against all V local rows.
        upstream: gradient and global statistics per token.
        sinks: outputs; every element of a wanted one is written.
        eps: threshold of the paper's filter, or None.
        far: what the forward pass left for the far field, or None.
        kept: logits that it kept, or None; those in dC's memory are in that of `sinks.weight`, and
            both dE and dC are wanted.
        arriving: what fills `logits.input`, or None: it is there.
        workspace_bytes: cap on temporaries beyond the gradients.
        kind: of the call, if parts of it are to be replayed.
    """
    num_tokens, vocab, _ = logits.shape
    if num_tokens > 0 and vocab > 0:
        walked = _BackwardPass(backend, logits, upstream, sinks, eps, far, kept, arriving, kind)
        walked.run(workspace_bytes)
        return
    if sinks.input is not None:
        sinks.input.zero_()
        sinks.input_done()
    if sinks.weight is not None and not sinks.accumulate_weight:
        sinks.weight.zero_()
