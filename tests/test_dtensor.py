"""DTensor weights: Shard(0) on a 1-D mesh is a shard of the vocabulary, Replicate a full weight."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch.distributed.device_mesh import DeviceMesh
from torch.distributed.tensor import DTensor, Placement, Replicate, Shard, distribute_tensor

import cce_tp
from oracle import Outcome, dense
from problems import Problem, per_token
from ranks import Rank, RankPool
from sharding_cases import Answer, answer
from tolerance import check_outcome

# On the CPU everywhere: what is tested is which rows and which placements, not the kernels.
DEVICE = "cpu"
OPTIONS: dict[str, Any] = {"label_smoothing": 0.1, "return_stats": "entropy", "reduction": "none"}


def mesh_of(rank: Rank) -> DeviceMesh:
    return DeviceMesh.from_group(rank.group, DEVICE)


def distributed(rank: Rank, problem: Problem, placement: Placement, everything: bool) -> Any:
    """The loss with a DTensor weight and bias (and, with `everything`, input and target)."""
    operands = problem.build(DEVICE)
    mesh = mesh_of(rank)
    weight = distribute_tensor(operands.weight, mesh, [placement]).requires_grad_()
    bias = distribute_tensor(operands.bias, mesh, [placement]).requires_grad_()
    input, target = operands.input, operands.target
    if everything:
        input = distribute_tensor(input, mesh, [Replicate()])
        target = distribute_tensor(target, mesh, [Replicate()])
    input = input.detach().requires_grad_()
    loss, stats = cce_tp.linear_cross_entropy(
        input, weight, target, linear_bias=bias, impl=problem.impl, **problem.options
    )
    loss.backward(operands.upstream)
    for grad in (weight.grad, bias.grad):
        assert isinstance(grad, DTensor) and grad.placements == (placement,)
        assert grad.device_mesh == mesh
    assert input.grad is not None and isinstance(input.grad, DTensor) == everything
    grad_input = input.grad.full_tensor() if isinstance(input.grad, DTensor) else input.grad
    return Outcome(
        loss=loss.detach(),
        grad_input=grad_input,
        grad_weight=weight.grad.full_tensor(),
        grad_bias=bias.grad.full_tensor(),
        **per_token(stats),
    )


@pytest.mark.parametrize("everything", [False, True], ids=["weight", "all-operands"])
@pytest.mark.parametrize("placement", [Shard(0), Replicate()], ids=str)
@pytest.mark.parametrize(("ranks", "vocab"), [(1, 50), (2, 51), (3, 50), (3, 4), (4, 5)], ids=str)
def test_placements(
    pool: RankPool, ranks: int, vocab: int, placement: Placement, everything: bool
) -> None:
    """Also vocabularies that torch's chunks leave a rank without rows of."""
    problem = Problem(vocab=vocab, tokens=(3, 5), bias=True, options=OPTIONS, impl="torch")
    expected = dense(problem.build(), problem.options)
    for outcome in pool.run(distributed, problem, placement, everything, ranks=ranks):
        check_outcome(outcome, expected, problem.dtype)


def accumulated(rank: Rank, problem: Problem) -> torch.Tensor:
    """grad_weight_out as a DTensor beside the weight."""
    operands = problem.build(DEVICE)
    weight = distribute_tensor(operands.weight, mesh_of(rank), [Shard(0)]).requires_grad_()
    out = torch.zeros_like(weight).detach()
    cce_tp.linear_cross_entropy(
        operands.input, weight, operands.target, grad_weight_out=out, impl="torch"
    ).backward()
    assert weight.grad is None
    return out.full_tensor()


def test_grad_weight_out(pool: RankPool) -> None:
    problem = Problem(vocab=50)
    expected = dense(problem.build(), {}).grad_weight
    for out in pool.run(accumulated, problem, ranks=3):
        torch.testing.assert_close(out.double(), expected, rtol=1e-4, atol=1e-7)


def wrong(rank: Rank, kind: str) -> Answer:
    """A placement or combination that has no meaning here."""
    operands = Problem(vocab=48, hidden=12, tokens=(6,), bias=True).build(DEVICE)
    mesh = mesh_of(rank)
    weight: Any = distribute_tensor(operands.weight, mesh, [Shard(0)])
    input: Any = operands.input
    more: dict[str, Any] = {}
    if kind == "weight-shard-1":
        weight = distribute_tensor(operands.weight, mesh, [Shard(1)])
    elif kind == "weight-2d-mesh":
        square = DeviceMesh(DEVICE, torch.arange(4).view(2, 2))
        weight = distribute_tensor(operands.weight, square, [Shard(0), Shard(0)])
    elif kind == "weight-partial":
        from torch.distributed.tensor import Partial

        weight = DTensor.from_local(operands.weight, mesh, [Partial()])
    elif kind == "input-sharded":
        input = distribute_tensor(operands.input, mesh, [Shard(0)])
    elif kind == "bias-plain":
        more["linear_bias"] = operands.bias
    elif kind == "bias-replicated":
        more["linear_bias"] = distribute_tensor(operands.bias, mesh, [Replicate()])
    elif kind == "bias-only":
        weight = operands.weight
        more["linear_bias"] = distribute_tensor(operands.bias, mesh, [Shard(0)])
    elif kind == "with-vocab-shard":
        more["vocab_shard"] = cce_tp.VocabShard.even(48, rank.group)
    return answer(
        lambda: cce_tp.linear_cross_entropy(input, weight, operands.target, impl="torch", **more)
    )


@pytest.mark.parametrize(
    ("kind", "argument"),
    [
        ("weight-shard-1", "linear_weight"),
        ("weight-2d-mesh", "linear_weight"),
        ("weight-partial", "linear_weight"),
        ("input-sharded", "input"),
        ("bias-plain", "linear_bias"),
        ("bias-replicated", "linear_bias"),
        ("bias-only", "linear_bias"),
        ("with-vocab-shard", "vocab_shard"),
    ],
    ids=str,
)
def test_other_placements_raise_on_every_rank(pool: RankPool, kind: str, argument: str) -> None:
    for each in pool.run(wrong, kind, group="world", timeout_s=20):
        assert each.error is not None and each.error.startswith(argument), each
        assert "expected" in each.error and "got" in each.error
