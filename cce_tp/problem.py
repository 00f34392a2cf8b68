"""The rectangle of logits a rank works on, and the gradient that arrives at it.

Legend: N tokens, V vocabulary rows of this rank (or of a part of them), D hidden size.
The logits are x = cap(logit_scale * (E C^T + bias)) with cap(y) = softcap * tanh(y / softcap).
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from cce_tp.workspace import gradient_pitch


def statistics_dtype(dtype: torch.dtype) -> torch.dtype:
    """Statistics, losses and accumulators are fp32, or fp64 for fp64 inputs."""
    return torch.float64 if dtype == torch.float64 else torch.float32


def rows_of(tensor: Tensor, start: int, stop: int) -> Tensor:
    """tensor[start:stop], or the tensor itself where that is all: a view keeps the host a while."""
    return tensor if stop - start == tensor.shape[0] else tensor[start:stop]


def memory_of(
    tensor: Tensor, first_byte: int, shape: tuple[int, int], dtype: torch.dtype, pitch: int
) -> Tensor:
    """A matrix of this shape, its rows `pitch` apart, in a tensor's memory from a byte of it on."""
    # One view of two dimensions for three of one: each keeps the host as long.
    flat = tensor if tensor.dtype == dtype else tensor.view(dtype)
    first = flat.storage_offset() + first_byte // dtype.itemsize
    return flat.as_strided(shape, (pitch, 1), first)


