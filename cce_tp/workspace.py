"""How the backward pass cuts its work so that its temporaries fit a number of bytes.

The gradient of the logits exists only as a buffer of (token chunk, vocabulary strip). One pass
over all strips with every token in the chunk gives both dE and dC for one recomputation of the
logits; it needs an fp32 accumulator for dE. Where that does not fit, tokens are taken in chunks,
and a 16-bit dC, which must not be summed over chunks in 16 bits, gets a second pass of its own
(one more recomputation), with strips outside and tokens inside.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass

MIB = 1 << 20
MIN_WORKSPACE_BYTES = 1 * MIB
_DEFAULT_FLOOR_BYTES = 16 * MIB
_DEFAULT_SHARE = 0.05
# The wider the strip, the fewer times dE's accumulator is read and written; wider was not tried.
_WIDEST_STRIP = 8192
_STRIP_STEP = 256
_TOKEN_STEP = 128
# Below this width the products are so slow that memory is better spent on a second recomputation.
_NARROWEST_GOOD_STRIP = 512
# Vectors of one number per token (statistics, losses, their intermediate values) that live beside
# the buffers.
_BYTES_PER_TOKEN = 64


def for_buffers(workspace_bytes: int, num_tokens: int) -> int:
    """Bytes left for buffers once the per-token vectors are paid for."""
    return workspace_bytes - min(_BYTES_PER_TOKEN * num_tokens, workspace_bytes // 2)


def default_workspace_bytes(num_tokens: int, vocab_size: int) -> int:
    """5% of the bf16 logits of the global vocabulary, but at least 16 MiB."""
    return max(_DEFAULT_FLOOR_BYTES, int(_DEFAULT_SHARE * 2 * num_tokens * vocab_size))


@dataclass(frozen=True, slots=True)
class Walk:
    """Sizes of one pass over the (tokens, vocabulary) rectangle.

    Attributes:
        chunk: tokens per gradient buffer.
        strip: vocabulary columns per gradient buffer, a multiple of 16 or all of them.
    """

    chunk: int
    strip: int


def blocks(size: int, step: int) -> list[tuple[int, int]]:
    """[0, size) in pieces of `step`."""
    return [(start, min(start + step, size)) for start in range(0, size, step)]


@dataclass(frozen=True, slots=True)
class BackwardPlan:
    """Passes of one backward call.

    Attributes: input: the pass that makes dE, or None if dE is not wanted. weight: the pass that
        makes dC alone, or None if the first pass makes it or it is not wanted.
    """

    input: Walk | None
    weight: Walk | None


@dataclass(frozen=True, slots=True, kw_only=True)
class BackwardSizes:
    """What the plan depends on, in elements and bytes.

    Attributes: tokens, vocab: N, V (local). element: bytes per element of the gradient buffer.
        token_row: bytes per token of a chunk beside the buffer (dE's accumulator). strip_row:
        bytes per vocabulary row of a strip beside the buffer (gathered rows). weight_row: bytes
        per vocabulary row of a strip where a step makes dC (its temporaries). weight_accumulator:
        bytes per vocabulary row of dC's own accumulator. weight_accumulates: whether dC may be
        summed over token chunks where it is stored (fp32, fp64). fixed: bytes that live during
        the whole pass and do not depend on the cut. need_input, need_weight: which gradients are
        wanted.
    """

    tokens: int
    vocab: int
    element: int
    token_row: int
    strip_row: int
    weight_row: int
    weight_accumulator: int
    weight_accumulates: bool
    fixed: int
    need_input: bool
    need_weight: bool


def _fit(available: int, per_unit: int, size: int, step: int) -> int:
    """Largest count of units that fits, in [16, size], a multiple of `step` or at least of 16."""
    count = max(16, available // max(1, per_unit))
    count -= count % (step if count >= step else 16)
    return min(count, size)


def plan_backward(sizes: BackwardSizes, workspace_bytes: int) -> BackwardPlan:
    """Cut the backward pass to `workspace_bytes` of temporaries.

    No cut goes below 16 tokens by 16 rows, which a cap near the smallest allowed may not hold.
    """
    available = for_buffers(workspace_bytes, sizes.tokens)
    available -= min(sizes.fixed, 3 * available // 4)
    # Half of the vocabulary at most: however small the problem, nothing is as large as its logits.
    widest = min(_WIDEST_STRIP, max(16, -(-sizes.vocab // 32) * 16), sizes.vocab)
    good = min(_NARROWEST_GOOD_STRIP, widest)

    def strip_for(chunk: int, room: int, row: int) -> int:
        return min(_fit(room, chunk * sizes.element + row, sizes.vocab, _STRIP_STEP), widest)

    def fits(room: int, row: int) -> bool:
        return room >= good * (sizes.tokens * sizes.element + row)

    both_rows = sizes.strip_row + (sizes.weight_row if sizes.need_weight else 0)
    if sizes.need_input:
        left = available - sizes.tokens * sizes.token_row
        if fits(left, both_rows):
            return BackwardPlan(Walk(sizes.tokens, strip_for(sizes.tokens, left, both_rows)), None)
        one_pass = not sizes.need_weight or sizes.weight_accumulates
        row = both_rows if one_pass else sizes.strip_row
        # Half the bytes for what a token chunk holds, half for its gradient buffer.
        chunk = _fit(
            available // 2, max(sizes.token_row, good * sizes.element), sizes.tokens, _TOKEN_STEP
        )
        walk = Walk(chunk, strip_for(chunk, available - chunk * sizes.token_row, row))
        return BackwardPlan(walk, None if one_pass else _weight_walk(sizes, available, widest))
    return BackwardPlan(None, _weight_walk(sizes, available, widest))


def _weight_walk(sizes: BackwardSizes, available: int, widest: int) -> Walk:
    row = sizes.strip_row + sizes.weight_row
    strip = min(
        _fit(available, sizes.tokens * sizes.element + row, sizes.vocab, _STRIP_STEP), widest
    )
    if strip >= min(_NARROWEST_GOOD_STRIP, widest):
        return Walk(sizes.tokens, strip)
    row += sizes.weight_accumulator
    strip = min(_fit(available // 2, row, sizes.vocab, _STRIP_STEP), widest)
    chunk = _fit(available - strip * row, strip * sizes.element, sizes.tokens, _TOKEN_STEP)
    return Walk(chunk, strip)
