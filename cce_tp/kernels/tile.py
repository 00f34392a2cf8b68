"""Device helpers that every Triton kernel shares: loads, the one matmul loop, the one logits tile.

Legend: N tokens, V vocabulary rows of this launch, D hidden size. A matrix argument is either a
pointer to a row-major matrix (with its row stride) or a host tensor descriptor of it;
`DESCRIPTOR` says which."""

from __future__ import annotations

import triton
import triton.language as tl

from cce_tp.kernels.tuning import is_interpreted

LOG2E = tl.constexpr(1.4426950408889634)
_INTERPRETED = tl.constexpr(is_interpreted())


@triton.jit
def reciprocal(x):
    """1 / x to the last bit or so, in one instruction where a division takes six."""
    if _INTERPRETED:
        return 1.0 / x
    else:
        return tl.inline_asm_elementwise(
            "rcp.approx.ftz.f32 $0, $1;", "=f,f", [x], dtype=tl.float32, is_pure=True, pack=1
        )


@triton.jit
def multiply_add(a, b, c):
    """a * b + c for fp32, rounded once."""
    if _INTERPRETED:  # whose own rounds the product, too
        exact = a.to(tl.float64) * b.to(tl.float64) + c.to(tl.float64)
        return exact.to(tl.float32)
    else:
        return tl.fma(a, b, c)


@triton.jit
def exp_below(x, base):
    """exp(x - base) for x (n, v) and base (n,) to a factor of each row, and that factor (n,): what
    sums over the row are to be multiplied by.

    So that subtraction and scale are one instruction for each element. The product subtracted is
    rounded, which a base of 1,000 would show; but it is one of a row, and its error is known."""
    # From 2^29 on that error would be an exponent that fp32 does not hold. There numbers are 32 or
    # more apart, and 2^-32 is as good a nothing as e^-32.
    log2e = tl.where(tl.abs(base) < 536870912.0, LOG2E, 1.0)
    scaled = base * log2e
    exp_x = tl.exp2(multiply_add(x, log2e[:, None], -scaled[:, None]))
    return exp_x, tl.exp2(-multiply_add(base, log2e, -scaled))


@triton.jit
def load_tile(
    matrix,
    row,
    col,
    num_rows,
    num_cols,
    stride_row,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """(BLOCK_ROWS, BLOCK_COLS) of a matrix from (row, col) on; zeros outside of it."""
    if DESCRIPTOR:
        return matrix.load([row, col])
    else:
        rows = row + tl.arange(0, BLOCK_ROWS)
        cols = col + tl.arange(0, BLOCK_COLS)
        # 64-bit before the multiplication: a matrix may hold more than 2^31 elements.
        offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :]
        mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
        return tl.load(matrix + offsets, mask=mask, other=0.0)


@triton.jit
def store_tile(
    matrix,
    row,
    col,
    num_rows,
    num_cols,
    stride_row,
    tile,
    BLOCK_ROWS: tl.constexpr,
    BLOCK_COLS: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
):
    """Store a (BLOCK_ROWS, BLOCK_COLS) tile at (row, col), clipped to the matrix."""
    if DESCRIPTOR:
        matrix.store([row, col], tile)
    else:
        rows = row + tl.arange(0, BLOCK_ROWS)
        cols = col + tl.arange(0, BLOCK_COLS)
        offsets = rows[:, None].to(tl.int64) * stride_row + cols[None, :]
        mask = (rows[:, None] < num_rows) & (cols[None, :] < num_cols)
        tl.store(matrix + offsets, tile, mask=mask)


