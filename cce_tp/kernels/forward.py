"""Forward pass: per-token statistics of this rank's logits, which are never stored.

Kernel 1 computes one logits tile at a time and stores, per (tile, token), the maximum m and the
sum of exp(x - m) (and, on request, the sum of x, the entropy term, the argmax); the tile that has a
token's target also stores its logit. Kernel 2 joins the tiles of a token. Every output element has
one writer: no locks, no atomics, equal bits in every run.

Legend: N tokens, V vocabulary rows of this rank, D hidden size, T vocabulary tiles of a launch.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cce_tp import stats
from cce_tp.kernels import tuning
from cce_tp.kernels.launch import LogitsForm, Prepared, prepared
from cce_tp.kernels.tile import (
    LOG2E,
    exp_below,
    grouped_block,
    logits_tile,
    store_tile,
    target_column,
)
from cce_tp.kernels.tuning import ceil_div
from cce_tp.problem import KeptLogits, LocalLogits, rows_of
from cce_tp.stats import StatRows
from cce_tp.workspace import blocks, for_buffers


@triton.jit
def mask_columns(x, in_tile, first_col, V, BLOCK_V: tl.constexpr, MASK_ALL: tl.constexpr):
    """A tile of logits with -inf beyond V; in_tile (BLOCK_V,): the columns less first_col.

    MASK_ALL: the mask also where nothing is beyond V. Without it what follows reads the accumulator
    itself, and in Triton's kernel the matrix instructions of the next tile wait for it (1.38 gemm
    and not 1.07). But it is half of all instructions here."""
    if MASK_ALL:
        return tl.where((first_col + in_tile < V)[None, :], x, float("-inf"))
    if first_col + BLOCK_V > V:
        x = tl.where((first_col + in_tile < V)[None, :], x, float("-inf"))
    return x


@triton.jit
def logit_sums(x, in_tile, first_col, V, BLOCK_V: tl.constexpr, MASK_ALL: tl.constexpr):
    """Of a tile before `mask_columns`, with its arguments: the sum of each row's logits."""
    if MASK_ALL:
        return tl.sum(tl.where((first_col + in_tile < V)[None, :], x, 0.0), axis=1)
    if first_col + BLOCK_V > V:
        sums = tl.sum(tl.where((first_col + in_tile < V)[None, :], x, 0.0), axis=1)
    else:
        sums = tl.sum(x, axis=1)
    return sums


@triton.jit
def targets_here(target_ptr, rows, first_col, N, V, first_id, BLOCK_V: tl.constexpr):
    """Of the tokens `rows`: the target's column less first_col, whether it is in this tile, and
    whether any is."""
    target = target_column(target_ptr, rows, N, first_id, V) - first_col
    here = (target >= 0) & (target < BLOCK_V)
    return target, here, tl.max(here.to(tl.int32), axis=0) > 0


@triton.jit
def store_target_logits(x, rows, in_tile, targets, merged_ptr, N):
    """From a masked tile and its `targets_here`."""
    target, here, any_here = targets
    # Most tiles hold no target: a branch costs less than a search of each. It must not read the
    # accumulator itself, or the matrix instructions of the next tile wait for it.
    if any_here:
        found = tl.where(in_tile[None, :] == target[:, None], x, 0.0)
        tl.store(merged_ptr + 2 * N + rows, tl.sum(found, axis=1), mask=here)


@triton.jit
def row_maxima(x):
    """Of a masked tile, and what exponentials are taken below."""
    max_x = tl.max(x, axis=1)
    return max_x, tl.where(max_x == float("-inf"), 0.0, max_x)


@triton.jit
def below_base(x, base, CLAMP: tl.constexpr):
    """What is kept of a tile of logits, fp16; CLAMP where a large cap may leave them further apart
    than fp16 can say."""
    below = x - base[:, None]
    if CLAMP:
        # An infinity would be one in the cap's derivative; NaN stays.
        below = tl.where(below < -65504.0, -65504.0, below)
    return below.to(tl.float16)


