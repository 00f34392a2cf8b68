"""Matrix products of the backward pass by the vendor library, with sums in fp32 (fp64 for fp64)."""

from __future__ import annotations

import torch
from torch import Tensor

from cce_tp.problem import statistics_dtype


def copies_operands(operand: Tensor) -> bool:
    """Whether products of such operands are taken from wide copies of them (16 bits on the CPU)."""
    return not operand.is_cuda and operand.dtype != statistics_dtype(operand.dtype)


def _wide_mm(a: Tensor, b: Tensor) -> Tensor:
    """a @ b in the accumulator's dtype."""
    dtype = statistics_dtype(a.dtype)
    if a.dtype == dtype or copies_operands(a):
        return a.to(dtype) @ b.to(dtype)
    return torch.mm(a, b, out_dtype=dtype)


def add_product(out: Tensor, a: Tensor, b: Tensor, *, accumulate: bool) -> None:
    """out = or += a @ b, joined in the wider dtype before the one rounding to out's.

    Args:
        out: (M, N), the operands' dtype or a wider one.
        a: (M, K).
        b: (K, N), same dtype as a.
        accumulate: add to `out` instead of overwriting it.
    """
    direct = not copies_operands(a)
    if direct and out.dtype == a.dtype:
        if accumulate:
            out.addmm_(a, b)
        else:
            torch.mm(a, b, out=out)
    elif direct and out.dtype == torch.float32:
        if accumulate:
            torch.addmm(out, a, b, out_dtype=torch.float32, out=out)
        else:
            torch.mm(a, b, out_dtype=torch.float32, out=out)
    else:
        wide = _wide_mm(a, b)
        if accumulate:
            out.add_(wide)
        else:
            out.copy_(wide)
