"""The dense loss in fp64: what every number of the library is held against.

Independent of `cce_tp`: the whole (N, V) logits, plain PyTorch operators, PyTorch's autograd.

Legend: N tokens, V global vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True, kw_only=True)
class Operands:
    """Tensors of one call over the whole vocabulary.

    Attributes:
        input: (..., D).
        weight: (V, D).
        bias: (V,) or None.
        target: (...) integer ids.
        upstream: gradient of the loss: (...) for reduction "none", () otherwise.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    upstream: Tensor


@dataclass(kw_only=True)
class Outcome:
    """Everything a call and its backward pass give back; None where it does not exist.

    Attributes:
        loss: () or (...).
        lse, target_logit, max_logit, argmax, entropy: (...) statistics.
        logits: (N, V) (oracle only).
        grad_input, grad_weight, grad_bias: gradients.
        magnitude_input, magnitude_weight, magnitude_bias: sums of the absolute values of the terms
            that make up each gradient element (oracle only): its rounding error is a multiple.
        magnitude_loss: the same for the loss.
    """

    loss: Tensor
    lse: Tensor | None = None
    target_logit: Tensor | None = None
    max_logit: Tensor | None = None
    argmax: Tensor | None = None
    entropy: Tensor | None = None
    logits: Tensor | None = None
    grad_input: Tensor | None = None
    grad_weight: Tensor | None = None
    grad_bias: Tensor | None = None
    magnitude_input: Tensor | None = None
    magnitude_weight: Tensor | None = None
    magnitude_bias: Tensor | None = None
    magnitude_loss: Tensor | None = None


def _leaf(tensor: Tensor, dtype: torch.dtype) -> Tensor:
    return tensor.detach().to(dtype).requires_grad_()


def dense_logits(
    input: Tensor, weight: Tensor, bias: Tensor | None, options: Mapping[str, Any]
) -> Tensor:
    """(N, D), (V, D), (V,) -> (N, V): product in the operands' dtype, the rest in fp32 or fp64."""
    y = F.linear(input, weight, bias)
    y = y.to(torch.promote_types(y.dtype, torch.float32)) * options.get("logit_scale", 1.0)
    softcap = options.get("logit_softcap")
    return y if softcap is None else softcap * torch.tanh(y / softcap)


