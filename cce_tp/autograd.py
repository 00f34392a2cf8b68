"""The data flow of one loss, forward and backward.

Forward: local statistics -> merged over the group -> loss per token -> reduced. Backward: upstream
gradient per token -> local dE, dC, dbias from recomputed logits -> dE summed over the group. What
is kept in between: the inputs and two numbers per token; in the memory of dC as many logits as fit,
with the far field a part of them; and more logits where they are asked for.

Legend: N tokens, V_local vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from typing import Any, NoReturn

import torch
from torch import Tensor

from cce_tp import ops
from cce_tp.options import LossOptions
from cce_tp.stats import LossStats, StatRows, unpack_ids


def _serves(tensor: Tensor, dtype: torch.dtype) -> bool:
    """Whether a tensor can be an operand as it is: its dtype, and rows that do not overlap."""
    if tensor.dtype != dtype:
        return False
    if tensor.is_contiguous():
        return True
    return tensor.stride(-1) == 1 and (tensor.dim() == 1 or tensor.stride(0) >= tensor.shape[1])


def _operand(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor if _serves(tensor, dtype) else tensor.to(dtype).contiguous()


def _unpack(
    packed_RN: Tensor,
    log_sum_N: Tensor,
    target_N: Tensor,
    totals_4: Tensor | None,
    options: LossOptions,
) -> LossStats:
    rows = options.rows
    max_N, sum_N = packed_RN[StatRows.MAX], packed_RN[StatRows.SUM_EXP]
    valid_N = target_N != options.ignore_index
    entropy_N = None
    if rows.entropy:
        # -sum p log p = lse - sum p x, with x relative to the maximum.
        entropy_N = log_sum_N - packed_RN[rows.entropy_row] / sum_N
    tiles_kept = far_mass = far_deviation = None
    if totals_4 is not None:
        tiles_kept = totals_4[0] / totals_4[1].clamp(min=1)
        far_mass, far_deviation = totals_4[2:] / valid_N.sum().clamp(min=1)
    return LossStats(
        lse=max_N + log_sum_N,
        target_logit=torch.where(valid_N, packed_RN[StatRows.TARGET], 0.0),
        max_logit=max_N.clone(),
        # Logits that are all NaN have no largest one; any valid id keeps a look-up in bounds.
        argmax=unpack_ids(packed_RN[rows.argmax_row]).clamp(max=options.vocab_size - 1),
        entropy=entropy_N,
        tiles_kept=tiles_kept,
        far_mass=far_mass,
        far_deviation=far_deviation,
    )


# Tensors saved before those of the far field and the anchors: four operands, normaliser, count.
_NUM_SAVED = 6


def anchors(dtype: torch.dtype, *tensors: Tensor | None) -> tuple[Tensor, ...]:
    """Empty tensors that depend on the given ones: what a second derivative is traced through.

    Only for those that the loss copies out of autograd's sight: others are saved themselves.
    """
    if not torch.is_grad_enabled():
        return ()
    return tuple(
        each[:0].clone()
        for each in tensors
        if each is not None and each.requires_grad and not _serves(each, dtype)
    )


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
        grad_enabled: bool,
        *anchors: Tensor,
    ) -> tuple[Tensor | None, ...]:
        """(N, D), (V_local, D), (V_local,), (N,) -> loss, and LossStats where asked for.

        grad_enabled: autograd's mode at the call, which is off in here."""
        dtype = options.compute_dtype
        operands = (
            _operand(input, dtype),
            _operand(weight, dtype),
            None if bias is None else _operand(bias, dtype),
            target.contiguous(),
        )
        rows = options.rows
        # Without gradients and statistics there is nothing to choose tiles for.
        differentiates = grad_enabled and any(ctx.needs_input_grad)
        far_budget = options.grad_filter.budget if rows.argmax or differentiates else None
        keep_bytes = options.keep_logits_bytes if differentiates else 0
        # In dC's memory, where there will be a dC together with dE.
        inside = options.keep_logits_in_grad and grad_enabled and not torch.compiler.is_compiling()
        inside = inside and ctx.needs_input_grad[0] and ctx.needs_input_grad[1]
        lent_dtype = ops.dtype_code(weight.dtype) if inside else ops.NOT_WANTED
        loss, normaliser_2N, count, packed_RN, far = ops.loss(
            *operands,
            *_logit_arguments(options),
            *(rows.logit_sum, rows.entropy, rows.argmax),
            far_budget,
            keep_bytes,
            lent_dtype,
            options.group_name,
            options.sequence_parallel,
            [options.start, options.stop, options.vocab_size],
            options.terms,
            [operands[0].shape[1], *options.numbers] if options.group_name else [],
            options.workspace_bytes,
            options.impl,
            name=("loss", options, far_budget, keep_bytes, lent_dtype) if options.replays else None,
        )
        totals_4 = far.pop() if far_budget is not None and rows.argmax else None
        # Not saved as what must not change: the backward pass writes it, and gives it away.
        ctx.lent = far.pop(0) if inside and ops.split_far(far)[0] else None
        ctx.save_for_backward(*operands, normaliser_2N, count, *far, *anchors)
        ctx.num_far = len(far)
        # Not saved through save_for_backward: it is accumulated into between forward and backward.
        ctx.grad_weight_out = grad_weight_out
        ctx.options = options
        ctx.grad_dtypes = (input.dtype, weight.dtype, None if bias is None else bias.dtype)
        if not rows.argmax:
            return (loss,)
        statistics = _unpack(packed_RN, normaliser_2N[1], target, totals_4, options)
        ctx.mark_non_differentiable(*(each for each in statistics if each is not None))
        return (loss, *statistics)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        """Gradient of the loss -> gradients in the dtypes of the inputs given to forward."""
        # Read once: activation checkpointing recomputes what it gives out, and gives it out once.
        saved = ctx.saved_tensors
        kept, anchors = saved[: _NUM_SAVED + ctx.num_far], saved[_NUM_SAVED + ctx.num_far :]
        if not torch.is_grad_enabled():
            results = _gradients(ctx, kept, grads[0])
        else:  # create_graph=True
            with torch.no_grad():
                results = _gradients(ctx, kept, grads[0])
            through = [t for t in (*saved[:3], *anchors) if t is not None and t.requires_grad]
            results = tuple(
                None if each is None else _FirstDerivative.apply(each, *through) for each in results
            )
        return (*results, None, None, None, None, *(None for _ in anchors))


