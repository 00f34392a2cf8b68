"""How the backward pass cuts its work so that its temporaries fit a number of bytes.

The gradient of the logits, G, exists only for (token chunk, vocabulary strip) rectangles. There are
several ways to walk the (tokens, vocabulary) plane; each is priced in bytes moved beyond what no
way can avoid, and the cheapest that fits is taken:

- `TokenWalk`, all tokens at once: every strip's dC is complete at once, dE is summed over the
  strips in an fp32 accumulator. While most of dC is still to be written, its memory holds G (the
  strip is "lent"), so that strips are much wider than the workspace alone would allow.
- `TokenWalk`, the whole vocabulary per token chunk: dE is complete at once, dC is summed over the
  chunks where it is stored; needs a dC in fp32.
- `TokenWalk`, both cut: the smallest buffers.
- `WholeWalk`: all of G^T at the end of dC's memory (N <= D), neither sum is needed; dC is written
  from its start, and what of G^T is in the way by then is copied out strip by strip.
- `PrefixWalk`: where dC's memory holds kept logits of the first columns: their G^T in their place,
  and dC over it as above; then a `TokenWalk` of the other columns.
- `RunPlan`: the same of listed rows (the far field's), of the first of which logits are kept in the
  last rows of dC, beside dE's accumulator.
- `TailWalk`: dE's accumulator in the last rows of dC, whose logits are recomputed once more when dE
  is complete: where the workspace does not hold the accumulator, and the vocabulary is large beside
  N.
- two passes, one for dE and one for dC (`StripWalk`): one more recomputation of the logits.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

import functools
import math
from collections.abc import Iterator
from dataclasses import dataclass
from typing import NamedTuple

import torch

MIB = 1 << 20
MIN_WORKSPACE_BYTES = 1 * MIB
# The default is never less than half of the bf16 hidden states, within these bounds: with less,
# products become narrow where the vocabulary is small beside D.
_DEFAULT_FLOORS_BYTES = (16 * MIB, 64 * MIB)
_DEFAULT_SHARE = 0.05
# With a filter beside the order of the rows, their gathered copies and the sum of dE: with less,
# steps become hundreds where there are fewer than 8192 tokens or so, and a GPU waits for their
# launches. Measured on H200s at D 4096 and V 128256, random inputs, 512 and 2048 tokens, in
# products of the whole size: the far field 12.7 and 6.1 with 5% of the logits, 5.7 and 4.6 with
# this; the paper's filter 469 and 200, 33 and 9.9. Other floors are but counted, in launches of
# the far field's backward pass with a quarter of the tiles kept, at 1024, 2048 and 4096 tokens: 66,
# 58, 100 with 96 MiB; 70, 100, 230 with 64; 45, 159, 64 with 128.
_FILTERED_FLOOR_BYTES = 96 * MIB
_STRIP_STEP = 256
_TOKEN_STEP = 128
# A buffer of G is never wider than this; beyond, dE's accumulator is no longer what costs.
_WIDEST_BUFFER = 32768
# Where dC lends its memory, the buffer is for the last strips only: this many columns.
_LAST_STRIPS = 2048
# Of rows that are listed on the device: so many are taken before the host knows how many there are,
# at most this share of the vocabulary.
_HEAD_ROWS = 4096
_HEAD_SHARE = 1 / 8
# More than this of the exact pass's time, and the exact pass is taken, which is exact.
_WELL_BELOW = 0.75
# What the L2 cache of a GPU holds costs next to nothing to read and write again.
_IN_CACHE = 64 * MIB
# Numbers of rows kept by a filter that are walked alike.
_SIMILAR_ROWS = 1024
# Starts of lent rectangles are aligned for the tensor memory accelerator.
ALIGNMENT = 128
# Vectors of one number per token (statistics, losses, their intermediate values) that live beside
# the buffers.
_BYTES_PER_TOKEN = 64
# Operations that a Hopper GPU does in the time in which it moves one byte (650 TFLOP/s, 4 TB/s).
_FLOPS_PER_BYTE = 160
# Products lose about this many rows' worth of time at an edge (measured: 5% at 2048 columns).
_EDGE = 100
# Two products of half the tokens each instead of one (measured: 0% to 4%).
_HALVES = 0.03
# A launch or a product more, in bytes moved: about a microsecond, which decides at small sizes.
_STEP = 4 * MIB


def for_buffers(workspace_bytes: int, num_tokens: int) -> int:
    """Bytes left for buffers once the per-token vectors are paid for."""
    return workspace_bytes - min(_BYTES_PER_TOKEN * num_tokens, workspace_bytes // 2)


def default_workspace_bytes(
    num_tokens: int, hidden: int, vocab_size: int, *, filtered: bool = False
) -> int:
    """5% of the bf16 logits of the global vocabulary; at least 16 MiB, or half of the bf16 hidden
    states if that is more, up to 64 MiB; or with a filter 96 MiB."""
    least, most = _DEFAULT_FLOORS_BYTES
    floor = _FILTERED_FLOOR_BYTES if filtered else min(max(least, num_tokens * hidden), most)
    return max(floor, int(_DEFAULT_SHARE * 2 * num_tokens * vocab_size))


def aligned(first_byte: int) -> int:
    """The first byte from this one on at which a lent rectangle may start."""
    return -(-first_byte // ALIGNMENT) * ALIGNMENT


def gradient_pitch(num_tokens: int) -> int:
    """Elements from one row of G^T, or of kept logits, to the next: rows start aligned for the
    tensor memory accelerator."""
    return -(-num_tokens // 16) * 16


def columns_in_grad(
    num_tokens: int,
    grad_shape: tuple[int, int],
    grad_dtype: torch.dtype,
    tile: int,
    workspace_bytes: int,
) -> int:
    """How many columns' 16-bit logits the memory of dC is to hold: all, or as many whole tiles as
    fit; none where their tiles' maxima would take more than half of the workspace, or where it
    would not hold beside them the sum of dE that some of them ask for, taken to be in fp32 with a
    dE in 16 bits.

    Args:
        num_tokens: N.
        grad_shape, grad_dtype: (V, D), of dC.
        tile: columns per tile.
        workspace_bytes: cap of the backward pass.
    """
    vocab, hidden = grad_shape
    row, column = hidden * grad_dtype.itemsize, 2 * gradient_pitch(num_tokens)
    columns, beside = vocab, 0
    if column > row:
        columns = vocab * row // (column * tile) * tile
        # fp32 for half of the tokens, the others borrow; and two strips.
        beside = 2 * num_tokens * hidden + 2 * _STRIP_STEP * column
    maxima = -(-columns // tile) * num_tokens * 4
    fits = for_buffers(workspace_bytes, num_tokens) >= maxima + max(maxima, beside)
    return columns if fits else 0


def blocks(size: int, step: int) -> list[tuple[int, int]]:
    """[0, size) in pieces of `step`."""
    if 0 < size <= step:  # what it nearly always is, without the loop
        return [(0, size)]
    return [(start, min(start + step, size)) for start in range(0, size, step)]


class BackwardSizes(NamedTuple):
    """What the plan depends on, in elements and bytes.

    Attributes:
        tokens, vocab, hidden: N, V (local), D.
        element: bytes per element of G in a buffer, with the copies that products make of it.
        token_row: bytes per token of dE's accumulator, 0 where dE itself takes the sum.
        single_row: bytes per token of dE's temporary where one product makes it.
        can_borrow: whether half of dE's accumulator fits into dE's own memory.
        token_tile: tokens that must not be cut between the halves.
        can_hold: whether rows of dC that may hold G may hold dE's accumulator as well.
        strip_row: bytes per vocabulary row of a strip beside the buffer (gathered rows).
        weight_row: bytes per vocabulary row of a strip where a step makes dC, for a temporary as
            large as the strip's rows; 0 where there is none, or one of a few rows at a time.
        weight_accumulator: bytes per vocabulary row of dC's own accumulator.
        weight_accumulates: whether dC may be summed over token chunks where it is stored.
        lent_row: bytes per vocabulary row of dC that may hold G while dC is not written, or 0.
        gradient_row: bytes per vocabulary row of G^T for all tokens.
        loan_columns: columns of G^T that a fixed part of dC may hold during the walk, or 0.
        loan_bytes: bytes of what must be held elsewhere meanwhile.
        sequential: gathered rows are dropped before the temporaries of dC are made.
        fixed: bytes that do not depend on the cut: what lives during the whole pass, and the
            temporary for a few rows of dC at a time.
        known: columns, the first ones, whose logits are kept and need no recomputation.
        need_input, need_weight: which gradients are wanted.
    """

    tokens: int
    vocab: int
    hidden: int
    element: int
    token_row: int
    single_row: int
    can_borrow: bool
    token_tile: int
    can_hold: bool
    strip_row: int
    weight_row: int
    weight_accumulator: int
    weight_accumulates: bool
    lent_row: int
    gradient_row: int
    loan_columns: int
    loan_bytes: int
    sequential: bool
    fixed: int
    known: int
    need_input: bool
    need_weight: bool

    def sum_bytes(self, chunk: int, borrow: bool) -> int:
        """Of dE's accumulator for a walk with such chunks, beside what lies in dE."""
        if not borrow:
            return chunk * self.token_row
        # The last chunk is shorter, and may have fewer whole tiles to borrow for.
        chunks = chunk, self.tokens % chunk
        return max(n - borrowed_tokens(n, self.token_tile) for n in chunks) * self.token_row

    def step_row(self, weight: bool) -> int:
        """Bytes per vocabulary row of a strip beside its G."""
        if not weight:
            return self.strip_row
        if self.sequential:
            return max(self.strip_row, self.weight_row)
        return self.strip_row + self.weight_row

    def rounded(self) -> BackwardSizes:
        """A little larger: one plan for many calls whose sizes depend on the data."""
        vocab = max(1, -(-self.vocab // _SIMILAR_ROWS)) * _SIMILAR_ROWS
        return self._replace(vocab=vocab, loan_bytes=-(-self.loan_bytes // MIB) * MIB)

    @property
    def gemm(self) -> int:
        """One product of the whole size, in bytes moved in the same time."""
        return 2 * self.tokens * self.vocab * self.hidden // _FLOPS_PER_BYTE

    def logits(self, start: int, stop: int) -> int:
        """Price of making G of these columns once more: a product, or where their logits are kept
        reading them and writing it, in 16 bits each."""
        known = max(0, min(stop, self.known) - start)
        product = self.gemm * (stop - start - known) // max(1, self.vocab)
        return product + 4 * self.tokens * known

    def edges(self, *extents: float) -> int:
        """Price of products with short sides."""
        return int(self.gemm * sum(_EDGE / extent for extent in extents))


@dataclass(frozen=True, slots=True, kw_only=True)
class TokenWalk:
    """Token chunks outside, strips inside: dE, and dC with `weight`.

    Attributes:
        chunk: tokens per rectangle.
        strip: columns that the buffer holds, a multiple of 16 or all of them.
        weight: whether this walk makes dC.
        lent: strips are as wide as the memory of dC that they leave unwritten allows.
        loan: the buffer lies in the last rows of dC, which are written when the walk is done.
        borrow: half of dE's accumulator lies in dE itself.
    """

    chunk: int
    strip: int
    weight: bool
    lent: bool = False
    loan: bool = False
    borrow: bool = False

    def strips(self, sizes: BackwardSizes) -> Iterator[tuple[int, int]]:
        """(start, stop) of each strip."""
        if self.lent:
            return _lent_strips(sizes, self.strip, 0, sizes.vocab)
        return iter(blocks(sizes.vocab, self.strip))


def _lent_strips(
    sizes: BackwardSizes, least: int, first: int, last: int
) -> Iterator[tuple[int, int]]:
    """(start, stop) of strips of [first, last): as wide that G fits into the rows of dC after the
    strip's own and before `last`, but at least as wide as the buffer, which takes it then."""
    start = first
    while start < last:
        room = (last - start) * sizes.lent_row - ALIGNMENT
        width = room // (sizes.gradient_row + sizes.lent_row)
        width = max(least, width - width % _STRIP_STEP)
        yield start, min(start + width, last)
        start += width


@dataclass(frozen=True, slots=True)
class StripWalk:
    """Strips outside, token chunks inside: dC alone, summed in fp32 if there are several chunks.

    Attributes:
        strip: columns per rectangle.
        chunk: tokens per rectangle.
    """

    strip: int
    chunk: int


@dataclass(frozen=True, slots=True)
class WholeWalk:
    """All of G^T at the end of dC's memory.

    Attributes:
        strip: vocabulary rows that the buffer holds.
        chunk: tokens per product of dE.
    """

    strip: int
    chunk: int

    def strips(self, sizes: BackwardSizes) -> Iterator[tuple[int, int, bool]]:
        """(start, stop, whether G^T is copied out first) of each strip of dC, in their order."""
        row = sizes.lent_row or sizes.gradient_row
        return _overlaid_strips(sizes, self.strip, sizes.vocab, sizes.vocab * row)


def _overlaid_strips(
    sizes: BackwardSizes, buffer: int, columns: int, last_byte: int
) -> Iterator[tuple[int, int, bool]]:
    """(start, stop, whether G^T is copied out first) of strips of dC's first rows, in their order,
    where dC's memory holds G^T of as many columns, up to a byte.

    Args:
        buffer: columns that are copied out at once.
    """
    row = sizes.lent_row or sizes.gradient_row
    start = 0
    while start < columns:
        left = columns - start
        # Rows of dC from `start` on whose memory holds none of G^T's rows from `start` on.
        free = (last_byte - left * sizes.gradient_row) // row - start
        free = min(free - free % 16, left)
        # They make a strip if they are many, or if the buffer then holds what is left.
        enough = free >= buffer or left - free <= buffer
        copied = free < left and (left <= buffer or not enough)
        width = buffer if copied else free
        if sizes.weight_row:  # the product has a temporary, as wide as the strip
            width = min(width, buffer)
        yield start, min(start + width, columns), copied
        start += width


@dataclass(frozen=True, slots=True)
class PrefixWalk:
    """G^T of the first columns at the start of dC's memory, then the other columns.

    Attributes:
        strip: vocabulary rows that the buffer holds meanwhile.
        rest: the walk of the other columns, over all tokens at once.
    """

    strip: int
    rest: TokenWalk

    def strips(self, sizes: BackwardSizes, columns: int) -> Iterator[tuple[int, int, bool]]:
        """As those of a `WholeWalk`, of so many columns."""
        return _overlaid_strips(sizes, self.strip, columns, columns * sizes.gradient_row)


@dataclass(frozen=True, slots=True, kw_only=True)
class TailWalk:
    """All tokens at once; the last rows of dC, the tail, hold dE's accumulator until it is done.

    Attributes:
        tail: rows.
        strip: columns that the buffer holds, a multiple of 16.
        borrow: half of dE's accumulator lies in dE itself.
    """

    tail: int
    strip: int
    borrow: bool

    def ahead(self, sizes: BackwardSizes) -> list[tuple[int, int]]:
        """(start, stop) of each strip of the tail for dE, with G in the rows of dC before it."""
        front = sizes.vocab - self.tail
        width = (front * sizes.lent_row - ALIGNMENT) // sizes.gradient_row
        width = max(_STRIP_STEP, width - width % _STRIP_STEP)
        return [(front + start, front + stop) for start, stop in blocks(self.tail, width)]

    def front(self, sizes: BackwardSizes) -> Iterator[tuple[int, int]]:
        """(start, stop) of each strip of the rows before the tail, for dE and dC."""
        return _lent_strips(sizes, self.strip, 0, sizes.vocab - self.tail)

    def behind(self, sizes: BackwardSizes) -> Iterator[tuple[int, int]]:
        """(start, stop) of each strip of the tail for dC."""
        return _lent_strips(sizes, self.strip, sizes.vocab - self.tail, sizes.vocab)


Walk = TokenWalk | StripWalk | WholeWalk | TailWalk


def _fit(available: int, per_unit: int, size: int, step: int) -> int:
    """Largest count of units that fits, in [16, size], a multiple of `step` or at least of 16."""
    count = max(16, available // max(1, per_unit))
    count -= count % (step if count >= step else 16)
    return min(count, size)


@functools.lru_cache(maxsize=256)
def plan_backward(sizes: BackwardSizes, workspace_bytes: int) -> tuple[Walk, ...]:
    """The walks of one backward call, one after the other, in `workspace_bytes` of temporaries.

    No cut goes below 16 tokens by 16 rows, which a cap near the smallest allowed may not hold.
    """
    available = _available(sizes, workspace_bytes)
    if not sizes.need_input:
        return (_weight_only(sizes, available),)
    found: list[tuple[int, tuple[Walk, ...]]] = []
    for chunk in _chunks(sizes, available):
        for borrow in (False, True) if sizes.can_borrow else (False,):
            if sizes.need_weight and (chunk == sizes.tokens or sizes.weight_accumulates):
                found += _token_walk(sizes, available, chunk, weight=True, borrow=borrow)
            if not sizes.need_weight:
                found += _token_walk(sizes, available, chunk, weight=False, borrow=borrow)
    if sizes.need_weight:
        found += _whole_walk(sizes, available)
        found += _tail_walk(sizes, available)
        found += _two_passes(sizes, available)
    if not found:
        # The least that there is; plans that fit are preferred, however slow.
        chunk = min(16, sizes.tokens)
        return _least(sizes, available, chunk)
    return min(found, key=lambda each: each[0])[1]


@functools.lru_cache(maxsize=256)
def plan_kept(sizes: BackwardSizes, workspace_bytes: int) -> WholeWalk | PrefixWalk | None:
    """The walk where dC's memory holds kept logits of the first columns, or of all; None where the
    workspace does not hold what that takes, and all must be recomputed.

    Args:
        sizes: with the columns whose logits are not kept as the vocabulary; if there are none, with
            all columns.
    """
    available = _available(sizes, workspace_bytes)
    if sizes.lent_row == 0:
        return None
    if sizes.known >= sizes.vocab:
        for _, (walk,) in _whole_walk(sizes, available):
            assert isinstance(walk, WholeWalk)
            return walk
        return None
    # The sum of dE is there from the start.
    sizes = sizes._replace(known=0, single_row=sizes.token_row)
    found: list[tuple[int, TokenWalk]] = []
    for borrow in (False, True) if sizes.can_borrow else (False,):
        for price, walks in _token_walk(sizes, available, sizes.tokens, weight=True, borrow=borrow):
            assert isinstance(walks[0], TokenWalk)
            found.append((price, walks[0]))
    if not found:
        return None
    _, rest = min(found, key=lambda each: each[0])
    sums = sizes.sum_bytes(sizes.tokens, rest.borrow)
    per_row = sizes.gradient_row + sizes.weight_row
    strip = _fit(available - sums, per_row, _LAST_STRIPS, _STRIP_STEP)
    return PrefixWalk(strip, rest) if strip * per_row <= available - sums else None


@dataclass(frozen=True, slots=True)
class Head:
    """The first columns of a walk over all tokens at once, dE and dC.

    Attributes:
        columns: how many.
        borrow: half of dE's accumulator lies in dE itself.
    """

    columns: int
    borrow: bool


@functools.lru_cache(maxsize=256)
def plan_head(sizes: BackwardSizes, workspace_bytes: int, tile: int) -> Head | None:
    """Columns to begin with, a multiple of `tile`; or None if that does not fit well.

    Args:
        sizes: with the whole vocabulary.
    """
    available = _available(sizes, workspace_bytes)
    borrow = sizes.can_borrow and 4 * sizes.tokens * sizes.token_row > available
    room = available - sizes.sum_bytes(sizes.tokens, borrow)
    per_column = sizes.step_row(True)
    most = min(_HEAD_ROWS, int(_HEAD_SHARE * sizes.vocab))
    if sizes.loan_columns > 0:
        most = min(most, sizes.loan_columns)
    else:
        per_column += sizes.tokens * sizes.element
    columns = min(most, room // (2 * per_column))
    columns -= columns % tile
    return Head(columns, borrow) if columns > 0 else None


class RunPlan(NamedTuple):
    """A walk over listed rows, of the first of which dC's memory holds the kept logits.

    Attributes:
        strip: columns at a time of dC.
        held: late rows are held until the walk is done; or one strip is all of them.
        rest: the walk of the others, or None if there are none.
    """

    strip: int
    held: bool
    rest: TokenWalk | None


@functools.lru_cache(maxsize=256)
def rows_ahead(sizes: BackwardSizes, workspace_bytes: int, columns: int) -> int | None:
    """Rows to gather at a time for dE of so many columns; None if that does not fit well."""
    available = _available(sizes, workspace_bytes)
    rows = _fit(available, sizes.strip_row, columns, _STRIP_STEP)
    return rows if rows * sizes.strip_row <= available else None


@functools.lru_cache(maxsize=256)
def plan_run(sizes: BackwardSizes, workspace_bytes: int, run: int, rest: int) -> RunPlan | None:
    """None if that does not fit well.

    Args:
        sizes: with the others as the vocabulary, or with anything if there are none; the sum of dE
            lies in the memory of dC.
        run: columns whose logits are kept.
        rest: how many others there are.
    """
    sizes = sizes._replace(token_row=0)
    available = _available(sizes, workspace_bytes)
    if rest == 0 and run * sizes.weight_row <= available:
        return RunPlan(run, held=False, rest=None)
    room = available - sizes.loan_bytes
    strip = _even(_fit(room, sizes.weight_row, run, _STRIP_STEP), run)
    if strip * sizes.weight_row > room:
        return None
    if rest == 0:
        return RunPlan(strip, held=True, rest=None)
    found = _token_walk(sizes, available, sizes.tokens, weight=True, borrow=False)
    walks = [walk for _, (walk,) in found if isinstance(walk, TokenWalk) and walk.loan]
    return RunPlan(strip, held=True, rest=walks[0]) if walks else None


def _even(strip: int, size: int) -> int:
    """Equal strips instead of these: a short last one would be as slow as a long one."""
    count = -(-size // strip)
    return min(strip, -(-size // (_STRIP_STEP * count)) * _STRIP_STEP)


@functools.lru_cache(maxsize=256)
def plan_rest(sizes: BackwardSizes, workspace_bytes: int, borrow: bool) -> TokenWalk:
    """The walk of what a head left, with dE's accumulator as it is."""
    available = _available(sizes, workspace_bytes)
    found = _token_walk(sizes, available, sizes.tokens, weight=True, borrow=borrow)
    if found:
        (walk,) = min(found, key=lambda each: each[0])[1]
        assert isinstance(walk, TokenWalk)
        return walk
    return TokenWalk(chunk=sizes.tokens, strip=min(16, sizes.vocab), weight=True, borrow=borrow)


def pays(sizes: BackwardSizes, walks: tuple[Walk, ...], rows: int, *, run: int = 0) -> bool:
    """Whether walks over some of the rows are well below the exact pass over all.

    Args:
        sizes: of what is walked; what is done already does not count.
        rows: all of them.
        run: rows beside those, whose gradient of the logits is done.
    """
    product = 2 * sizes.tokens * sizes.hidden / _FLOPS_PER_BYTE  # of one row
    products = 1 + sizes.need_input + sizes.need_weight
    cost = (products + len(walks) - 1) * product * sizes.vocab
    cost += (products - 1) * product * run
    for walk in walks:
        if isinstance(walk, TokenWalk) and _sum_again(sizes) > _IN_CACHE:
            cost += max(0, -(-sizes.vocab // walk.strip) - 1) * _sum_again(sizes)
    return cost <= _WELL_BELOW * products * product * rows


def borrowed_tokens(tokens: int, tile: int = 1) -> int:
    """How many of the fp32 sums of so many 16-bit rows lie in those rows' own memory: half of them,
    cut where operands of products start aligned, and between tiles of so many tokens."""
    unit = math.lcm(8, tile)
    return tokens // 2 // unit * unit


def _sum_again(sizes: BackwardSizes) -> int:
    """Bytes to read and write the fp32 sum of dE."""
    return 8 * sizes.tokens * sizes.hidden


def _available(sizes: BackwardSizes, workspace_bytes: int) -> int:
    available = for_buffers(workspace_bytes, sizes.tokens)
    return available - min(sizes.fixed, 3 * available // 4)


def _chunks(sizes: BackwardSizes, available: int) -> list[int]:
    """Token chunks to try: all, halves of it, and the one that the whole vocabulary allows."""
    found, chunk = [], sizes.tokens
    while True:
        found.append(chunk)
        if chunk <= 16:
            break
        chunk = max(16, -(-chunk // 32) * 16)
    row = sizes.vocab * sizes.element + sizes.single_row
    whole = _fit(available - sizes.vocab * sizes.strip_row, row, sizes.tokens, _TOKEN_STEP)
    # Equal chunks: a short last one would be as slow as a long one.
    count = -(-sizes.tokens // whole)
    found.append(min(sizes.tokens, -(-sizes.tokens // (16 * count)) * 16))
    return sorted(set(found), reverse=True)


def _widest(sizes: BackwardSizes, chunk: int) -> int:
    """Columns of the widest buffer: however small the problem, none is as large as its logits."""
    if 2 * chunk <= sizes.tokens:
        return sizes.vocab
    return min(_WIDEST_BUFFER, max(16, -(-sizes.vocab // 32) * 16), sizes.vocab)


def _token_walk(
    sizes: BackwardSizes, available: int, chunk: int, *, weight: bool, borrow: bool
) -> list[tuple[int, tuple[Walk, ...]]]:
    """The walk with this chunk and its price, if it fits."""
    row = sizes.step_row(weight)
    widest = _widest(sizes, chunk)
    whole = chunk * (sizes.vocab * sizes.element + sizes.single_row) + sizes.vocab * row
    if widest == sizes.vocab and whole <= available and not borrow:
        walk = TokenWalk(chunk=chunk, strip=sizes.vocab, weight=weight)
        return [(_price(sizes, walk), (walk,))]
    room = available - sizes.sum_bytes(chunk, borrow)
    per_column = chunk * sizes.element + row
    found: list[tuple[int, tuple[Walk, ...]]] = []
    loan_room = room - sizes.loan_bytes
    if weight and chunk == sizes.tokens and sizes.loan_columns >= 16 and loan_room >= 16 * row:
        strip = _fit(loan_room, row, sizes.vocab, _STRIP_STEP)
        strip = _even(min(strip, sizes.loan_columns - sizes.loan_columns % 16), sizes.vocab)
        walk = TokenWalk(chunk=chunk, strip=strip, weight=True, loan=True, borrow=borrow)
        found.append((_price(sizes, walk), (walk,)))
    if room < min(16, sizes.vocab) * per_column:
        return found
    lent = weight and chunk == sizes.tokens and sizes.lent_row > 0 and sizes.weight_row == 0
    limit = min(widest, _LAST_STRIPS) if lent else widest
    strip = min(_fit(room, per_column, sizes.vocab, _STRIP_STEP), limit)
    walk = TokenWalk(chunk=chunk, strip=strip, weight=weight, lent=lent, borrow=borrow)
    return [*found, (_price(sizes, walk), (walk,))]


def _price(sizes: BackwardSizes, walk: TokenWalk) -> int:
    chunks = -(-sizes.tokens // walk.chunk)
    strips = sum(1 for _ in walk.strips(sizes)) if walk.lent else -(-sizes.vocab // walk.strip)
    wide = 8 * sizes.hidden  # bytes to read and write a row of fp32 numbers
    price = (strips - 1) * _sum_again(sizes) + sizes.edges(walk.chunk, sizes.vocab / strips)
    # G and dE of each rectangle, and dC.
    price += (2 + walk.weight) * chunks * strips * _STEP
    if walk.weight:
        price += (chunks - 1) * sizes.vocab * wide
    return price + int(walk.borrow * _HALVES * sizes.gemm)


def _whole_walk(sizes: BackwardSizes, available: int) -> list[tuple[int, tuple[Walk, ...]]]:
    if not 0 < sizes.gradient_row <= sizes.lent_row:
        return []
    per_row = sizes.gradient_row + sizes.weight_row
    widest = max(16, -(-sizes.vocab // 32) * 16)
    strip = min(_fit(available, per_row, sizes.vocab, _STRIP_STEP), widest, 2 * _LAST_STRIPS)
    if strip * per_row > available:
        return []
    chunk = sizes.tokens
    if sizes.single_row:
        chunk = _fit(available, sizes.single_row, sizes.tokens, _TOKEN_STEP)
    walk = WholeWalk(strip, chunk)
    strips = list(walk.strips(sizes))
    copied = sum(stop - start for start, stop, copied in strips if copied)
    price = 2 * copied * sizes.gradient_row + sizes.edges(chunk, sizes.vocab / len(strips)) // 2
    # G, dE of each chunk, dC of each strip, and the copies.
    price += (1 - -sizes.tokens // chunk + sum(1 + copied for *_, copied in strips)) * _STEP
    return [(price, (walk,))]


def _tail_walk(sizes: BackwardSizes, available: int) -> list[tuple[int, tuple[Walk, ...]]]:
    if not sizes.can_hold:
        return []
    held = sizes.sum_bytes(sizes.tokens, sizes.can_borrow) + ALIGNMENT
    tail = 16 * -(-held // (16 * sizes.lent_row))
    # At least one strip of the tail must fit into the rows before it.
    if (sizes.vocab - tail) * sizes.lent_row < _STRIP_STEP * sizes.gradient_row + ALIGNMENT:
        return []
    row = sizes.gradient_row
    widest = min(_widest(sizes, sizes.tokens), _LAST_STRIPS)
    strip = min(_fit(available, row, sizes.vocab, _STRIP_STEP), widest)
    if strip * row > available:
        return []
    walk = TailWalk(tail=tail, strip=strip, borrow=sizes.can_borrow)
    sums = len(walk.ahead(sizes)) + sum(1 for _ in walk.front(sizes))
    writes = sum(1 for _ in walk.front(sizes)) + sum(1 for _ in walk.behind(sizes))
    price = sizes.logits(sizes.vocab - tail, sizes.vocab) + (sums - 1) * _sum_again(sizes)
    price += sizes.edges(sizes.tokens, sizes.vocab / max(sums, writes))
    price += int(sizes.can_borrow * _HALVES * sizes.gemm) + 2 * (sums + writes) * _STEP
    return [(price, (walk,))]


def _two_passes(sizes: BackwardSizes, available: int) -> list[tuple[int, tuple[Walk, ...]]]:
    alone = sizes._replace(need_weight=False)
    found: list[tuple[int, tuple[Walk, ...]]] = []
    for chunk in _chunks(alone, available):
        found += _token_walk(alone, available, chunk, weight=False, borrow=False)
    if not found:
        return []
    price, walks = min(found, key=lambda each: each[0])
    second = _weight_only(sizes, available)
    rectangles = -(-sizes.vocab // second.strip) * -(-sizes.tokens // second.chunk)
    price += sizes.logits(0, sizes.vocab) + 2 * rectangles * _STEP
    return [(price, (*walks, second))]


def _weight_only(sizes: BackwardSizes, available: int) -> StripWalk:
    """dC alone."""
    row = sizes.step_row(True)
    per_column = sizes.tokens * sizes.element + row
    widest = _widest(sizes, sizes.tokens)
    strip = min(_fit(available, per_column, sizes.vocab, _STRIP_STEP), widest)
    good = min(_STRIP_STEP, widest)
    if strip >= good and strip * per_column <= available:
        return StripWalk(strip, sizes.tokens)
    row += sizes.weight_accumulator
    strip = min(_fit(available // 2, row, sizes.vocab, _STRIP_STEP), widest)
    chunk = _fit(available - strip * row, strip * sizes.element, sizes.tokens, _TOKEN_STEP)
    return StripWalk(strip, chunk)


def _least(sizes: BackwardSizes, available: int, chunk: int) -> tuple[Walk, ...]:
    strip = min(16, sizes.vocab)
    if sizes.need_weight and not sizes.weight_accumulates:
        walk = TokenWalk(chunk=chunk, strip=strip, weight=False)
        return walk, _weight_only(sizes, available)
    return (TokenWalk(chunk=chunk, strip=strip, weight=sizes.need_weight),)
