"""Backward pass: the logits' gradient of a strip, and block-sparse products with it.

The exact path needs kernel 1 only: it recomputes the logits of a strip of the vocabulary and
writes their gradient, transposed, to a buffer; products take it from there (`cce_tp.backward`),
the library's or, for dC on Hopper, that of `kernels.hopper`. With the paper's filter kernel 1 also
decides which tiles of G to keep, kernel 2 lists them and kernel 3 multiplies them alone. Every
output element has one writer: no locks, no atomics.

G^T is stored, (V, N), and not G: the rows of a vocabulary row's dC are then contiguous, so that
G^T can live in the memory of dC itself, and the transposed store is the faster one on Hopper
(1.05 against 1.11 gemm at 8192 x 2304 x 256000).

Legend: N tokens, V vocabulary columns of the strip, D hidden size.
"""

from __future__ import annotations

import functools
from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from cce_tp import products
from cce_tp.kernels import tuning
from cce_tp.kernels.launch import (
    LogitsForm,
    Prepared,
    launch,
    logit_arguments,
    matrix_argument,
    prepared,
)
from cce_tp.kernels.tile import (
    LOG2E,
    dot_tile,
    grouped_block,
    halves,
    logits_tile,
    store_tile,
    target_column,
)
from cce_tp.kernels.tuning import ceil_div
from cce_tp.problem import KeptLogits, LocalLogits, LogitGradient, rows_of

# Tokens, columns and warps of a program that makes G of kept logits. Of eleven choices the fastest
# on an H200: 142 us for 16384 columns of 8192 tokens, where copying them takes 128 and this with
# twice the columns and warps 201.
_KEPT_BLOCK = (128, 32, 4)


@triton.jit
def token_terms(target_ptr, grad_ptr, max_ptr, log_sum_ptr, rows, first_col, N, V, first_id):
    """Of each token: its target's column less first_col, upstream gradient, maximum, and log of the
    sum."""
    valid = rows < N
    grad = tl.load(grad_ptr + rows, mask=valid, other=0.0)
    max_x = tl.load(max_ptr + rows, mask=valid, other=0.0)
    log_sum = tl.load(log_sum_ptr + rows, mask=valid, other=0.0)
    target = target_column(target_ptr, rows, N, first_id, V) - first_col
    return target, grad, max_x, log_sum


@triton.jit
def cap_slope(x, logit_softcap, LOGISTIC: tl.constexpr):
    """The cap's derivative at the logits x; with LOGISTIC a quarter of it: see `gradient_of`."""
    if LOGISTIC:
        return x - x * x
    else:
        capped = x * (1.0 / logit_softcap)
        return 1.0 - capped * capped


# What a minimum makes of NaN.
_STAYS = tl.constexpr(tl.PropagateNan.ALL)


