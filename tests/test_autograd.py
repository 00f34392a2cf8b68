"""What autograd sees: which gradients come back, in which dtype, how often, into which tensor."""

from __future__ import annotations

import itertools
from dataclasses import replace
from typing import Any

import pytest
import torch
from torch import Tensor

import cce_tp
from oracle import Operands, dense
from problems import Problem, call, same_bits
from tolerance import assert_close, check_outcome, relative_error
from variants import DEVICE, HAS_CUDA, IMPLS, MAIN_IMPL_DTYPES

SUBSETS = list(itertools.product([False, True], repeat=3))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "wanted",
    SUBSETS,
    ids=lambda wanted: "-".join(n for n, w in zip("ECb", wanted, strict=True) if w) or "no",
)
def test_each_subset_of_gradients(impl: str, wanted: tuple[bool, bool, bool]) -> None:
    options = {"label_smoothing": 0.1, "reduction": "none"}
    problem = Problem(impl=impl, tokens=(40,), bias=True, options=options)
    operands = problem.build(DEVICE)
    outcome = call(operands, {**options, "impl": impl}, requires_grad=wanted)
    for name, want in zip(("input", "weight", "bias"), wanted, strict=True):
        assert (getattr(outcome, f"grad_{name}") is not None) == want, name
    check_outcome(outcome, dense(operands, options), problem.dtype)


@pytest.mark.once
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("wanted", SUBSETS[1:], ids=str)
def test_each_subset_of_gradients_in_fp16_with_the_least_workspace(
    impl: str, wanted: tuple[bool, bool, bool]
) -> None:
    """A workspace too small for one pass: the backward pass takes another way for each subset."""
    problem = Problem(
        impl=impl, tokens=(300,), hidden=1200, vocab=70, dtype=torch.float16, bias=True
    )
    operands = problem.build(DEVICE)
    options = {"impl": impl, "workspace_bytes": 1 << 20}
    outcome = call(operands, options, requires_grad=wanted)
    native = dense(operands, {}, dtype=torch.float16)
    check_outcome(outcome, dense(operands, {}), torch.float16, native=native)


