"""Extreme inputs of one rank: no tokens, huge logits, tiny vocabularies, strange targets."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cce_tp
from oracle import Operands, dense
from problems import Problem, call, check, check_ignored
from tolerance import check_outcome, relative_error
from variants import DEVICE, IMPL_DTYPES, IMPLS, MAIN_IMPL_DTYPES

EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.1,
    "logit_softcap": 20.0,
    "return_stats": "entropy",
}


def huge_logits(signs: int, dtype: torch.dtype, options: dict[str, Any]) -> Operands:
    """Logits of +-9984 (signs 1, -1, or 0 for both) plus eighths; every product is exact in fp16.

    The weight's first column holds k / 8: the softmax among the largest rows is not trivial.
    """
    tokens, vocab, hidden = 45, 130, 40
    random = torch.Generator().manual_seed(3)
    sign_n = torch.ones(tokens)
    sign_v = torch.ones(vocab) if signs >= 0 else -torch.ones(vocab)
    if signs == 0:
        sign_n = 2.0 * torch.randint(0, 2, (tokens,), generator=random) - 1
        sign_v = 2.0 * torch.randint(0, 2, (vocab,), generator=random) - 1
    input, weight = torch.zeros(tokens, hidden), torch.zeros(vocab, hidden)
    input[:, 1:] = 16 * sign_n[:, None]
    weight[:, 1:] = 16 * sign_v[:, None]
    input[:, 0] = 1.0
    weight[:, 0] = torch.randint(0, 16, (vocab,), generator=random) / 8
    target = torch.randint(0, vocab, (tokens,), generator=random)
    upstream = torch.ones(tokens if options.get("reduction") == "none" else ())
    return Operands(
        input=input.to(DEVICE, dtype),
        weight=weight.to(DEVICE, dtype),
        bias=None,
        target=target.to(DEVICE),
        upstream=upstream.to(DEVICE),
    )


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("signs", [1, -1, 0], ids=["plus", "minus", "both"])
@pytest.mark.parametrize("reduction", ["mean", "none"])
def test_logits_of_ten_thousand(impl: str, dtype: torch.dtype, signs: int, reduction: str) -> None:
    options = {"reduction": reduction, "return_stats": "entropy"}
    operands = huge_logits(signs, dtype, options)
    outcome = call(operands, {**options, "impl": impl})
    expected = dense(operands, options)
    native = dense(operands, options, dtype=dtype) if dtype != torch.float32 else None
    check_outcome(outcome, expected, dtype, native=native)
    assert outcome.max_logit is not None and expected.max_logit is not None
    assert torch.equal(outcome.max_logit.double(), expected.max_logit)


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("bias", [-1e4, -1e8, -5e8, -1e9, -3e9, -1e10, -1e30, -3.4e38, 2e9])
def test_tiles_whose_bias_is_huge(impl: str, dtype: torch.dtype, bias: float) -> None:
    """As entries are masked: whole tiles of them, whose maximum is as large, weigh nothing."""
    problem = Problem(impl=impl, dtype=dtype, vocab=703, bias=True)
    operands = problem.build(DEVICE)
    assert operands.bias is not None
    bias = max(min(bias, torch.finfo(dtype).max), torch.finfo(dtype).min)
    operands.bias[: 300 if bias < 0 else 1] = bias  # above all others: one alone
    masked = (operands.target >= 0) & (operands.target < 300)
    operands = replace(operands, target=torch.where(masked, 300, operands.target))
    options = {"return_stats": "entropy"}
    outcome = call(operands, {**options, "impl": impl})
    expected = dense(operands, options)
    for name in ("loss", "entropy", "grad_input", "grad_weight", "grad_bias"):
        found, wanted = getattr(outcome, name), getattr(expected, name)
        assert bool(found.isfinite().all()), name
        if bias < 0:
            assert relative_error(found, wanted) < (1e-5 if dtype == torch.float32 else 1e-2), name


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
def test_all_logits_negative(impl: str, dtype: torch.dtype) -> None:
    """A running maximum that starts at 0 would show here."""
    problem = Problem(impl=impl, dtype=dtype, spread=6.0, options={"return_stats": "entropy"})
    operands = problem.build(DEVICE)
    operands = replace(operands, input=operands.input.abs(), weight=-operands.weight.abs() - 1)
    outcome = call(operands, {**problem.options, "impl": impl})
    expected = dense(operands, problem.options)
    assert expected.max_logit is not None and bool((expected.max_logit < -10).all())
    native = dense(operands, problem.options, dtype=dtype) if dtype != torch.float32 else None
    check_outcome(outcome, expected, dtype, native=native)


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
@pytest.mark.parametrize("tokens", [(0,), (3, 0)], ids=str)
def test_no_tokens(impl: str, dtype: torch.dtype, reduction: str, tokens: tuple[int, ...]) -> None:
    options = {**EVERYTHING, "reduction": reduction}
    problem = Problem(impl=impl, dtype=dtype, tokens=tokens, bias=True, options=options)
    outcome = call(problem.build(DEVICE), {**options, "impl": impl})
    assert outcome.loss.shape == (tokens if reduction == "none" else ())
    assert float(outcome.loss.sum()) == 0.0
    assert outcome.lse is not None and outcome.lse.shape == tokens
    for name in ("grad_input", "grad_weight", "grad_bias"):
        grad = getattr(outcome, name)
        assert grad is not None and bool((grad == 0).all()), name


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("reduction", ["none", "mean", "sum"])
def test_all_tokens_ignored(impl: str, dtype: torch.dtype, reduction: str) -> None:
    options = {**EVERYTHING, "reduction": reduction}
    problem = Problem(impl=impl, dtype=dtype, ignored=1.0, bias=True, options=options)
    outcome = call(problem.build(DEVICE), {**options, "impl": impl})
    assert bool((outcome.loss == 0).all())
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert bool((getattr(outcome, name) == 0).all()), name
    assert outcome.target_logit is not None and bool((outcome.target_logit == 0).all())
    assert outcome.lse is not None and bool(outcome.lse.isfinite().all())


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("options", [{}, EVERYTHING], ids=["plain", "everything"])
def test_vocabulary_of_one(impl: str, dtype: torch.dtype, options: dict[str, Any]) -> None:
    problem = Problem(impl=impl, dtype=dtype, vocab=1, bias=True, options=options)
    outcome = check(problem, DEVICE)
    if not options:
        # A probability of 1, to the last bit or two, less the target's 1.
        assert outcome.grad_input is not None
        most = 4 * torch.finfo(torch.float32).eps * problem.build().weight.abs().max()
        assert float(outcome.grad_input.abs().max()) <= float(most)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stranger", [-1, 203, 204, 2**31, 2**31 + 5, 2**40, -(2**40), -101])
def test_a_target_outside_the_vocabulary_is_nan_and_only_there(impl: str, stranger: int) -> None:
    options = {"reduction": "none"}
    problem = Problem(impl=impl, ignored=0.0, zero_upstream=False, bias=True, options=options)
    operands = problem.build(DEVICE)
    clean = dense(operands, options)
    target = operands.target.clone()
    target[5] = stranger
    outcome = call(replace(operands, target=target), {**options, "impl": impl})
    others = torch.arange(71, device=DEVICE) != 5
    assert bool(outcome.loss[5].isnan())
    torch.testing.assert_close(
        outcome.loss[others].double(), clean.loss[others], rtol=1e-5, atol=1e-5
    )
    assert outcome.grad_input is not None and clean.grad_input is not None
    assert bool(outcome.grad_input[5].isnan().all())
    torch.testing.assert_close(
        outcome.grad_input[others].double(), clean.grad_input[others], rtol=1e-4, atol=1e-5
    )


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_outside_with_no_upstream_gradient_poisons_no_gradient(impl: str) -> None:
    options = {"reduction": "none"}
    problem = Problem(impl=impl, ignored=0.2, zero_upstream=False, options=options)
    operands = problem.build(DEVICE)
    operands.target[5] = 5000
    operands.upstream[5] = 0.0
    outcome = call(operands, {**options, "impl": impl})
    assert bool(outcome.loss[5].isnan())
    ignored = replace(operands, target=operands.target.clone())
    ignored.target[5] = -100
    expected = dense(ignored, options)
    outcome.loss[5] = 0.0
    check_outcome(outcome, expected, problem.dtype)
    check_ignored(ignored, outcome, options)


@pytest.mark.parametrize("impl", IMPLS)
def test_debug_switch_raises_for_a_target_outside(
    impl: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    operands = Problem(impl=impl, ignored=0.0).build(DEVICE)
    operands.target[5] = 5000
    arguments = (operands.input, operands.weight, operands.target)
    assert cce_tp.linear_cross_entropy(*arguments, impl=impl).isnan()
    monkeypatch.setenv("CCE_TP_DEBUG", "1")
    with pytest.raises(ValueError, match=r"target.*203.*5000"):
        cce_tp.linear_cross_entropy(*arguments, impl=impl)
    operands.target[5] = -100
    assert cce_tp.linear_cross_entropy(*arguments, impl=impl).isfinite()


@pytest.mark.parametrize("impl", IMPLS)
def test_infinite_bias_masks_a_row(impl: str) -> None:
    """-inf in the bias takes a row out of the softmax, as it does in PyTorch."""
    problem = Problem(impl=impl, bias=True, ignored=0.0, options={"return_stats": True})
    operands = problem.build(DEVICE)
    assert operands.bias is not None
    operands.bias[100:] = -torch.inf
    operands.target.remainder_(100)
    outcome = call(operands, {**problem.options, "impl": impl})
    short = replace(operands, weight=operands.weight[:100], bias=operands.bias[:100])
    expected = dense(short, problem.options)
    assert outcome.grad_weight is not None and outcome.grad_bias is not None
    assert bool((outcome.grad_weight[100:] == 0).all())
    outcome.grad_weight, outcome.grad_bias = outcome.grad_weight[:100], outcome.grad_bias[:100]
    check_outcome(outcome, expected, problem.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("softcap", [1.0, 30.0])
def test_softcap_is_accurate_at_every_size(impl: str, softcap: float) -> None:
    """Where tanh is nearly linear, where 1 - exp would cancel, and where it saturates."""
    size = softcap * torch.logspace(-6, 3, 200, device=DEVICE)
    y = torch.cat([size, -size])
    _, stats = cce_tp.linear_cross_entropy(
        y[:, None],
        torch.ones(1, 1, device=DEVICE),
        torch.zeros(len(y), dtype=torch.int64, device=DEVICE),
        logit_softcap=softcap,
        return_stats=True,
        impl=impl,
    )
    wanted = softcap * torch.tanh(y.double() / softcap)
    for got in (stats.target_logit, stats.max_logit, stats.lse):
        torch.testing.assert_close(got.double(), wanted, rtol=5e-6, atol=0.0)