@triton.jit
def gradient_of(
    x,
    target,
    grad,
    factor,
    max_x,
    log_sum,
    in_tile,
    logit_softcap,
    z_loss,
    onehot_weight,
    uniform_weight,
    BLOCK_V: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    SPECIAL: tl.constexpr = None,
    LOGISTIC: tl.constexpr = False,
    HAS_SCALE: tl.constexpr = False,
):
    """From a tile of logits x (tokens, BLOCK_V), the numbers of its columns, and its `token_terms`:
    the gradient of each token's own loss with respect to y, the logit before the cap, times factor
    (tokens,); 0 for masked tokens.

    SPECIAL: what `is_special` says, or None if that is to be asked here.
    LOGISTIC: of capped logits x is not them but the `logistic` r of which they are cap - 2 cap r,
    which saves three instructions for each element.
    HAS_SCALE: x is a product with the scale, which the compiler need not round here, so that it may
    lie above max_x by what the forward pass has rounded: at 1e10 that is an exponent of 512."""
    if LOGISTIC:
        # x - max is (cap - max) - 2 cap r, and the cap's derivative 4 (r - r^2).
        below = (logit_softcap - max_x) * LOG2E - log_sum * LOG2E
        p = tl.exp2(x * (-2.0 * LOG2E * logit_softcap) + below[:, None])
        factor = 4.0 * factor
    else:
        below = x - max_x[:, None]
        if HAS_SCALE and not HAS_SOFTCAP:
            # A choice would become one of products with LOG2E, and round them here or there.
            below = tl.minimum(below, 0.0, propagate_nan=_STAYS)
        p = tl.exp2(below * LOG2E - (log_sum * LOG2E)[:, None])
    # What is the same for all columns goes into one factor of p and one term.
    of_p = factor
    if HAS_Z_LOSS:
        of_p *= 1.0 + 2.0 * z_loss * (max_x + log_sum)
    g = p * of_p[:, None]
    if HAS_SMOOTHING:
        g -= (uniform_weight * factor)[:, None]
    at_target = (onehot_weight * factor)[:, None]
    here = (target >= 0) & (target < BLOCK_V)
    # A masked token has gradient exactly 0 even where its logits are not finite.
    masked = grad == 0.0
    # Most tiles hold no target, and no masked token: a branch costs less than a comparison per
    # element. One where that can be, since a second one that short becomes a selection of every
    # element; with a cap its derivative comes between them.
    if SPECIAL is not None:
        if SPECIAL:
            g -= tl.where(in_tile[None, :] == target[:, None], at_target, 0.0)
        if HAS_SOFTCAP:
            g *= cap_slope(x, logit_softcap, LOGISTIC)
        if SPECIAL:
            g = tl.where(masked[:, None], 0.0, g)
    elif HAS_SOFTCAP:
        if tl.max(here.to(tl.int32), axis=0) > 0:
            g -= tl.where(in_tile[None, :] == target[:, None], at_target, 0.0)
        g *= cap_slope(x, logit_softcap, LOGISTIC)
        if tl.max(masked.to(tl.int32), axis=0) > 0:
            g = tl.where(masked[:, None], 0.0, g)
    else:
        if tl.max((here | masked).to(tl.int32), axis=0) > 0:
            g -= tl.where(in_tile[None, :] == target[:, None], at_target, 0.0)
            g = tl.where(masked[:, None], 0.0, g)
    return g


@triton.jit
def is_special(target, grad, BLOCK_V: tl.constexpr):
    """Whether a token is masked, or has its target among BLOCK_V columns from 0 on."""
    here = (target >= 0) & (target < BLOCK_V)
    return tl.max((here | (grad == 0.0)).to(tl.int32), axis=0) > 0


