"""The large kernels for Hopper's tensor cores: tile statistics, G^T, and dC, of 16-bit operands.

The first two compute what `forward.tile_statistics_kernel` and `backward.grad_logits_kernel` do,
with the same functions for all that comes after the product; the third is a product alone. They are
in Gluon, which can say what Triton cannot:

*192 x 256 tiles.* These products run at the card's power limit, so what counts is energy; and a
tile of 192 x 256 brings 22% fewer bytes from the L2 cache for each product than one of 128 x 256.

*Warpgroups that run apart.* One warp loads; three warpgroups of 64 tokens each multiply and go on
by themselves, so that one's exponentials run beside the others' products. Or, on cards with the L2
cache of an H200 (`tuning.few_warpgroups`), two, and tiles of 128 x 256: where the larger ones do
not fit the sizes (`tuning.warpgroups`), and where what comes after the product takes more registers
than three leave (`forward.statistics_form`, G^T with a cap).

*Sums in memory.* dC that is added to is not read: the bulk copy engine adds to it where it lies.

Triton's interpreter does not know Gluon, which also changes from release to release: there, on
other devices, in other releases, on an H100 what two warpgroups would make, with a cap above 50,
for some statistics (`forward.statistics_form`), for G^T with the paper's filter, for rows of dC
that do not fit (`tuning.rows_for_warpgroups`) and for operands that the bulk copy engine cannot
address, or only in pieces that cut sectors of memory (`tuning.warpgroups`), Triton's two kernels
and the vendor's product run. Triton's compute the same bits, or, with a bias or a cap and a scale,
a bias and a cap, for sums of logits with a scale that is no power of two, and for G^T with such a
scale, a cap, z-loss or smoothing, the same to rounding, as is dC (`tests/test_hopper.py`).

Legend: N tokens, V vocabulary rows of this launch, D hidden size.
"""

from __future__ import annotations

from types import FunctionType
from typing import Any

import torch
from torch import Tensor
from triton._C.libtriton import ir
from triton.experimental import gluon
from triton.experimental.gluon import language as gl
from triton.experimental.gluon.language._core import builtin
from triton.experimental.gluon.language.nvidia.hopper import (
    fence_async_shared,
    mbarrier,
    tma,
    warpgroup_mma,
    warpgroup_mma_init,
    warpgroup_mma_wait,
)
from triton.experimental.gluon.nvidia.hopper import TensorDescriptor

from cce_tp.kernels import backward, forward, tile
from cce_tp.kernels.launch import LogitsForm, Prepared, logit_arguments, prepared
from cce_tp.kernels.tuning import HOPPER_ROWS, WARPGROUP_ROWS, ceil_div
from cce_tp.stats import StatRows

# Tokens of a warpgroup.
_ROWS = WARPGROUP_ROWS
# Half a tile's vocabulary rows, and the depth of a step.
_HALF_V = 128
_BLOCK_D = 32
# Columns of a tile that are on their way out at once, from each warpgroup.
_STORED_COLUMNS = 32
# Columns of ones, the fewest that the tensor cores multiply: for sums of the other operand's rows.
_SUM_COLUMNS = 8
_LOADER_REGISTERS = 24
# By how many warpgroups multiply in a program: steps of BLOCK_D deep that are loaded ahead, 28 or
# 24 KiB each; and registers of a thread, which holds 128 of its warpgroup's 64 x 256 sums.
_MEANS = {3: (7, 160), 2: (8, 232)}

# Blocks of tokens that sweep the vocabulary together, about. The fewer, the fewer operands are on
# their way through the L2 cache at once, and the more often the classifier comes from memory.
# Forward pass, 8192 tokens, with 43, 22, 11, 8, 5, 4 blocks, on an H200: D 2304 1.019 to 1.024 with
# 11 or more, then 1.020, 1.017, 1.013; D 4096 -, 1.017, 1.013, 1.010, 1.011, 1.009; D 8192 -, -,
# 1.010, 1.004, 1.003, 1.002. On an H100: D 2304 1.016, -, 1.021, 1.021, 1.019, 1.018; D 4096 -,
# 1.018, 1.013, 1.018, 1.017, 1.016; D 8192 -, -, 1.009, 1.016, 1.016, 1.018.
# With two warpgroups 8 are faster than 4 by up to 0.009, in the median 0.003 (an H200, D 2304 and
# 4096, with and without bias, cap, kept logits, statistics).
_GROUP_BLOCKS = {3: 4, 2: 8}

# Where the warps of a warpgroup hold their sums.
_HALF_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _HALF_V, 16]))
_WHOLE_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, 2 * _HALF_V, 16]))
_BIAS_LAYOUT = gl.constexpr(gl.BlockedLayout([2], [32], [4], [0]))
_BIAS_BUF_LAYOUT = gl.constexpr(gl.SwizzledSharedLayout(1, 1, 1, [0]))
_ONES_LAYOUT = gl.constexpr(gl.BlockedLayout([1, 1], [8, 4], [1, 4], [1, 0]))
_SUM_LAYOUT = gl.constexpr(gl.NVMMADistributedLayout([3, 0], [4, 1], [16, _SUM_COLUMNS, 16]))

_twins: dict[str, Any] = {}


