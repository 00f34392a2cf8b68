"""torch.library operators under opcheck, and torch.compile with a full graph."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

import cce_tp
from oracle import Outcome
from problems import Problem, even_bounds, join_shards, restrict, same_bits, solve
from ranks import Rank, RankPool
from sharding_cases import shard_of
from variants import DEVICE, HAS_CUDA, IMPLS

# The compiler's own machinery must see memory as it is.
pytestmark = pytest.mark.no_poison

BACKEND = "inductor" if HAS_CUDA else "aot_eager"
EVERYTHING: dict[str, Any] = {
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.1,
    "logit_softcap": 20.0,
    "return_stats": "entropy",
}
CASES = {
    "plain": {},
    "none": {"reduction": "none"},
    "everything": {**EVERYTHING, "reduction": "sum"},
    "paper": {"grad_filter": cce_tp.GradFilter.paper(eps=2.0**-12)},
    "workspace": {"workspace_bytes": 1 << 20},
}


class _Recorder(TorchDispatchMode):
    """Calls of this library's operators, with their arguments."""

    def __init__(self) -> None:
        super().__init__()
        self.calls: list[tuple[Any, tuple[Any, ...], dict[str, Any]]] = []

    def __torch_dispatch__(
        self, func: Any, types: Any, args: tuple[Any, ...] = (), kwargs: Any = None
    ) -> Any:
        if func.namespace == "cce_tp":
            copies = tuple(a.clone() if isinstance(a, Tensor) else a for a in args)
            self.calls.append((func, copies, kwargs or {}))
        return func(*args, **(kwargs or {}))


def recorded_calls(options: dict[str, Any], impl: str) -> list[Any]:
    """The operators that a forward and a backward pass call."""
    problem = Problem(impl=impl, tokens=(40,), vocab=70, hidden=16, bias=True, options=options)
    operands = problem.build(DEVICE)
    leaves = [t.requires_grad_() for t in (operands.input, operands.weight, operands.bias)]
    with _Recorder() as recorder:
        answer = cce_tp.linear_cross_entropy(
            leaves[0], leaves[1], operands.target, linear_bias=leaves[2], impl=impl, **options
        )
        loss = answer[0] if isinstance(answer, tuple) else answer
        loss.sum().backward()
    return recorder.calls


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_opcheck(impl: str, name: str) -> None:
    """Schema, fake implementation and dispatch of every operator, with real calls' arguments."""
    calls = recorded_calls(CASES[name], impl)
    assert len({func for func, _, _ in calls}) >= 2
    for func, args, kwargs in calls:
        torch.library.opcheck(func, args, kwargs)


@pytest.mark.parametrize("name", CASES)
def test_equal_bits_whether_or_not_somebody_looks_on(name: str) -> None:
    """Without a dispatch mode the function behind an operator is called, and no operator."""
    problem = Problem(bias=True, options=CASES[name])
    alone = solve(problem, DEVICE)
    with _Recorder() as recorder:
        watched = solve(problem, DEVICE)
    assert len(recorder.calls) == 2
    for field in ("loss", "lse", "grad_input", "grad_weight", "grad_bias"):
        assert same_bits(getattr(alone, field), getattr(watched, field)), field


def test_opcheck_of_accumulation() -> None:
    out = torch.zeros(70, 16, device=DEVICE)
    for func, args, kwargs in recorded_calls({"grad_weight_out": out}, "torch"):
        torch.library.opcheck(func, args, kwargs)


def compiled(function: Callable[..., Any], **more: Any) -> Callable[..., Any]:
    torch._dynamo.reset()
    return torch.compile(function, fullgraph=True, backend=BACKEND, **more)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", CASES)
def test_compiled_equals_eager(impl: str, name: str) -> None:
    problem = Problem(impl=impl, bias=True, options=CASES[name])
    operands = problem.build(DEVICE)

    def function(input: Tensor, weight: Tensor, bias: Tensor, target: Tensor) -> Any:
        answer = cce_tp.linear_cross_entropy(
            input * 2, weight, target, linear_bias=bias, impl=impl, **CASES[name]
        )
        return answer if isinstance(answer, tuple) else (answer,)

    results = []
    for each in (function, compiled(function)):
        leaves = [
            t.detach().clone().requires_grad_()
            for t in (operands.input, operands.weight, operands.bias)
        ]
        loss, *stats = each(*leaves, operands.target)
        loss.backward(operands.upstream.to(loss.dtype).expand(loss.shape))
        statistics = [s for s in stats[0] if s is not None] if stats else []
        results.append([loss.detach(), *(leaf.grad for leaf in leaves), *statistics])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-6, atol=1e-6)


