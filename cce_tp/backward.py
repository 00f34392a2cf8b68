"""Backward pass of one rank: dE, dC and the bias gradient from strips of the logits' gradient.

For each strip of the vocabulary the backend writes G = d loss / d (E C^T) to a small buffer; then
dC_strip = G^T E is complete at once and dE += G C_strip is summed in fp32. Deterministic. With
the paper's filter the strips are cut from the sorted vocabulary and the products skip the dropped
tiles.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce_tp.backend import Backend
from cce_tp.filtering import BYTES_PER_ORDERED_ROW, vocabulary_order
from cce_tp.problem import LocalLogits, LogitGradient, statistics_dtype
from cce_tp.products import add_product, copies_operands
from cce_tp.workspace import BackwardSizes, Walk, blocks, plan_backward


@dataclass(frozen=True, slots=True, kw_only=True)
class GradientSinks:
    """Where the gradients go; None for one that is not wanted.

    Attributes:
        input: (N, D), overwritten with this rank's part of dE.
        weight: (V, D), overwritten, or added to with `accumulate_weight`.
        bias: (V,) fp32 or fp64, zeros beforehand, added to.
        accumulate_weight: add to `weight`.
    """

    input: Tensor | None
    weight: Tensor | None
    bias: Tensor | None
    accumulate_weight: bool


@dataclass(frozen=True, slots=True)
class _Strip:
    """Vocabulary columns of one step: a slice of the local rows, or a gathered list of them."""

    start: int
    stop: int
    rows: Tensor | None

    def store(self, sink: Tensor, value: Tensor, *, accumulate: bool) -> None:
        """sink[rows of the strip] = or += value, which it may overwrite."""
        if self.rows is None:
            part = sink[self.start : self.stop]
            part.add_(value) if accumulate else part.copy_(value)
            return
        if accumulate:
            # Added in the wider dtype, rounded once; the rows of a permutation are distinct.
            value += sink.index_select(0, self.rows)
        sink.index_copy_(0, self.rows, value.to(sink.dtype))


class _Columns:
    """Cuts this rank's logits into strips: of local rows as they are, or of their sorted order."""

    def __init__(self, logits: LocalLogits, *, sort: bool) -> None:
        self._logits = logits
        self._order = self._position = None
        if sort:
            self._order = vocabulary_order(logits.input, logits.weight, logits.bias)
            position = torch.empty_like(self._order)
            position[self._order] = torch.arange(len(position), device=position.device)
            column = logits.target - logits.first_id
            local = (column >= 0) & (column < len(position))
            self._position = torch.where(local, position[torch.where(local, column, 0)], -1)

    def strips(self, width: int) -> Iterator[tuple[_Strip, LocalLogits]]:
        for start, stop in blocks(self._logits.shape[1], width):
            if self._order is None or self._position is None:
                yield _Strip(start, stop, None), self._logits.columns(start, stop)
            else:
                rows = self._order[start:stop]
                column = torch.where(self._position >= 0, self._position - start, -1)
                yield _Strip(start, stop, rows), self._logits.gathered(rows, column)