def _twin(function: Any) -> Any:
    """A device function of the Triton kernels, to be called from Gluon.

    The source is one; where it says `tl`, Gluon's language is meant."""
    plain = function.fn
    names = {**plain.__globals__, **_twins, "tl": gl}
    made = FunctionType(plain.__code__, names, plain.__name__, plain.__defaults__)
    made.__annotations__ = plain.__annotations__
    made.__kwdefaults__ = plain.__kwdefaults__
    made.__module__, made.__qualname__ = plain.__module__, plain.__qualname__
    _twins[plain.__name__] = gluon.jit(made)
    return _twins[plain.__name__]


_halves = _twin(tile.halves)
_multiply_add = _twin(tile.multiply_add)
_twin(tile.target_column)
_twin(tile.exp_below)
_twin(tile.reciprocal)
_logistic = _twin(tile.logistic)
_logistic_factor = _twin(tile.logistic_factor)
_mask_columns = _twin(forward.mask_columns)
_logit_sums = _twin(forward.logit_sums)
_targets_here = _twin(forward.targets_here)
_store_target_logits = _twin(forward.store_target_logits)
_row_maxima = _twin(forward.row_maxima)
_below_base = _twin(forward.below_base)
_store_statistics = _twin(forward.store_statistics)
_token_terms = _twin(backward.token_terms)
_twin(backward.cap_slope)
_gradient_of = _twin(backward.gradient_of)
_is_special = _twin(backward.is_special)


@builtin
def _add_shared_to_global(tensor_desc, coord, src, _semantic: Any = None):
    """`tma.async_copy_shared_to_global`, but added to what is there, which Gluon 3.6 has no name
    for."""
    builder, coord = _semantic.builder, _semantic._convert_to_ir_values(coord, require_i64=False)
    add = ir.DESCRIPTOR_REDUCE_KIND.ADD
    builder.create_async_tma_reduce(add, tensor_desc.handle, coord, src.handle)


@builtin
def _specialize(
    multiply,
    arguments,
    load,
    operands,
    PARTS,
    REGISTERS,
    LOADER_REGISTERS,
    _semantic: Any = None,
    _generator: Any = None,
):
    """What the warps of a program do: PARTS warpgroups multiply(its number, *arguments), and one
    warp load(*operands). Tuples as they are: what a variable holds is no constant any more."""
    parts, registers, of_loader = PARTS.value, REGISTERS.value, LOADER_REGISTERS.value
    apart = [(multiply, gl.tuple([gl.constexpr(part), *arguments])) for part in range(parts)]
    apart.append((load, operands))
    warps, limits = [4] * (parts - 1) + [1], [registers] * (parts - 1) + [of_loader]
    gl.warp_specialize(apart, warps, limits, _semantic=_semantic, _generator=_generator)


