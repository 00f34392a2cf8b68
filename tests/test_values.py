"""Loss, statistics and gradients of one rank against the fp64 oracle, by option and together."""

from __future__ import annotations

from typing import Any

import pytest
import torch

import cce_tp
from oracle import dense
from problems import Problem, call, check, same_bits, solve
from tolerance import error_norm
from variants import DEVICE, IMPL_DTYPES, IMPLS, LOW_IMPL_DTYPES, MAIN_IMPL_DTYPES

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "none": {"reduction": "none"},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.1},
    "strong-smoothing": {"label_smoothing": 0.9, "reduction": "sum"},
    "z-loss": {"z_loss": 1e-2},
    "scale": {"logit_scale": 0.37},
    "negative-scale": {"logit_scale": -1.5},
    "zero-scale": {"logit_scale": 0.0},
    "softcap": {"logit_softcap": 1.5},
    "wide-softcap": {"logit_softcap": 50.0},
    "very-wide-softcap": {"logit_softcap": 150.0},
    "stats": {"return_stats": True},
    "entropy": {"return_stats": "entropy"},
    "ignore-id": {"ignore_index": 7},
    "ignore-zero": {"ignore_index": 0, "reduction": "none"},
    "ignore-large": {"ignore_index": 2**40, "reduction": "none"},
    "together": {
        "reduction": "none",
        "label_smoothing": 0.2,
        "z_loss": 5e-3,
        "logit_scale": 1.3,
        "logit_softcap": 4.0,
        "return_stats": "entropy",
        "ignore_index": -1,
    },
    "together-negative": {
        "reduction": "sum",
        "label_smoothing": 0.05,
        "z_loss": 2e-2,
        "logit_scale": -0.7,
        "logit_softcap": 2.5,
        "return_stats": "entropy",
        "ignore_index": 3,
    },
}


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("bias", [False, True], ids=["no-bias", "bias"])
def test_every_dtype_plain_and_with_everything(impl: str, dtype: torch.dtype, bias: bool) -> None:
    for name in ("plain", "together"):
        check(Problem(impl=impl, dtype=dtype, bias=bias, options=OPTIONS[name]), DEVICE)


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(impl: str, dtype: torch.dtype, name: str) -> None:
    bias = len(name) % 2 == 0
    check(Problem(impl=impl, dtype=dtype, bias=bias, options=OPTIONS[name]), DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [(), (1,), (5, 13), (2, 3, 4), (33,), (64,)], ids=str)