class LocalLogits(NamedTuple):
    """What defines the logits of some tokens against some rows; nothing is computed.

    Attributes:
        input: (N, D) hidden states, last dim contiguous.
        weight: (V, D) classifier rows, same dtype, last dim contiguous.
        bias: (V,) or None.
        target: (N,) int64; the target's column is `target - first_id`, outside [0, V) if it is
            elsewhere.
        first_id: id of column 0.
        logit_scale: factor on E C^T + bias.
        logit_softcap: cap, or None.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    first_id: int
    logit_scale: float
    logit_softcap: float | None

    @property
    def shape(self) -> tuple[int, int, int]:
        """(N, V, D)."""
        return self.input.shape[0], self.weight.shape[0], self.input.shape[1]

    def tokens(self, start: int, stop: int) -> LocalLogits:
        if start == 0 and stop == self.target.shape[0]:
            return self
        return self._replace(input=self.input[start:stop], target=self.target[start:stop])

    def columns(self, start: int, stop: int) -> LocalLogits:
        if start == 0 and stop == self.weight.shape[0]:
            return self
        bias = None if self.bias is None else self.bias[start:stop]
        first_id = self.first_id + start
        return self._replace(weight=self.weight[start:stop], bias=bias, first_id=first_id)

    def gathered(
        self, rows: Tensor, column_of_target: Tensor, weight: Tensor | None = None
    ) -> LocalLogits:
        """The same logits with only the given local rows, in the given order (copies those rows).

        Args:
            rows: (R,) int64 local row numbers; with `weight` -1 for one that does not matter.
            column_of_target: (N,) int64 column of each token's target in the new order; others
                outside [0, R).
            weight: (R, D) these rows, if they are gathered already.
        """
        bias = self.bias
        if bias is not None:
            bias = bias.index_select(0, rows if weight is None else rows.clamp(min=0))
        return self._replace(
            weight=self.weight.index_select(0, rows) if weight is None else weight,
            bias=bias,
            target=column_of_target,
            first_id=0,
        )


class KeptLogits(NamedTuple):
    """Logits of the first columns, kept from the forward pass for the backward pass; with the far
    field of the first ones of its order.

    Attributes:
        below_max: (columns, N) fp16 logit less the maximum of its (token, tile), cap included.
            Eleven bits serve better than bf16's eight: what is near the maximum is small.
        tile_max: (tiles, N) fp32 those maxima.
        tile: columns per tile.
        in_grad: below_max lies in the memory of dC.
    """

    below_max: Tensor
    tile_max: Tensor
    tile: int
    in_grad: bool = False

    @classmethod
    def empty(cls, logits: LocalLogits, tile: int, keep_bytes: int) -> KeptLogits | None:
        """Room for as many whole tiles as fit `keep_bytes`, or all; None for none."""
        num_tokens, vocab = logits.target.shape[0], logits.weight.shape[0]
        width = gradient_pitch(num_tokens)
        tiles = 0 if width == 0 else min(keep_bytes // (2 * width * tile), -(-vocab // tile))
        if tiles == 0:
            return None
        columns = min(tiles * tile, vocab)
        below_max = logits.input.new_empty((columns, width), dtype=torch.float16)
        tile_max = logits.input.new_empty((tiles, num_tokens), dtype=torch.float32)
        return cls(below_max[:, :num_tokens], tile_max, tile)

    @classmethod
    def inside(
        cls, grad_weight: Tensor, tile_max: Tensor, tile: int, first_byte: int | None = None
    ) -> KeptLogits:
        """In the memory of dC: all columns at its end, or the first ones at its start.

        Args:
            grad_weight: (V, D) contiguous.
            tile_max: (tiles, N), as many tiles as are kept.
            tile: columns per tile.
            first_byte: where they begin, if elsewhere.
        """
        tiles, num_tokens = tile_max.shape
        vocab, pitch = grad_weight.shape[0], gradient_pitch(num_tokens)
        columns = min(tiles * tile, vocab)
        if first_byte is None:
            first_byte = grad_weight.nbytes - vocab * pitch * 2 if columns == vocab else 0
        shape = (columns, num_tokens)
        below_max = memory_of(grad_weight, first_byte, shape, torch.float16, pitch)
        return cls(below_max, tile_max, tile, in_grad=True)

    @property
    def columns(self) -> int:
        return self.below_max.shape[0]

    def tokens(self, start: int, stop: int) -> KeptLogits:
        if start == 0 and stop == self.tile_max.shape[1]:
            return self
        below_max, tile_max = self.below_max[:, start:stop], self.tile_max[:, start:stop]
        return self._replace(below_max=below_max, tile_max=tile_max)


class LossTerms(NamedTuple):
    """How the losses of the tokens are made and joined.

    Attributes:
        reduction: "none", "sum" or "mean".
        ignore_index: target value of a token that does not count.
        label_smoothing, z_loss: coefficients of the loss.
        vocab_size: global vocabulary size.
    """

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    vocab_size: int


class TokenLoss(NamedTuple):
    """What the forward pass leaves.

    Attributes:
        loss: (N,) for reduction "none", else (); fp32 or fp64.
        normaliser: (2, N) maximum over the global vocabulary, and log of the sum of exp(x - max);
            NaN in the second row poisons the token on purpose.
        count: () int32 number of tokens that are not ignored, at least 1; (0,) for "none".
    """

    loss: Tensor
    normaliser: Tensor
    count: Tensor


class LogitGradient(NamedTuple):
    """What the backward pass needs per token to form G = d loss / d x.

    G_nv = grad_n * (p_nv * (1 + 2 z_loss lse_n) - (1 - label_smoothing) [v = target_n] -
    label_smoothing / vocab_size) with p_nv = exp(x_nv - max_n - log_sum_n).

    Attributes:
        grad: (N,) fp32/fp64 upstream gradient; exactly 0 for ignored tokens, whose row of G is
            then exactly 0.
        max_logit: (N,) maximum over the global vocabulary.
        log_sum: (N,) log of the sum of exp(x - max) over the global vocabulary; NaN poisons the
            token on purpose.
        z_loss, label_smoothing: coefficients of the loss.
        vocab_size: global vocabulary size.
    """

    grad: Tensor
    max_logit: Tensor
    log_sum: Tensor
    z_loss: float
    label_smoothing: float
    vocab_size: int

    @property
    def onehot_weight(self) -> float:
        return 1.0 - self.label_smoothing

    @property
    def uniform_weight(self) -> float:
        return self.label_smoothing / self.vocab_size

    @property
    def coefficients(self) -> tuple[float, float, float]:
        """z_loss, onehot_weight, uniform_weight: what is the same for all tokens."""
        return float(self.z_loss), self.onehot_weight, self.uniform_weight

    def tokens(self, start: int, stop: int) -> LogitGradient:
        if start == 0 and stop == self.grad.shape[0]:
            return self
        return self._replace(
            grad=self.grad[start:stop],
            max_logit=self.max_logit[start:stop],
            log_sum=self.log_sum[start:stop],
        )

    def scaled(self, factor: Tensor) -> LogitGradient:
        """The same with the upstream gradient times a 0-dim factor."""
        return self._replace(grad=self.grad * factor)
