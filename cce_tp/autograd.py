"""The data flow of one loss, forward and backward.

Forward: local statistics -> merged over the group -> loss per token. Backward: upstream gradient
per token -> local dE, dC, dbias from recomputed logits -> dE summed over the group. What is kept
in between: the inputs and two numbers per token, never logits.

Legend: N tokens, V_local vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, NoReturn

import torch
from torch import Tensor

from cce_tp import ops
from cce_tp.filtering import GradFilter
from cce_tp.stats import LossStats, StatRows, unpack_ids


@dataclass(frozen=True, slots=True, kw_only=True)
class LossOptions:
    """Everything about a call that is not a tensor, checked and resolved.

    Attributes:
        ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap, grad_filter: as in the
            public API.
        start, stop, vocab_size: this rank's rows of the global vocabulary.
        group_name: registered name of the process group, "" without one.
        reduce_input_grad: sum dE over the group.
        rows: statistics to compute.
        compute_dtype: dtype of the products' operands.
        workspace_bytes: cap on temporaries, or None for the default.
        impl: "triton" or "torch".
        terms: what all ranks must agree on beside the numbers, as "name=value; name=value".
    """

    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    logit_softcap: float | None
    grad_filter: GradFilter
    start: int
    stop: int
    vocab_size: int
    group_name: str
    reduce_input_grad: bool
    rows: StatRows
    compute_dtype: torch.dtype
    workspace_bytes: int | None
    impl: str
    terms: str


def _row_major(matrix: Tensor) -> Tensor:
    """The matrix, copied only if its rows are not contiguous or overlap."""
    if matrix.stride(1) == 1 and matrix.stride(0) >= matrix.shape[1]:
        return matrix
    return matrix.contiguous()


def _global_statistics(
    operands: tuple[Tensor, Tensor, Tensor | None, Tensor], options: LossOptions
) -> Tensor:
    """Packed (rows, N) statistics over the global vocabulary, the same bits on every rank."""
    rows = options.rows
    flags = (rows.logit_sum, rows.entropy, rows.argmax)
    packed = ops.statistics(
        *operands,
        options.start,
        options.logit_scale,
        options.logit_softcap,
        *flags,
        options.vocab_size,
        options.workspace_bytes,
        options.impl,
    )
    if options.group_name:
        shard = [options.start, options.stop, options.vocab_size]
        numbers = [
            operands[0].shape[1],
            options.ignore_index,
            options.label_smoothing,
            options.z_loss,
            options.logit_scale,
            0.0 if options.logit_softcap is None else options.logit_softcap,
            -1.0 if options.grad_filter.eps is None else options.grad_filter.eps,
        ]
        packed = ops.merge_over_group(
            packed, *flags, options.group_name, shard, options.terms, numbers
        )
    return packed


def _loss_per_token(
    packed_RN: Tensor, log_sum_N: Tensor, valid_N: Tensor, options: LossOptions
) -> Tensor:
    """lse - (1 - a) x_target - a mean(x) + z lse^2; differences come before sums."""
    max_N, target_N = packed_RN[StatRows.MAX], packed_RN[StatRows.TARGET]
    loss_N = log_sum_N + (max_N - target_N)
    if options.label_smoothing > 0:
        mean_N = packed_RN[options.rows.logit_sum_row] / options.vocab_size
        loss_N = loss_N + options.label_smoothing * (target_N - mean_N)
    if options.z_loss > 0:
        loss_N = loss_N + options.z_loss * (max_N + log_sum_N) ** 2
    return torch.where(valid_N, loss_N, 0.0)


def _unpack(
    packed_RN: Tensor, log_sum_N: Tensor, valid_N: Tensor, options: LossOptions
) -> LossStats:
    rows = options.rows
    max_N, sum_N = packed_RN[StatRows.MAX], packed_RN[StatRows.SUM_EXP]
    entropy_N = None
    if rows.entropy:
        # -sum p log p = lse - sum p x, with x relative to the maximum.
        entropy_N = log_sum_N - packed_RN[rows.entropy_row] / sum_N
    return LossStats(
        lse=max_N + log_sum_N,
        target_logit=torch.where(valid_N, packed_RN[StatRows.TARGET], 0.0),
        max_logit=max_N.clone(),
        # Logits that are all NaN have no largest one; any valid id keeps a look-up in bounds.
        argmax=unpack_ids(packed_RN[rows.argmax_row]).clamp(max=options.vocab_size - 1),
        entropy=entropy_N,
    )


# Tensors saved before the anchors: four operands, maximum, log of the sum, valid tokens.
_NUM_SAVED = 7


def anchors(*tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors that depend on the given ones: what a second derivative is traced through.

    The operands themselves do not serve, they may be casts made out of autograd's sight.
    """
    if not torch.is_grad_enabled():
        return ()
    wanted = (each for each in tensors if each is not None and each.requires_grad)
    return tuple(each[:0].clone() for each in wanted)