class _BackwardPass:
    """State of one backward call; `run` walks the plan."""

    def __init__(
        self,
        backend: Backend,
        logits: LocalLogits,
        upstream: LogitGradient,
        sinks: GradientSinks,
        eps: float | None,
    ) -> None:
        self.backend = backend
        self.logits = logits
        self.sinks = sinks
        self.eps = eps
        self.upstream, self.unscale = _into_range(logits, upstream)
        self.columns = _Columns(logits, sort=eps is not None)
        self.sum_dtype = statistics_dtype(logits.input.dtype)

    def run(self, workspace_bytes: int) -> None:
        plan = plan_backward(self._sizes(), workspace_bytes)
        if plan.input is not None:
            self._input_pass(plan.input, None if plan.weight else self.sinks.weight)
        if plan.weight is not None:
            self._weight_pass(plan.weight, bias=plan.input is None)

    def _sizes(self) -> BackwardSizes:
        num_tokens, vocab, hidden = self.logits.shape
        itemsize, wide = self.logits.input.element_size(), self.sum_dtype.itemsize
        dE, dC = self.sinks.input, self.sinks.weight
        gathers, copies = self.eps is not None, copies_operands(self.logits.input)
        weight_row = 0
        if dC is not None and not self._direct(dC):
            weight_row = hidden * (
                wide + gathers * (1 + self.sinks.accumulate_weight) * dC.itemsize
            )
        fixed = self.backend.tile_bytes(self.logits)
        return BackwardSizes(
            tokens=num_tokens,
            vocab=vocab,
            element=itemsize + copies * wide,
            token_row=hidden * wide * ((dE is not None and dE.dtype != self.sum_dtype) + copies),
            strip_row=hidden * (gathers * itemsize + copies * wide),
            weight_row=weight_row,
            weight_accumulator=hidden * wide,
            weight_accumulates=dC is not None and dC.dtype == self.sum_dtype,
            fixed=fixed + (BYTES_PER_ORDERED_ROW * vocab if gathers else 0),
            need_input=dE is not None,
            need_weight=dC is not None,
        )

    def _direct(self, grad_weight: Tensor) -> bool:
        """Whether a product can write its rows of dC without a temporary."""
        native = grad_weight.dtype in (self.logits.input.dtype, self.sum_dtype)
        indirect = self.eps is not None or self.unscale is not None
        return native and not indirect and not copies_operands(self.logits.input)

    def _input_pass(self, walk: Walk, grad_weight: Tensor | None) -> None:
        """Token chunks outside, strips inside: dE and the bias gradient, and dC if given."""
        grad_input = self.sinks.input
        assert grad_input is not None
        buffer = self._buffer(walk)
        for n0, n1 in blocks(self.logits.shape[0], walk.chunk):
            total = grad_input[n0:n1]
            if total.dtype != self.sum_dtype:
                total = torch.empty(total.shape, dtype=self.sum_dtype, device=total.device)
            for strip, logits in self.columns.strips(walk.strip):
                logits, grad_NV, kept = self._gradient(strip, logits, (n0, n1), buffer)
                if grad_weight is not None:
                    later = n0 > 0 or self.sinks.accumulate_weight
                    self._add_weight(grad_weight, strip, grad_NV, logits, kept, accumulate=later)
                self._add_bias(strip, grad_NV)
                self._product(total, grad_NV, logits.weight, kept, accumulate=strip.start > 0)
            if self.unscale is not None:
                total.mul_(self.unscale)
            if total.dtype != grad_input.dtype:
                grad_input[n0:n1].copy_(total)
            del total  # before the next chunk's is allocated

    def _weight_pass(self, walk: Walk, *, bias: bool) -> None:
        """Strips outside, token chunks inside: dC (and the bias gradient) with a sum in fp32."""
        grad_weight = self.sinks.weight
        num_tokens, _, hidden = self.logits.shape
        buffer = self._buffer(walk)
        whole = walk.chunk >= num_tokens
        for strip, columns in self.columns.strips(walk.strip):
            total = None
            if grad_weight is not None and not whole:
                shape = (strip.stop - strip.start, hidden)
                total = torch.zeros(shape, dtype=self.sum_dtype, device=grad_weight.device)
            for n0, n1 in blocks(num_tokens, walk.chunk):
                logits, grad_NV, kept = self._gradient(strip, columns, (n0, n1), buffer)
                if bias:
                    self._add_bias(strip, grad_NV)
                if total is not None:
                    self._weight_product(total, grad_NV, logits.input, kept, accumulate=True)
                elif grad_weight is not None:
                    add = self.sinks.accumulate_weight
                    self._add_weight(grad_weight, strip, grad_NV, logits, kept, accumulate=add)
            if total is not None and grad_weight is not None:
                if self.unscale is not None:
                    total *= self.unscale
                strip.store(grad_weight, total, accumulate=self.sinks.accumulate_weight)

    def _buffer(self, walk: Walk) -> Tensor:
        # Rows start aligned for the tensor memory accelerator: a multiple of 16 elements.
        return self.logits.input.new_empty(walk.chunk, -(-walk.strip // 16) * 16)

    def _gradient(
        self, strip: _Strip, columns: LocalLogits, tokens: tuple[int, int], buffer: Tensor
    ) -> tuple[LocalLogits, Tensor, Any]:
        """The rectangle of a step, its gradient, and the backend's record of kept tiles."""
        logits = columns.tokens(*tokens)
        grad_NV = buffer[: tokens[1] - tokens[0], : strip.stop - strip.start]
        kept = self.backend.grad_logits(logits, self.upstream.tokens(*tokens), grad_NV, self.eps)
        return logits, grad_NV, kept

    def _product(
        self, out: Tensor, grad_NV: Tensor, other: Tensor, kept: Any, *, accumulate: bool
    ) -> None:
        """out = or += G @ other."""
        if kept is None:
            add_product(out, grad_NV, other, accumulate=accumulate)
        else:
            self.backend.sparse_product(
                out, grad_NV, other, kept, transposed=False, accumulate=accumulate
            )

    def _weight_product(
        self, out: Tensor, grad_NV: Tensor, inputs: Tensor, kept: Any, *, accumulate: bool
    ) -> None:
        """out = or += G^T @ inputs, in the scale of G."""
        if kept is None:
            add_product(out, grad_NV.t(), inputs, accumulate=accumulate)
        else:
            self.backend.sparse_product(
                out, grad_NV, inputs, kept, transposed=True, accumulate=accumulate
            )

    def _add_weight(
        self,
        grad_weight: Tensor,
        strip: _Strip,
        grad_NV: Tensor,
        logits: LocalLogits,
        kept: Any,
        *,
        accumulate: bool,
    ) -> None:
        """The strip's rows of dC = or += unscale * G^T E."""
        if self._direct(grad_weight):
            part = grad_weight[strip.start : strip.stop]
            add_product(part, grad_NV.t(), logits.input, accumulate=accumulate)
            return
        shape = (strip.stop - strip.start, logits.shape[2])
        part = torch.empty(shape, dtype=self.sum_dtype, device=grad_NV.device)
        self._weight_product(part, grad_NV, logits.input, kept, accumulate=False)
        if self.unscale is not None:
            part *= self.unscale
        strip.store(grad_weight, part, accumulate=accumulate)

    def _add_bias(self, strip: _Strip, grad_NV: Tensor) -> None:
        if self.sinks.bias is None:
            return
        part = grad_NV.sum(dim=0, dtype=self.sum_dtype)
        if self.unscale is not None:
            part *= self.unscale
        strip.store(self.sinks.bias, part, accumulate=True)


def _into_range(
    logits: LocalLogits, upstream: LogitGradient
) -> tuple[LogitGradient, Tensor | None]:
    """Scale fp16's upstream gradient by a power of two into range; and the inverse factor.

    G is about grad / N, which fp16 would flush to zero. The largest |G| possible goes to about
    2^14; the factor stays on the device (no host sync)."""
    if logits.input.dtype != torch.float16 or logits.input.shape[0] == 0:
        return upstream, None
    lse_N = upstream.max_logit + upstream.log_sum
    bound_N = upstream.grad.abs() * (1 + (1 + 2 * upstream.z_loss * lse_N).abs())
    bound_N = torch.where(bound_N.isfinite(), bound_N, 0.0)
    bound = (bound_N * abs(logits.logit_scale)).amax().clamp(min=2.0**-100)
    scale = torch.exp2(14 - torch.ceil(torch.log2(bound)))
    return upstream.scaled(scale), 1 / scale


def gradients(
    backend: Backend,
    logits: LocalLogits,
    upstream: LogitGradient,
    sinks: GradientSinks,
    *,
    eps: float | None,
    workspace_bytes: int,
) -> None:
    """Write this rank's gradients into `sinks`.

    Args:
        backend: tile functions to use.
        logits: all N tokens against all V local rows.
        upstream: gradient and global statistics per token.
        sinks: outputs; every element of a wanted one is written.
        eps: threshold of the paper's filter, or None for the exact gradient.
        workspace_bytes: cap on temporaries beyond the gradients.
    """
    num_tokens, vocab, _ = logits.shape
    if num_tokens > 0 and vocab > 0:
        _BackwardPass(backend, logits, upstream, sinks, eps).run(workspace_bytes)
        return
    if sinks.input is not None:
        sinks.input.zero_()
    if sinks.weight is not None and not sinks.accumulate_weight:
        sinks.weight.zero_()
