"""Kernels of the sorted far field (`cce_tp.far_field`): what is done per tile instead of per logit.

All of them move memory; one reads the classifier to multiply it with a few tokens. Every output
element has one writer: no locks, no atomics, equal bits in every run.

Legend: N tokens, V vocabulary rows of this rank, D hidden size, B rows per vocabulary tile, T tiles
of the sorted vocabulary (the last one may be short).
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cce_tp.far_field import (
    FarField,
    FarGradient,
    KeptRows,
    RankBudget,
    SortedStatistics,
    TargetPlan,
    TileMasses,
    mass_dtype,
    rounds_gradient,
    row_pitch,
    rows_per_gather,
)
from cce_tp.filtering import LARGEST_FAR_MASS
from cce_tp.kernels import forward, tuning
from cce_tp.kernels.backward import coefficient_arguments, gradient_of
from cce_tp.kernels.launch import launch, matrix_argument
from cce_tp.kernels.tile import LOG2E, dot_tile
from cce_tp.kernels.tuning import ceil_div
from cce_tp.problem import KeptLogits, LocalLogits, LogitGradient
from cce_tp.stats import StatRows
from cce_tp.workspace import blocks, gradient_pitch

_BLOCK_N = 1024
_BLOCK_T = 128
# Classifier rows whose key of the order one program makes, and bytes of each in a step: with 64
# probes and four stages 96 KiB, which every GPU has, whatever tiles of logits are tuned to.
_KEY_ROWS = 128
_KEY_BYTES = 128
# Sums over the tokens are taken in so many parts.
_SUM_PARTS = 32
# Each program compares so few tiles with all others that there are many programs.
_TILES_EACH = 16


@triton.jit
def partial_sums_kernel(
    input_ptr,
    partial_ptr,
    N,
    D,
    tokens_each,
    stride_input,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """partial (parts, D) fp32: the sums of `tokens_each` rows each of input (N, D)."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    part = tl.program_id(0) // blocks_d
    cols = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    first = part * tokens_each
    last = tl.minimum(first + tokens_each, N)
    total = tl.zeros((BLOCK_N, BLOCK_D), dtype=tl.float32)
    for start in range(first, last, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        at = rows[:, None].to(tl.int64) * stride_input + cols[None, :]
        mask = (rows < last)[:, None] & inside[None, :]
        total += tl.load(input_ptr + at, mask=mask, other=0.0).to(tl.float32)
    tl.store(partial_ptr + part * D + cols, tl.sum(total, axis=0), mask=inside)


@triton.jit
def probes_kernel(
    input_ptr,
    partial_ptr,
    out_ptr,
    N,
    D,
    P,
    step,
    stride_input,
    PARTS: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (P, D): the average of input's (N, D) rows, by their partial sums (PARTS, D); then its
    rows 0, step, 2 step, ..."""
    cols = tl.program_id(0) * BLOCK_D + tl.arange(0, BLOCK_D)
    inside = cols < D
    parts = tl.arange(0, PARTS)
    at = parts[:, None] * D + cols[None, :]
    partial = tl.load(partial_ptr + at, mask=inside[None, :], other=0.0)
    average = tl.sum(partial, axis=0) / N
    tl.store(out_ptr + cols, average.to(out_ptr.dtype.element_ty), mask=inside)
    probes = 1 + tl.arange(0, BLOCK_P)
    at = (probes[:, None] - 1).to(tl.int64) * step * stride_input + cols[None, :]
    mask = (probes < P)[:, None] & inside[None, :]
    sampled = tl.load(input_ptr + at, mask=mask, other=0.0)
    tl.store(out_ptr + probes[:, None] * D + cols[None, :], sampled, mask=mask)


@triton.jit
def mass_key_kernel(
    weight,
    probes,
    bias_ptr,
    out_ptr,
    V,
    D,
    P,
    stride_weight,
    stride_probes,
    logit_scale,
    HAS_BIAS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out (V,): each row's product with probe 0, plus half the mean square of those with the others
    about it; all P probes are in one block."""
    first = tl.program_id(0) * BLOCK_V
    x = dot_tile(
        weight, probes, first, 0, V, P, D, stride_weight, stride_probes, weight, 0,
        BLOCK_V, BLOCK_P, BLOCK_D, 0, False, True, DESCRIPTOR, DESCRIPTOR, PRECISION,
    )  # fmt: skip
    probe = tl.arange(0, BLOCK_P)[None, :]
    average = tl.sum(tl.where(probe == 0, x, 0.0), axis=1)
    off = tl.where((probe > 0) & (probe < P), x - average[:, None], 0.0)
    variance = tl.sum(off * off, axis=1) * (logit_scale * logit_scale) / (P - 1)
    rows = first + tl.arange(0, BLOCK_V)
    if HAS_BIAS:
        average += tl.load(bias_ptr + rows, mask=rows < V, other=0.0).to(tl.float32)
    key = average * logit_scale + 0.5 * variance
    tl.store(out_ptr + rows, key.to(out_ptr.dtype.element_ty), mask=rows < V)


@triton.jit
def invert_kernel(order_ptr, place_ptr, V, BLOCK_V: tl.constexpr):
    """place[order[i]] = i."""
    at = tl.program_id(0) * BLOCK_V + tl.arange(0, BLOCK_V)
    tl.store(place_ptr + tl.load(order_ptr + at, mask=at < V, other=0), at, mask=at < V)


@triton.jit(do_not_specialize=["first_id"])
def target_places_kernel(
    places_ptr, target_ptr, place_ptr, sorted_ptr, N, V, first_id, BLOCK_N: tl.constexpr
):
    """place (N,) of each target's row, and first_id + place; both -1 where it is not here."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    target = tl.load(target_ptr + rows, mask=inside, other=-1)
    column = target - first_id
    local = inside & (target >= 0) & (column >= 0) & (column < V)
    place = tl.load(places_ptr + column, mask=local, other=-1).to(tl.int64)
    tl.store(place_ptr + rows, place, mask=inside)
    tl.store(sorted_ptr + rows, tl.where(local, place + first_id, -1), mask=inside)


@triton.jit
def count_kept_kernel(kept_ptr, order_ptr, flags_ptr, V, T, first_late, TILE: tl.constexpr):
    """flags (2, T): whether a tile is kept, and how many of its rows are late if it is."""
    tile = tl.program_id(0)
    kept = tl.load(kept_ptr + tile)
    places = tile * TILE + tl.arange(0, TILE)
    rows = tl.load(order_ptr + places, mask=places < tl.where(kept != 0, V, 0), other=-1)
    tl.store(flags_ptr + tile, kept)
    tl.store(flags_ptr + T + tile, tl.sum((rows >= first_late).to(tl.int32), axis=0))


@triton.jit
def number_kept_kernel(flags_ptr, before_ptr, numbers_ptr, T, BLOCK_T: tl.constexpr):
    """before (2, T): the sums of flags (2, T) over the tiles before each; numbers (3,): over all,
    and how many tiles come before the first whose flag is 0; two programs."""
    program = tl.program_id(0)
    flags_ptr += program * T
    before_ptr += program * T
    before = 0
    run = T
    for start in range(0, T, BLOCK_T):
        tiles = start + tl.arange(0, BLOCK_T)
        count = tl.load(flags_ptr + tiles, mask=tiles < T, other=0)
        tl.store(before_ptr + tiles, before + tl.cumsum(count, axis=0) - count, mask=tiles < T)
        before += tl.sum(count, axis=0)
        run = tl.minimum(run, tl.min(tl.where((tiles < T) & (count == 0), tiles, T), axis=0))
    tl.store(numbers_ptr + program, before)
    if program == 0:
        tl.store(numbers_ptr + 2, run)


@triton.jit
def kept_rows_kernel(
    kept_ptr,
    before_ptr,
    order_ptr,
    rows_ptr,
    direct_ptr,
    held_ptr,
    home_ptr,
    V,
    T,
    first_late,
    TILE: tl.constexpr,
):
    """The lists of a KeptRows; before (2, T): kept tiles and late rows before each tile."""
    tile = tl.program_id(0)
    if tl.load(kept_ptr + tile) != 0:
        in_tile = tl.arange(0, TILE)
        places = tile * TILE + in_tile
        inside = places < V
        rows = tl.load(order_ptr + places, mask=inside, other=-1)
        late = (rows >= first_late).to(tl.int32)
        slot = tl.load(before_ptr + T + tile) + tl.cumsum(late, axis=0) - late
        at = tl.load(before_ptr + tile) * TILE + in_tile
        tl.store(rows_ptr + at, rows, mask=inside)
        tl.store(direct_ptr + at, tl.where(late != 0, -1, rows), mask=inside)
        tl.store(held_ptr + at, tl.where(late != 0, slot, -1), mask=inside)
        tl.store(home_ptr + slot, rows, mask=late != 0)


@triton.jit(do_not_specialize=["first_id"])
def plan_targets_kernel(
    place_ptr,
    target_ptr,
    target_logit_ptr,
    kept_ptr,
    slot_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    column_ptr,
    row_ptr,
    tile_ptr,
    factor_ptr,
    is_target_ptr,
    remainder_ptr,
    N,
    first_id,
    logit_scale,
    logit_softcap,
    z_loss,
    onehot_weight,
    uniform_weight,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    HAS_REMAINDER: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """The fields of a TargetPlan; is_target holds zeros before."""
    rows = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    place = tl.load(place_ptr + rows, mask=inside, other=-1)
    here = place >= 0
    tile = tl.where(here, place // TILE, 0)
    kept = here & (tl.load(kept_ptr + tile, mask=here, other=0) != 0)
    slot = tl.load(slot_ptr + tile, mask=here, other=0).to(tl.int64)
    tl.store(column_ptr + rows, tl.where(kept, slot * TILE + place % TILE, -1), mask=inside)
    grad = tl.load(grad_ptr + rows, mask=inside, other=0.0)
    # A token without a gradient adds nothing to its target's row, which may have many such.
    far = here & (kept == 0) & (grad != 0.0)
    row = tl.load(target_ptr + rows, mask=inside, other=-1) - first_id
    tl.store(row_ptr + rows, tl.where(far, row, -1), mask=inside)
    tl.store(tile_ptr + rows, tl.where(here, tile, -1), mask=inside)
    tl.store(is_target_ptr + row, tl.full((BLOCK_N,), 1, dtype=tl.uint8), mask=far)
    x = tl.load(target_logit_ptr + rows, mask=inside, other=0.0)
    upstream = grad * logit_scale
    factor = upstream * -onehot_weight
    if HAS_SOFTCAP:
        capped = x / logit_softcap
        factor *= 1.0 - capped * capped
    # A masked token has gradient exactly 0 even where its logits are not finite.
    factor = tl.where(grad == 0.0, 0.0, factor)
    tl.store(factor_ptr + rows, factor, mask=inside)
    remainder = tl.where(far, factor, 0.0)
    if HAS_REMAINDER:
        max_x = tl.load(max_ptr + rows, mask=inside, other=0.0)
        log_sum = tl.load(log_sum_ptr + rows, mask=inside, other=0.0)
        # A tile of one column, the target.
        g = gradient_of(
            x[:, None], row * 0, grad, upstream, max_x, log_sum, tl.arange(0, 1),
            logit_softcap, z_loss, onehot_weight, uniform_weight,
            1, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP,
        )  # fmt: skip
        remainder = tl.where(kept, tl.sum(g, axis=1), remainder)
    tl.store(remainder_ptr + rows, remainder, mask=inside)


@triton.jit
def subtract_stored_kernel(
    grad_ptr, column_ptr, remainder_ptr, N, V, start, stride_grad, BLOCK_N: tl.constexpr
):
    """remainder[n] -= grad[column[n] - start, n] where that is one of grad's V rows."""
    tokens = tl.program_id(0) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = tokens < N
    col = tl.load(column_ptr + tokens, mask=inside, other=-1) - start
    here = inside & (col >= 0) & (col < V)
    stored = tl.load(grad_ptr + col * stride_grad + tokens, mask=here, other=0.0).to(tl.float32)
    remainder = tl.load(remainder_ptr + tokens, mask=here, other=0.0)
    tl.store(remainder_ptr + tokens, remainder - stored, mask=here)


@triton.jit
def gather_rows_kernel(
    weight_ptr,
    order_ptr,
    gathered_ptr,
    mean_ptr,
    V,
    D,
    stride_weight,
    stride_gathered,
    HAS_MEAN: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """gathered (V, D): rows of the weight in the given order, zeros for -1; mean (T, D): of each
    tile of them."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    tile = tl.program_id(0) // blocks_d
    places = tile * TILE + tl.arange(0, TILE)
    cols = (tl.program_id(0) % blocks_d) * BLOCK_D + tl.arange(0, BLOCK_D)
    rows = tl.load(order_ptr + places, mask=places < V, other=-1)
    mask = (places < V)[:, None] & (cols < D)[None, :]
    there = mask & (rows >= 0)[:, None]
    values = tl.load(weight_ptr + rows[:, None] * stride_weight + cols[None, :], there, other=0.0)
    out = gathered_ptr + places[:, None].to(tl.int64) * stride_gathered + cols[None, :]
    tl.store(out, values, mask=mask)
    if HAS_MEAN:
        count = tl.minimum(V - tile * TILE, TILE).to(tl.float32)
        mean = tl.sum(values.to(tl.float32), axis=0) / count
        tl.store(mean_ptr + tile.to(tl.int64) * D + cols, mean, mask=cols < D)


@triton.jit
def tile_mass_kernel(
    tiles_ptr,
    normaliser_ptr,
    target_ptr,
    mass_ptr,
    slope_ptr,
    totals_ptr,
    N,
    V,
    T,
    ignore_index,
    TILE: tl.constexpr,
    ROWS: tl.constexpr,
    CAPPED: tl.constexpr,
    SLOPE: tl.constexpr,
    STRICT: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """mass (T, N): sum of p over a tile, times the cap's derivative if CAPPED.

    totals (4, T) fp32: the largest probability mass that a token has in the tile; the sum over the
    tokens; the sum of min(sqrt(rows * sum (p - mean p)^2), 2 mass), which bounds the distance of p
    from its mean, or with STRICT of 2 mass; and the number of tokens. Ignored ones do not count."""
    tile = tl.program_id(0)
    part = tiles_ptr + tile.to(tl.int64) * ROWS * N
    squares_row: tl.constexpr = ROWS - 3 if CAPPED else ROWS - 1
    count = tl.minimum(V - tile * TILE, TILE).to(tl.float32)
    largest = tl.zeros((BLOCK_N,), dtype=tl.float32)
    total = tl.zeros((BLOCK_N,), dtype=tl.float32)
    deviation = tl.zeros((BLOCK_N,), dtype=tl.float32)
    number = tl.zeros((BLOCK_N,), dtype=tl.float32)
    for start in range(0, N, BLOCK_N):
        rows = start + tl.arange(0, BLOCK_N)
        inside = rows < N
        max_x = tl.load(part + rows, mask=inside, other=0.0)
        sum_exp = tl.load(part + N + rows, mask=inside, other=0.0)
        squares = tl.load(part + squares_row * N + rows, mask=inside, other=0.0)
        max_all = tl.load(normaliser_ptr + rows, mask=inside, other=0.0)
        log_sum = tl.load(normaliser_ptr + N + rows, mask=inside, other=0.0)
        target = tl.load(target_ptr + rows, mask=inside, other=0)
        scale = tl.exp2((max_x - max_all) * LOG2E - log_sum * LOG2E)
        counts = inside & (target != ignore_index)
        number += counts.to(tl.float32)
        mass = tl.where(counts, sum_exp * scale, 0.0)
        # NaN reaches the total, which keeps everything.
        largest = tl.maximum(largest, mass)
        total += mass
        if STRICT:
            deviation += 2.0 * mass
        else:
            # Scaled after the root: the square of a small scale would be 0.
            spread = tl.sqrt(tl.maximum(count * squares - sum_exp * sum_exp, 0.0)) * scale
            deviation += tl.where(counts, tl.minimum(spread, 2.0 * mass), 0.0)
        if CAPPED:
            sum_exp = tl.load(part + (ROWS - 2) * N + rows, mask=inside, other=0.0)
        out = tile.to(tl.int64) * N + rows
        tl.store(mass_ptr + out, (sum_exp * scale).to(mass_ptr.dtype.element_ty), mask=inside)
        if SLOPE:
            slope = tl.load(part + (ROWS - 1) * N + rows, mask=inside, other=0.0)
            tl.store(slope_ptr + out, slope.to(slope_ptr.dtype.element_ty), mask=inside)
    tl.store(totals_ptr + tile, tl.max(largest, axis=0))
    tl.store(totals_ptr + T + tile, tl.sum(total, axis=0))
    tl.store(totals_ptr + 2 * T + tile, tl.sum(deviation, axis=0))
    tl.store(totals_ptr + 3 * T + tile, tl.sum(number, axis=0))


@triton.jit
def select_tiles_kernel(
    totals_ptr,
    kept_ptr,
    T,
    budget_by_mass,
    budget_by_rows,
    largest_mass,
    RAGGED: tl.constexpr,
    MINE: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    """kept (T,) int32: 1 for a tile that is heavy, or that the budget does not cover.

    totals (4, T) as `tile_mass_kernel` makes them. Of all mass here budget_by_mass may be left, and
    budget_by_rows per token. The budget covers tiles in the order of their deviation, the smallest
    first; the sum of those that come no later than a tile needs no sorting."""
    mine = tl.program_id(0) * MINE + tl.arange(0, MINE)
    my_largest = tl.load(totals_ptr + mine, mask=mine < T, other=0.0)
    my_deviation = tl.load(totals_ptr + 2 * T + mine, mask=mine < T, other=0.0)
    left = tl.zeros((MINE,), dtype=tl.float32)
    whole = tl.zeros((BLOCK_T,), dtype=tl.float32)
    for start in range(0, T, BLOCK_T):
        other = start + tl.arange(0, BLOCK_T)
        whole += tl.load(totals_ptr + T + other, mask=other < T, other=0.0)
        deviation = tl.load(totals_ptr + 2 * T + other, mask=other < T, other=0.0)[None, :]
        tied = (deviation == my_deviation[:, None]) & (other[None, :] >= mine[:, None])
        before = (deviation < my_deviation[:, None]) | tied
        left += tl.sum(tl.where(before, deviation, 0.0), axis=1)
    whole_mass = tl.sum(whole, axis=0)
    number = tl.load(totals_ptr + 3 * T)
    fits = left <= budget_by_mass * whole_mass + budget_by_rows * number
    fits &= my_largest <= largest_mass
    kept = tl.where(fits, 0, 1)
    if RAGGED:  # so that the number of rows kept follows from the number of tiles
        kept = tl.where(mine == T - 1, 1, kept)
    kept = tl.where(mine == 0, 1, kept)  # never none: the first holds the likeliest rows
    tl.store(kept_ptr + mine, kept, mask=mine < T)


@triton.jit
def fill_run_kernel(kept_ptr, leading, BLOCK_T: tl.constexpr):
    """Keep all of the first tiles, up to the last kept one before which, and with it, three of four
    are; of the first `leading` tiles, at most BLOCK_T. One program."""
    tiles = tl.arange(0, BLOCK_T)
    kept = tl.load(kept_ptr + tiles, mask=tiles < leading, other=0)
    dense = (kept != 0) & (4 * tl.cumsum(kept, axis=0) >= 3 * (tiles + 1))
    stop = tl.max(tl.where(dense, tiles + 1, 0), axis=0)
    tl.store(kept_ptr + tiles, tl.full((BLOCK_T,), 1, dtype=tl.int32), mask=tiles < stop)


@triton.jit
def far_gradient_kernel(
    mass_ptr,
    slope_ptr,
    kept_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    out_ptr,
    N,
    V,
    stride_out,
    logit_scale,
    z_loss,
    uniform_weight,
    TILE: tl.constexpr,
    HAS_SLOPE: tl.constexpr,
    BLOCK_N: tl.constexpr,
):
    """out (T, N): sum over a tile of the gradient of its logits, without one-hots; 0 if kept."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    tile = tl.program_id(0) // blocks_n
    rows = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = rows < N
    at = tile.to(tl.int64) * N + rows
    mass = tl.load(mass_ptr + at, mask=inside, other=0.0).to(tl.float32)
    grad = tl.load(grad_ptr + rows, mask=inside, other=0.0)
    lse = tl.load(max_ptr + rows, mask=inside, other=0.0)
    lse += tl.load(log_sum_ptr + rows, mask=inside, other=0.0)
    if HAS_SLOPE:
        slope = tl.load(slope_ptr + at, mask=inside, other=0.0).to(tl.float32)
    else:
        slope = tl.minimum(V - tile * TILE, TILE).to(tl.float32)
    g = mass * (1.0 + 2.0 * z_loss * lse) - uniform_weight * slope
    g *= grad * logit_scale
    g = tl.where(grad == 0.0, 0.0, g)
    if tl.load(kept_ptr + tile) != 0:
        g = tl.zeros((BLOCK_N,), dtype=tl.float32)
    out = out_ptr + tile.to(tl.int64) * stride_out + rows
    tl.store(out, g.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit
def scatter_rows_kernel(
    out_ptr,
    row_ptr,
    value_ptr,
    D,
    stride_out,
    stride_value,
    ACCUMULATE: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row[i]] = or += value[i] where row[i] is not negative; no two of them are equal."""
    entry = tl.program_id(0).to(tl.int64)
    row = tl.load(row_ptr + entry)
    if row >= 0:
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            inside = cols < D
            value = tl.load(value_ptr + entry * stride_value + cols, mask=inside, other=0.0)
            out = out_ptr + row * stride_out + cols
            if ACCUMULATE:
                value = value.to(tl.float32) + tl.load(out, mask=inside, other=0.0).to(tl.float32)
            tl.store(out, value.to(out_ptr.dtype.element_ty), mask=inside)


@triton.jit(do_not_specialize=["first_id"])
def add_target_rows_kernel(
    out_ptr,
    weight_ptr,
    target_ptr,
    factor_ptr,
    V,
    D,
    first_id,
    stride_out,
    stride_weight,
    BLOCK_D: tl.constexpr,
):
    """out[n] += factor[n] * weight[target[n] - first_id] where the factor is not 0 and the row is
    one of V; out is (n, D) fp32."""
    token = tl.program_id(0).to(tl.int64)
    row = tl.load(target_ptr + token) - first_id
    factor = tl.load(factor_ptr + token)
    if (row >= 0) & (row < V) & (factor != 0.0):
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            inside = cols < D
            value = tl.load(weight_ptr + row * stride_weight + cols, mask=inside, other=0.0)
            out = out_ptr + token * stride_out + cols
            total = tl.load(out, mask=inside, other=0.0) + factor * value.to(tl.float32)
            tl.store(out, total, mask=inside)


@triton.jit
def far_rows_kernel(
    far_ptr,
    order_ptr,
    kept_ptr,
    is_target_ptr,
    out_ptr,
    V,
    D,
    first_row,
    last_row,
    stride_out,
    ACCUMULATE: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row] = or += the far field of its tile, (T, D) fp32, for first_row <= row < last_row; not
    where a row is a target."""
    block = tl.program_id(0)
    tile = (block * BLOCK_V) // TILE
    if tl.load(kept_ptr + tile) == 0:
        places = block * BLOCK_V + tl.arange(0, BLOCK_V)
        rows = tl.load(order_ptr + places, mask=places < V, other=0)
        count = tl.minimum(V - tile * TILE, TILE).to(tl.float32)
        other = (places < V) & (tl.load(is_target_ptr + rows) == 0)
        other &= (rows >= first_row) & (rows < last_row)
        for start in range(0, D, BLOCK_D):
            cols = start + tl.arange(0, BLOCK_D)
            far = tl.load(far_ptr + tile.to(tl.int64) * D + cols, mask=cols < D, other=0.0) / count
            mask = other[:, None] & (cols < D)[None, :]
            out = out_ptr + rows[:, None] * stride_out + cols[None, :]
            value = tl.broadcast_to(far[None, :], (BLOCK_V, BLOCK_D))
            if ACCUMULATE:
                value += tl.load(out, mask=mask, other=0.0).to(tl.float32)
            tl.store(out, value.to(out_ptr.dtype.element_ty), mask=mask)


@triton.jit
def target_rows_kernel(
    far_ptr,
    input_ptr,
    row_ptr,
    tile_ptr,
    factor_ptr,
    out_ptr,
    bias_ptr,
    N,
    V,
    D,
    stride_input,
    stride_out,
    ACCUMULATE: tl.constexpr,
    HAS_OUT: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    TILE: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    """out[row] = or += the far field of its tile + sum of factor * input over the row's tokens.

    row_ptr (N,): each token's row or -1. The program of a row's first token does all of them, in
    order. It finds them by looking at all tokens, as does each other one at those before its own:
    cheaper than sorting the tokens by row, since few have a row here."""
    blocks_d = tl.cdiv(D, BLOCK_D)
    first = tl.program_id(0) // blocks_d
    block_d = tl.program_id(0) % blocks_d
    row = tl.load(row_ptr + first)
    earlier = 0
    if row < 0:
        earlier = 1
    start = 0
    while (earlier == 0) & (start < first):
        tokens = start + tl.arange(0, BLOCK_N)
        others = tl.load(row_ptr + tokens, mask=tokens < first, other=-1)
        earlier = tl.max((others == row).to(tl.int32), axis=0)
        start += BLOCK_N
    if earlier == 0:
        cols = block_d * BLOCK_D + tl.arange(0, BLOCK_D)
        inside = cols < D
        total = tl.zeros((BLOCK_D,), dtype=tl.float32)
        if HAS_OUT:
            tile = tl.load(tile_ptr + first)
            count = tl.minimum(V - tile * TILE, TILE).to(tl.float32)
            total += tl.load(far_ptr + tile * D + cols, mask=inside, other=0.0) / count
        total_factor = 0.0
        for start in range(first, N, BLOCK_N):
            tokens = start + tl.arange(0, BLOCK_N)
            others = tl.load(row_ptr + tokens, mask=tokens < N, other=-1)
            found = tl.min(tl.where(others == row, tokens, N), axis=0)
            while found < N:
                factor = tl.load(factor_ptr + found)
                total_factor += factor
                at = found.to(tl.int64) * stride_input + cols
                value = tl.load(input_ptr + at, mask=inside, other=0.0)
                total += factor * value.to(tl.float32)
                found = tl.min(tl.where((others == row) & (tokens > found), tokens, N), axis=0)
        if HAS_OUT:
            out = out_ptr + row * stride_out + cols
            if ACCUMULATE:
                total += tl.load(out, mask=inside, other=0.0).to(tl.float32)
            tl.store(out, total.to(out_ptr.dtype.element_ty), mask=inside)
        if HAS_BIAS:
            if block_d == 0:
                tl.store(bias_ptr + row, tl.load(bias_ptr + row) + total_factor)


def tile_rows(like: Tensor) -> int:
    """B, the vocabulary rows of a tile, for operands like this one."""
    config, _ = tuning.config_for(like)
    return config.block_v


def probes(input: Tensor, step: int) -> Tensor:
    """(P, D): the average of input's (N, D) rows, then its rows 0, step, 2 step, ..."""
    num_tokens, hidden = input.shape
    count = 1 + ceil_div(num_tokens, step)
    out = input.new_empty(count, hidden)
    # Two steps: there are not as many columns as it takes to keep all multiprocessors reading.
    partial = input.new_empty((_SUM_PARTS, hidden), dtype=torch.float32)
    launch(
        partial_sums_kernel,
        _SUM_PARTS * ceil_div(hidden, 64),
        input_ptr=input,
        partial_ptr=partial,
        N=num_tokens,
        D=hidden,
        tokens_each=ceil_div(num_tokens, _SUM_PARTS),
        stride_input=input.stride(0),
        BLOCK_N=64,
        BLOCK_D=64,
        num_warps=4,
    )
    launch(
        probes_kernel,
        ceil_div(hidden, 32),
        input_ptr=input,
        partial_ptr=partial,
        out_ptr=out,
        N=num_tokens,
        D=hidden,
        P=count,
        step=step,
        stride_input=input.stride(0),
        PARTS=_SUM_PARTS,
        BLOCK_P=triton.next_power_of_2(count - 1),
        BLOCK_D=32,
        num_warps=4,
    )
    return out


def mass_key(
    weight: Tensor, probes: Tensor, bias: Tensor | None, logit_scale: float, out: Tensor
) -> None:
    """Key of the sorted order.

    Args:
        weight: (V, D), last dim contiguous.
        probes: (P, D) the average token and sampled ones, at most 64.
        bias: (V,) or None.
        logit_scale: factor on E C^T + bias.
        out: (V,) average logit plus half of its variance, rounded to its dtype.
    """
    (num_probes, hidden), vocab = probes.shape, weight.shape[0]
    block_d = _KEY_BYTES // weight.itemsize
    block_p = max(16, triton.next_power_of_2(num_probes))
    descriptor = tuning.use_descriptors(weight, probes)
    launch(
        mass_key_kernel,
        ceil_div(vocab, _KEY_ROWS),
        weight=matrix_argument(weight, _KEY_ROWS, block_d, descriptor),
        probes=matrix_argument(probes, block_p, block_d, descriptor),
        bias_ptr=bias,
        out_ptr=out,
        V=vocab,
        D=hidden,
        P=num_probes,
        stride_weight=weight.stride(0),
        stride_probes=probes.stride(0),
        logit_scale=float(logit_scale),
        HAS_BIAS=bias is not None,
        DESCRIPTOR=descriptor,
        PRECISION=tuning.input_precision(weight.dtype),
        BLOCK_V=_KEY_ROWS,
        BLOCK_P=block_p,
        BLOCK_D=block_d,
        num_warps=4,
        num_stages=4,
    )


def target_places(order: Tensor, target: Tensor, first_id: int) -> tuple[Tensor, Tensor]:
    """Where the targets' rows are in the order.

    Args:
        order: (V,) int64 permutation of the local rows.
        target: (N,) int64 global ids.
        first_id: id of local row 0.

    Returns:
        (N,) int64 place of each target's row, -1 where it is not among them; and the same plus
        first_id where it is.
    """
    vocab, num_tokens = order.shape[0], target.shape[0]
    places = torch.empty(vocab, dtype=torch.int32, device=order.device)
    place, in_order = torch.empty_like(target), torch.empty_like(target)
    launch(
        invert_kernel,
        ceil_div(vocab, _BLOCK_N),
        order_ptr=order,
        place_ptr=places,
        V=vocab,
        BLOCK_V=_BLOCK_N,
        num_warps=4,
    )
    launch(
        target_places_kernel,
        ceil_div(num_tokens, _BLOCK_N),
        places_ptr=places,
        target_ptr=target,
        place_ptr=place,
        sorted_ptr=in_order,
        N=num_tokens,
        V=vocab,
        first_id=first_id,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )
    return place, in_order


def kept_rows(kept: Tensor, order: Tensor, tile: int, first_late: int) -> KeptRows:
    """The rows of the kept tiles.

    Args:
        kept: (T,) int32.
        order: (V,) int64.
        tile: B.
        first_late: the first late row.
    """
    num_tiles, vocab = kept.shape[0], order.shape[0]
    flags, before = kept.new_empty(2, 2, num_tiles).unbind()
    numbers = kept.new_empty(3)
    rows, direct, held = order.new_full((3, num_tiles * tile), -1).unbind()
    home = order.new_empty(vocab - first_late)
    sizes = {"V": vocab, "T": num_tiles, "first_late": first_late, "TILE": tile}
    launch(
        count_kept_kernel,
        num_tiles,
        kept_ptr=kept,
        order_ptr=order,
        flags_ptr=flags,
        num_warps=4,
        **sizes,
    )
    launch(
        number_kept_kernel,
        2,
        flags_ptr=flags,
        before_ptr=before,
        numbers_ptr=numbers,
        T=num_tiles,
        BLOCK_T=1024,
        num_warps=4,
    )
    launch(
        kept_rows_kernel,
        num_tiles,
        kept_ptr=kept,
        before_ptr=before,
        order_ptr=order,
        rows_ptr=rows,
        direct_ptr=direct,
        held_ptr=held,
        home_ptr=home,
        num_warps=4,
        **sizes,
    )
    return KeptRows(rows, before[0], numbers, direct, held, home)


def plan_targets(
    far: FarField, slot: Tensor, upstream: LogitGradient, logits: LocalLogits
) -> TargetPlan:
    """Where each token's one-hot is added, and its factor."""
    num_tokens, vocab = far.place.shape[0], logits.weight.shape[0]
    made = torch.empty_like
    plan = TargetPlan(
        made(far.place),
        made(far.place),
        made(far.place),
        made(upstream.grad),
        torch.zeros(vocab, dtype=torch.uint8, device=slot.device),
        made(upstream.grad),
    )
    softcap = logits.logit_softcap
    launch(
        plan_targets_kernel,
        ceil_div(num_tokens, _BLOCK_N),
        place_ptr=far.place,
        target_ptr=logits.target,
        target_logit_ptr=far.target_logit,
        kept_ptr=far.kept,
        slot_ptr=slot,
        grad_ptr=upstream.grad,
        max_ptr=upstream.max_logit,
        log_sum_ptr=upstream.log_sum,
        column_ptr=plan.column,
        row_ptr=plan.row,
        tile_ptr=plan.tile,
        factor_ptr=plan.factor,
        is_target_ptr=plan.is_target,
        remainder_ptr=plan.remainder,
        N=num_tokens,
        first_id=logits.first_id,
        logit_scale=float(logits.logit_scale),
        logit_softcap=1.0 if softcap is None else float(softcap),
        HAS_SOFTCAP=softcap is not None,
        HAS_REMAINDER=rounds_gradient(logits.input.dtype),
        TILE=tile_rows(logits.input),
        BLOCK_N=_BLOCK_N,
        num_warps=4,
        **coefficient_arguments(upstream.coefficients),
    )
    return plan


def subtract_stored(remainder: Tensor, column: Tensor, start: int, grad_KN: Tensor) -> None:
    """remainder[n] -= what is stored of the gradient of token n's target.

    Args:
        remainder: (n,) fp32.
        column: (n,) int64 the target's place among all columns, or -1.
        start: the first of these columns.
        grad_KN: (K, n) their G^T, last dim contiguous.
    """
    launch(
        subtract_stored_kernel,
        ceil_div(len(column), _BLOCK_N),
        grad_ptr=grad_KN,
        column_ptr=column,
        remainder_ptr=remainder,
        N=len(column),
        V=len(grad_KN),
        start=start,
        stride_grad=grad_KN.stride(0),
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )


def gather_rows(
    weight: Tensor,
    rows: Tensor,
    tile: int = 256,
    means: Tensor | None = None,
    out: Tensor | None = None,
) -> Tensor:
    """weight[rows] (R, D), its rows aligned, and the mean of each `tile` of them into `means`.

    Args:
        weight: (V, D), last dim contiguous.
        rows: (R,) int64; -1 for a row of zeros.
        tile: B.
        means: (ceil(R / B), D) contiguous, or None.
        out: (R or more, D), its rows aligned, takes the rows; or None.
    """
    hidden = weight.shape[1]
    if out is None:
        out = weight.new_empty(len(rows), row_pitch(hidden, weight.itemsize))[:, :hidden]
    made = out[: len(rows)]
    block_d = 128
    launch(
        gather_rows_kernel,
        ceil_div(len(rows), tile) * ceil_div(hidden, block_d),
        weight_ptr=weight,
        order_ptr=rows,
        gathered_ptr=made,
        mean_ptr=means,
        V=len(rows),
        D=hidden,
        stride_weight=weight.stride(0),
        stride_gathered=made.stride(0),
        HAS_MEAN=means is not None,
        TILE=tile,
        BLOCK_D=block_d,
        num_warps=8,
    )
    return made


def sorted_statistics(
    logits: LocalLogits,
    order: Tensor,
    target: Tensor,
    rows: StatRows,
    workspace_bytes: int,
    free: Tensor | None,
    kept: KeptLogits | None,
) -> SortedStatistics:
    """`forward.statistics` over the vocabulary in another order, with the tiles and their means.

    Args:
        logits: N tokens against all V local rows; fp16, bf16 or fp32.
        order: (V,) int64 permutation of the local rows.
        target: (N,) int64 `logits.first_id` plus the target's place in the order, or -1.
        rows: optional statistics to compute.
        workspace_bytes: cap on the tile statistics and the gathered rows together.
        free: (R, D) memory beside it for gathered rows, or None.
        kept: takes the logits of the first rows of the order, or None.
    """
    num_tokens, vocab, hidden = logits.shape
    config, programs = tuning.config_for(logits.input)
    tile, more = config.block_v, 1 if logits.logit_softcap is None else 3
    num_tiles = ceil_div(vocab, tile)
    tiles, merged = forward.empty_tiles(num_tiles, num_tokens, rows, logits.input, more=more)
    means = logits.weight.new_empty(num_tiles, hidden)
    available = workspace_bytes - tiles.nbytes - means.nbytes
    available -= 0 if kept is None else kept.tile_max.nbytes
    row = hidden * logits.weight.element_size()
    if free is not None and len(free) * row > max(available, tile * row):
        available = len(free) * row
    else:
        free = None
    keeps = 0 if kept is None else kept.columns
    # About as many rows as are gathered at a time, which decides by what tiles they are multiplied.
    at_once = logits.columns(0, min(max(available // row, tile), vocab))
    form = forward.statistics_form(
        at_once,
        rows,
        masses=True,
        is_sorted=True,
        kept=None if kept is None else tuning.use_branch_descriptor(kept.below_max),
    )
    step = rows_per_gather(available, row, tile, vocab, form.token_blocks, programs)
    for start, stop in blocks(vocab, step):
        ids = order[start:stop]
        t0, t1 = start // tile, ceil_div(stop, tile)
        part = logits._replace(
            weight=gather_rows(logits.weight, ids, tile, means[t0:t1], free),
            bias=None if logits.bias is None else logits.bias.index_select(0, ids),
            target=target,
            first_id=logits.first_id + start,
        )
        keep = None
        if kept is not None and start < keeps:
            keep = kept.below_max[start : min(stop, keeps)]
        forward.tile_statistics(part, rows, tiles[t0:t1], merged, ids=ids, masses=True, keep=keep)
        del part  # before the next rows are gathered
    maxima = None if kept is None else kept.tile_max
    forward.merge_tiles(target, logits.first_id, vocab, rows, tiles, merged, maxima=maxima)
    return SortedStatistics(merged, tiles, means)


def tile_masses(
    tiles: Tensor,
    normaliser_2N: Tensor,
    target_N: Tensor,
    logits: LocalLogits,
    *,
    ignore_index: int,
    budget: RankBudget,
    slopes: bool,
    leading: int,
) -> TileMasses:
    """Each tile's share of each token's softmax, and which tiles to keep.

    Args:
        tiles: (T, tile rows, N) of `sorted_statistics`.
        normaliser_2N: (2, N) maximum and log of the sum over the global vocabulary.
        target_N: (N,) int64 targets.
        logits: what the tiles were made of.
        ignore_index: target of a token that does not count.
        budget: of this rank.
        slopes: also keep the sums of the cap's derivative.
        leading: among so many of the first tiles, all up to the last kept one are kept that follows
            on enough others: their logits lie in one piece.
    """
    num_tiles, per_tile, num_tokens = tiles.shape
    vocab = logits.weight.shape[0]
    made = torch.empty
    device, dtype = tiles.device, mass_dtype(logits.input.dtype)
    mass = made((num_tiles, num_tokens), dtype=dtype, device=device)
    slope = made((num_tiles if slopes else 0, num_tokens), dtype=dtype, device=device)
    totals = made((4, num_tiles), dtype=torch.float32, device=device)
    kept = made(num_tiles, dtype=torch.int32, device=device)
    launch(
        tile_mass_kernel,
        num_tiles,
        tiles_ptr=tiles,
        normaliser_ptr=normaliser_2N,
        target_ptr=target_N,
        mass_ptr=mass,
        slope_ptr=slope,
        totals_ptr=totals,
        N=num_tokens,
        V=vocab,
        T=num_tiles,
        ignore_index=ignore_index,
        TILE=tile_rows(logits.input),
        ROWS=per_tile,
        CAPPED=logits.logit_softcap is not None,
        SLOPE=slopes,
        STRICT=budget.is_zero,
        BLOCK_N=_BLOCK_N,
        num_warps=8,
    )
    launch(
        select_tiles_kernel,
        ceil_div(num_tiles, _TILES_EACH),
        totals_ptr=totals,
        kept_ptr=kept,
        T=num_tiles,
        budget_by_mass=budget.by_mass,
        budget_by_rows=budget.by_rows,
        largest_mass=LARGEST_FAR_MASS,
        RAGGED=vocab % tile_rows(logits.input) != 0,
        MINE=_TILES_EACH,
        BLOCK_T=_BLOCK_T,
        num_warps=4,
    )
    if leading:
        launch(
            fill_run_kernel,
            1,
            kept_ptr=kept,
            leading=leading,
            BLOCK_T=triton.next_power_of_2(leading),
            num_warps=4,
        )
    return TileMasses(mass, slope, totals[1:3], kept)


def far_gradient(
    masses: TileMasses, upstream: LogitGradient, logits: LocalLogits, out: Tensor | None
) -> Tensor:
    """(T, N) gradient of the logits summed over each tile, one-hots left out; 0 for kept tiles.

    Args:
        masses: of the tiles.
        upstream: gradient and global statistics of the tokens.
        logits: what the tiles were made of.
        out: takes it, last dim contiguous; None for a new tensor in the operands' dtype.
    """
    num_tiles, num_tokens = masses.mass.shape
    if out is None:
        out = logits.input.new_empty(num_tiles, gradient_pitch(num_tokens))[:, :num_tokens]
    launch(
        far_gradient_kernel,
        num_tiles * ceil_div(num_tokens, _BLOCK_N),
        mass_ptr=masses.mass,
        slope_ptr=masses.slope,
        kept_ptr=masses.kept,
        grad_ptr=upstream.grad,
        max_ptr=upstream.max_logit,
        log_sum_ptr=upstream.log_sum,
        out_ptr=out,
        N=num_tokens,
        V=logits.weight.shape[0],
        stride_out=out.stride(0),
        logit_scale=float(logits.logit_scale),
        z_loss=float(upstream.z_loss),
        uniform_weight=float(upstream.uniform_weight),
        TILE=tile_rows(logits.input),
        HAS_SLOPE=masses.slope.shape[0] > 0,
        BLOCK_N=_BLOCK_N,
        num_warps=4,
    )
    return out


def scatter_rows(out: Tensor, rows: Tensor, value: Tensor, *, accumulate: bool) -> None:
    """out[rows[i]] = or += value[i] where rows[i] is not negative.

    Args:
        out: (V, D).
        rows: (R,) int64, those that are not negative distinct.
        value: (R, D), out's dtype or a wider one.
        accumulate: add to `out`, in the wider dtype.
    """
    if rows.shape[0] == 0:
        return
    launch(
        scatter_rows_kernel,
        rows.shape[0],
        out_ptr=out,
        row_ptr=rows,
        value_ptr=value,
        D=out.shape[1],
        stride_out=out.stride(0),
        stride_value=value.stride(0),
        ACCUMULATE=accumulate,
        BLOCK_D=1024,
        num_warps=4,
    )


def add_target_rows(
    out: Tensor, weight: Tensor, target: Tensor, first_id: int, factors: Tensor
) -> None:
    """out[n] += factors[n] * weight[target[n] - first_id] where there is such a row.

    Args:
        out: (n, D) fp32.
        weight: (V, D).
        target: (n,) int64.
        first_id: of the first row.
        factors: (n,) fp32; where one is 0 nothing is added, whatever the row holds.
    """
    launch(
        add_target_rows_kernel,
        out.shape[0],
        out_ptr=out,
        weight_ptr=weight,
        target_ptr=target,
        factor_ptr=factors,
        V=weight.shape[0],
        D=out.shape[1],
        first_id=first_id,
        stride_out=out.stride(0),
        stride_weight=weight.stride(0),
        BLOCK_D=1024,
        num_warps=4,
    )


def write_far_rows(
    far: FarGradient,
    input: Tensor,
    out: Tensor | None,
    bias: Tensor | None,
    rows: tuple[int, int],
    *,
    targets: bool,
    accumulate: bool,
) -> None:
    """Rows of dC, and of the bias gradient, that are not in a kept tile.

    Args:
        far: the far field's part of the gradients.
        input: (N, D) hidden states.
        out: (V, D) dC, or None; overwritten, or added to with `accumulate`.
        bias: (V,) fp32, added to: the targets' part; or None.
        rows: [start, stop) of the local rows to write, among those that are no token's target.
        targets: also write those that are, all of them.
        accumulate: add to `out`.
    """
    vocab, hidden = far.order.shape[0], input.shape[1]
    block_v, block_d = min(16, far.tile), 512
    common = {
        "V": vocab,
        "D": hidden,
        "ACCUMULATE": accumulate,
        "TILE": far.tile,
    }
    if out is not None:
        launch(
            far_rows_kernel,
            ceil_div(vocab, block_v),
            far_ptr=far.weight,
            order_ptr=far.order,
            kept_ptr=far.kept,
            is_target_ptr=far.targets.is_target,
            out_ptr=out,
            stride_out=out.stride(0),
            first_row=rows[0],
            last_row=rows[1],
            BLOCK_V=block_v,
            BLOCK_D=block_d,
            num_warps=4,
            **common,
        )
    if not targets:
        return
    target_block = min(1024, triton.next_power_of_2(hidden))
    launch(
        target_rows_kernel,
        input.shape[0] * ceil_div(hidden, target_block),
        far_ptr=far.weight,
        input_ptr=input,
        row_ptr=far.targets.row,
        tile_ptr=far.targets.tile,
        factor_ptr=far.targets.factor,
        out_ptr=out,
        bias_ptr=bias,
        N=input.shape[0],
        stride_input=input.stride(0),
        stride_out=0 if out is None else out.stride(0),
        HAS_OUT=out is not None,
        HAS_BIAS=bias is not None,
        BLOCK_N=_BLOCK_N,
        BLOCK_D=target_block,
        num_warps=4,
        **common,
    )