def test_leading_dims(impl: str, tokens: tuple[int, ...]) -> None:
    options = {"reduction": "none", "return_stats": "entropy"}
    outcome = check(Problem(impl=impl, tokens=tokens, ignored=0.1, options=options), DEVICE)
    assert outcome.loss.shape == tokens
    assert outcome.argmax is not None and outcome.argmax.shape == tokens


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    ("vocab", "hidden"),
    [(1, 1), (2, 3), (63, 31), (64, 32), (65, 33), (129, 96), (200, 7), (31, 130)],
    ids=str,
)
def test_ragged_sizes(impl: str, vocab: int, hidden: int) -> None:
    options = {"label_smoothing": 0.1, "return_stats": "entropy"}
    problem = Problem(impl=impl, tokens=(37,), vocab=vocab, hidden=hidden, options=options)
    check(problem, DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_tiles_of_the_largest_kind(impl: str) -> None:
    """More tokens and rows than any one tile of impl="torch" (128 x 256) holds."""
    small = DEVICE == "cpu" and impl == "triton"
    size = {"tokens": (140,), "vocab": 300} if small else {"tokens": (300,), "vocab": 1001}
    check(Problem(impl=impl, hidden=24, bias=True, options=OPTIONS["together"], **size), DEVICE)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_are_what_they_say(impl: str) -> None:
    """Fields, dtypes, no gradient; entropy on request; target logit 0 for ignored tokens."""
    operands = Problem(tokens=(4, 9), impl=impl).build(DEVICE)
    input = operands.input.requires_grad_()
    for wanted in (True, "entropy"):
        loss, stats = cce_tp.linear_cross_entropy(
            input, operands.weight, operands.target, return_stats=wanted, impl=impl
        )
        assert isinstance(stats, cce_tp.LossStats)
        assert loss.requires_grad
        for name in ("lse", "target_logit", "max_logit"):
            field = getattr(stats, name)
            assert field.dtype == torch.float32 and field.shape == (4, 9), name
            assert not field.requires_grad, name
        assert stats.argmax.dtype == torch.int64 and not stats.argmax.requires_grad
        assert bool((stats.target_logit[operands.target == -100] == 0).all())
        assert (stats.entropy is None) == (wanted is True)


@pytest.mark.parametrize("impl", IMPLS)
def test_argmax_of_equal_logits_is_the_lowest_id(impl: str) -> None:
    operands = Problem(impl=impl, tokens=(40,), vocab=200, hidden=8).build(DEVICE)
    weight = operands.weight.clone()
    winner = operands.input[0] * 3.0
    weight[[190, 70, 130, 71]] = winner
    input = operands.input[:1].expand(40, -1)
    _, stats = cce_tp.linear_cross_entropy(
        input, weight, operands.target, return_stats=True, impl=impl
    )
    assert bool((stats.argmax == 70).all())
    _, stats = cce_tp.linear_cross_entropy(
        input, torch.zeros_like(weight), operands.target, return_stats=True, impl=impl
    )
    assert bool((stats.argmax == 0).all())


@pytest.mark.no_poison
@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
def test_two_runs_give_equal_bits(impl: str, dtype: torch.dtype) -> None:
    problem = Problem(impl=impl, dtype=dtype, bias=True, options=OPTIONS["together"])
    first, second = solve(problem, DEVICE), solve(problem, DEVICE)
    for name in ("loss", "lse", "entropy", "argmax", "grad_input", "grad_weight", "grad_bias"):
        assert same_bits(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("impl", IMPLS)
def test_int32_targets(impl: str) -> None:
    operands = Problem(impl=impl).build(DEVICE)
    wide = cce_tp.linear_cross_entropy(operands.input, operands.weight, operands.target, impl=impl)
    narrow = cce_tp.linear_cross_entropy(
        operands.input, operands.weight, operands.target.int(), impl=impl
    )
    assert same_bits(wide, narrow)


@pytest.mark.parametrize("impl", IMPLS)
def test_statistics_do_not_change_the_loss(impl: str) -> None:
    problem = Problem(impl=impl, bias=True, options={"label_smoothing": 0.1})
    plain = solve(problem, DEVICE)
    more = solve(problem, DEVICE, return_stats="entropy")
    assert same_bits(plain.loss, more.loss)
    assert same_bits(plain.grad_input, more.grad_input)
    assert same_bits(plain.grad_weight, more.grad_weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_auto_is_triton_on_cuda_and_torch_elsewhere(impl: str) -> None:
    problem = Problem(impl="auto")
    same = solve(problem, DEVICE, impl="triton" if DEVICE == "cuda" else "torch")
    auto = call(problem.build(DEVICE), {"impl": "auto"})
    assert same_bits(auto.loss, same.loss) and same_bits(auto.grad_weight, same.grad_weight)


@pytest.mark.parametrize("impl", IMPLS)
def test_module_is_the_function(impl: str) -> None:
    operands = Problem(bias=True, impl=impl).build(DEVICE)
    options = {"label_smoothing": 0.1, "reduction": "sum", "impl": impl, "return_stats": True}
    module = cce_tp.LinearCrossEntropyLoss(**options)
    assert not list(module.parameters())
    from_module = module(
        operands.input, operands.weight, operands.target, linear_bias=operands.bias
    )
    from_function = cce_tp.linear_cross_entropy(
        operands.input, operands.weight, operands.target, linear_bias=operands.bias, **options
    )
    assert same_bits(from_module[0], from_function[0])
    assert same_bits(from_module[1].lse, from_function[1].lse)
    assert "label_smoothing=0.1" in repr(module)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("spread", [1.0, 6.0], ids=["flat", "peaked"])
def test_error_is_no_larger_than_that_of_pytorch(
    impl: str, dtype: torch.dtype, spread: float
) -> None:
    """16-bit results over many elements, where luck evens out; PyTorch in the same dtype."""
    problem = Problem(
        impl=impl, dtype=dtype, tokens=(160,), vocab=300, hidden=64, bias=True, spread=spread
    )
    operands = problem.build(DEVICE)
    ours = call(operands, {"impl": impl})
    exact, theirs = dense(operands, {}), dense(operands, {}, dtype=dtype)
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        error = error_norm(getattr(ours, name), getattr(exact, name))
        limit = error_norm(getattr(theirs, name), getattr(exact, name))
        floor = 2e-6 * getattr(exact, name).norm().item()
        assert error <= 1.05 * limit + floor, f"{name}: {error:.3e}, PyTorch {limit:.3e}"
