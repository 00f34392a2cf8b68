"""Random shapes, dtypes, options and shards against the fp64 oracle: 320 examples in all."""

from __future__ import annotations

import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from oracle import dense
from problems import Problem, call, check
from ranks import RankPool
from sharding_cases import check_sharded
from strategies import PROPERTY, problems, shards
from tolerance import check_outcome
from variants import DEVICE


@settings(PROPERTY, max_examples=120)
@given(problem=problems("torch", largest=(150, 300, 48)))
def test_one_rank_torch(problem: Problem) -> None:
    check(problem, DEVICE)


@settings(PROPERTY, max_examples=60)
@given(problem=problems("triton", largest=(70, 150, 48)))
def test_one_rank_triton(problem: Problem) -> None:
    check(problem, DEVICE)


@settings(PROPERTY, max_examples=40)
@given(
    problem=problems("torch", largest=(200, 600, 64)),
    workspace=st.integers(1 << 20, 1 << 22),
    wanted=st.tuples(st.booleans(), st.booleans(), st.booleans()),
)
def test_workspace_and_gradients_asked_for(
    problem: Problem, workspace: int, wanted: tuple[bool, bool, bool]
) -> None:
    operands = problem.build(DEVICE)
    options = {**problem.options, "impl": problem.impl, "workspace_bytes": workspace}
    outcome = call(operands, options, requires_grad=wanted)
    for name, want in zip(("input", "weight"), wanted[:2], strict=True):
        assert (getattr(outcome, f"grad_{name}") is not None) == want
    low = problem.dtype in (torch.float16, torch.bfloat16)
    native = dense(operands, problem.options, dtype=problem.dtype) if low else None
    check_outcome(outcome, dense(operands, problem.options), problem.dtype, native=native)


@settings(PROPERTY, max_examples=70)
@given(data=st.data())
def test_sharded_torch(pool: RankPool, data: st.DataObject) -> None:
    problem = data.draw(problems("torch", largest=(60, 120, 32)))
    check_sharded(pool, problem, data.draw(shards(problem.vocab)))


@settings(PROPERTY, max_examples=30)
@given(data=st.data())
def test_sharded_triton(pool: RankPool, data: st.DataObject) -> None:
    problem = data.draw(problems("triton", largest=(40, 120, 40)))
    check_sharded(pool, problem, data.draw(shards(problem.vocab)))