def _logit_arguments(options: LossOptions) -> tuple[Any, ...]:
    """What every operator takes after the four operands: of the logits, and of the loss."""
    return (
        options.start,
        options.logit_scale,
        options.logit_softcap,
        options.reduction,
        options.ignore_index,
        options.label_smoothing,
        options.z_loss,
        options.vocab_size,
    )


def _gradients(ctx: Any, saved: tuple[Any, ...], upstream: Tensor) -> tuple[Tensor | None, ...]:
    """Gradients of input, weight and bias; None where not wanted or in grad_weight_out."""
    options: LossOptions = ctx.options
    *operands, normaliser_2N, count = saved[:_NUM_SAVED]
    far = saved[_NUM_SAVED:]
    lent = ctx.lent
    if lent is not None:
        ctx.lent = None  # a second backward pass finds no logits any more
    elif options.keep_logits_in_grad:
        _, far = ops.split_far([*far])
    into_out = ctx.grad_weight_out is not None and ctx.needs_input_grad[1]
    wanted = (
        ctx.needs_input_grad[0],
        ctx.needs_input_grad[1] and not into_out and lent is None,
        ctx.needs_input_grad[2],
    )
    codes = [
        ops.dtype_code(dtype) if want else ops.NOT_WANTED
        for want, dtype in zip(wanted, ctx.grad_dtypes, strict=True)
    ]
    made = ops.input_weight_gradients(
        *operands,
        *_logit_arguments(options),
        upstream,
        normaliser_2N,
        count,
        options.grad_filter.eps,
        [*far],
        ctx.grad_weight_out if into_out else lent,
        lent is not None,
        codes,
        options.group_name if options.reduce_input_grad else "",
        options.sequence_parallel,
        options.workspace_bytes,
        options.impl,
        name=("gradients", options, lent is None, *codes) if options.replays else None,
    )
    results = [grad if want else None for grad, want in zip(made, wanted, strict=True)]
    if lent is not None:
        results[1] = lent
    return tuple(results)
