"""Sequence parallelism: each rank holds a part of the tokens' hidden states.

Legend: N tokens, W ranks, V global vocabulary.
"""

from __future__ import annotations

import re
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from cce_tp import sharding
from oracle import Outcome
from problems import Problem, call, even_bounds, expect, join_shards, restrict
from ranks import COUNTS, Rank, RankPool
from sharding_cases import Answer, answer, shard_of
from tolerance import check_outcome
from variants import IMPLS, MAIN_IMPL_DTYPES

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.2,
    "z_loss": 5e-3,
    "logit_softcap": 4.0,
    "return_stats": "entropy",
}

FILTERS = (cce_tp.GradFilter.paper(0.0), cce_tp.GradFilter.far_field(0.0))


def solve_part(
    rank: Rank, problem: Problem, bounds: list[tuple[int, int]], more: dict[str, Any], few: int
) -> Outcome:
    """The library's answer on this rank, from its part of the tokens and its rows of the weight.

    From `few` own tokens on, it begins with them before the others' are there."""
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    part = operands.input.tensor_split(len(bounds))[rank.rank].contiguous()
    shard = shard_of(rank, bounds, problem.vocab, sequence_parallel=True)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard, **more}
    with mock.patch.object(sharding, "_FEW_TOKENS", few):
        return call(replace(operands, input=part), options)


def check_parts(
    pool: RankPool, problem: Problem, bounds: list[tuple[int, int]], few: int = 1, **more: Any
) -> None:
    """Join the ranks' parts of dE, and hold everything against the oracle on the whole."""
    outcomes = pool.run(solve_part, problem, bounds, more, few, ranks=len(bounds))
    whole = torch.cat([outcome.grad_input for outcome in outcomes])
    joined = join_shards([replace(each, grad_input=whole) for each in outcomes], bounds)
    expected, native = expect(problem.build(), problem)
    check_outcome(joined, expected, problem.dtype, native=native, ranks=len(bounds))


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("ranks", [count for count in COUNTS if count != 3])
def test_parts_of_the_tokens(pool: RankPool, ranks: int, impl: str, dtype: torch.dtype) -> None:
    for options in ({}, EVERYTHING):
        problem = Problem(impl=impl, dtype=dtype, tokens=(40, 2), bias=True, options=options)
        check_parts(pool, problem, even_bounds(problem.vocab, ranks))


@pytest.mark.parametrize("impl", IMPLS)
def test_an_empty_shard_still_has_tokens(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, tokens=(24,), options=EVERYTHING)
    check_parts(pool, problem, [(0, 100), (100, 100), (100, 203)])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("few", [1, 9], ids=["own-first", "all-at-once"])
def test_kept_logits(pool: RankPool, impl: str, few: int) -> None:
    """Of tokens that are taken at different times; kept for part of the columns."""
    options = {"label_smoothing": 0.2, "reduction": "none"}
    problem = Problem(impl=impl, dtype=torch.float16, tokens=(24,), vocab=460, options=options)
    check_parts(pool, problem, even_bounds(460, 3), few, keep_logits_bytes=7000)


@pytest.mark.parametrize("grad_filter", FILTERS, ids=lambda chosen: chosen.kind)
def test_filters(pool: RankPool, grad_filter: cce_tp.GradFilter) -> None:
    """They look at all tokens before they begin; nothing is left out here."""
    problem = Problem(impl="torch", tokens=(24,), options={"reduction": "none"})
    check_parts(pool, problem, even_bounds(problem.vocab, 3), grad_filter=grad_filter)


@pytest.mark.parametrize("cap", [1 << 20, None], ids=["1MiB", "default"])
def test_a_small_workspace(pool: RankPool, cap: int | None) -> None:
    problem = Problem(impl="torch", tokens=(400,), vocab=900, hidden=120)
    check_parts(pool, problem, even_bounds(900, 2), workspace_bytes=cap)


def with_frozen(rank: Rank, wanted: tuple[bool, bool]) -> list[str]:
    """Gradients that are not wanted do not come, and no rank hangs."""
    problem = Problem(tokens=(16,))
    bounds = even_bounds(problem.vocab, 2)
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    part = operands.input.tensor_split(2)[rank.rank].contiguous()
    shard = shard_of(rank, bounds, problem.vocab, sequence_parallel=True)
    outcome = call(
        replace(operands, input=part), {"vocab_shard": shard}, requires_grad=(*wanted, False)
    )
    found = (outcome.grad_input is not None, outcome.grad_weight is not None)
    return [] if found == wanted else [f"rank {rank.rank}: {found}, wanted {wanted}"]


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_frozen_input_or_weight(pool: RankPool, wanted: tuple[bool, bool]) -> None:
    assert pool.run(with_frozen, wanted, ranks=2) == [[], []]


def bad_part(rank: Rank, shape: tuple[int, ...], targets: int) -> Answer:
    shard = cce_tp.VocabShard.even(20, rank.group)
    shard = replace(shard, sequence_parallel=True)
    input = torch.ones(shape, device=rank.device)
    weight = torch.ones(shard.num_rows, shape[-1], device=rank.device)
    target = torch.zeros(targets, dtype=torch.int64, device=rank.device)
    return answer(lambda: cce_tp.linear_cross_entropy(input, weight, target, vocab_shard=shard))


@pytest.mark.parametrize(
    ("shape", "targets", "message"),
    [((6, 4), 6, r"target: expected input's leading shape \(12,\)"), ((4,), 1, "input: expected")],
    ids=["tokens", "no-tokens-dim"],
)
def test_parts_that_do_not_fit(
    pool: RankPool, shape: tuple[int, ...], targets: int, message: str
) -> None:
    for given in pool.run(bad_part, shape, targets, ranks=2, group=None):
        assert given.error is not None and re.search(message, given.error), given.error


def test_sequence_parallel_needs_a_group_and_the_reduction() -> None:
    with pytest.raises(ValueError, match="sequence_parallel: expected False"):
        cce_tp.VocabShard(0, 4, 4, sequence_parallel=True)