@triton.jit
def dot_tile(
    a,
    b,
    a_start,
    b_start,
    M,
    N,
    K,
    stride_a,
    stride_b,
    worklist,
    work_count,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    WORK_K: tl.constexpr,
    A_KM: tl.constexpr,
    B_NK: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    B_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """One fp32 output tile of A B at (a_start, b_start): the only matmul loop but that of `hopper`.

    A is (M, K), or stored as (K, M) with A_KM; B is (K, N), or stored as (N, K) with B_NK. With
    WORK_K = 0 the loop runs over all of K; otherwise over `work_count` blocks of WORK_K alone,
    whose numbers are in `worklist`: the block-sparse products of the filtered backward pass.
    """
    acc = tl.zeros((BLOCK_M, BLOCK_N), dtype=tl.float32)
    if WORK_K == 0:
        steps = tl.cdiv(K, BLOCK_K)
    else:
        steps = work_count * (WORK_K // BLOCK_K)
    for step in range(steps):
        if WORK_K == 0:
            k = step * BLOCK_K
        else:
            per_block: tl.constexpr = WORK_K // BLOCK_K
            block = tl.load(worklist + step // per_block)
            k = block * WORK_K + (step % per_block) * BLOCK_K
        if A_KM:
            a_tile = load_tile(a, k, a_start, K, M, stride_a, BLOCK_K, BLOCK_M, A_DESCRIPTOR).T
        else:
            a_tile = load_tile(a, a_start, k, M, K, stride_a, BLOCK_M, BLOCK_K, A_DESCRIPTOR)
        if B_NK:
            b_tile = load_tile(b, b_start, k, N, K, stride_b, BLOCK_N, BLOCK_K, B_DESCRIPTOR).T
        else:
            b_tile = load_tile(b, k, b_start, K, N, stride_b, BLOCK_K, BLOCK_N, B_DESCRIPTOR)
        acc = tl.dot(a_tile, b_tile, acc, input_precision=PRECISION)
    return acc


@triton.jit
def logistic(w):
    """1 / (1 + 2^w). For w = `logistic_factor` of a cap times y, cap * tanh(y / cap) is cap less
    2 cap times that."""
    return reciprocal(1.0 + tl.exp2(w))


@triton.jit
def logistic_factor(cap):
    return 2.0 * LOG2E / cap


@triton.jit
def soft_cap(y, cap, PRECISE: tl.constexpr):
    """cap * tanh(y / cap) without overflow: to 1.2e-7 of cap, or with PRECISE to 5e-6 of itself."""
    if PRECISE:
        size = tl.abs(y / cap)
        e = tl.exp2(size * (-2.0 * LOG2E))
        t = (1.0 - e) / (1.0 + e)
        # Near 0, where 1 - e cancels, its Taylor series.
        t = tl.where(size < 0.02, size * (1.0 - size * size / 3.0), t)
        return cap * tl.where(y < 0, -t, t)
    else:
        return cap - 2.0 * cap * logistic(y * logistic_factor(cap))


@triton.jit
def logits_tile(
    input,
    weight,
    bias_ptr,
    row,
    col,
    N,
    V,
    D,
    stride_input,
    stride_weight,
    logit_scale,
    logit_softcap,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE_CAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
):
    """The logits of BLOCK_N tokens against BLOCK_V rows, fp32: the only place that computes them.

    Columns beyond V hold the logit of a zero row; the caller masks them.
    """
    x = dot_tile(
        input, weight, row, col, N, V, D, stride_input, stride_weight, input, 0,
        BLOCK_N, BLOCK_V, BLOCK_D, 0, False, True, DESCRIPTOR, DESCRIPTOR, PRECISION,
    )  # fmt: skip
    if HAS_BIAS:
        cols = col + tl.arange(0, BLOCK_V)
        x += tl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(tl.float32)[None, :]
    return scale_and_cap(x, logit_scale, logit_softcap, HAS_SCALE, HAS_SOFTCAP, PRECISE_CAP)


@triton.jit
def scale_and_cap(
    y,
    logit_scale,
    logit_softcap,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE_CAP: tl.constexpr,
):
    """From E C^T + bias to the logit."""
    if HAS_SCALE:
        y *= logit_scale
    if HAS_SOFTCAP:
        y = soft_cap(y, logit_softcap, PRECISE_CAP)
    return y


@triton.jit
def halves(x):
    """The left and the right columns of a tile, which stay in the threads that hold them."""
    HALF: tl.constexpr = x.shape[1] // 2
    return x.reshape([x.shape[0], 2, HALF]).permute((0, 2, 1)).split()


@triton.jit
def target_column(target_ptr, rows, N, first_id, V):
    """int32 column of each token's target in this launch; -1 where it is not here, or no id."""
    target = tl.load(target_ptr + rows, mask=rows < N, other=-1)
    column = target - first_id
    return tl.where((target >= 0) & (column >= 0) & (column < V), column, -1).to(tl.int32)


@triton.jit
def grouped_block(tile, num_rows, num_cols, group):
    """(row block, column block) of a linear tile number.

    `group` row blocks sweep the columns together, so that a block of the classifier is used so many
    times while it is in the L2 cache.
    """
    per_group = group * num_cols
    first_row = (tile // per_group) * group
    group_rows = tl.minimum(num_rows - first_row, group)
    within = tile % per_group
    return first_row + within % group_rows, within // group_rows
