"""The steps that are timed: one implementation on one set of inputs.

Legend: N tokens, V_local vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from functools import partial
from typing import Any, TypeVar

import torch
from torch import Tensor

from launch.benchmark.catalogue import Options
from launch.benchmark.inputs import Inputs
from launch.benchmark.measure import HOST_CALLS
from launch.benchmark.peers import Loss, Operands
from launch.benchmark.reference import Results

T = TypeVar("T")


def even_rows(vocab: int, rank: int, ranks: int) -> tuple[int, int]:
    """[start, stop) of a rank, sizes differing by one at most, as VocabShard.even."""
    base, extra = divmod(vocab, ranks)
    start = rank * base + min(rank, extra)
    return start, start + base + (rank < extra)


def alone(inputs: Inputs, start: int) -> Inputs:
    """The same inputs as a problem of their own, whose vocabulary is the rows held here.

    A target among the rows stays; another is mapped to one of them.
    """
    rows = inputs.weight.shape[0]
    local = inputs.target - start
    here = (local >= 0) & (local < rows)
    return replace(inputs, target=torch.where(here, local, inputs.target % rows))


class _Nothing(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, *leaves: Tensor) -> Tensor:
        ctx.save_for_backward(*leaves)
        return leaves[0].new_empty(())

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(each) for each in ctx.saved_tensors)


def nothing(operands: Operands) -> Tensor:
    """No loss, with no gradients: what PyTorch itself takes for a function of these operands."""
    leaves = (operands.input, operands.weight, operands.bias)
    loss: Any = _Nothing.apply(*(each for each in leaves if each is not None))
    return loss


class Steps:
    """Forward and backward passes of a loss on given inputs.

    Args:
        loss: of an implementation.
        inputs: of this rank.
        options: of the loss.
    """

    def __init__(self, loss: Loss, inputs: Inputs, options: Options) -> None:
        self._loss = loss
        bias = inputs.bias if options.bias else None
        out = None
        if options.grad_weight_out:
            out = torch.zeros(inputs.weight.shape, device=inputs.weight.device)
        self._plain = Operands(inputs.input, inputs.weight, inputs.target, bias, out)
        self._leaves = Operands(
            inputs.input.detach().requires_grad_(),
            inputs.weight.detach().requires_grad_(),
            inputs.target,
            None if bias is None else bias.detach().requires_grad_(),
            out,
        )

    def forward(self) -> None:
        """The loss, nothing requiring a gradient."""
        self.without_gradients(self._loss)

    def without_gradients(self, function: Callable[[Operands], T]) -> T:
        """Something else of the same operands."""
        with torch.no_grad():
            return function(self._plain)

    def training_forward(self) -> Tensor:
        """The loss as in training, ready for a backward pass."""
        return self._loss(self._leaves)

    def both(self) -> None:
        """The loss and its gradients, which stay in the operands."""
        self.release()
        self.training_forward().backward()

    def release(self) -> int:
        """Drop the gradients; returns their bytes. `grad_weight_out` is an input."""
        size = 0
        for leaf in self._tensors():
            size += 0 if leaf.grad is None else leaf.grad.nbytes
            leaf.grad = None
        return size

    def results(self, forward_only: bool) -> Results:
        """One pass for the gate."""
        if forward_only:
            return Results(self.without_gradients(self._loss))
        self.release()
        operands = self._leaves
        loss = self.training_forward()
        loss.backward()
        out, bias = operands.grad_weight_out, operands.bias
        return Results(
            loss.detach(),
            operands.input.grad,
            operands.weight.grad if out is None else out,
            None if bias is None else bias.grad,
        )

    def host_forward(self) -> list[Callable[[], Any]]:
        """Forward passes as in training, for `Meter.host_us`."""
        return [self.training_forward] * HOST_CALLS

    def host_backward(self) -> list[Callable[[], Any]]:
        """Backward passes of as many losses; gradients are not accumulated."""
        leaves = self._tensors()
        losses = [self.training_forward() for _ in range(HOST_CALLS)]
        return [partial(torch.autograd.grad, each, leaves, allow_unused=True) for each in losses]

    def _tensors(self) -> list[Tensor]:
        found = (self._leaves.input, self._leaves.weight, self._leaves.bias)
        return [tensor for tensor in found if tensor is not None]
