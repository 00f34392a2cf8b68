"""Megatron's PyTorch layer norm, for sequence parallelism without Transformer Engine or apex.

Megatron-core's local layer specification falls back to `WrappedTorchNorm` where neither library
is there, and that class refuses sequence parallelism: its parameters would not carry the mark by
which Megatron sums their gradients over the tensor-parallel ranks. The norm itself works on each
token alone, so the mark is all that is missing.
"""

from __future__ import annotations

import copy
import functools
from typing import Any

from megatron.core.transformer.torch_norm import WrappedTorchNorm


def allow_sequence_parallel_norms() -> None:
    """Make `WrappedTorchNorm` work under sequence parallelism, process-wide; idempotent."""
    stock = WrappedTorchNorm.__new__
    if getattr(stock, "_marks_parameters", False):
        return

    @functools.wraps(stock)
    def make(cls: type, config: Any, *args: Any, **kwargs: Any) -> Any:
        if not config.sequence_parallel:
            return stock(cls, config, *args, **kwargs)
        plain = copy.copy(config)  # the norm only reads a few fields of it
        plain.sequence_parallel = False
        norm: Any = stock(cls, plain, *args, **kwargs)
        for parameter in norm.parameters():
            parameter.sequence_parallel = True  # type: ignore[attr-defined]
        return norm

    make._marks_parameters = True  # type: ignore[attr-defined]
    WrappedTorchNorm.__new__ = make  # type: ignore[method-assign]
