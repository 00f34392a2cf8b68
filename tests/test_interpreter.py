"""The shortcuts through Triton's interpreter leave what kernels compute as it is."""

from __future__ import annotations

from contextlib import ExitStack
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import interpreter
from problems import Problem, same_bits, solve
from variants import HAS_CUDA

pytestmark = pytest.mark.skipif(HAS_CUDA, reason="kernels are compiled, not interpreted")


def others() -> list[tuple[Any, str, Any]]:
    """The stock of the other shortcuts: owner, name, value."""
    import triton.language as tl
    from triton.runtime import interpreter as tritons

    builder: Any = tritons.interpreter_builder
    assert builder.options.sanitize_overflow is False
    found: list[tuple[Any, str, Any]] = [
        (builder, "options", replace(builder.options, sanitize_overflow=True))
    ]
    for owner, name in (
        (tritons, "_get_np_dtype"),
        (tl.tensor, "__init__"),
        (tl.block_type, "__init__"),
    ):
        found.append((owner, name, getattr(owner, name).stock))
    return found


def test_kernels_give_the_bits_that_they_give_without_it() -> None:
    from triton.runtime import interpreter as tritons

    assert hasattr(tritons._patch_lang, "stock"), "this Triton's interpreter is not known here"
    searches: list[int] = []

    def count(stock: Any, function: Any) -> Any:
        searches[-1] += 1
        return stock(function)

    problem = Problem(impl="triton", tokens=(40,), vocab=150, hidden=40, bias=True)
    stock, scope = tritons._patch_lang.stock, tritons._LangPatchScope

    def searched(function: Any) -> Any:
        return scope() if interpreter.is_patched(function) else count(stock, function)

    outcomes = []
    for patch_lang in (lambda function: count(stock, function), searched):
        searches.append(0)
        with ExitStack() as stack, mock.patch.object(tritons, "_patch_lang", patch_lang):
            if patch_lang is not searched:
                for owner, name, value in others():
                    stack.enter_context(mock.patch.object(owner, name, value))
            outcomes.append(solve(problem))
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        assert same_bits(*(getattr(outcome, name) for outcome in outcomes)), name
    assert 0 < searches[1] < searches[0] / 2


def test_triton_is_whole_again_after_a_kernel() -> None:
    import triton.language as tl

    function: Any = test_triton_is_whole_again_after_a_kernel
    with mock.patch.dict(function.__globals__, {"tl": tl}):
        assert not interpreter.is_patched(function)
        solve(Problem(impl="triton", tokens=(4,), vocab=70, hidden=8))
        assert not interpreter.is_patched(function)
        with mock.patch.object(tl, "load", torch.empty):
            assert interpreter.is_patched(function)