def test_compiled_module_in_a_model() -> None:
    torch.manual_seed(0)
    layer = torch.nn.Linear(16, 16, device=DEVICE)
    table = torch.nn.Embedding(70, 16, device=DEVICE)
    head = cce_tp.LinearCrossEntropyLoss(label_smoothing=0.1)
    ids = torch.randint(0, 70, (2, 9), device=DEVICE)

    def step(ids: Tensor) -> Tensor:
        return head(layer(table(ids[:, :-1])), table.weight, ids[:, 1:])

    grads = []
    for each in (step, compiled(step)):
        for module in (layer, table):
            module.zero_grad()
        loss = each(ids)
        loss.backward()
        grads.append([loss.detach(), table.weight.grad.clone(), layer.weight.grad.clone()])
    for eager, other in zip(*grads, strict=True):
        torch.testing.assert_close(other, eager, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_compiled_accumulation_into_a_given_tensor(out_dtype: torch.dtype) -> None:
    operands = Problem(bias=False).build(DEVICE)

    def function(input: Tensor, weight: Tensor, target: Tensor, out: Tensor) -> Tensor:
        return cce_tp.linear_cross_entropy(input, weight, target, grad_weight_out=out)

    results = []
    for each in (function, compiled(function)):
        out = torch.ones_like(operands.weight, dtype=out_dtype)
        input = operands.input.detach().clone().requires_grad_()
        weight = operands.weight.detach().clone().requires_grad_()
        for _ in range(2):
            each(input, weight, operands.target, out).backward()
        assert weight.grad is None
        results.append([input.grad, out])
    for eager, other in zip(*results, strict=True):
        torch.testing.assert_close(other, eager)


def test_compiled_with_dynamic_shapes_compiles_once() -> None:
    weight = torch.randn(70, 16, device=DEVICE)

    def function(input: Tensor, target: Tensor) -> Tensor:
        return cce_tp.linear_cross_entropy(input, weight, target)

    dynamic = compiled(function, dynamic=True)
    with mock.patch.object(torch._dynamo.config, "error_on_recompile", True):
        for tokens in (8, 24, 57):
            input = torch.randn(tokens, 16, device=DEVICE, requires_grad=True)
            target = torch.randint(0, 70, (tokens,), device=DEVICE)
            loss = dynamic(input, target)
            loss.backward()
            torch.testing.assert_close(loss, function(input, target))


def test_compiled_bad_argument_is_still_an_error() -> None:
    operands = Problem().build(DEVICE)

    def function(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return cce_tp.linear_cross_entropy(input, weight, target, label_smoothing=2.0)

    with pytest.raises(Exception, match="label_smoothing"):
        compiled(function)(operands.input, operands.weight, operands.target)


def compiled_shard(rank: Rank, problem: Problem, bounds: list[tuple[int, int]]) -> list[Outcome]:
    """Eager and compiled outcome of one rank."""
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    shard = shard_of(rank, bounds, problem.vocab)

    def function(input: Tensor, weight: Tensor, target: Tensor) -> Tensor:
        return cce_tp.linear_cross_entropy(
            input, weight, target, vocab_shard=shard, impl=problem.impl, **problem.options
        )

    outcomes = []
    for each in (function, compiled(function)):
        input = operands.input.detach().clone().requires_grad_()
        weight = operands.weight.detach().clone().requires_grad_()
        for _ in range(2):
            loss = each(input, weight, operands.target)
            input.grad = weight.grad = None
            loss.backward()
        outcomes.append(Outcome(loss=loss.detach(), grad_input=input.grad, grad_weight=weight.grad))
    return outcomes


@pytest.mark.parametrize("ranks", [2, 3])
def test_compiled_sharded(pool: RankPool, ranks: int) -> None:
    problem = Problem(impl="auto", options={"label_smoothing": 0.1})
    bounds = even_bounds(problem.vocab, ranks)
    answers = pool.run(compiled_shard, problem, bounds, ranks=ranks, poison=False, timeout_s=200)
    eager = join_shards([each[0] for each in answers], bounds)
    other = join_shards([each[1] for each in answers], bounds)
    torch.testing.assert_close(other.loss, eager.loss, rtol=1e-6, atol=1e-6)
    torch.testing.assert_close(other.grad_input, eager.grad_input, rtol=1e-5, atol=1e-7)
    torch.testing.assert_close(other.grad_weight, eager.grad_weight, rtol=1e-5, atol=1e-7)
    alone = solve(problem, "cpu" if pool.device == "cpu" else DEVICE)
    torch.testing.assert_close(other.loss, alone.loss.cpu(), rtol=1e-5, atol=1e-6)


@pytest.fixture(autouse=True)
def _fresh_dynamo() -> Iterator[None]:
    yield
    torch._dynamo.reset()


def test_fake_tensors_pass_through() -> None:
    """Shapes and dtypes without data, as tools that plan memory use them."""
    from torch._subclasses.fake_tensor import FakeTensorMode

    with FakeTensorMode():
        input = torch.empty(2, 9, 16, dtype=torch.bfloat16, requires_grad=True)
        weight = torch.empty(70, 16, dtype=torch.bfloat16, requires_grad=True)
        target = torch.empty(2, 9, dtype=torch.int64)
        loss, stats = cce_tp.linear_cross_entropy(
            input, weight, target, reduction="none", return_stats="entropy", impl="torch"
        )
        loss.sum().backward()
        assert loss.shape == (2, 9) and loss.dtype == torch.float32
        assert stats.argmax.shape == (2, 9) and stats.argmax.dtype == torch.int64
        assert input.grad is not None and input.grad.shape == (2, 9, 16)
        assert weight.grad is not None and weight.grad.dtype == torch.bfloat16


def test_same_bits_under_inference_mode() -> None:
    operands = Problem().build(DEVICE)
    arguments = (operands.input, operands.weight, operands.target)
    plain = cce_tp.linear_cross_entropy(*arguments)
    with torch.inference_mode():
        assert same_bits(cce_tp.linear_cross_entropy(*arguments).clone(), plain)