class _FirstDerivative(torch.autograd.Function):
    """Identity on a gradient that knows no derivative of its own, and says so when asked for it.

    torch's once_differentiable would let a second derivative vanish silently where the upstream
    gradient is a constant.
    """

    @staticmethod
    def forward(ctx: Any, gradient: Tensor, *anchors: Tensor) -> Tensor:
        return gradient.view_as(gradient)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> NoReturn:
        raise RuntimeError(
            "linear_cross_entropy has no second derivative: its gradient cannot be differentiated. "
            "Drop create_graph=True, or use F.cross_entropy on materialised logits"
        )


class LinearCrossEntropyFunction(torch.autograd.Function):
    """Loss per token of this rank's shard, over the global vocabulary."""

    @staticmethod
    def forward(
        ctx: Any,
        input: Tensor,
        weight: Tensor,
        bias: Tensor | None,
        target: Tensor,
        grad_weight_out: Tensor | None,
        options: LossOptions,
        *anchors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """(N, D), (V_local, D), (V_local,), (N,) -> (N,) loss, and LossStats where asked for."""
        dtype = options.compute_dtype
        operands = (
            _row_major(input.to(dtype)),
            _row_major(weight.to(dtype)),
            None if bias is None else bias.to(dtype).contiguous(),
            target.contiguous(),
        )
        packed_RN = _global_statistics(operands, options)
        valid_N = target != options.ignore_index
        in_vocab_N = (target >= 0) & (target < options.vocab_size)
        # A target that is no id poisons its token: a NaN loss is seen, a plausible one is not.
        log_sum_N = torch.where(in_vocab_N | ~valid_N, packed_RN[StatRows.SUM_EXP].log(), torch.nan)
        loss_N = _loss_per_token(packed_RN, log_sum_N, valid_N, options)

        saved = (*operands, packed_RN[StatRows.MAX], log_sum_N, valid_N)
        ctx.save_for_backward(*saved, *anchors)
        # Not saved through save_for_backward: it is accumulated into between forward and backward.
        ctx.grad_weight_out = grad_weight_out
        ctx.options = options
        ctx.grad_dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        if not options.rows.argmax:
            return (loss_N,)
        statistics = _unpack(packed_RN, log_sum_N, valid_N, options)
        ctx.mark_non_differentiable(*(each for each in statistics if each is not None))
        return (loss_N, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """(N,) gradient of the loss -> gradients in the dtypes of the inputs given to forward."""
        # Read once: activation checkpointing recomputes what it gives out, and gives it out once.
        saved = ctx.saved_tensors
        with torch.no_grad():
            results = _gradients(ctx, saved[:_NUM_SAVED], grads[0])
        anchors = saved[_NUM_SAVED:]
        if torch.is_grad_enabled():  # create_graph=True
            results = tuple(
                None if each is None else _FirstDerivative.apply(each, *anchors) for each in results
            )
        return (*results, None, None, None, *(None for _ in anchors))


def _gradients(ctx: Any, saved: tuple[Any, ...], grad_N: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; None where not wanted or in grad_weight_out."""
    options: LossOptions = ctx.options
    *operands, max_N, log_sum_N, valid_N = saved
    into_out = ctx.grad_weight_out is not None and ctx.needs_input_grad[1]
    wanted = (
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1] and not into_out,
        ctx.needs_input_grad[2],
    )
    codes = [
        ops.dtype_code(dtype) if want else ops.NOT_WANTED
        for want, dtype in zip(wanted, ctx.grad_dtypes, strict=True)
    ]
    made = ops.local_gradients(
        *operands,
        options.start,
        options.logit_scale,
        options.logit_softcap,
        torch.where(valid_N, grad_N.to(log_sum_N.dtype), 0.0),
        max_N,
        log_sum_N,
        options.z_loss,
        options.label_smoothing,
        options.vocab_size,
        options.grad_filter.eps,
        ctx.grad_weight_out if into_out else None,
        codes,
        options.workspace_bytes,
        options.impl,
    )
    if wanted[0] and options.group_name and options.reduce_input_grad:
        ops.sum_over_group(made[0], options.group_name)
    return tuple(grad if want else None for grad, want in zip(made, wanted, strict=True))
