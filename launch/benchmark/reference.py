"""The correctness gate: loss and gradients in fp32, and how far an implementation is from them.

The reference takes tokens and vocabulary rows in chunks, so that nothing of N x V elements is
held, with fp32 products (TF32 off). Under a group every rank brings its own rows.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from launch.benchmark.catalogue import Options
from launch.benchmark.inputs import Inputs

_TOKENS, _ROWS = 2048, 8192
_NAMES = ("loss", "input_grad", "weight_grad", "bias_grad")


@dataclass(frozen=True, slots=True)
class Results:
    """What is compared; gradients are None where there was no backward pass or no bias.

    Attributes:
        loss: () mean over the tokens.
        input_grad: (N, D), summed over the group.
        weight_grad, bias_grad: (V_local, D) and (V_local,).
    """

    loss: Tensor
    input_grad: Tensor | None = None
    weight_grad: Tensor | None = None
    bias_grad: Tensor | None = None


@contextlib.contextmanager
def matmul_precision(name: str) -> Iterator[None]:
    """torch's setting for fp32 products, "highest" or "high" (TF32), while this is open."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(name)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


# (N,) each, over the whole vocabulary: log-sum-exp, target's logit, sum of the logits.
Statistics = tuple[Tensor, Tensor, Tensor]


def statistics(inputs: Inputs, options: Options, vocab: int) -> Statistics:
    """What the parts of a vocabulary need to know of the whole, which `inputs` hold."""
    with torch.no_grad(), matmul_precision("highest"):
        return _Reference(inputs, options, 0, vocab, None).statistics()


def compute(
    inputs: Inputs,
    options: Options,
    start: int,
    vocab: int,
    group: Any,
    whole: Statistics | None = None,
) -> Results:
    """The fp32 reference.

    Args:
        inputs: of this rank.
        options: of the loss.
        start: global id of the first row held here.
        vocab: V.
        group: process group that holds the vocabulary, or None for one rank.
        whole: of a vocabulary of which only a part is held, without a group; dE is that part's.
    """
    with torch.no_grad(), matmul_precision("highest"):
        return _Reference(inputs, options, start, vocab, group).results(whole)


class _Reference:
    def __init__(
        self, inputs: Inputs, options: Options, start: int, vocab: int, group: Any
    ) -> None:
        self.inputs, self.options, self.group = inputs, options, group
        self.start, self.vocab = start, vocab
        tokens, rows = inputs.input.shape[0], inputs.weight.shape[0]
        self.tokens = [slice(n, min(n + _TOKENS, tokens)) for n in range(0, tokens, _TOKENS)]
        self.rows = [slice(v, min(v + _ROWS, rows)) for v in range(0, rows, _ROWS)]

    def results(self, whole: Statistics | None) -> Results:
        """Loss, and gradients unless only the forward pass is asked for."""
        lse, target_logit, logit_sum = self.statistics() if whole is None else whole
        options, alpha = self.options, self.options.label_smoothing
        loss = lse - (1 - alpha) * target_logit - alpha / self.vocab * logit_sum
        loss = (loss + options.z_loss * lse.square()).mean()
        if options.forward_only:
            return Results(loss)
        hidden, weight = self.inputs.input, self.inputs.weight
        input_grad = torch.zeros(hidden.shape, device=hidden.device)
        weight_grad = torch.zeros(weight.shape, device=hidden.device)
        bias_grad = torch.zeros(weight.shape[:1], device=hidden.device) if options.bias else None
        for v in self.rows:
            for n in self.tokens:
                grad = self._logit_grad(n, v, lse[n])
                input_grad[n] += grad @ weight[v].float()
                weight_grad[v] += grad.t() @ hidden[n].float()
                if bias_grad is not None:
                    bias_grad[v] += grad.sum(0)
        if self.group is not None:
            dist.all_reduce(input_grad, group=self.group)
        return Results(loss, input_grad, weight_grad, bias_grad)

    def _logits(self, n: slice, v: slice) -> Tensor:
        logits = self.inputs.input[n].float() @ self.inputs.weight[v].float().t()
        if self.options.bias:
            logits += self.inputs.bias[v].float()
        if self.options.softcap is not None:
            logits = (logits / self.options.softcap).tanh_().mul_(self.options.softcap)
        return logits

    def _columns(self, n: slice, v: slice) -> tuple[Tensor, Tensor]:
        """(tokens of the chunk whose target is in these rows, the columns of those targets)."""
        column = self.inputs.target[n] - self.start - v.start
        (here,) = ((column >= 0) & (column < v.stop - v.start)).nonzero(as_tuple=True)
        return here, column[here]

    def statistics(self) -> Statistics:
        """Of the rows held here, and of the others of the group."""
        device = self.inputs.input.device
        lse, target_logit, logit_sum = torch.zeros(3, len(self.inputs.target), device=device)
        lse.fill_(-torch.inf)
        for n in self.tokens:
            for v in self.rows:
                logits = self._logits(n, v)
                lse[n] = torch.logaddexp(lse[n], logits.logsumexp(1))
                logit_sum[n] += logits.sum(1)
                here, column = self._columns(n, v)
                target_logit[n][here] = logits[here, column]
        if self.group is not None:
            parts = [torch.empty_like(lse) for _ in range(self.group.size())]
            dist.all_gather(parts, lse, group=self.group)
            lse = torch.stack(parts).logsumexp(0)
            sums = torch.stack([target_logit, logit_sum])
            dist.all_reduce(sums, group=self.group)
            target_logit, logit_sum = sums
        return lse, target_logit, logit_sum

    def _logit_grad(self, n: slice, v: slice, lse: Tensor) -> Tensor:
        """Gradient of the mean loss with respect to E C^T, one chunk of it."""
        options, alpha = self.options, self.options.label_smoothing
        logits = self._logits(n, v)
        grad = (logits - lse[:, None]).exp_()
        grad *= (1 + 2 * options.z_loss * lse)[:, None]
        grad -= alpha / self.vocab
        grad[self._columns(n, v)] -= 1 - alpha
        if options.softcap is not None:
            grad *= 1 - (logits / options.softcap).square_()
        return grad.div_(len(self.inputs.target))


def errors(got: Results, want: Results) -> dict[str, float]:
    """||got - want|| / ||want|| of everything that `want` has, by name; nan for what is missing."""
    found = {}
    for name in _NAMES:
        reference, value = getattr(want, name), getattr(got, name)
        if reference is not None:
            found[name] = torch.nan if value is None else _relative(value, reference)
    return found


def _relative(got: Tensor, want: Tensor) -> float:
    difference = norm = 0.0
    rows = (
        ((got, want),) if got.dim() == 0 else zip(got.split(_ROWS), want.split(_ROWS), strict=True)
    )
    for a, b in rows:
        difference += (a.float() - b).double().square().sum().item()
        norm += b.double().square().sum().item()
    return (difference / max(norm, 1e-60)) ** 0.5


def limits(dtype: str, tf32: bool, exact: bool) -> dict[str, float]:
    """The largest error that passes the gate.

    bf16 and fp16: 1e-2 for the loss and 2e-2 for gradients, a few times what PyTorch's own path
    has. fp32: 1e-5 and 1e-4; in TF32 1e-3 and 1e-2. An implementation that leaves part of the
    gradient out on purpose may err in it by 1e-1.
    """
    loss, gradient = (1e-2, 2e-2)
    if dtype == "fp32":
        loss, gradient = (1e-3, 1e-2) if tf32 else (1e-5, 1e-4)
    if not exact:
        gradient = 1e-1
    return {name: loss if name == "loss" else gradient for name in _NAMES}