@pytest.mark.parametrize("impl", IMPLS)
def test_no_grad_mode(impl: str) -> None:
    operands = Problem(impl=impl).build(DEVICE)
    with torch.no_grad():
        loss = cce_tp.linear_cross_entropy(
            operands.input.requires_grad_(), operands.weight, operands.target, impl=impl
        )
    assert not loss.requires_grad


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("upstream", [0.0, 1.0, -3.0, 2.0**16, 2.0**-20], ids=str)
def test_upstream_gradient_of_a_scalar_loss(impl: str, upstream: float) -> None:
    problem = Problem(impl=impl, options={"reduction": "sum"})
    operands = replace(problem.build(DEVICE), upstream=torch.tensor(upstream, device=DEVICE))
    outcome = call(operands, {**problem.options, "impl": impl})
    check_outcome(outcome, dense(operands, problem.options), problem.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("upstream", [2.0**-24, 1.0, 2.0**14], ids=str)
def test_fp16_gradients_keep_their_range(impl: str, upstream: float) -> None:
    """G is about upstream / N; what fp16 can hold of the result must not be lost on the way."""
    problem = Problem(
        impl=impl, dtype=torch.float16, spread=0.1, options={"reduction": "sum"}, hidden=32
    )
    operands = replace(problem.build(DEVICE), upstream=torch.tensor(upstream, device=DEVICE))
    out = torch.zeros_like(operands.weight, dtype=torch.float32)
    outcome = call(operands, {**problem.options, "impl": impl, "grad_weight_out": out})
    expected = dense(operands, problem.options)
    assert relative_error(out, expected.grad_weight) < 2e-3
    if upstream > 0.5:
        in_range = expected.grad_input.abs() < 6e4
        got = torch.where(in_range, outcome.grad_input, 0.0)
        assert relative_error(got, torch.where(in_range, expected.grad_input, 0.0)) < 2e-3


@pytest.mark.parametrize("impl", IMPLS)
def test_per_token_upstream_of_expanded_and_strided_kind(impl: str) -> None:
    """loss.sum() sends an expanded gradient, slicing a strided one."""
    problem = Problem(impl=impl, options={"reduction": "none"})
    operands = problem.build(DEVICE)
    for pick in (lambda loss: loss.sum(), lambda loss: loss[::3].sum() + loss[0]):
        input = operands.input.clone().requires_grad_()
        loss = cce_tp.linear_cross_entropy(
            input, operands.weight, operands.target, reduction="none", impl=impl
        )
        pick(loss).backward()
        weights = torch.zeros_like(loss, requires_grad=True)
        pick(weights).backward()
        expected = dense(replace(operands, upstream=weights.grad), problem.options)
        assert relative_error(input.grad, expected.grad_input) < 5e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_backward_twice_with_retain_graph(impl: str) -> None:
    operands = Problem(impl=impl, bias=True).build(DEVICE)
    leaves = [operands.input, operands.weight, operands.bias]
    for leaf in leaves:
        leaf.requires_grad_()
    loss = cce_tp.linear_cross_entropy(
        operands.input, operands.weight, operands.target, linear_bias=operands.bias, impl=impl
    )
    loss.backward(retain_graph=True)
    first = [leaf.grad.clone() for leaf in leaves]
    loss.backward()
    for leaf, grad in zip(leaves, first, strict=True):
        assert same_bits(leaf.grad, 2 * grad)


@pytest.mark.parametrize("impl", IMPLS)
def test_double_backward_says_that_there_is_none(impl: str) -> None:
    operands = Problem(impl=impl).build(DEVICE)
    input = operands.input.requires_grad_()
    loss = cce_tp.linear_cross_entropy(input, operands.weight, operands.target, impl=impl)
    (grad,) = torch.autograd.grad(loss, input, create_graph=True)
    with pytest.raises(RuntimeError, match=r"(?i)twice|double|second deriv"):
        grad.sum().backward()


def _strided(tensor: Tensor, kind: str) -> Tensor:
    """The same values with other strides."""
    if kind == "transposed":
        return tensor.t().contiguous().t()
    if kind == "every-other-column":
        wide = torch.full((tensor.shape[0], 2 * tensor.shape[1]), torch.nan).to(tensor)
        wide[:, ::2] = tensor
        return wide[:, ::2]
    padded = torch.full((tensor.shape[0], tensor.shape[1] + 3), torch.nan).to(tensor)
    padded[:, 1:-2] = tensor
    return padded[:, 1:-2]


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("kind", ["transposed", "every-other-column", "padded-rows"])
def test_non_contiguous_operands(impl: str, dtype: torch.dtype, kind: str) -> None:
    problem = Problem(impl=impl, dtype=dtype, bias=True)
    plain = problem.build(DEVICE)
    bias, target = plain.bias, plain.target
    assert bias is not None
    strided = replace(
        plain,
        input=_strided(plain.input, kind),
        weight=_strided(plain.weight, kind),
        bias=torch.stack([bias, bias], dim=1)[:, 0],
        target=torch.stack([target, -target], dim=1)[:, 0],
    )
    outcome = call(strided, {"impl": impl})
    native = dense(plain, {}, dtype=dtype) if dtype != torch.float32 else None
    check_outcome(outcome, dense(plain, {}), dtype, native=native)


@pytest.mark.parametrize("impl", IMPLS)
def test_expanded_input(impl: str) -> None:
    """Stride 0 along the tokens."""
    problem = Problem(impl=impl, options={"reduction": "none"}, zero_upstream=False)
    plain = problem.build(DEVICE)
    row = plain.input[:1]
    operands = replace(plain, input=row.expand(71, -1))
    outcome = call(operands, {**problem.options, "impl": impl})
    check_outcome(outcome, dense(operands, problem.options), problem.dtype)


AUTOCAST_DTYPES = [torch.bfloat16, torch.float16]


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("dtype", AUTOCAST_DTYPES, ids=["bf16", "fp16"])
def test_autocast(impl: str, dtype: torch.dtype) -> None:
    """fp32 leaves, products in autocast's dtype, fp32 gradients that are not rounded to it."""
    if impl == "triton" and dtype == torch.bfloat16 and not HAS_CUDA:
        pytest.skip("Triton's interpreter multiplies bf16 wrongly")
    problem = Problem(impl=impl, bias=True)
    operands = problem.build(DEVICE)
    leaves = [
        tensor.clone().requires_grad_()
        for tensor in (operands.input, operands.weight, operands.bias)
        if tensor is not None
    ]
    with torch.autocast(DEVICE, dtype=dtype):
        loss = cce_tp.linear_cross_entropy(
            leaves[0], leaves[1], operands.target, linear_bias=leaves[2], impl=impl
        )
    loss.backward()
    rounded = replace(
        operands,
        input=operands.input.to(dtype),
        weight=operands.weight.to(dtype),
        bias=leaves[2].detach().to(dtype),
    )
    expected = dense(rounded, {})
    native = dense(rounded, {}, dtype=dtype)
    assert loss.dtype == torch.float32
    assert_close("loss", loss.detach(), expected.loss, rtol=1e-5)
    for leaf, name in zip(leaves, ("input", "weight", "bias"), strict=True):
        assert leaf.grad is not None and leaf.grad.dtype == torch.float32, name
        theirs = relative_error(getattr(native, f"grad_{name}"), getattr(expected, f"grad_{name}"))
        error = relative_error(leaf.grad, getattr(expected, f"grad_{name}"))
        assert error <= 1.5 * theirs, f"{name}: {error:.2e}, PyTorch's own {theirs:.2e}"


def _accumulated(operands: Operands, out: Tensor, impl: str, **options: Any) -> Tensor | None:
    weight = operands.weight.detach().requires_grad_()
    loss = cce_tp.linear_cross_entropy(
        operands.input, weight, operands.target, grad_weight_out=out, impl=impl, **options
    )
    loss.backward(operands.upstream.to(loss.dtype))
    return weight.grad


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("kind", ["fp32", "bf16", "weight"])
@pytest.mark.parametrize("workspace", [None, 1 << 20], ids=["default", "1MiB"])
def test_grad_weight_out_is_added_to(
    impl: str, dtype: torch.dtype, kind: str, workspace: int | None
) -> None:
    out_dtype = {"fp32": torch.float32, "bf16": torch.bfloat16, "weight": dtype}[kind]
    problem = Problem(impl=impl, dtype=dtype, hidden=48, options={"reduction": "sum"})
    operands = problem.build(DEVICE)
    expected = dense(operands, problem.options)
    start = torch.randn(operands.weight.shape, generator=torch.Generator().manual_seed(1))
    out = start.to(DEVICE, out_dtype)
    before = out.double()
    for times in (1, 2):
        grad = _accumulated(operands, out, impl, reduction="sum", workspace_bytes=workspace)
        assert grad is None
        wanted = before + times * expected.grad_weight
        rtol = max(times * torch.finfo(out_dtype).eps, torch.finfo(dtype).eps / 2, 5e-5)
        assert_close(f"after {times}", out, wanted, rtol=rtol)


@pytest.mark.parametrize("impl", IMPLS)
def test_grad_weight_out_is_left_alone_where_nothing_is_asked(impl: str) -> None:
    """Forward only; a weight without gradient; and a NaN that was there stays (it is added to)."""
    operands = Problem(impl=impl).build(DEVICE)
    out = torch.full_like(operands.weight, 3.0)
    input = operands.input.requires_grad_()
    loss = cce_tp.linear_cross_entropy(
        input, operands.weight, operands.target, grad_weight_out=out, impl=impl
    )
    assert bool((out == 3.0).all())
    loss.backward()
    assert bool((out == 3.0).all())
    out[7] = torch.nan
    _accumulated(operands, out, impl)
    assert bool(out[7].isnan().all()) and int(out.isnan().sum()) == out.shape[1]


@pytest.mark.parametrize("impl", IMPLS)
def test_grad_weight_out_with_a_weight_used_twice(impl: str) -> None:
    """Tied embeddings: the other use's gradient arrives as usual, this one's in the tensor."""
    operands = Problem(impl=impl).build(DEVICE)
    weight = operands.weight.clone().requires_grad_()
    out = torch.zeros_like(operands.weight)
    loss = cce_tp.linear_cross_entropy(
        operands.input, weight, operands.target, grad_weight_out=out, impl=impl
    )
    (loss + weight.sum()).backward()
    assert weight.grad is not None and bool((weight.grad == 1).all())
    expected = dense(operands, {})
    assert relative_error(out, expected.grad_weight) < 5e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_non_leaf_operands(impl: str) -> None:
    """Gradients flow on through what came before."""
    operands = Problem(impl=impl).build(DEVICE)
    input, weight = (
        operands.input.clone().requires_grad_(),
        operands.weight.clone().requires_grad_(),
    )
    loss = cce_tp.linear_cross_entropy(input * 2, weight / 2, operands.target, impl=impl)
    (loss * 3).backward()
    expected = dense(replace(operands, upstream=torch.tensor(3.0, device=DEVICE)), {})
    # E C^T is unchanged: the chain rule gives factors 2 / 2 and 1 / 2 * 2.
    assert relative_error(input.grad, expected.grad_input) < 5e-5
    assert relative_error(weight.grad, expected.grad_weight) < 5e-5