@triton.jit
def store_statistics(
    x,
    sum_x,
    max_x,
    base,
    rows,
    in_tile,
    block_v,
    ids_ptr,
    tiles_ptr,
    N,
    V,
    logit_softcap,
    ROWS: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    SORTED: tl.constexpr,
    MASSES: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """All statistics of a masked tile, into tile number block_v of tiles_ptr; sum_x (tokens,) of
    the logits themselves, with LOGIT_SUM."""
    exp_x, mend = exp_below(x, base)
    cols = block_v * BLOCK_V + in_tile
    in_range = (cols < V)[None, :]
    out = tiles_ptr + block_v.to(tl.int64) * ROWS * N + rows
    valid = rows < N
    tl.store(out, max_x, mask=valid)
    tl.store(out + N, tl.sum(exp_x, axis=1) * mend, mask=valid)
    out += 2 * N
    if LOGIT_SUM:
        tl.store(out, sum_x, mask=valid)
        out += N
    if ENTROPY:
        weighted = exp_x * tl.where(exp_x > 0, x - base[:, None], 0.0)
        tl.store(out, tl.sum(weighted, axis=1) * mend, mask=valid)
        out += N
    if ARGMAX:
        ids = cols
        if SORTED:
            # The lowest id among equals, which need not be the first column.
            ids = tl.load(ids_ptr + cols, mask=cols < V, other=2147483647).to(tl.int32)
        largest = (x == max_x[:, None]) & in_range
        best = tl.min(tl.where(largest, ids[None, :], 2147483647), axis=1)
        tl.store(out, best.to(tl.float32, bitcast=True), mask=valid)
        out += N
    if MASSES:
        tl.store(out, tl.sum(exp_x * exp_x, axis=1) * (mend * mend), mask=valid)
        if HAS_SOFTCAP:
            capped = x * (1.0 / logit_softcap)
            slope = tl.where(in_range, 1.0 - capped * capped, 0.0)
            tl.store(out + N, tl.sum(exp_x * slope, axis=1) * mend, mask=valid)
            tl.store(out + 2 * N, tl.sum(slope, axis=1), mask=valid)


@triton.jit(do_not_specialize=["first_id"])
def tile_statistics_kernel(
    input,
    weight,
    bias_ptr,
    target_ptr,
    ids_ptr,
    keep,
    tiles_ptr,
    merged_ptr,
    N,
    V,
    D,
    stride_input,
    stride_weight,
    stride_keep,
    keep_V,
    first_id,
    logit_scale,
    logit_softcap,
    NUM_PROGRAMS: tl.constexpr,
    ROWS: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    SORTED: tl.constexpr,
    MASSES: tl.constexpr,
    KEEP: tl.constexpr,
    KEEP_DESCRIPTOR: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE_CAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """tiles_ptr is (T, ROWS, N) fp32; row 2 of merged_ptr takes the targets' logits.

    With SORTED the columns are in another order than their ids, which are in ids_ptr (V,). MASSES
    adds rows for the far field: the sum of exp(x - m)^2; and with a cap the sum of its derivative,
    weighted by exp(x - m) and not. With KEEP keep (keep_V, N) takes x - m of the first columns,
    transposed, in fp16."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), blocks_n * blocks_v, NUM_PROGRAMS, flatten=True):
        block_n, block_v = grouped_block(tile, blocks_n, blocks_v, GROUP_N)
        x = logits_tile(
            input, weight, bias_ptr, block_n * BLOCK_N, block_v * BLOCK_V, N, V, D,
            stride_input, stride_weight, logit_scale, logit_softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, PRECISE_CAP, DESCRIPTOR,
            PRECISION,
        )  # fmt: skip
        rows = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        in_tile = tl.arange(0, BLOCK_V)
        first_col = block_v * BLOCK_V
        # Before the mask: from the masked tile it costs 0.06 of a forward pass more.
        sum_x = 0.0
        if LOGIT_SUM:
            sum_x = logit_sums(x, in_tile, first_col, V, BLOCK_V, True)
        x = mask_columns(x, in_tile, first_col, V, BLOCK_V, True)
        targets = targets_here(target_ptr, rows, first_col, N, V, first_id, BLOCK_V)
        store_target_logits(x, rows, in_tile, targets, merged_ptr, N)
        max_x, base = row_maxima(x)
        if KEEP:
            if block_v * BLOCK_V < keep_V:
                # A cap that needs no precise tangent is at most 50, far from where fp16 ends.
                store_tile(
                    keep, block_v * BLOCK_V, block_n * BLOCK_N, keep_V, N, stride_keep,
                    tl.trans(below_base(x, base, PRECISE_CAP)), BLOCK_V, BLOCK_N, KEEP_DESCRIPTOR,
                )  # fmt: skip
        store_statistics(
            x, sum_x, max_x, base, rows, in_tile, block_v, ids_ptr, tiles_ptr, N, V, logit_softcap,
            ROWS, LOGIT_SUM, ENTROPY, ARGMAX, SORTED, MASSES, HAS_SOFTCAP, BLOCK_V,
        )  # fmt: skip


@triton.jit(do_not_specialize=["first_id"])
def merge_tiles_kernel(
    tiles_ptr,
    target_ptr,
    merged_ptr,
    maxima_ptr,
    N,
    V,
    T,
    kept_T,
    stride_maxima,
    first_id,
    ROWS: tl.constexpr,
    LOGIT_SUM: tl.constexpr,
    ENTROPY: tl.constexpr,
    ARGMAX: tl.constexpr,
    KEEP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """`stats.merge`, streamed: (T, ROWS, N) tile statistics to the packed (rows, N).

    Row 2 holds the targets' logits where a target is among these V rows, and anything elsewhere.
    With KEEP maxima_ptr (kept_T, N) takes what the kept logits of the first tiles are below."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    valid = rows < N
    stride_tile = ROWS * N
    running_max = tl.full((BLOCK_N,), float("-inf"), dtype=tl.float32)
    running_sum = tl.zeros((BLOCK_N,), dtype=tl.float32)
    sum_x = tl.zeros((BLOCK_N,), dtype=tl.float32)
    weighted = tl.zeros((BLOCK_N,), dtype=tl.float32)
    best = tl.full((BLOCK_N,), 2147483647, dtype=tl.int32)
    for start in range(0, T, BLOCK_T):
        tile = start + tl.arange(0, BLOCK_T)
        mask = (tile < T)[:, None] & valid[None, :]
        part = tiles_ptr + tile.to(tl.int64)[:, None] * stride_tile + rows[None, :]
        part_max = tl.load(part, mask=mask, other=float("-inf"))
        part_sum = tl.load(part + N, mask=mask, other=0.0)
        if KEEP:
            # 0 for a tile of -inf alone, as in `row_maxima`.
            part_base = tl.where(part_max == float("-inf"), 0.0, part_max)
            at = tile.to(tl.int64)[:, None] * stride_maxima + rows[None, :]
            tl.store(maxima_ptr + at, part_base, mask=mask & (tile < kept_T)[:, None])
        part += 2 * N
        new_max = tl.maximum(running_max, tl.max(part_max, axis=0))
        base = tl.where(new_max == float("-inf"), 0.0, new_max)
        shift = part_max - base[None, :]
        scale = tl.exp2(shift * LOG2E)
        running_shift = running_max - base
        running_scale = tl.exp2(running_shift * LOG2E)
        if LOGIT_SUM:
            sum_x += tl.sum(tl.load(part, mask=mask, other=0.0), axis=0)
            part += N
        if ENTROPY:
            moved = scale * (tl.load(part, mask=mask, other=0.0) + shift * part_sum)
            moved = tl.where(scale == 0.0, 0.0, moved)  # 0 * -inf
            kept = running_scale * (weighted + running_shift * running_sum)
            kept = tl.where(running_scale == 0.0, 0.0, kept)
            weighted = kept + tl.sum(moved, axis=0)
            part += N
        if ARGMAX:
            ids = tl.load(part, mask=mask, other=0.0).to(tl.int32, bitcast=True)
            ids = tl.min(tl.where(part_max == new_max[None, :], ids, 2147483647), axis=0)
            best = tl.minimum(tl.where(running_max == new_max, best, 2147483647), ids)
        running_sum = running_sum * running_scale + tl.sum(scale * part_sum, axis=0)
        running_max = new_max
    out = merged_ptr + rows
    tl.store(out, running_max, mask=valid)
    tl.store(out + N, running_sum, mask=valid)
    here = target_column(target_ptr, rows, N, first_id, V) >= 0
    target_x = tl.load(out + 2 * N, mask=here, other=0.0)
    tl.store(out + 2 * N, target_x, mask=valid)
    out += 3 * N
    if LOGIT_SUM:
        tl.store(out, sum_x, mask=valid)
        out += N
    if ENTROPY:
        tl.store(out, weighted, mask=valid)
        out += N
    if ARGMAX:
        # Columns of the launch become global ids; a token without a finite logit keeps the "no
        # id" mark.
        ids = tl.where(best == 2147483647, best, best + first_id.to(tl.int32))
        tl.store(out, ids.to(tl.float32, bitcast=True), mask=valid)


def statistics(
    logits: LocalLogits, rows: StatRows, workspace_bytes: int, kept: KeptLogits | None
) -> Tensor:
    """Statistics of this rank's logits for every token.

    Args:
        logits: N tokens against all V local rows; fp16, bf16 or fp32.
        rows: optional statistics to compute.
        workspace_bytes: cap on the tile statistics; more tiles than fit are taken in several
            launches.
        kept: takes the logits of the first columns, or None.

    Returns:
        (rows.count, N) fp32 packed statistics, local to this rank (see `cce_tp.stats`).
    """
    num_tokens, vocab, _ = logits.shape
    if num_tokens == 0 or vocab == 0:
        return stats.empty_statistics(num_tokens, rows, like=logits.input, dtype=torch.float32)
    config, _ = tuning.config_for(logits.input)
    bytes_per_tile = (rows.count - 1) * num_tokens * 4
    available = for_buffers(workspace_bytes, num_tokens)
    tiles_per_launch = max(1, available // bytes_per_tile)
    columns_per_launch = tiles_per_launch * config.block_v
    merged = None
    keeps = 0 if kept is None else kept.columns
    pieces = [(start, stop) for start, stop in blocks(keeps, columns_per_launch)]
    pieces += [(keeps + a, keeps + b) for a, b in blocks(vocab - keeps, columns_per_launch)]
    for start, stop in pieces:
        keep = maxima = None
        if kept is not None and start < keeps:
            keep = rows_of(kept.below_max, start, stop)
            maxima = rows_of(kept.tile_max, start // kept.tile, ceil_div(stop, kept.tile))
        part = logits.columns(start, stop)
        num_tiles = ceil_div(stop - start, config.block_v)
        tiles, found = empty_tiles(num_tiles, num_tokens, rows, logits.input)
        tile_statistics(part, rows, tiles, found, keep=keep)
        merge_tiles(part.target, part.first_id, stop - start, rows, tiles, found, maxima=maxima)
        del tiles  # before the next launch's are allocated
        merged = found if merged is None else stats.merge(torch.stack([merged, found]), rows)
    assert merged is not None
    return merged


def empty_tiles(
    num_tiles: int, num_tokens: int, rows: StatRows, like: Tensor, *, more: int = 0
) -> tuple[Tensor, Tensor]:
    """Unfilled (T, tile rows, N) tile statistics, `more` rows than usual, and (rows, N), fp32."""
    per_tile = rows.count - 1 + more  # the target's logit is not kept per tile
    tiles = like.new_empty((num_tiles, per_tile, num_tokens), dtype=torch.float32)
    return tiles, like.new_empty((rows.count, num_tokens), dtype=torch.float32)


def tile_statistics(
    logits: LocalLogits,
    rows: StatRows,
    tiles: Tensor,
    merged: Tensor,
    *,
    ids: Tensor | None = None,
    masses: bool = False,
    keep: Tensor | None = None,
) -> None:
    """Fill the tile statistics of some columns, and their targets' logits in row 2 of `merged`.

    Args:
        logits: N tokens against the V columns.
        rows: optional statistics to compute.
        tiles: (T, tile rows, N) fp32, every element is written.
        merged: (rows, N) fp32.
        ids: (V,) int64 number of each column, where that is not its place.
        masses: also make the rows for the far field: one, or three with a cap.
        keep: (columns, N) fp16, takes the first columns' logits less their tile's maximum; or None.
    """
    kept, tile_rows = None, tiles.shape[1]
    if keep is not None:
        kept = len(keep), keep.stride(0), tuning.use_branch_descriptor(keep)
    form = statistics_form(
        logits, rows, masses=masses, is_sorted=ids is not None, kept=kept and kept[2]
    )
    if form.warpgroups:
        from cce_tp.kernels import hopper

        run = hopper.statistics(form, rows, tile_rows, kept and kept[:2], masses)
        run(logits.input, logits.weight, logits.bias, logits.target, keep, tiles, merged)
        return
    run = _tile_statistics(form, rows, tile_rows, kept, ids is not None, masses)
    run(logits.input, logits.weight, logits.bias, logits.target, ids, keep, tiles, merged)


def statistics_form(
    logits: LocalLogits, rows: StatRows, *, masses: bool, is_sorted: bool, kept: bool | None
) -> LogitsForm:
    """In which form `tile_statistics` takes logits: which kernel makes their tiles.

    Args:
        logits, rows, masses: as there.
        is_sorted: whether there are ids.
        kept: whether a descriptor addresses where logits are kept; or None, where none are.
    """
    form = LogitsForm.of(logits)
    capped = form.logit_softcap is not None
    # With the rows that a cap adds to the masses two warpgroups are slower than Triton's kernel, on
    # an H100; on an H200 nobody has compared them.
    known = kept is not False and not (rows.argmax and is_sorted) and not (capped and masses)
    if not known or (rows.entropy and kept):  # the latter for registers, even of two warpgroups
        return form._replace(warpgroups=0)
    if rows.entropy or rows.argmax or (capped and kept):
        return form.of_few_warpgroups(tuning.few_warpgroups(logits.input))
    return form


@prepared
def _tile_statistics(
    form: LogitsForm,
    rows: StatRows,
    tile_rows: int,
    keep: tuple[int, int, bool] | None,
    is_sorted: bool,
    masses: bool,
) -> Prepared:
    keep_columns, keep_stride, keep_descriptor = keep or (0, 0, False)
    tile = (form.config.block_v, form.config.block_n)
    return Prepared(
        tile_statistics_kernel,
        min(form.programs, form.tiles),
        stride_keep=keep_stride,
        keep_V=keep_columns,
        KEEP=keep is not None,
        KEEP_DESCRIPTOR=keep_descriptor,
        SORTED=is_sorted,
        MASSES=masses,
        **_flags(rows, tile_rows),
        **form.tile_arguments(),
        blocks={**form.blocks, **({"keep": tile} if keep_descriptor else {})},
    )


def merge_tiles(
    target: Tensor,
    first_id: int,
    vocab: int,
    rows: StatRows,
    tiles: Tensor,
    merged: Tensor,
    *,
    maxima: Tensor | None = None,
) -> None:
    """Join the tiles of `vocab` columns; `merged` holds the logits of the targets among them.

    Args:
        maxima: (t, N) fp32, takes what the kept logits of the first t tiles are below; or None.
    """
    kept = (0, 0) if maxima is None else (maxima.shape[0], maxima.stride(0))
    run = _merge_tiles(target.shape[0], vocab, tiles.shape[:2], first_id, rows, kept)
    run(tiles, target, merged, maxima)


@prepared
def _merge_tiles(
    num_tokens: int,
    vocab: int,
    tiles_and_rows: tuple[int, int],
    first_id: int,
    rows: StatRows,
    kept: tuple[int, int],
) -> Prepared:
    num_tiles, tile_rows = tiles_and_rows
    kept_tiles, stride = kept
    block_n = 32
    return Prepared(
        merge_tiles_kernel,
        ceil_div(num_tokens, block_n),
        first_id=first_id,
        N=num_tokens,
        V=vocab,
        T=num_tiles,
        kept_T=kept_tiles,
        stride_maxima=stride,
        KEEP=kept_tiles > 0,
        **_flags(rows, tile_rows),
        BLOCK_N=block_n,
        BLOCK_T=256,  # 64 with 4 warps: 36 microseconds for 1000 tiles and not 27, on an H200
        num_warps=8,
    )


def _flags(rows: StatRows, tile_rows: int) -> dict[str, Any]:
    return {
        "ROWS": tile_rows,
        "LOGIT_SUM": rows.logit_sum,
        "ENTROPY": rows.entropy,
        "ARGMAX": rows.argmax,
    }
