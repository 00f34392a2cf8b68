"""Implementations, dtypes and devices to parametrise over on this machine.

Without a GPU the kernels run in Triton's interpreter, whose bf16 products are wrong: fp32 and
fp16 there.
"""

from __future__ import annotations

import pytest
import torch

HAS_CUDA = torch.cuda.is_available()
DEVICE = "cuda" if HAS_CUDA else "cpu"

_NAMES = {
    torch.float32: "fp32",
    torch.float16: "fp16",
    torch.bfloat16: "bf16",
    torch.float64: "fp64",
}
_TRITON_DTYPES = (torch.float32, torch.float16) + ((torch.bfloat16,) if HAS_CUDA else ())
_TORCH_DTYPES = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

IMPLS = [pytest.param(impl, id=impl) for impl in ("torch", "triton")]
IMPL_DTYPES = [
    pytest.param(impl, dtype, id=f"{impl}-{_NAMES[dtype]}")
    for impl, dtypes in (("torch", _TORCH_DTYPES), ("triton", _TRITON_DTYPES))
    for dtype in dtypes
]
LOW_IMPL_DTYPES = [
    param for param in IMPL_DTYPES if param.values[1] in (torch.float16, torch.bfloat16)
]
# The combinations that differ most, for tests of many options.
MAIN_IMPL_DTYPES = [
    pytest.param("torch", torch.float32, id="torch-fp32"),
    pytest.param("triton", torch.float32, id="triton-fp32"),
    pytest.param("triton", torch.float16, id="triton-fp16"),
] + ([pytest.param("triton", torch.bfloat16, id="triton-bf16")] if HAS_CUDA else [])
