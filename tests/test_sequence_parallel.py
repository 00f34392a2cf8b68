"""Sequence parallelism: each rank holds a part of the tokens' hidden states.

Legend: N tokens, W ranks, V global vocabulary.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass, replace
from typing import Any
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import cce_tp
from backward_passes import kept_columns, operands_as_they_are
from cce_tp import backward, sharding
from cce_tp.backend import backend
from cce_tp.workspace import Walk
from oracle import Outcome
from problems import Problem, call, even_bounds, expect, join_shards, restrict
from ranks import COUNTS, Rank, RankPool
from sharding_cases import Answer, answer, shard_of
from test_walks import WALKS
from tolerance import check_outcome, relative_error
from variants import DEVICE, HAS_CUDA, IMPLS, LOW_IMPL_DTYPES, MAIN_IMPL_DTYPES

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.2,
    "z_loss": 5e-3,
    "logit_softcap": 4.0,
    "return_stats": "entropy",
}
PLENTY = 1 << 24


class _Arrival:
    """The work of a gather whose result comes with `wait` and not before."""

    def __init__(self, whole: torch.Tensor, waited: list[int]) -> None:
        self._whole, self._result, self._waited = whole, whole.clone(), waited
        whole.fill_(torch.nan)

    def wait(self) -> None:
        self._whole.copy_(self._result)
        self._waited.append(1)


@contextmanager
def late_tokens(few: int) -> Iterator[list[int]]:
    """Other ranks' hidden states are NaN until they are waited for; yields an entry per wait.

    From `few` own tokens on a rank begins with those."""
    waited: list[int] = []
    enqueue = sharding.TokenGather._enqueue

    class Late(sharding.TokenGather):
        @staticmethod
        def _enqueue(local: torch.Tensor, group: Any) -> tuple[torch.Tensor, Any]:
            whole, work = enqueue(local, group)
            work.wait()
            return whole, _Arrival(whole, waited)

    with (
        mock.patch.object(sharding, "_FEW_TOKENS", few),
        mock.patch.object(sharding, "TokenGather", Late),
    ):
        yield waited


@dataclass(frozen=True)
class Setting:
    """How a rank computes its answer.

    Attributes:
        few: as in `late_tokens`.
        walks: the plan of the backward pass, or None for the planner's.
        filtered: the far field is taken also where the exact pass would cost less.
        kept: what share of the columns has its logits from the forward pass: "some" or "all", or
            None where that does not matter.
        in_grad: they are kept in dC's memory, as on a GPU.
    """

    few: int = 1
    walks: tuple[Walk, ...] | None = None
    filtered: bool = False
    kept: str | None = None
    in_grad: bool = False

    @contextmanager
    def applied(self) -> Iterator[None]:
        with ExitStack() as stack:
            if self.walks is not None:
                plan = mock.patch.object(backward, "plan_backward", lambda *_: self.walks)
                stack.enter_context(plan)
            if self.filtered:
                stack.enter_context(mock.patch.object(backward, "pays", lambda *_: True))
            if self.in_grad:
                stack.enter_context(operands_as_they_are())
            yield

    def check_kept(self, columns: list[int], rows: int) -> None:
        """Of the only backward pass over so many rows."""
        if self.kept is not None:
            (count,) = columns
            assert count == rows if self.kept == "all" else 0 < count < rows


def solve_part(
    rank: Rank,
    problem: Problem,
    bounds: list[tuple[int, int]],
    more: dict[str, Any],
    setting: Setting,
    wanted: tuple[bool, bool, bool] = (True, True, True),
) -> Outcome:
    """The library's answer on this rank, from its part of the tokens and its rows of the weight."""
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    part = operands.input.tensor_split(len(bounds))[rank.rank].contiguous()
    shard = shard_of(rank, bounds, problem.vocab, sequence_parallel=True)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard, **more}
    with setting.applied(), late_tokens(setting.few) as waited, kept_columns() as columns:
        outcome = call(replace(operands, input=part), options, requires_grad=wanted)
    setting.check_kept(columns, len(operands.weight))
    assert len(waited) == (2 if any(wanted) else 1)  # once in each pass
    return outcome


def check_parts(
    pool: RankPool,
    problem: Problem,
    bounds: list[tuple[int, int]],
    setting: Setting | None = None,
    **more: Any,
) -> None:
    """Join the ranks' parts of dE, and hold everything against the oracle on the whole."""
    setting = setting or Setting()
    outcomes = pool.run(solve_part, problem, bounds, more, setting, ranks=len(bounds))
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


@pytest.mark.parametrize("name", WALKS)
@pytest.mark.parametrize("few", [1, 30], ids=["own-first", "all-at-once"])
def test_every_walk(pool: RankPool, name: str, few: int) -> None:
    """In chunks that hold some, none or all of a rank's own tokens."""
    dtype = torch.bfloat16 if "borrowed" in name else torch.float32
    problem = Problem(impl="torch", dtype=dtype, tokens=(75,), vocab=1406, hidden=200)
    check_parts(pool, problem, [(0, 703), (703, 703), (703, 1406)], Setting(few, WALKS[name]))


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("few", [1, 30], ids=["own-first", "all-at-once"])
@pytest.mark.parametrize("kept", ["some", "all"])
@pytest.mark.parametrize("in_grad", [False, True], ids=["beside", "in-dC"])
def test_kept_logits(
    pool: RankPool, impl: str, dtype: torch.dtype, few: int, kept: str, in_grad: bool
) -> None:
    """Of tokens that are taken at different times."""
    options = {"label_smoothing": 0.2, "reduction": "none"}
    hidden = 200 if in_grad and kept == "all" else 40
    problem = Problem(
        impl=impl, dtype=dtype, tokens=(76,), vocab=1706, hidden=hidden, options=options
    )
    tile = backend(impl).tile_rows(torch.empty(0, dtype=dtype, device=DEVICE))
    room = PLENTY if kept == "all" else 2 * tile * 2 * 80
    more: dict[str, Any] = {"keep_logits_in_grad": True} if in_grad else {"keep_logits_bytes": room}
    setting = Setting(few, kept=kept, in_grad=in_grad)
    check_parts(pool, problem, even_bounds(problem.vocab, 2), setting, **more)