@triton.jit(do_not_specialize=["first_id"])
def grad_kept_kernel(
    below_ptr,
    tile_max_ptr,
    target_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    out_ptr,
    tiles_ptr,
    N,
    V,
    stride_below,
    stride_out,
    start,
    first_id,
    logit_scale,
    logit_softcap,
    z_loss,
    onehot_weight,
    uniform_weight,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    TILE: tl.constexpr,
    ONE_TILE: tl.constexpr,
    SKIP: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
):
    """out (V, N): G^T of V kept columns from `start` on; tile_max (tiles, N) of all of them.

    out may be the memory of the kept logits. ONE_TILE: the columns of a block are of one tile.
    SKIP, which needs that: nothing is done for tiles that are 0 in tiles_ptr."""
    blocks_n = tl.cdiv(N, BLOCK_N)
    col = (tl.program_id(0) // blocks_n) * BLOCK_V
    wanted = 1
    if SKIP:
        wanted = tl.load(tiles_ptr + (start + col) // TILE)
    if wanted != 0:
        rows = (tl.program_id(0) % blocks_n) * BLOCK_N + tl.arange(0, BLOCK_N)
        cols = col + tl.arange(0, BLOCK_V)
        mask = (cols < V)[:, None] & (rows < N)[None, :]
        at = cols[:, None].to(tl.int64) * stride_below + rows[None, :]
        below = tl.load(below_ptr + at, mask=mask, other=0.0).to(tl.float32)
        if ONE_TILE:
            first = tile_max_ptr + ((start + col) // TILE).to(tl.int64) * N
            x = tl.trans(below) + tl.load(first + rows, mask=rows < N, other=0.0)[:, None]
        else:
            tiles = ((start + cols) // TILE).to(tl.int64)
            tile_max = tl.load(
                tile_max_ptr + tiles[:, None] * N + rows[None, :], mask=mask, other=0.0
            )
            x = tl.trans(below + tile_max)
        target, grad, max_x, log_sum = token_terms(
            target_ptr, grad_ptr, max_ptr, log_sum_ptr, rows, col, N, V, first_id
        )
        factor = grad * logit_scale if HAS_SCALE else grad
        g = gradient_of(
            x, target, grad, factor, max_x, log_sum, tl.arange(0, BLOCK_V),
            logit_softcap, z_loss, onehot_weight, uniform_weight,
            BLOCK_V, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP,
        )  # fmt: skip
        out = out_ptr + cols[:, None].to(tl.int64) * stride_out + rows[None, :]
        tl.store(out, tl.trans(g.to(out_ptr.dtype.element_ty)), mask=mask)


@triton.jit(do_not_specialize=["first_id"])
def grad_logits_kernel(
    input,
    weight,
    bias_ptr,
    target_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    out,
    kept_ptr,
    N,
    V,
    D,
    stride_input,
    stride_weight,
    stride_out,
    first_id,
    logit_scale,
    logit_softcap,
    z_loss,
    onehot_weight,
    uniform_weight,
    eps,
    NUM_PROGRAMS: tl.constexpr,
    FILTER: tl.constexpr,
    HALVES: tl.constexpr,
    LOAD_LATE: tl.constexpr,
    SCALE_LATE: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    HAS_BIAS: tl.constexpr,
    HAS_SCALE: tl.constexpr,
    HAS_SOFTCAP: tl.constexpr,
    PRECISE_CAP: tl.constexpr,
    DESCRIPTOR: tl.constexpr,
    OUT_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_V: tl.constexpr,
    BLOCK_D: tl.constexpr,
    GROUP_N: tl.constexpr,
):
    """out: G^T, (V, N), inputs' dtype; kept_ptr: (token blocks, tiles) int32, FILTER only.

    LOAD_LATE: what is loaded per token is loaded after the products, not before them; SCALE_LATE: g
    takes the upstream gradient at the end, not as a factor of p; HALVES, without either filter or
    SCALE_LATE: it is made for one half of the columns after the other. All to the same bits."""
    dtype: tl.constexpr = out.dtype if OUT_DESCRIPTOR else out.dtype.element_ty
    blocks_n = tl.cdiv(N, BLOCK_N)
    blocks_v = tl.cdiv(V, BLOCK_V)
    for tile in tl.range(tl.program_id(0), blocks_n * blocks_v, NUM_PROGRAMS, flatten=True):
        block_n, block_v = grouped_block(tile, blocks_n, blocks_v, GROUP_N)
        rows = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
        if not LOAD_LATE:
            target, grad, max_x, log_sum = token_terms(
                target_ptr, grad_ptr, max_ptr, log_sum_ptr, rows, block_v * BLOCK_V, N, V, first_id
            )
        x = logits_tile(
            input, weight, bias_ptr, block_n * BLOCK_N, block_v * BLOCK_V, N, V, D,
            stride_input, stride_weight, logit_scale, logit_softcap,
            BLOCK_N, BLOCK_V, BLOCK_D, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, PRECISE_CAP, DESCRIPTOR,
            PRECISION,
        )  # fmt: skip
        if LOAD_LATE:
            target, grad, max_x, log_sum = token_terms(
                target_ptr, grad_ptr, max_ptr, log_sum_ptr, rows, block_v * BLOCK_V, N, V, first_id
            )
        upstream = grad * logit_scale if HAS_SCALE else grad
        if HALVES:
            HALF: tl.constexpr = BLOCK_V // 2
            in_half = tl.arange(0, HALF)
            x_left, x_right = halves(x)
            left = gradient_of(
                x_left, target, grad, upstream, max_x, log_sum, in_half,
                logit_softcap, z_loss, onehot_weight, uniform_weight,
                HALF, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, None, False, HAS_SCALE,
            ).to(dtype)  # fmt: skip
            right = gradient_of(
                x_right, target - HALF, grad, upstream, max_x, log_sum, in_half,
                logit_softcap, z_loss, onehot_weight, uniform_weight,
                HALF, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, None, False, HAS_SCALE,
            ).to(dtype)  # fmt: skip
            g = tl.join(left, right).permute((0, 2, 1)).reshape([BLOCK_N, BLOCK_V])
        else:
            in_tile = tl.arange(0, BLOCK_V)
            factor = tl.full((BLOCK_N,), 1.0, tl.float32) if SCALE_LATE else upstream
            g = gradient_of(
                x, target, grad, factor, max_x, log_sum, in_tile,
                logit_softcap, z_loss, onehot_weight, uniform_weight,
                BLOCK_V, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, None, False, HAS_SCALE,
            )  # fmt: skip
            if FILTER:
                size = tl.where((block_v * BLOCK_V + in_tile < V)[None, :], tl.abs(g), 0.0)
                small = (size < eps).to(tl.int32)  # NaN is not small
                # Over the flat tile: Triton 3.7 cannot build the reduction by axes for Blackwell.
                kept = tl.min(small) == 0
                tl.store(kept_ptr + block_n * blocks_v + block_v, kept.to(tl.int32))
                g = tl.where(kept, g, 0.0)
            if SCALE_LATE:
                g *= upstream[:, None]
            g = g.to(dtype)
        store_tile(
            out, block_v * BLOCK_V, block_n * BLOCK_N, V, N, stride_out, tl.trans(g),
            BLOCK_V, BLOCK_N, OUT_DESCRIPTOR,
        )  # fmt: skip


@triton.jit
def kept_blocks_kernel(
    mask_ptr,
    worklist_ptr,
    count_ptr,
    K,
    stride_row,
    stride_col,
    BLOCK_K: tl.constexpr,
):
    """Of each row of a matrix of zeros and ones: the columns of the ones, ascending, and how many.

    In worklist_ptr a row has K places; those beyond so many stay as they are."""
    row = tl.program_id(0)
    count = 0
    for first in range(0, K, BLOCK_K):
        cols = first + tl.arange(0, BLOCK_K)
        kept = tl.load(mask_ptr + row * stride_row + cols * stride_col, mask=cols < K, other=0)
        places = count + tl.cumsum(kept, axis=0) - kept
        tl.store(worklist_ptr + row * K + places, cols, mask=kept != 0)
        count += tl.sum(kept, axis=0)
    tl.store(count_ptr + row, count)


@triton.jit
def sparse_product_kernel(
    a,
    b,
    out_ptr,
    row_ptr,
    factor_ptr,
    worklist_ptr,
    count_ptr,
    M,
    N,
    K,
    stride_a,
    stride_b,
    stride_out,
    stride_worklist,
    ACCUMULATE: tl.constexpr,
    TRANSPOSED: tl.constexpr,
    SPLIT_M: tl.constexpr,
    WORK_K: tl.constexpr,
    A_DESCRIPTOR: tl.constexpr,
    B_DESCRIPTOR: tl.constexpr,
    PRECISION: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
):
    """out (M, N) = or += factor A B, A being (M, K), or stored as (K, M) with TRANSPOSED.

    A's blocks of (BLOCK_M * SPLIT_M) x WORK_K are either kept or zero: worklist_ptr holds, per
    row of blocks, the numbers of its `count` kept blocks. Row m goes to row_ptr[m] of out, or to
    row m where that is None; no factor is 1."""
    blocks_m = tl.cdiv(M, BLOCK_M)
    block_m = tl.program_id(0) % blocks_m
    block_n = tl.program_id(0) // blocks_m
    row = block_m // SPLIT_M
    acc = dot_tile(
        a, b, block_m * BLOCK_M, block_n * BLOCK_N, M, N, K, stride_a, stride_b,
        worklist_ptr + row * stride_worklist, tl.load(count_ptr + row),
        BLOCK_M, BLOCK_N, BLOCK_K, WORK_K, TRANSPOSED, False, A_DESCRIPTOR, B_DESCRIPTOR, PRECISION,
    )  # fmt: skip
    if factor_ptr is not None:
        acc *= tl.load(factor_ptr)
    rows = block_m * BLOCK_M + tl.arange(0, BLOCK_M)
    cols = block_n * BLOCK_N + tl.arange(0, BLOCK_N)
    mask = (rows[:, None] < M) & (cols[None, :] < N)
    if row_ptr is not None:
        rows = tl.load(row_ptr + rows, mask=rows < M, other=0)
    # 64-bit before the multiplication: a matrix may hold more than 2^31 elements.
    outs = out_ptr + rows[:, None].to(tl.int64) * stride_out + cols[None, :]
    if ACCUMULATE:
        acc += tl.load(outs, mask=mask, other=0.0).to(tl.float32)
    tl.store(outs, acc.to(out_ptr.dtype.element_ty), mask=mask)


class KeptTiles:
    """Which tiles of a gradient strip survived the filter.

    Attributes:
        mask: (token blocks, vocabulary tiles) int32, 1 where the tile is kept.
        block_n, block_v: tokens and columns per tile.
    """

    def __init__(self, mask: Tensor, block_n: int, block_v: int) -> None:
        self.mask, self.block_n, self.block_v = mask, block_n, block_v

    def tokens(self, start: int, stop: int) -> KeptTiles:
        """Of these tokens alone, `start` being the first one of a tile."""
        assert start % self.block_n == 0
        part = slice(start // self.block_n, ceil_div(stop, self.block_n))
        made = KeptTiles(self.mask[part], self.block_n, self.block_v)
        worklist, count = self.by_tokens
        made.by_tokens = worklist[part], count[part]
        return made

    @functools.cached_property
    def by_tokens(self) -> tuple[Tensor, Tensor]:
        """For each block of tokens the vocabulary tiles that are kept, ascending, and how many."""
        return _listed(self.mask)

    @functools.cached_property
    def by_columns(self) -> tuple[Tensor, Tensor]:
        """For each vocabulary tile the blocks of tokens, likewise."""
        return _listed(self.mask.t())


def _listed(mask: Tensor) -> tuple[Tensor, Tensor]:
    """Of each row the columns of the ones, and how many: in ascending order, so that a sum over
    them has one order and two runs give equal bits."""
    worklist, count = mask.new_empty(mask.shape), mask.new_empty(mask.shape[0])
    launch(
        kept_blocks_kernel, len(mask),
        mask_ptr=mask, worklist_ptr=worklist, count_ptr=count,
        K=mask.shape[1], stride_row=mask.stride(0), stride_col=mask.stride(1),
        BLOCK_K=128, num_warps=1,
    )  # fmt: skip
    return worklist, count


def filter_tokens(input: Tensor) -> int:
    """Tokens of a tile of the paper's filter, for operands like this one."""
    return tuning.config_for(input)[0].block_n


def grad_logits(
    logits: LocalLogits, upstream: LogitGradient, out_VN: Tensor, eps: float | None
) -> KeptTiles | None:
    """Gradient of E C^T for a strip: d loss / d x, times the cap's derivative and logit_scale.

    Args:
        logits: N tokens against the V columns of the strip.
        upstream: gradient and global statistics of the same tokens.
        out_VN: (V, N) in the inputs' dtype, last dim contiguous; G^T, every element is written; and
            perhaps what follows a row of it, up to a whole unit of 16 bytes.
        eps: threshold of the paper's filter, or None for all of G.

    Returns:
        The kept tiles with a filter (dropped ones are zeros in out_VN), else None.
    """
    form, stride = LogitsForm.of(logits), out_VN.stride(0)
    described = tuning.use_descriptors(out_VN)
    of_tokens = logits.target, upstream.grad, upstream.max_logit, upstream.log_sum
    if form.logit_softcap is not None:
        form = form.of_few_warpgroups(tuning.few_warpgroups(logits.input))
    if form.warpgroups and described and eps is None:
        from cce_tp.kernels import hopper

        run = hopper.gradients(form, stride, upstream.coefficients)
        run(logits.input, logits.weight, logits.bias, *of_tokens, out_VN)
        return None
    form, kept = form._replace(warpgroups=0), None
    if eps is not None:
        block_n, block_v = form.config.block_n, form.config.block_v
        shape = (ceil_div(logits.shape[0], block_n), ceil_div(logits.shape[1], block_v))
        mask = torch.empty(shape, dtype=torch.int32, device=logits.input.device)
        kept = KeptTiles(mask, block_n, block_v)
    run = _grad_logits(form, stride, described, upstream.coefficients, eps)
    mask = None if kept is None else kept.mask
    run(logits.input, logits.weight, logits.bias, *of_tokens, out_VN, mask)
    return kept


def weight_product(
    out: Tensor, grad_VN: Tensor, input: Tensor, *, accumulate: bool, sums: Tensor | None
) -> None:
    """`products.weight_product`, of as many rows as that is faster for by a kernel for Hopper."""
    rows = tuning.rows_for_warpgroups(out, grad_VN, input, accumulate)
    (vocab, tokens), hidden = grad_VN.shape, input.shape[1]
    if rows:
        from cce_tp.kernels import hopper

        strides = grad_VN.stride(0), input.stride(0), out.stride(0)
        programs = tuning.config_for(grad_VN)[1]
        run = hopper.weight_gradient(
            (rows, tokens, hidden),
            strides,
            (input.dtype, out.dtype),
            programs,
            accumulate,
            sums is not None,
        )
        run(rows_of(grad_VN, 0, rows), input, sums, rows_of(out, 0, rows))
    if rows < vocab:
        rest = None if sums is None else rows_of(sums, rows, vocab)
        out, grad_VN = rows_of(out, rows, vocab), rows_of(grad_VN, rows, vocab)
        products.weight_product(out, grad_VN, input, accumulate=accumulate, sums=rest)


@prepared
def _grad_logits(
    form: LogitsForm,
    stride_out: int,
    out_descriptor: bool,
    coefficients: tuple[float, float, float],
    eps: float | None,
) -> Prepared:
    out = {"out": (form.config.block_v, form.config.block_n)} if out_descriptor else {}
    # Equal in value, not in registers. Early and whole is faster, but with a cap g and x are both
    # needed for long, and G takes twice as long where too many of them are spilled to memory.
    # Measured on an H200 at D 4096: the cap alone 1.100 gemm, in halves 1.111; with z-loss and
    # smoothing 1.134 in one piece, 1.110 in halves, and with a bias too 1.152 and 1.122.
    z_loss, _, uniform_weight = coefficients
    capped = form.logit_softcap is not None
    more = z_loss != 0.0 or uniform_weight != 0.0
    filters = eps is not None  # by each token's own gradient
    return Prepared(
        grad_logits_kernel,
        min(form.programs, form.tiles),
        stride_out=stride_out,
        eps=0.0 if eps is None else float(eps),
        FILTER=filters,
        HALVES=capped and more and not filters,
        LOAD_LATE=capped and more,
        SCALE_LATE=filters or (capped and not more),
        OUT_DESCRIPTOR=out_descriptor,
        **coefficient_arguments(coefficients),
        **form.tile_arguments(),
        blocks={**form.blocks, **out},
    )


def grad_kept(
    kept: KeptLogits,
    start: int,
    logits: LocalLogits,
    upstream: LogitGradient,
    out: Tensor,
    tiles: Tensor | None,
) -> None:
    """As `grad_logits`, of columns whose logits are kept.

    Args:
        kept: logits of the same tokens.
        start: first of the kept columns to take.
        logits: N tokens against those V columns.
        upstream: gradient and global statistics of the tokens.
        out: (V, N) in the inputs' dtype, last dim contiguous; G^T, every element is written.
        tiles: int32 by tile, 0 for one that may be left out; or None.
    """
    run = _grad_kept(
        # Less than a `LogitsForm`, which also says how to multiply.
        (logits.shape, logits.first_id, logits.logit_scale, logits.logit_softcap),
        (kept.below_max.stride(0), out.stride(0)),
        start,
        kept.tile,
        tiles is not None,
        upstream.coefficients,
        out.dtype,
    )
    run(
        rows_of(kept.below_max, start, start + logits.shape[1]),
        kept.tile_max.contiguous(),
        logits.target,
        upstream.grad,
        upstream.max_logit,
        upstream.log_sum,
        out,
        tiles,
    )


@prepared
def _grad_kept(
    logits: tuple[tuple[int, int, int], int, float, float | None],
    strides: tuple[int, int],
    start: int,
    tile: int,
    skips: bool,
    coefficients: tuple[float, float, float],
    dtype: torch.dtype,
) -> Prepared:
    del dtype  # what is prepared holds for it alone
    num_tokens, vocab, _ = logits[0]
    block_n, block_v, num_warps = _KEPT_BLOCK
    one_tile = tile % block_v == 0 and start % block_v == 0
    return Prepared(
        grad_kept_kernel,
        ceil_div(num_tokens, block_n) * ceil_div(vocab, block_v),
        stride_below=strides[0],
        stride_out=strides[1],
        start=start,
        TILE=tile,
        ONE_TILE=one_tile,
        SKIP=skips and one_tile,
        BLOCK_N=block_n,
        BLOCK_V=block_v,
        num_warps=num_warps,
        **coefficient_arguments(coefficients),
        **logit_arguments(*logits),
    )


def coefficient_arguments(coefficients: tuple[float, float, float]) -> dict[str, Any]:
    """Of the kernels that call `gradient_of`."""
    z_loss, onehot_weight, uniform_weight = coefficients
    return {
        "z_loss": z_loss,
        "onehot_weight": onehot_weight,
        "uniform_weight": uniform_weight,
        "HAS_SMOOTHING": uniform_weight != 0.0,
        "HAS_Z_LOSS": z_loss != 0.0,
    }


def sparse_product(
    out: Tensor,
    grad_VN: Tensor,
    other: Tensor,
    kept: KeptTiles,
    *,
    of_input: bool,
    accumulate: bool,
    rows: Tensor | None = None,
    factor: Tensor | None = None,
) -> None:
    """out = or += G @ other with `of_input`, else G^T @ other, over the kept tiles of G alone.

    Args:
        out: (N, D) with `of_input`, else (V, D), or with `rows` all rows of dC; rounded to once.
        grad_VN: (V, N) gradient strip, G^T.
        other: (V, D) classifier rows of the strip with `of_input`, else (N, D) inputs.
        kept: which tiles of G are not zero.
        of_input: make a part of dE and not of dC.
        accumulate: add to `out`.
        rows: (V,) int64, distinct: where in `out` the rows of the product go; None for in order.
        factor: () fp32, of the product; None for 1.
    """
    tile_m, tile_k = (kept.block_n, kept.block_v) if of_input else (kept.block_v, kept.block_n)
    worklist, count = kept.by_tokens if of_input else kept.by_columns
    config, _ = tuning.config_for(grad_VN)
    block_m, block_k = min(tile_m, 128), min(tile_k, config.block_d)
    block_d = min(config.block_v, 128)
    inner, outer = tuple(grad_VN.shape) if of_input else (grad_VN.shape[1], grad_VN.shape[0])
    a_descriptor = tuning.use_descriptors(grad_VN)
    b_descriptor = tuning.use_descriptors(other)
    a_block = (block_k, block_m) if of_input else (block_m, block_k)
    hidden = other.shape[1]
    launch(
        sparse_product_kernel, ceil_div(outer, block_m) * ceil_div(hidden, block_d),
        a=matrix_argument(grad_VN, *a_block, a_descriptor),
        b=matrix_argument(other, block_k, block_d, b_descriptor),
        out_ptr=out, row_ptr=rows, factor_ptr=factor, worklist_ptr=worklist, count_ptr=count,
        M=outer, N=hidden, K=inner,
        stride_a=grad_VN.stride(0), stride_b=other.stride(0), stride_out=out.stride(0),
        stride_worklist=worklist.stride(0),
        ACCUMULATE=accumulate, TRANSPOSED=of_input, SPLIT_M=tile_m // block_m, WORK_K=tile_k,
        A_DESCRIPTOR=a_descriptor, B_DESCRIPTOR=b_descriptor,
        PRECISION=tuning.input_precision(grad_VN.dtype),
        BLOCK_M=block_m, BLOCK_N=block_d, BLOCK_K=block_k,
        num_warps=config.num_warps, num_stages=config.num_stages,
    )  # fmt: skip
