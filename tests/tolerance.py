"""How far a result may be from the fp64 oracle.

Two bars: the error of a whole tensor relative to its norm, with a rounding band for results that
come from cancellation (a few ulp of the terms that cancel), and for 16-bit inputs the error of
PyTorch's own path in that dtype on the same inputs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from oracle import Outcome

LOSS_RTOL = 1e-5
GRAD_RTOL = 5e-5
FP64_RTOL = 1e-11
# A 16-bit result may be this much worse than PyTorch's own path in that dtype.
LOW_PRECISION_FACTOR = 1.5
# Rounding band in units of the machine epsilon of the dtype the sums are made in.
_BAND_ULPS = 8.0


def error_norm(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected||, in fp64; infinite if anything is not finite where the oracle is."""
    error = (actual.double() - expected.double()).norm().item()
    return error if error == error else float("inf")


def relative_error(actual: Tensor, expected: Tensor) -> float:
    """||actual - expected|| / ||expected||; 0 for equal tensors of zeros."""
    error, size = error_norm(actual, expected), expected.double().norm().item()
    return 0.0 if error == 0 else error / size if size > 0 else float("inf")


def _norm(tensor: Tensor | None) -> float:
    return 0.0 if tensor is None else tensor.double().norm().item()


def _sum_epsilon(dtype: torch.dtype) -> float:
    return torch.finfo(torch.promote_types(dtype, torch.float32)).eps


def assert_close(
    name: str,
    actual: Tensor | None,
    expected: Tensor | None,
    *,
    rtol: float,
    band: float = 0.0,
) -> None:
    """||actual - expected|| <= rtol ||expected|| + band; same shape; NaN only where expected."""
    assert (actual is None) == (expected is None), f"{name}: got {actual}, expected {expected}"
    if actual is None or expected is None:
        return
    assert actual.shape == expected.shape, f"{name}: {actual.shape} is not {expected.shape}"
    nan = actual.isnan()
    assert torch.equal(nan, expected.isnan()), f"{name}: {int(nan.sum())} NaN, not as expected"
    actual, expected = actual.nan_to_num(nan=0.0), expected.nan_to_num(nan=0.0)
    error, bar = error_norm(actual, expected), rtol * _norm(expected) + band
    worst = 0.0 if actual.numel() == 0 else (actual.double() - expected).abs().max().item()
    assert error <= bar, (
        f"{name}: error {error:.3e} > {bar:.3e} (norm {_norm(expected):.3e}, largest {worst:.3e})"
    )


def check_outcome(
    actual: Outcome,
    expected: Outcome,
    dtype: torch.dtype,
    *,
    native: Outcome | None = None,
    ranks: int = 1,
) -> None:
    """Hold loss, statistics and gradients of `actual` against the oracle.

    Args:
        actual: from the library; a gradient that is None is not compared.
        expected: from the oracle.
        dtype: of the inputs.
        native: from PyTorch's own path in `dtype`; needed for 16-bit inputs.
        ranks: ranks whose parts of dE were added in `dtype`.
    """
    wide = torch.promote_types(dtype, torch.float32)
    assert actual.loss.dtype == wide, f"loss: dtype {actual.loss.dtype}, expected {wide}"
    eps = _sum_epsilon(dtype)
    exact = dtype in (torch.float32, torch.float64)
    loss_rtol, grad_rtol = (
        (FP64_RTOL, FP64_RTOL) if dtype == torch.float64 else (LOSS_RTOL, GRAD_RTOL)
    )
    # Products of 16-bit numbers are summed in fp32: the loss is as good as in fp32.
    band = _BAND_ULPS * eps * _norm(expected.magnitude_loss)
    assert_close("loss", actual.loss, expected.loss, rtol=loss_rtol, band=band)
    check_statistics(actual, expected, loss_rtol)
    for name in ("input", "weight", "bias"):
        grad = getattr(actual, f"grad_{name}")
        if grad is None:
            continue
        wanted = getattr(expected, f"grad_{name}")
        magnitude = _norm(getattr(expected, f"magnitude_{name}"))
        if exact:
            assert_close(name, grad, wanted, rtol=grad_rtol, band=_BAND_ULPS * eps * magnitude)
            continue
        assert native is not None, "16-bit results need PyTorch's own path to compare with"
        theirs = error_norm(getattr(native, f"grad_{name}"), wanted)
        # PyTorch may be lucky where a gradient has few elements: half an ulp for the result, and of
        # the terms that cancel a share of one for G and for each rank's part.
        ulp = torch.finfo(dtype).eps
        bar = LOW_PRECISION_FACTOR * theirs + ulp / 2 * _norm(wanted)
        bar += (0.05 + 0.025 * (ranks - 1)) * ulp * magnitude + _BAND_ULPS * eps * magnitude
        assert_close(f"grad_{name}", grad, wanted, rtol=0.0, band=bar)


def check_statistics(actual: Outcome, expected: Outcome, rtol: float) -> None:
    """Statistics against the oracle, where they were asked for."""
    for name in ("lse", "target_logit", "max_logit", "entropy"):
        if getattr(actual, name) is None:
            continue
        wanted = getattr(expected, name)
        # Per element: a statistic is as large as the logits it comes from.
        size = torch.maximum(expected.max_logit.abs(), wanted.abs()).clamp(min=1.0)
        got = getattr(actual, name).double()
        assert got.shape == wanted.shape, f"{name}: shape {got.shape}"
        assert bool(((got - wanted).abs() <= 2 * rtol * size).all()), (
            f"{name}: largest error {(got - wanted).abs().max().item():.3e}"
        )
    if actual.argmax is not None:
        assert actual.argmax.dtype == torch.int64
        assert actual.argmax.shape == expected.argmax.shape
        # Logits equal in fp32 may differ in fp64: the id found must be as good as the best.
        found = expected.logits.gather(1, actual.argmax.reshape(-1, 1))[:, 0]
        best = expected.max_logit.reshape(-1)
        assert bool((best - found <= 4 * rtol * best.abs().clamp(min=1.0)).all()), "argmax"
