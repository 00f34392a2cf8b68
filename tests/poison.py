"""Fills fresh memory with NaN, so that an output element that nobody wrote shows."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

_MAKERS: tuple[tuple[Any, str], ...] = (
    (torch, "empty"),
    (torch, "empty_like"),
    (torch, "empty_strided"),
    (torch.Tensor, "new_empty"),
    (torch.Tensor, "new_empty_strided"),
)


def _fill(tensor: Tensor) -> Tensor:
    if tensor.is_floating_point():
        return tensor.fill_(torch.nan)
    if tensor.dtype in (torch.int32, torch.int64):
        return tensor.fill_(torch.iinfo(tensor.dtype).max)
    return tensor


def _poisoned(maker: Callable[..., Tensor]) -> Callable[..., Tensor]:
    @functools.wraps(maker)
    def make(*args: Any, **kwargs: Any) -> Tensor:
        made = maker(*args, **kwargs)
        # An output buffer for FakeTensors or on the meta device holds nothing to fill.
        return _fill(made) if type(made) is Tensor and not made.is_meta else made

    return make


@contextlib.contextmanager
def poisoned_empty() -> Iterator[None]:
    """torch.empty and its kin give NaN (integers: their largest value) while this is open."""
    with contextlib.ExitStack() as stack:
        for owner, name in _MAKERS:
            maker = getattr(owner, name)
            stack.enter_context(mock.patch.object(owner, name, _poisoned(maker)))
        yield
