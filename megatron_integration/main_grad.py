"""Where the gradient of the output weight goes: Megatron's `main_grad`, or autograd.

Megatron's data-parallel wrapper gives each parameter a `main_grad` (a view of its gradient
buffer, fp32 by default) and a hook that adds `.grad` to it after each backward pass. Writing dC
there directly keeps it in fp32 over microbatches. The protocol of the flags is Megatron-core's
(megatron/core/tensor_parallel/layers.py and distributed/distributed_data_parallel.py).

Legend: V_local vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from typing import Any

import torch
from megatron.core.tensor_parallel import layers
from torch import Tensor


def weight_and_sink(weight: Tensor, fusion: bool) -> tuple[Tensor, Tensor | None]:
    """The weight to hand to the loss, and the tensor its gradient is to be added to.

    Args:
        weight: (V_local, D) parameter, possibly with `main_grad`.
        fusion: Megatron's gradient_accumulation_fusion of this layer.

    Returns:
        (weight, None) if autograd is to carry the gradient; otherwise a view of the weight whose
        backward pass tells Megatron's hook what has happened, and `weight.main_grad`.
    """
    main_grad = getattr(weight, "main_grad", None)
    if not (torch.is_grad_enabled() and weight.requires_grad and _accepts(main_grad, weight)):
        return weight, None
    return _Announce.apply(weight, main_grad, fusion), main_grad


def _accepts(main_grad: Any, weight: Tensor) -> bool:
    return (
        isinstance(main_grad, Tensor)
        and main_grad.shape == weight.shape
        and main_grad.is_contiguous()
        and main_grad.dtype in (torch.float32, torch.bfloat16, weight.dtype)
    )


class _Announce(torch.autograd.Function):
    """The weight itself; backward returns the placeholder that Megatron's hook expects.

    The loss writes dC into `main_grad` and gives autograd nothing, but the hook of a parameter
    must still run once, and with overlapped reduction must find a `.grad`.
    """

    @staticmethod
    def forward(ctx: Any, weight: Tensor, main_grad: Tensor, fusion: bool) -> Tensor:
        ctx.set_materialize_grads(False)
        # The parameter is kept by reference: hooks on saved tensors may unpack another object,
        # and main_grad changes between forward and backward, which saving would forbid.
        ctx.weight, ctx.main_grad, ctx.fusion = weight, main_grad, fusion
        return weight.view_as(weight)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor | None) -> tuple[Tensor | None, None, None]:
        (grad,) = grads  # not None only if something else used the view
        weight: Tensor = ctx.weight
        weight.main_grad = ctx.main_grad  # type: ignore[attr-defined]
        if grad is not None:
            weight.main_grad.add_(grad)  # type: ignore[attr-defined]
        if not hasattr(weight, "grad_added_to_main_grad"):
            return None, None, None
        if ctx.fusion:
            placeholder = _placeholder(weight, zero=getattr(weight, "zero_out_wgrad", False))
            weight.grad_added_to_main_grad = True  # type: ignore[attr-defined]
            return placeholder, None, None
        # Without fusion other uses of this weight (an embedding, materialised logits) return real
        # gradients, which the hook must go on adding: so the flag stays and the share is zero.
        return _placeholder(weight, zero=True), None, None


def _placeholder(weight: Any, *, zero: bool) -> Tensor:
    shape, dtype = weight.main_grad.shape, weight.dtype
    if getattr(layers, "HAVE_TE", False) and hasattr(layers, "get_dummy_wgrad"):
        return layers.get_dummy_wgrad(list(shape), dtype, zero=zero)
    make = torch.zeros if zero else torch.empty
    return make(shape, dtype=dtype, device=weight.device)
