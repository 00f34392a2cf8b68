"""Products whose operands do not end at whole units of memory: cut, and the same."""

from __future__ import annotations

from unittest import mock

import pytest
import torch

from cce_tp import products
from cce_tp.problem import statistics_dtype
from cce_tp.products import add_product, row_sums
from variants import DEVICE, HAS_CUDA

pytestmark = pytest.mark.no_poison
DTYPES = [torch.float32, torch.float64] + [torch.bfloat16, torch.float16] * HAS_CUDA


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("wide", [False, True])
@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("transposed", [False, True])
@pytest.mark.parametrize("tokens", [64, 71, 190])
def test_ragged_products(
    dtype: torch.dtype, wide: bool, accumulate: bool, transposed: bool, tokens: int
) -> None:
    """G^T (rows, tokens) times E, and its transpose times C; rows of G^T are padded."""
    if wide and dtype == torch.float64:
        pytest.skip("there is no wider one")
    rows, hidden = 83, 24
    stored = torch.randn(rows, 192, dtype=torch.float64, device=DEVICE).to(dtype)[:, :tokens]
    a = stored.t() if transposed else stored
    b = torch.randn(a.shape[1], hidden, dtype=torch.float64, device=DEVICE).to(dtype)
    out_dtype = torch.float32 if wide and dtype != torch.float32 else dtype
    out = torch.randn(a.shape[0], hidden, device=DEVICE).to(out_dtype)
    wanted = a.double() @ b.double() + (out.double() if accumulate else 0)
    with mock.patch.object(products, "_SMALL", 0):
        add_product(out, a, b, accumulate=accumulate)
    # One rounding of the result, and half of one of the few last terms.
    error = 3 * torch.finfo(out_dtype).eps + 1e-6
    torch.testing.assert_close(out.double(), wanted, rtol=error, atol=20 * error)


@pytest.mark.parametrize(
    "dtype", [torch.float32, torch.float64, torch.bfloat16, torch.float16], ids=str
)
@pytest.mark.parametrize("tokens", [0, 1, 71, 190])
def test_sums_of_rows(dtype: torch.dtype, tokens: int) -> None:
    stored = torch.randn(83, 192, dtype=torch.float64, device=DEVICE).to(dtype)[:, :tokens]
    wide = statistics_dtype(dtype)
    with mock.patch.object(products, "_SMALL", 0):
        sums = row_sums(stored, wide)
    assert sums.dtype == wide and sums.shape == (83,)
    torch.testing.assert_close(sums.double(), stored.double().sum(dim=1), rtol=1e-5, atol=1e-4)


def test_what_is_cut() -> None:
    """Products that take longer than another launch, and whose operands begin at whole units."""
    long, b = torch.empty(1024, 1032)[:, :1029], torch.empty(1029, 1024)
    assert products._whole_units(long, b) == (1024, 1028)
    assert products._whole_units(long.t(), torch.empty(1024, 1024)) == (1028, 1024)
    assert products._whole_units(long[:, :1028], b[:1028]) == (1024, 1028)
    assert products._whole_units(long[:128], b) == (128, 1029)
    assert products._whole_units(long[:, 1:], b[1:]) == (1024, 1028)
    assert products._whole_units(long[:, 1:1027], b[1:1027]) == (1024, 1026)
    assert products._whole_units(long, torch.empty(1029, 1025)[:, :1024]) == (1024, 1029)