@gluon.jit
def _tile(number, blocks_m, blocks_n, group):
    """(row block, column block) of a tile: `tile.grouped_block` in fewer instructions, since every
    warp works it out, and with the row blocks of a group turned now and then: a program takes every
    NUM_PROGRAMS-th tile, but not always the same row block, of which the last may have fewer rows.
    """
    per_group = group * blocks_n
    number = number.to(gl.uint32)
    groups = (number // per_group.to(gl.uint32)).to(gl.int32)
    within = number.to(gl.int32) - groups * per_group
    rows = gl.maximum(gl.minimum(blocks_m - groups * group, group), 1)  # 1 beyond the last tile
    block_n = (within.to(gl.uint32) // rows.to(gl.uint32)).to(gl.int32)
    turned = within - block_n * rows + (((block_n & 127) * rows) >> 7)
    return groups * group + gl.where(turned < rows, turned, turned - rows), block_n


@gluon.jit
def _next(stage, phase, STAGES: gl.constexpr):
    """Of the ring of buffers, the one after this, and in which round it is, modulo 2."""
    last = stage == STAGES - 1
    return gl.where(last, 0, stage + 1), gl.where(last, phase ^ 1, phase)


@gluon.jit
def _previous(stage, STAGES: gl.constexpr):
    # Not a variable of the loop: Triton 3.6 takes one that is only ever set to another for it.
    return gl.where(stage == 0, STAGES - 1, stage - 1)


@gluon.jit
def _load_tiles(
    a,
    b,
    ring,
    sizes,
    NUM_PROGRAMS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What one warp does: bring the operands of all tiles of this program, in order.

    Of the matrices a (M, K) and b (N, K), or (K, N) where its blocks are."""
    a_bufs, b_bufs, full, empty = ring
    M, N, K, group = sizes
    ROWS: gl.constexpr = a.block_shape[0]
    BLOCK_K: gl.constexpr = a.block_shape[1]
    K_FIRST: gl.constexpr = b.block_shape[0] == BLOCK_K
    HALF: gl.constexpr = b.block_shape[1] if K_FIRST else b.block_shape[0]
    PARTS: gl.constexpr = a_bufs.shape[0] // STAGES
    blocks_m = gl.cdiv(M, PARTS * ROWS)
    blocks_n = gl.cdiv(N, 2 * HALF)
    stage, phase = 0, 0
    for number in range(gl.program_id(0), blocks_m * blocks_n, NUM_PROGRAMS):
        block_m, block_n = _tile(number, blocks_m, blocks_n, group)
        for k in range(0, K, BLOCK_K):
            mbarrier.wait(empty.index(stage), phase ^ 1)
            arrived = full.index(stage)
            mbarrier.expect(arrived, (PARTS * ROWS + 2 * HALF) * BLOCK_K * 2)
            for part in gl.static_range(PARTS):
                tma.async_copy_global_to_shared(
                    a, [(block_m * PARTS + part) * ROWS, k], arrived,
                    a_bufs.index(stage * PARTS + part),
                )  # fmt: skip
            for half in gl.static_range(2):
                n = (block_n * 2 + half) * HALF
                tma.async_copy_global_to_shared(
                    b, [k, n] if K_FIRST else [n, k], arrived, b_bufs.index(stage * 2 + half)
                )
            stage, phase = _next(stage, phase, STAGES)


@gluon.jit
def _k_first(buf, BLOCK_K: gl.constexpr):
    return buf if buf.shape[0] == BLOCK_K else buf.permute((1, 0))


@gluon.jit
def _product(ring, stage, phase, K, ones, PART: gl.constexpr, STAGES: gl.constexpr) -> Any:
    """Begin the sums of one tile for warpgroup number PART, (ROWS, BLOCK_N / 2) fp32 each of its
    left and right columns; unless `ones` is None, those of its rows of `a` times that; and where in
    the ring the next tile begins. `_finish` waits for them.

    In halves, as one instruction for all would need more registers than ptxas grants a kernel of so
    many threads."""
    a_bufs, b_bufs, full, empty = ring
    ROWS: gl.constexpr = a_bufs.shape[1]
    BLOCK_K: gl.constexpr = a_bufs.shape[2]
    HALF: gl.constexpr = b_bufs.shape[2] if b_bufs.shape[1] == BLOCK_K else b_bufs.shape[1]
    PARTS: gl.constexpr = a_bufs.shape[0] // STAGES
    left = warpgroup_mma_init(gl.zeros([ROWS, HALF], gl.float32, _HALF_LAYOUT))
    right = warpgroup_mma_init(gl.zeros([ROWS, HALF], gl.float32, _HALF_LAYOUT))
    if ones is not None:
        COLUMNS: gl.constexpr = ones.shape[1]
        sums = warpgroup_mma_init(gl.zeros([ROWS, COLUMNS], gl.float32, _SUM_LAYOUT))
    for step in range(gl.cdiv(K, BLOCK_K)):
        mbarrier.wait(full.index(stage), phase)
        a = a_bufs.index(stage * PARTS + PART)
        b_left = _k_first(b_bufs.index(stage * 2), BLOCK_K)
        b_right = _k_first(b_bufs.index(stage * 2 + 1), BLOCK_K)
        left = warpgroup_mma(a, b_left, left, use_acc=step > 0, is_async=True)
        right = warpgroup_mma(a, b_right, right, use_acc=step > 0, is_async=True)
        # Until the step before this one has been multiplied.
        if ones is not None:
            sums = warpgroup_mma(a, ones, sums, use_acc=step > 0, is_async=True)
            done_left, done_right, done_sums = warpgroup_mma_wait(3, deps=(left, right, sums))
            sums = warpgroup_mma_init(done_sums)
        else:
            done_left, done_right = warpgroup_mma_wait(2, deps=(left, right))
        left, right = warpgroup_mma_init(done_left), warpgroup_mma_init(done_right)
        mbarrier.arrive(empty.index(_previous(stage, STAGES)), pred=step > 0)
        stage, phase = _next(stage, phase, STAGES)
    if ones is not None:
        return left, right, sums, stage, phase
    else:
        return left, right, stage, phase


@gluon.jit
def _load_biases(buf, bias_ptr, first_col, V, factor):
    """The biases of a tile's columns times factor, to shared memory in fp32.

    Begun while the last products are made: what sums begin with, they would wait for. And not kept
    in registers, of which there are so few that the compiler would rather load after the sums."""
    cols = first_col + gl.arange(0, buf.shape[0], layout=_BIAS_LAYOUT)
    biases = gl.load(bias_ptr + cols, mask=cols < V, other=0.0).to(gl.float32)
    buf.store(biases * factor)


@gluon.jit
def _scaled(
    left, right, bias_bufs, factor, PART: gl.constexpr, HAS_BIAS: gl.constexpr, SCALED: gl.constexpr
):
    """Of both halves of a tile of sums: the logits, or with a cap what `logistic` is to be of.

    A sum that is rounded once: of a bias that overflows with its factor where sum and bias cancel
    it makes an infinity, which the cap takes; of two products it would be NaN."""
    if HAS_BIAS:
        HALF: gl.constexpr = left.shape[1]
        biases = bias_bufs.index(PART)
        of_left = biases.slice(0, HALF).load(gl.SliceLayout(0, _HALF_LAYOUT))[None, :]
        of_right = biases.slice(HALF, HALF).load(gl.SliceLayout(0, _HALF_LAYOUT))[None, :]
        if SCALED:
            left = _multiply_add(left, factor, of_left)
            right = _multiply_add(right, factor, of_right)
        else:
            left += of_left
            right += of_right
    elif SCALED:
        left *= factor
        right *= factor
    return left, right


@gluon.jit
def _factor(logit_scale, logit_softcap, HAS_SCALE: gl.constexpr, HAS_SOFTCAP: gl.constexpr):
    """Of sums and bias alike: the scale, and what the cap's `logistic` takes them by."""
    factor = logit_scale if HAS_SCALE else 1.0
    if HAS_SOFTCAP:
        factor *= _logistic_factor(logit_softcap)
    return factor


@gluon.jit
def _finish(ring, stage, sums, STAGES: gl.constexpr):
    """Wait for the sums that `_product` has begun. What does not depend on them is done before."""
    done = warpgroup_mma_wait(0, deps=sums)
    mbarrier.arrive(ring[3].index(_previous(stage, STAGES)))
    return done


@gluon.jit
def _skip_product(ring, stage, phase, D, STAGES: gl.constexpr):
    """`_product` of tokens beyond N: nothing but to let the loader go on."""
    input_bufs, _, full, empty = ring
    for _ in range(gl.cdiv(D, input_bufs.shape[2])):
        mbarrier.wait(full.index(stage), phase)
        mbarrier.arrive(empty.index(stage))
        stage, phase = _next(stage, phase, STAGES)
    return stage, phase


@gluon.jit
def _quarters(x):
    """The columns of part of a tile in four pieces, from left to right."""
    left, right = _halves(x)
    first, second = _halves(left)
    third, fourth = _halves(right)
    return first, second, third, fourth


@gluon.jit
def _store_columns(out, buf, piece, col, row):
    """Through shared memory: out[col:, row:] = the transpose of a piece of a tile."""
    tma.store_wait(1)  # what was stored from this buffer has left it
    buf.store(piece.permute((1, 0)))
    fence_async_shared()
    tma.async_copy_shared_to_global(out, [col, row], buf)


@gluon.jit
def _store_transposed(out, bufs, g, col, row, PART: gl.constexpr):
    """out[col:, row:] = g^T for g (ROWS, BLOCK_V / 2) of 16 bits, clipped to the matrix."""
    WIDTH: gl.constexpr = g.shape[1] // 4
    first, second, third, fourth = _quarters(g)
    _store_columns(out, bufs.index(2 * PART), first, col, row)
    _store_columns(out, bufs.index(2 * PART + 1), second, col + WIDTH, row)
    _store_columns(out, bufs.index(2 * PART), third, col + 2 * WIDTH, row)
    _store_columns(out, bufs.index(2 * PART + 1), fourth, col + 3 * WIDTH, row)


@gluon.jit
def _statistics_of_tiles(
    PART: gl.constexpr,
    ring,
    sizes,
    terms,
    tensors,
    kept,
    NUM_PROGRAMS: gl.constexpr,
    ROWS: gl.constexpr,
    LOGIT_SUM: gl.constexpr,
    ENTROPY: gl.constexpr,
    ARGMAX: gl.constexpr,
    MASSES: gl.constexpr,
    KEEP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What warpgroup number PART does in the forward pass."""
    input_bufs, weight_bufs, _, _ = ring
    N, V, D, group_n = sizes
    first_id, logit_scale, logit_softcap = terms
    bias_ptr, bias_bufs, target_ptr, tiles_ptr, merged_ptr = tensors
    keep, store_bufs, keep_V = kept
    TOKENS: gl.constexpr = input_bufs.shape[1]
    PARTS: gl.constexpr = input_bufs.shape[0] // STAGES
    BLOCK_V: gl.constexpr = 2 * weight_bufs.shape[1]
    blocks_n = gl.cdiv(N, PARTS * TOKENS)
    blocks_v = gl.cdiv(V, BLOCK_V)
    in_tile = gl.arange(0, BLOCK_V, layout=gl.SliceLayout(0, _WHOLE_LAYOUT))
    factor = _factor(logit_scale, logit_softcap, HAS_SCALE, HAS_SOFTCAP)
    stage, phase = 0, 0
    next_m, next_n = _tile(gl.program_id(0), blocks_n, blocks_v, group_n)
    for number in range(gl.program_id(0), blocks_n * blocks_v, NUM_PROGRAMS):
        block_n, block_v = next_m, next_n
        first_row, first_col = (block_n * PARTS + PART) * TOKENS, block_v * BLOCK_V
        if first_row < N:
            left, right, stage, phase = _product(ring, stage, phase, D, None, PART, STAGES)
            rows = first_row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, _WHOLE_LAYOUT))
            targets = _targets_here(target_ptr, rows, first_col, N, V, first_id, BLOCK_V)
            next_m, next_n = _tile(number + NUM_PROGRAMS, blocks_n, blocks_v, group_n)
            if HAS_BIAS:
                _load_biases(bias_bufs.index(PART), bias_ptr, first_col, V, factor)
            left, right = _finish(ring, stage, (left, right), STAGES)
            # Of one half after the other: fewer registers.
            left, right = _scaled(
                left, right, bias_bufs, factor, PART, HAS_BIAS, HAS_SCALE or HAS_SOFTCAP
            )
            if HAS_SOFTCAP:
                left = logit_softcap - 2.0 * logit_softcap * _logistic(left)
                right = logit_softcap - 2.0 * logit_softcap * _logistic(right)
            x = gl.join(left, right).permute((0, 2, 1)).reshape([TOKENS, BLOCK_V])
            x = gl.convert_layout(x, _WHOLE_LAYOUT)
            if LOGIT_SUM:
                sum_x = _logit_sums(x, in_tile, first_col, V, BLOCK_V, False)
            else:
                sum_x = 0.0
            x = _mask_columns(x, in_tile, first_col, V, BLOCK_V, False)
            _store_target_logits(x, rows, in_tile, targets, merged_ptr, N)
            max_x, base = _row_maxima(x)
            if KEEP:
                if first_col < keep_V:
                    below = _halves(_below_base(x, base, False))
                    right_col = first_col + BLOCK_V // 2
                    _store_transposed(keep, store_bufs, below[0], first_col, first_row, PART)
                    _store_transposed(keep, store_bufs, below[1], right_col, first_row, PART)
            _store_statistics(
                x, sum_x, max_x, base, rows, in_tile, block_v, target_ptr, tiles_ptr, N, V,
                logit_softcap, ROWS, LOGIT_SUM, ENTROPY, ARGMAX, False, MASSES, HAS_SOFTCAP,
                BLOCK_V,
            )  # fmt: skip
        else:
            next_m, next_n = _tile(number + NUM_PROGRAMS, blocks_n, blocks_v, group_n)
            stage, phase = _skip_product(ring, stage, phase, D, STAGES)
    if KEEP:
        tma.store_wait(0)


@gluon.jit
def _store_gradients(
    x,
    of_token,
    in_half,
    at,
    tensors,
    terms,
    PART: gl.constexpr,
    HAS_SMOOTHING: gl.constexpr,
    HAS_Z_LOSS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    SPECIAL: gl.constexpr,
):
    """From both halves of a tile at (row, column), `_scaled`."""
    out, store_bufs = tensors
    logit_scale, logit_softcap, z_loss, onehot_weight, uniform_weight = terms
    target, grad, max_x, log_sum = of_token
    HALF_V: gl.constexpr = x[0].shape[1]
    factor = grad * logit_scale if HAS_SCALE else grad
    for i in gl.static_range(2):
        half = x[i]
        if HAS_SOFTCAP:
            half = _logistic(half)
        g = _gradient_of(
            half, target - i * HALF_V, grad, factor, max_x, log_sum, in_half,
            logit_softcap, z_loss, onehot_weight, uniform_weight,
            HALF_V, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SOFTCAP, SPECIAL, HAS_SOFTCAP, HAS_SCALE,
        )  # fmt: skip
        _store_transposed(out, store_bufs, g.to(out.dtype), at[1] + i * HALF_V, at[0], PART)


@gluon.jit
def _gradients_of_tiles(
    PART: gl.constexpr,
    ring,
    sizes,
    first_id,
    tensors,
    coefficients,
    NUM_PROGRAMS: gl.constexpr,
    HAS_SMOOTHING: gl.constexpr,
    HAS_Z_LOSS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What warpgroup number PART does for G^T."""
    input_bufs, weight_bufs, _, _ = ring
    N, V, D, group_n = sizes
    bias_ptr, bias_bufs, target_ptr, grad_ptr, max_ptr, log_sum_ptr, outs = tensors
    TOKENS: gl.constexpr = input_bufs.shape[1]
    PARTS: gl.constexpr = input_bufs.shape[0] // STAGES
    HALF_V: gl.constexpr = weight_bufs.shape[1]
    blocks_n = gl.cdiv(N, PARTS * TOKENS)
    blocks_v = gl.cdiv(V, 2 * HALF_V)
    in_half = gl.arange(0, HALF_V, layout=gl.SliceLayout(0, _HALF_LAYOUT))
    factor = _factor(coefficients[0], coefficients[1], HAS_SCALE, HAS_SOFTCAP)
    stage, phase = 0, 0
    for number in range(gl.program_id(0), blocks_n * blocks_v, NUM_PROGRAMS):
        block_n, block_v = _tile(number, blocks_n, blocks_v, group_n)
        first_row, first_col = (block_n * PARTS + PART) * TOKENS, block_v * (2 * HALF_V)
        if first_row < N:
            left, right, stage, phase = _product(ring, stage, phase, D, None, PART, STAGES)
            rows = first_row + gl.arange(0, TOKENS, layout=gl.SliceLayout(1, _HALF_LAYOUT))
            of_token = _token_terms(
                target_ptr, grad_ptr, max_ptr, log_sum_ptr, rows, first_col, N, V, first_id
            )
            if HAS_BIAS:
                _load_biases(bias_bufs.index(PART), bias_ptr, first_col, V, factor)
            left, right = _finish(ring, stage, (left, right), STAGES)
            left, right = _scaled(
                left, right, bias_bufs, factor, PART, HAS_BIAS, HAS_SCALE or HAS_SOFTCAP
            )
            # Two ways for the tile as a whole: a branch around a few instructions for each element
            # becomes their selection, which costs a third of all instructions here.
            if _is_special(of_token[0], of_token[1], 2 * HALF_V):
                _store_gradients(
                    (left, right), of_token, in_half, (first_row, first_col), outs, coefficients,
                    PART, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SCALE, HAS_SOFTCAP, True,
                )  # fmt: skip
            else:
                _store_gradients(
                    (left, right), of_token, in_half, (first_row, first_col), outs, coefficients,
                    PART, HAS_SMOOTHING, HAS_Z_LOSS, HAS_SCALE, HAS_SOFTCAP, False,
                )  # fmt: skip
        else:
            stage, phase = _skip_product(ring, stage, phase, D, STAGES)
    tma.store_wait(0)


@gluon.jit
def _put_columns(out, buf, piece, row, col, ADD: gl.constexpr):
    """Through shared memory: out[row:, col:] = or += a piece of a tile."""
    tma.store_wait(0)  # what was stored from this buffer has left it
    buf.store(piece)
    fence_async_shared()
    if ADD:
        _add_shared_to_global(out, [row, col], buf)
    else:
        tma.async_copy_shared_to_global(out, [row, col], buf)


@gluon.jit
def _put(out, buf, x, row, col, ADD: gl.constexpr):
    """out[row:, col:] = or += x (ROWS, BLOCK_N / 2), clipped to the matrix."""
    WIDTH: gl.constexpr = x.shape[1] // 4
    first, second, third, fourth = _quarters(x)
    _put_columns(out, buf, first, row, col, ADD)
    _put_columns(out, buf, second, row, col + WIDTH, ADD)
    _put_columns(out, buf, third, row, col + 2 * WIDTH, ADD)
    _put_columns(out, buf, fourth, row, col + 3 * WIDTH, ADD)


@gluon.jit
def _weight_gradients_of_tiles(
    PART: gl.constexpr,
    ring,
    sizes,
    tensors,
    ones,
    NUM_PROGRAMS: gl.constexpr,
    ADD: gl.constexpr,
    SUM_COLUMNS: gl.constexpr,
    STAGES: gl.constexpr,
):
    """What warpgroup number PART does for dC."""
    grad_bufs, input_bufs, _, _ = ring
    V, D, N, group_v = sizes
    sums_ptr, out, store_bufs = tensors
    ROWS: gl.constexpr = grad_bufs.shape[1]
    PARTS: gl.constexpr = grad_bufs.shape[0] // STAGES
    HALF_D: gl.constexpr = input_bufs.shape[2]
    blocks_v = gl.cdiv(V, PARTS * ROWS)
    blocks_d = gl.cdiv(D, 2 * HALF_D)
    stage, phase = 0, 0
    next_m, next_n = _tile(gl.program_id(0), blocks_v, blocks_d, group_v)
    for number in range(gl.program_id(0), blocks_v * blocks_d, NUM_PROGRAMS):
        block_v, block_d = next_m, next_n
        first_row, first_col = (block_v * PARTS + PART) * ROWS, block_d * (2 * HALF_D)
        if SUM_COLUMNS:
            if block_d == block_v % blocks_d:  # one tile of a row, not always the same program's
                left, right, sums, stage, phase = _product(
                    ring, stage, phase, N, ones, PART, STAGES
                )
                left, right, sums = _finish(ring, stage, (left, right, sums), STAGES)
                rows = first_row + gl.arange(0, ROWS, layout=gl.SliceLayout(1, _SUM_LAYOUT))
                so_far = gl.load(sums_ptr + rows, mask=rows < V, other=0.0)
                row_sums = gl.sum(sums, 1) / SUM_COLUMNS  # of equal columns: exact
                gl.store(sums_ptr + rows, so_far + row_sums, mask=rows < V)
            else:
                left, right, stage, phase = _product(ring, stage, phase, N, None, PART, STAGES)
                left, right = _finish(ring, stage, (left, right), STAGES)
        else:
            left, right, stage, phase = _product(ring, stage, phase, N, None, PART, STAGES)
            left, right = _finish(ring, stage, (left, right), STAGES)
        next_m, next_n = _tile(number + NUM_PROGRAMS, blocks_v, blocks_d, group_v)
        buf = store_bufs.index(PART)
        _put(out, buf, left.to(out.dtype), first_row, first_col, ADD)
        _put(out, buf, right.to(out.dtype), first_row, first_col + HALF_D, ADD)
    tma.store_wait(0)


@gluon.jit
def _ring(a, b, STAGES: gl.constexpr, PARTS: gl.constexpr):
    """Buffers for steps of a product's operands, and two barriers for each: that they are here, and
    that all warpgroups are done with them."""
    a_bufs = gl.allocate_shared_memory(
        a.dtype, [STAGES * PARTS, a.block_shape[0], a.block_shape[1]], a.layout
    )
    b_bufs = gl.allocate_shared_memory(
        b.dtype, [STAGES * 2, b.block_shape[0], b.block_shape[1]], b.layout
    )
    full = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    empty = gl.allocate_shared_memory(gl.int64, [STAGES, 1], mbarrier.MBarrierLayout())
    for stage in gl.static_range(STAGES):
        mbarrier.init(full.index(stage), count=1)
        mbarrier.init(empty.index(stage), count=PARTS)
    fence_async_shared()
    return a_bufs, b_bufs, full, empty


@gluon.jit(do_not_specialize=["first_id"])
def tile_statistics_kernel(
    input,
    weight,
    bias_ptr,
    target_ptr,
    keep,
    tiles_ptr,
    merged_ptr,
    N,
    V,
    D,
    group_n,
    keep_V,
    first_id,
    logit_scale,
    logit_softcap,
    NUM_PROGRAMS: gl.constexpr,
    ROWS: gl.constexpr,
    LOGIT_SUM: gl.constexpr,
    ENTROPY: gl.constexpr,
    ARGMAX: gl.constexpr,
    MASSES: gl.constexpr,
    KEEP: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """As `forward.tile_statistics_kernel`, without SORTED and for caps up to 50; input, weight and
    keep are descriptors."""
    ring = _ring(input, weight, STAGES, PARTS)
    # No partition takes a None: what is not read.
    if KEEP:
        store_bufs = gl.allocate_shared_memory(
            keep.dtype, [2 * PARTS, keep.block_shape[0], keep.block_shape[1]], keep.layout
        )
    else:
        keep, store_bufs = input, ring[0]
    if HAS_BIAS:
        bias_bufs = gl.allocate_shared_memory(
            gl.float32, [PARTS, 2 * weight.block_shape[0]], _BIAS_BUF_LAYOUT
        )
    else:
        bias_ptr, bias_bufs = V, V  # no partition takes a None: what is not read
    sizes, terms = (N, V, D, group_n), (first_id, logit_scale, logit_softcap)
    tensors = bias_ptr, bias_bufs, target_ptr, tiles_ptr, merged_ptr
    kept = keep, store_bufs, keep_V
    _specialize(
        _statistics_of_tiles,
        (
            ring, sizes, terms, tensors, kept, NUM_PROGRAMS, ROWS, LOGIT_SUM, ENTROPY, ARGMAX,
            MASSES, KEEP, HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, STAGES,
        ),
        _load_tiles,
        (input, weight, ring, sizes, NUM_PROGRAMS, STAGES),
        PARTS, REGISTERS, LOADER_REGISTERS,
    )  # fmt: skip


@gluon.jit(do_not_specialize=["first_id"])
def grad_logits_kernel(
    input,
    weight,
    bias_ptr,
    target_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    out,
    N,
    V,
    D,
    group_n,
    first_id,
    logit_scale,
    logit_softcap,
    z_loss,
    onehot_weight,
    uniform_weight,
    NUM_PROGRAMS: gl.constexpr,
    HAS_SMOOTHING: gl.constexpr,
    HAS_Z_LOSS: gl.constexpr,
    HAS_BIAS: gl.constexpr,
    HAS_SCALE: gl.constexpr,
    HAS_SOFTCAP: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """As `backward.grad_logits_kernel` without a filter; input, weight and out are descriptors."""
    ring = _ring(input, weight, STAGES, PARTS)
    store_bufs = gl.allocate_shared_memory(
        out.dtype, [2 * PARTS, out.block_shape[0], out.block_shape[1]], out.layout
    )
    if HAS_BIAS:
        bias_bufs = gl.allocate_shared_memory(
            gl.float32, [PARTS, 2 * weight.block_shape[0]], _BIAS_BUF_LAYOUT
        )
    else:
        bias_ptr, bias_bufs = V, V  # no partition takes a None: what is not read
    sizes = N, V, D, group_n
    tensors = bias_ptr, bias_bufs, target_ptr, grad_ptr, max_ptr, log_sum_ptr, (out, store_bufs)
    coefficients = logit_scale, logit_softcap, z_loss, onehot_weight, uniform_weight
    _specialize(
        _gradients_of_tiles,
        (
            ring, sizes, first_id, tensors, coefficients, NUM_PROGRAMS, HAS_SMOOTHING, HAS_Z_LOSS,
            HAS_BIAS, HAS_SCALE, HAS_SOFTCAP, STAGES,
        ),
        _load_tiles,
        (input, weight, ring, sizes, NUM_PROGRAMS, STAGES),
        PARTS, REGISTERS, LOADER_REGISTERS,
    )  # fmt: skip


@gluon.jit
def weight_gradient_kernel(
    grad,
    input,
    sums_ptr,
    out,
    V,
    D,
    N,
    group_v,
    NUM_PROGRAMS: gl.constexpr,
    ADD: gl.constexpr,
    SUM_COLUMNS: gl.constexpr,
    PARTS: gl.constexpr,
    STAGES: gl.constexpr,
    REGISTERS: gl.constexpr,
    LOADER_REGISTERS: gl.constexpr,
):
    """out (V, D) = or += grad (V, N) input (N, D); with SUM_COLUMNS also sums (V,) += the sums of
    grad's rows. Grad, input and out are descriptors.
    """
    ring = _ring(grad, input, STAGES, PARTS)
    store_bufs = gl.allocate_shared_memory(
        out.dtype, [PARTS, out.block_shape[0], out.block_shape[1]], out.layout
    )
    if SUM_COLUMNS:
        BLOCK_N: gl.constexpr = grad.block_shape[1]
        # As a tile of grad would lie there, of which its first rows are a part.
        buf = gl.allocate_shared_memory(grad.dtype, [SUM_COLUMNS, BLOCK_N], grad.layout)
        buf.store(gl.full([SUM_COLUMNS, BLOCK_N], 1.0, grad.dtype, _ONES_LAYOUT))
        fence_async_shared()
        ones = buf.permute((1, 0))
    else:
        ones, sums_ptr = ring[0].index(0), V  # no partition takes a None: what is not read
    sizes = V, D, N, group_v
    tensors = sums_ptr, out, store_bufs
    _specialize(
        _weight_gradients_of_tiles,
        (ring, sizes, tensors, ones, NUM_PROGRAMS, ADD, SUM_COLUMNS, STAGES),
        _load_tiles,
        (grad, input, ring, sizes, NUM_PROGRAMS, STAGES),
        PARTS, REGISTERS, LOADER_REGISTERS,
    )  # fmt: skip


def _workers(warpgroups: int) -> dict[str, Any]:
    """Arguments of every kernel here: who does what, with which means."""
    stages, registers = _MEANS[warpgroups]
    return {
        "PARTS": warpgroups,
        "STAGES": stages,
        "REGISTERS": registers,
        "LOADER_REGISTERS": _LOADER_REGISTERS,
        "num_warps": 4,
    }


_GLUON_DTYPES = {
    torch.bfloat16: gl.bfloat16,
    torch.float16: gl.float16,
    torch.float32: gl.float32,
}


def descriptor(
    matrix: Tensor, shape: list[int], strides: list[int], block: list[int]
) -> TensorDescriptor:
    """A row-major matrix, in tiles that are swizzled in shared memory as products want them."""
    layout = gl.NVMMASharedLayout.get_default_for(block, _GLUON_DTYPES[matrix.dtype])
    return TensorDescriptor(matrix, shape, strides, block, layout)


def _group(blocks: int, warpgroups: int) -> int:
    """Blocks of rows that sweep the columns together, in groups of about equal size."""
    groups = max(1, round(blocks / _GROUP_BLOCKS[warpgroups]))
    return ceil_div(blocks, groups)


@prepared
def statistics(
    form: LogitsForm,
    rows: StatRows,
    tile_rows: int,
    keep: tuple[int, int] | None,
    masses: bool,
) -> Prepared:
    """`forward.tile_statistics`, but no argmax by ids: takes input, weight, bias, target, keep,
    tiles, merged.

    Args:
        form: of the logits.
        rows: optional statistics to compute.
        tile_rows: rows of the statistics of a tile.
        keep: columns to keep, and the stride of their rows; or None.
        masses: as there.
    """
    blocks = {} if keep is None else {"keep": (_STORED_COLUMNS, _ROWS)}
    return Prepared(
        tile_statistics_kernel,
        keep_V=0 if keep is None else keep[0],
        ROWS=tile_rows,
        LOGIT_SUM=rows.logit_sum,
        ENTROPY=rows.entropy,
        ARGMAX=rows.argmax,
        MASSES=masses,
        KEEP=keep is not None,
        **_tile_arguments(form, blocks),
    )


@prepared
def gradients(
    form: LogitsForm, stride_out: int, coefficients: tuple[float, float, float]
) -> Prepared:
    """`backward.grad_logits` without a filter: takes input, weight, bias, target, upstream
    gradient, maximum, log of the sum, and out.

    Args:
        form: of the logits.
        stride_out: of the rows of out.
        coefficients: see `LogitGradient`.
    """
    blocks = {"out": (_STORED_COLUMNS, _ROWS)}
    arguments = backward.coefficient_arguments(coefficients)
    return Prepared(grad_logits_kernel, **arguments, **_tile_arguments(form, blocks))


@prepared
def weight_gradient(
    shape: tuple[int, int, int],
    strides: tuple[int, int, int],
    dtypes: tuple[torch.dtype, torch.dtype],
    programs: int,
    accumulate: bool,
    sums: bool,
) -> Prepared:
    """A part of dC: takes G^T, input, None or where the sums of G^T's rows are added to, and out.

    Args:
        shape: V rows of G^T, N tokens, D.
        strides: of the rows of G^T, input and out.
        dtypes: of G^T and input, and of out.
        programs: see `tuning.config_for`.
        accumulate: add to out, which is in fp32 then.
        sums: add the row sums.
    """
    del strides, dtypes  # what is prepared holds for them alone
    vocab, tokens, hidden = shape
    row_blocks = ceil_div(vocab, HOPPER_ROWS)
    return Prepared(
        weight_gradient_kernel,
        min(programs, row_blocks * ceil_div(hidden, 2 * _HALF_V)),
        V=vocab,
        D=hidden,
        N=tokens,
        group_v=_group(row_blocks, 3),
        NUM_PROGRAMS=programs,
        ADD=accumulate,
        SUM_COLUMNS=_SUM_COLUMNS if sums else 0,
        blocks={
            "grad": (_ROWS, _BLOCK_D),
            "input": (_BLOCK_D, _HALF_V),
            "out": (_ROWS, _STORED_COLUMNS),
        },
        **_workers(3),
    )


def _tile_arguments(form: LogitsForm, blocks: dict[str, tuple[int, int]]) -> dict[str, Any]:
    assert form.config.block_v == 2 * _HALF_V, "statistics are of tiles of that width"
    return {
        **logit_arguments(form.shape, form.first_id, form.logit_scale, form.logit_softcap),
        "HAS_BIAS": form.has_bias,
        "grid": min(form.programs, form.tiles),
        "D": form.shape[2],
        "NUM_PROGRAMS": form.programs,
        "group_n": _group(form.token_blocks, form.warpgroups),
        **_workers(form.warpgroups),
        "blocks": {
            "input": (_ROWS, _BLOCK_D),
            "weight": (_HALF_V, _BLOCK_D),
            **blocks,
        },
    }
