"""Per token, once the statistics are global: the loss, and the gradient that arrives at it.

A mean or a sum is taken by one program in a fixed order: no atomics, equal bits in every run, and
no further launch. At 65,536 tokens that takes a thousandth of the forward pass.

Legend: N tokens.
"""

from __future__ import annotations

import torch
import triton
import triton.language as tl
from torch import Tensor

from cce_tp.kernels.launch import Prepared, prepared
from cce_tp.kernels.tuning import ceil_div
from cce_tp.problem import LossTerms, TokenLoss
from cce_tp.stats import StatRows

_BLOCK = 1024


@triton.jit
def token_loss_kernel(
    packed_ptr,
    target_ptr,
    loss_ptr,
    normaliser_ptr,
    count_ptr,
    N,
    logit_sum_row,
    ignore_index,
    vocab_size,
    label_smoothing,
    z_loss,
    REDUCE: tl.constexpr,
    MEAN: tl.constexpr,
    HAS_SMOOTHING: tl.constexpr,
    HAS_Z_LOSS: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """packed (rows, N); loss (N,), or () with REDUCE; normaliser (2, N): maximum, log of sum."""
    total = tl.zeros((BLOCK,), dtype=tl.float32)
    count = tl.zeros((BLOCK,), dtype=tl.int32)
    for start in range(tl.program_id(0) * BLOCK, N, tl.num_programs(0) * BLOCK):
        rows = start + tl.arange(0, BLOCK)
        inside = rows < N
        target = tl.load(target_ptr + rows, mask=inside, other=0)
        counted = inside & (target != ignore_index)
        max_x = tl.load(packed_ptr + rows, mask=inside, other=0.0)
        sum_exp = tl.load(packed_ptr + N + rows, mask=inside, other=1.0)
        target_x = tl.load(packed_ptr + 2 * N + rows, mask=inside, other=0.0)
        log_sum = tl.log(sum_exp)
        # A target that is no id poisons its token: a NaN loss is seen, a plausible one is not.
        stray = counted & ((target < 0) | (target >= vocab_size))
        log_sum = tl.where(stray, float("nan"), log_sum)
        tl.store(normaliser_ptr + rows, max_x, mask=inside)
        tl.store(normaliser_ptr + N + rows, log_sum, mask=inside)
        # lse - (1 - a) x_target - a mean(x) + z lse^2; differences come before sums.
        loss = log_sum + (max_x - target_x)
        if HAS_SMOOTHING:
            sum_x = tl.load(packed_ptr + logit_sum_row * N + rows, mask=inside, other=0.0)
            loss += label_smoothing * (target_x - sum_x / vocab_size)
        if HAS_Z_LOSS:
            lse = max_x + log_sum
            loss += z_loss * lse * lse
        loss = tl.where(counted, loss, 0.0)
        if REDUCE:
            total += loss
            count += counted.to(tl.int32)
        else:
            tl.store(loss_ptr + rows, loss, mask=inside)
    if REDUCE:
        whole = tl.sum(total, axis=0)
        tokens = tl.maximum(tl.sum(count, axis=0), 1)
        if MEAN:
            whole = whole / tokens.to(tl.float32)
        tl.store(loss_ptr, whole)
        tl.store(count_ptr, tokens)


@triton.jit
def token_gradient_kernel(
    upstream_ptr,
    target_ptr,
    count_ptr,
    out_ptr,
    N,
    stride_upstream,
    ignore_index,
    MEAN: tl.constexpr,
    BLOCK: tl.constexpr,
):
    """out (N,) fp32: what arrives at each token's loss; exactly 0 for an ignored one."""
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    inside = rows < N
    target = tl.load(target_ptr + rows, mask=inside, other=0)
    grad = tl.load(upstream_ptr + rows.to(tl.int64) * stride_upstream, mask=inside, other=0.0)
    grad = grad.to(tl.float32)
    if MEAN:
        grad = grad / tl.load(count_ptr).to(tl.float32)
    tl.store(out_ptr + rows, tl.where(target == ignore_index, 0.0, grad), mask=inside)


def token_loss(packed_RN: Tensor, target_N: Tensor, rows: StatRows, terms: LossTerms) -> TokenLoss:
    """Loss and what the backward pass needs, from global statistics.

    Args:
        packed_RN: (rows, N) fp32 over the global vocabulary.
        target_N: (N,) int64 global ids.
        rows: which statistics are in packed_RN.
        terms: coefficients and reduction.
    """
    num_tokens = packed_RN.shape[1]
    reduce = terms.reduction != "none"
    loss = packed_RN.new_empty(() if reduce else num_tokens)
    normaliser_2N = packed_RN.new_empty((2, num_tokens))
    count = torch.empty(() if reduce else 0, dtype=torch.int32, device=packed_RN.device)
    run = _token_loss(num_tokens, rows.logit_sum_row, terms)
    run(packed_RN, target_N, loss, normaliser_2N, count)
    return TokenLoss(loss, normaliser_2N, count)


@prepared
def _token_loss(num_tokens: int, logit_sum_row: int, terms: LossTerms) -> Prepared:
    reduce = terms.reduction != "none"
    return Prepared(
        token_loss_kernel,
        1 if reduce else max(1, ceil_div(num_tokens, _BLOCK)),
        N=num_tokens,
        logit_sum_row=logit_sum_row,
        ignore_index=terms.ignore_index,
        vocab_size=terms.vocab_size,
        label_smoothing=float(terms.label_smoothing),
        z_loss=float(terms.z_loss),
        REDUCE=reduce,
        MEAN=terms.reduction == "mean",
        HAS_SMOOTHING=terms.label_smoothing != 0.0,
        HAS_Z_LOSS=terms.z_loss != 0.0,
        BLOCK=_BLOCK,
        num_warps=4,
    )


def token_gradient(upstream: Tensor, target_N: Tensor, count: Tensor, terms: LossTerms) -> Tensor:
    """(N,) fp32 gradient of the loss summed over tokens, from that of the reduced loss.

    Args:
        upstream: (N,) for reduction "none", else ().
        target_N: (N,) int64 global ids.
        count: () int32 number of tokens that are not ignored, at least 1; unused for "none".
        terms: reduction and ignore_index.
    """
    num_tokens = target_N.shape[0]
    grad_N = torch.empty(num_tokens, dtype=torch.float32, device=upstream.device)
    if num_tokens == 0:
        return grad_N
    stride = upstream.stride(0) if upstream.dim() else 0
    run = _token_gradient(num_tokens, stride, terms.ignore_index, terms.reduction == "mean")
    run(upstream, target_N, count, grad_N)
    return grad_N


@prepared
def _token_gradient(num_tokens: int, stride: int, ignore_index: int, mean: bool) -> Prepared:
    return Prepared(
        token_gradient_kernel,
        ceil_div(num_tokens, _BLOCK),
        N=num_tokens,
        stride_upstream=stride,
        ignore_index=ignore_index,
        MEAN=mean,
        BLOCK=_BLOCK,
        num_warps=4,
    )
