"""What Hopper's kernels make of capped logits, where Gluon does not run: the same functions in a
Triton kernel, interpreted, against fp64."""

from __future__ import annotations

import pytest
import torch
import triton
import triton.language as tl

from cce_tp.kernels.backward import gradient_of, is_special
from cce_tp.kernels.tile import logistic, logistic_factor
from variants import DEVICE

TOKENS, VOCAB, CAP = 16, 64, 7.0
Z_LOSS, SMOOTHING = 1e-2, 0.1


@triton.jit
def _kernel(
    y_ptr,
    target_ptr,
    grad_ptr,
    max_ptr,
    log_sum_ptr,
    x_ptr,
    out_ptr,
    special_ptr,
    cap,
    z_loss,
    onehot_weight,
    uniform_weight,
    TOKENS: tl.constexpr,
    VOCAB: tl.constexpr,
    SPECIAL: tl.constexpr,
):
    rows, cols = tl.arange(0, TOKENS), tl.arange(0, VOCAB)
    at = rows[:, None] * VOCAB + cols[None, :]
    r = logistic(tl.load(y_ptr + at) * logistic_factor(cap))
    tl.store(x_ptr + at, cap - 2.0 * cap * r)
    target, grad = tl.load(target_ptr + rows), tl.load(grad_ptr + rows)
    g = gradient_of(
        r, target, grad, grad, tl.load(max_ptr + rows), tl.load(log_sum_ptr + rows), cols,
        cap, z_loss, onehot_weight, uniform_weight, VOCAB, True, True, True, SPECIAL, True,
    )  # fmt: skip
    tl.store(out_ptr + at, g)
    tl.store(special_ptr, is_special(target, grad, VOCAB).to(tl.int32))


@pytest.mark.parametrize("way", ["special", "not-special", "asked"])
def test_gradients_from_the_logistic(way: str) -> None:
    y = torch.randn(TOKENS, VOCAB, dtype=torch.float64) * 6
    y[3, 5], y[4, 6] = torch.inf, -torch.inf
    target = torch.randint(0, VOCAB, (TOKENS,), dtype=torch.int32)
    grad = torch.rand(TOKENS, dtype=torch.float64) + 0.5
    if way == "not-special":
        target[:] = -1
        target[::3] = VOCAB + 3
    else:
        target[::5], grad[::4] = -1, 0.0
        y[0, 0] = torch.nan  # of a masked token
    x = CAP * torch.tanh(y / CAP)
    max_logit = (
        x.nan_to_num(0.0).amax(dim=1) + 0.25
    )  # of the whole vocabulary, of which this is part
    log_sum = (x.nan_to_num(0.0) - max_logit[:, None]).exp().sum(dim=1).log() + 0.5
    p = (x - (max_logit + log_sum)[:, None]).exp()
    g = p * (1 + 2 * Z_LOSS * (max_logit + log_sum))[:, None] - SMOOTHING / VOCAB
    g -= (1 - SMOOTHING) * (target[:, None] == torch.arange(VOCAB))
    expected = g * (1 - (x / CAP) ** 2) * grad[:, None]
    expected[grad == 0] = 0.0

    narrow = [each.to(DEVICE, torch.float32) for each in (y, grad, max_logit, log_sum)]
    found_x, found = torch.empty_like(narrow[0]), torch.empty_like(narrow[0])
    special = torch.empty(1, dtype=torch.int32, device=DEVICE)
    _kernel[(1,)](
        narrow[0], target.to(DEVICE), *narrow[1:], found_x, found, special,
        CAP, Z_LOSS, 1 - SMOOTHING, SMOOTHING / VOCAB,
        TOKENS, VOCAB, {"special": True, "not-special": False, "asked": None}[way],
    )  # fmt: skip
    assert bool(special.item()) == (way != "not-special")
    torch.testing.assert_close(found_x.double().cpu(), x, rtol=0, atol=3e-7 * CAP, equal_nan=True)
    torch.testing.assert_close(found.double().cpu(), expected, rtol=1e-5, atol=1e-6)
