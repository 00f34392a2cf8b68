"""Functions that run on the ranks of the pool: the library on one rank's shard of a problem.

Legend: V global vocabulary.
"""

from __future__ import annotations

import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any
from unittest import mock

import torch
import torch.distributed as dist

import cce_tp
from oracle import Operands, Outcome
from problems import Bounds, Problem, call, expect, join_shards, restrict
from ranks import Rank, RankPool
from tolerance import check_outcome


def shard_of(rank: Rank, bounds: Bounds, vocab: int, **more: Any) -> cce_tp.VocabShard:
    """This rank's entry of `bounds`, in the order of the group's ranks."""
    return cce_tp.VocabShard(*bounds[rank.rank], vocab, rank.group, **more)


def solve_shard(
    rank: Rank, problem: Problem, bounds: Bounds, more: Mapping[str, Any], shard_options: Mapping
) -> Outcome:
    """The library's answer on this rank."""
    start, stop = bounds[rank.rank]
    operands = restrict(problem.build(rank.device), start, stop)
    shard = shard_of(rank, bounds, problem.vocab, **shard_options)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard, **more}
    return call(operands, options)


def solve_sharded(
    pool: RankPool,
    problem: Problem,
    bounds: Bounds,
    *,
    group: str | None = None,
    shard_options: Mapping[str, Any] | None = None,
    **more: Any,
) -> list[Outcome]:
    """Outcomes of all ranks of a group of len(bounds) ranks."""
    return pool.run(
        solve_shard, problem, bounds, more, shard_options or {}, ranks=len(bounds), group=group
    )


def check_sharded(
    pool: RankPool,
    problem: Problem,
    bounds: Bounds,
    *,
    operands: Operands | None = None,
    group: str | None = None,
    **more: Any,
) -> list[Outcome]:
    """Solve on all ranks, join, and hold everything against the oracle on the whole vocabulary."""
    outcomes = solve_sharded(pool, problem, bounds, group=group, **more)
    joined = join_shards(outcomes, bounds)
    expected, native = expect(operands or problem.build(), problem)
    check_outcome(joined, expected, problem.dtype, native=native, ranks=len(bounds))
    return outcomes


@dataclass(frozen=True)
class Answer:
    """What a call that may raise did on one rank: the ValueError's text, or None."""

    error: str | None


def answer(function: Callable[[], Any]) -> Answer:
    """Call, and turn a ValueError into its text; any other error is the test's failure."""
    try:
        function()
    except ValueError as error:
        return Answer(str(error))
    return Answer(None)


def debug(enabled: bool) -> Any:
    """CCE_TP_DEBUG for a while."""
    return mock.patch.dict(os.environ, {"CCE_TP_DEBUG": "1" if enabled else "0"})


def usable(rank: Rank, group: Any) -> float:
    """A correct call over the group (after an incorrect one), and its loss."""
    problem = Problem(tokens=(9,), vocab=17, hidden=5)
    operands = problem.build(rank.device)
    shard = cce_tp.VocabShard.even(problem.vocab, group)
    part = restrict(operands, shard.start, shard.stop)
    outcome = call(part, {"impl": "torch", "vocab_shard": shard})
    dist.barrier(group=group)
    assert bool(torch.isfinite(outcome.loss))
    return float(outcome.loss)