def beside_whole_input(
    rank: Rank, problem: Problem, grad_filter: cce_tp.GradFilter
) -> tuple[list[float], bool]:
    """Differences to the same rank's answer with the hidden states of all tokens given, relative;
    and whether those are other than the exact ones."""
    bounds, setting = even_bounds(problem.vocab, rank.size), Setting(filtered=True)
    more = {"grad_filter": grad_filter}
    parts = solve_part(rank, problem, bounds, more, setting)
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    shard = shard_of(rank, bounds, problem.vocab)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard}
    with setting.applied():
        whole = call(operands, {**options, **more})
        exact = call(operands, options)
    own = whole.grad_input.tensor_split(rank.size)[rank.rank]
    pairs = ((parts.loss, whole.loss), (parts.grad_input, own))
    pairs = (*pairs, (parts.grad_weight, whole.grad_weight))
    filtered = relative_error(whole.grad_weight, exact.grad_weight) > 1e-4
    return [relative_error(one, other) for one, other in pairs], filtered


@pytest.mark.once
@pytest.mark.parametrize(
    "grad_filter",
    [cce_tp.GradFilter.paper(0.05), cce_tp.GradFilter.far_field(0.3)],
    ids=lambda chosen: chosen.kind,
)
def test_filters(pool: RankPool, grad_filter: cce_tp.GradFilter) -> None:
    """Which look at all tokens before they begin. (The reference's tiles are too large for it to
    leave any out here, and so are a GPU's for the paper's filter.)"""
    problem = Problem(
        impl="triton",
        tokens=(40,),
        vocab=4096,
        hidden=16,
        spread=4.0,
        options={"reduction": "none"},
    )
    for errors, filtered in pool.run(beside_whole_input, problem, grad_filter, ranks=2):
        assert max(errors) < 1e-6
        assert filtered or (HAS_CUDA and grad_filter.kind == "paper")


@pytest.mark.parametrize("cap", [1 << 20, None], ids=["1MiB", "default"])
def test_a_small_workspace(pool: RankPool, cap: int | None) -> None:
    problem = Problem(impl="torch", tokens=(400,), vocab=900, hidden=120)
    check_parts(pool, problem, even_bounds(900, 2), workspace_bytes=cap)


def with_frozen(rank: Rank, wanted: tuple[bool, bool]) -> list[str]:
    """Gradients that are not wanted do not come, the others are right, and no rank hangs."""
    problem = Problem(tokens=(16,))
    bounds = even_bounds(problem.vocab, 2)
    outcome = solve_part(rank, problem, bounds, {}, Setting(), (*wanted, False))
    both = solve_part(rank, problem, bounds, {}, Setting(), (True, True, False))
    wrong = []
    for name, want in zip(("grad_input", "grad_weight"), wanted, strict=True):
        given, expected = getattr(outcome, name), getattr(both, name)
        if (given is not None) != want:
            wrong.append(f"rank {rank.rank}: {name} {given}, wanted: {want}")
        elif want and not relative_error(given, expected) < 1e-5:
            wrong.append(f"rank {rank.rank}: {name} differs")
    return wrong


@pytest.mark.parametrize("wanted", [(True, False), (False, True), (False, False)], ids=str)
def test_frozen_input_or_weight(pool: RankPool, wanted: tuple[bool, bool]) -> None:
    assert pool.run(with_frozen, wanted, ranks=2) == [[], []]


@given(
    own=st.tuples(st.integers(0, 5000), st.integers(0, 5000)).map(sorted),
    chunk=st.tuples(st.integers(0, 5000), st.integers(1, 5000)).map(sorted),
    dtype=st.sampled_from([torch.int16, torch.int32, torch.int64]),  # numbers that are exact
)
def test_pieces_begin_and_end_at_whole_units(
    own: list[int], chunk: list[int], dtype: torch.dtype
) -> None:
    """G^T is written in units of 16 bytes: a piece that ended inside one, with its neighbour done
    before, would go over the neighbour's first tokens."""
    start, stop = chunk
    gather = object.__new__(sharding.TokenGather)
    gather.whole = torch.arange(5000, dtype=dtype)[:, None]
    gather.own, gather._local, gather._work = (own[0], own[1]), gather.whole[slice(*own)], None
    pieces = list(gather.pieces(start, stop))
    unit = 16 // dtype.itemsize
    for first, last, input in pieces:
        assert (first - start) % unit == 0 and (last == stop or (last - start) % unit == 0)
        assert input[:, 0].tolist() == list(range(first, last))
    if len(pieces) > 1:
        assert own[0] <= pieces[0][0] and pieces[0][1] <= own[1]
    assert sorted(token for first, last, _ in pieces for token in range(first, last)) == list(
        range(start, stop)
    )


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
    for found in pool.run(bad_part, shape, targets, ranks=2, group=None):
        assert found.error is not None and re.search(message, found.error), found.error


def test_sequence_parallel_needs_a_group_and_the_reduction() -> None:
    with pytest.raises(ValueError, match="sequence_parallel: expected False"):
        cce_tp.VocabShard(0, 4, 4, sequence_parallel=True)