def loss_of_logits(x: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
    """(N, V) logits, (N,) ids -> (N,) loss; NaN for an id that is neither in [0, V) nor ignored."""
    vocab = x.shape[1]
    ignored = target == options.get("ignore_index", -100)
    known = (target >= 0) & (target < vocab)
    lse = torch.logsumexp(x, dim=1)
    picked = x.gather(1, torch.where(known, target, 0)[:, None])[:, 0]
    smoothing = options.get("label_smoothing", 0.0)
    loss = lse - (1 - smoothing) * picked
    # A term that is not asked for must not bring in 0 * infinity.
    if smoothing:
        loss = loss - smoothing * x.mean(dim=1)
    if options.get("z_loss", 0.0):
        loss = loss + options["z_loss"] * lse**2
    loss = torch.where(known, loss, torch.nan)
    return torch.where(ignored, 0.0, loss)


def reduce(loss_N: Tensor, target: Tensor, options: Mapping[str, Any]) -> Tensor:
    """(N,) loss per token -> () or target's shape."""
    reduction = options.get("reduction", "mean")
    if reduction == "none":
        return loss_N.view(target.shape)
    if reduction == "sum":
        return loss_N.sum()
    valid = int((target != options.get("ignore_index", -100)).sum())
    return loss_N.sum() / max(valid, 1)


def dense(
    operands: Operands, options: Mapping[str, Any], *, dtype: torch.dtype = torch.float64
) -> Outcome:
    """Loss, statistics and gradients from dense logits.

    Args:
        operands: the whole problem.
        options: loss options of `linear_cross_entropy`, by name.
        dtype: of the operands of the product. fp64 is the oracle; fp16, bf16 and fp32 are the usual
            training code (F.linear, logits to fp32, cross entropy), whose error is the yardstick.
    """
    hidden = operands.input.shape[-1]
    input, weight = _leaf(operands.input, dtype), _leaf(operands.weight, dtype)
    bias = None if operands.bias is None else _leaf(operands.bias, dtype)
    target = operands.target.reshape(-1).long()
    x = dense_logits(input.reshape(-1, hidden), weight, bias, options)
    loss_N = loss_of_logits(x, target, options)
    loss = reduce(loss_N, operands.target, options)
    leaves = [input, weight] if bias is None else [input, weight, bias]
    upstream = operands.upstream.to(loss.dtype)
    grads = torch.autograd.grad(loss, leaves, upstream, retain_graph=True)
    (grad_x,) = torch.autograd.grad(loss, [x], upstream)
    outcome = Outcome(
        loss=loss.detach(),
        grad_input=grads[0],
        grad_weight=grads[1],
        grad_bias=None if bias is None else grads[2],
    )
    if dtype == torch.float64:
        _add_statistics(outcome, x.detach(), operands.target, options)
        _add_magnitudes(outcome, operands, x.detach(), grad_x, loss_N.detach(), options)
    return outcome


def _add_statistics(
    outcome: Outcome, x: Tensor, target: Tensor, options: Mapping[str, Any]
) -> None:
    shape, ids = target.shape, target.reshape(-1).long()
    known = (ids >= 0) & (ids < x.shape[1]) & (ids != options.get("ignore_index", -100))
    picked = x.gather(1, torch.where(known, ids, 0)[:, None])[:, 0]
    log_p = x.log_softmax(dim=1)
    outcome.lse = torch.logsumexp(x, dim=1).view(shape)
    outcome.target_logit = torch.where(known, picked, 0.0).view(shape)
    outcome.max_logit = x.amax(dim=1).view(shape)
    outcome.argmax = x.argmax(dim=1).view(shape)
    outcome.logits = x
    outcome.entropy = -(log_p.exp() * log_p).sum(dim=1).view(shape)


def _add_magnitudes(
    outcome: Outcome,
    operands: Operands,
    x: Tensor,
    grad_x: Tensor,
    loss_N: Tensor,
    options: Mapping[str, Any],
) -> None:
    """Sums of absolute terms: probabilities, one-hot and smoothing, without cancellation."""
    ids = operands.target.reshape(-1).long()
    vocab = x.shape[1]
    scale, smoothing = options.get("logit_scale", 1.0), options.get("label_smoothing", 0.0)
    lse = torch.logsumexp(x, dim=1)
    onehot = torch.zeros_like(x)
    known = (ids >= 0) & (ids < vocab)
    onehot[known, ids[known]] = 1.0
    terms = x.softmax(dim=1) * (1 + 2 * options.get("z_loss", 0.0) * lse.abs())[:, None]
    terms = terms + onehot + smoothing / vocab
    per_token = _upstream_per_token(operands, options).abs()
    terms = terms * (abs(scale) * per_token)[:, None]
    flat = operands.input.reshape(-1, operands.input.shape[-1]).double()
    outcome.magnitude_input = (terms @ operands.weight.double().abs()).view(operands.input.shape)
    outcome.magnitude_weight = terms.t() @ flat.abs()
    outcome.magnitude_bias = terms.sum(dim=0)
    size = x.abs().amax(dim=1) + lse.abs() + options.get("z_loss", 0.0) * lse**2
    size = torch.where(ids == options.get("ignore_index", -100), 0.0, size)
    outcome.magnitude_loss = reduce(size, operands.target, options)


def _upstream_per_token(operands: Operands, options: Mapping[str, Any]) -> Tensor:
    """(N,) derivative of the reduced loss, times its upstream gradient, by each token's loss."""
    target = operands.target
    ones = torch.ones(target.numel(), dtype=torch.float64, device=target.device, requires_grad=True)
    reduced = reduce(ones, target, options)
    (grad,) = torch.autograd.grad(reduced, [ones], operands.upstream.to(torch.float64))
    return torch.where(target.reshape(-1) == options.get("ignore_index", -100), 0.0, grad)
