"""Ranks that do not mean the same call: a ValueError on all of them; the group stays usable."""

from __future__ import annotations

import time
from collections.abc import Callable, Mapping
from typing import Any

import pytest
import torch
import torch.distributed as dist

import cce_tp
from cce_tp import options
from problems import Bounds, Problem, call, even_bounds, restrict
from ranks import Rank, RankPool
from sharding_cases import Answer, answer, debug, usable

LIMIT_S = 20.0

# What rank r changes: keys of `attempt`'s plan.
Plan = Mapping[str, Any]


def attempt(rank: Rank, plans: list[Plan], *, group: Any = None) -> Answer:
    """One call in which each rank follows its own plan.

    A plan may change tokens, vocab, hidden, dtype, bias, wanted (requires_grad), bounds,
    weight_rows, target_len, and any option of the loss.
    """
    plan = dict(plans[rank.rank])
    names = ("tokens", "vocab", "hidden", "dtype", "bias")
    changes = {name: plan.pop(name) for name in names if name in plan}
    problem = Problem(**{"tokens": (9,), "vocab": 23, "hidden": 5, **changes})
    bounds: Bounds = plan.pop("bounds", even_bounds(problem.vocab, rank.size))
    start, stop = bounds[rank.rank]
    operands = restrict(problem.build(rank.device), start, stop)
    wanted = plan.pop("wanted", (True, True, True))
    if "weight_rows" in plan:
        operands = restrict(operands, 0, plan.pop("weight_rows"))
    if "target_len" in plan:
        object.__setattr__(operands, "target", operands.target[: plan.pop("target_len")])

    def loss() -> None:
        shard = cce_tp.VocabShard(start, stop, problem.vocab, group)
        call(operands, {"impl": "torch", "vocab_shard": shard, **plan}, requires_grad=wanted)

    return answer(loss)


def attempt_afresh(rank: Rank, plans: list[Plan], enabled: bool = False) -> tuple[Answer, float]:
    """`attempt` over a group that the library has not met, then a correct call over it."""
    group = rank.fresh_group()
    with debug(enabled):
        first = attempt(rank, plans, group=group)
        return first, usable(rank, group)


def attempt_after_a_good_call(rank: Rank, plans: list[Plan], enabled: bool) -> tuple[Answer, float]:
    """The same over a group that has agreed on a correct call before."""
    group = rank.fresh_group()
    with debug(enabled):
        good = attempt(rank, [{}] * rank.size, group=group)
        assert good.error is None, good.error
        first = attempt(rank, plans, group=group)
        return first, usable(rank, group)


def raised_everywhere(
    pool: RankPool, function: Callable[..., Any], plans: list[Plan], *args: Any
) -> list[str]:
    """Messages of all ranks; fails if one did not raise, was late, or if the group is broken."""
    start = time.monotonic()
    answers = pool.run(function, plans, *args, ranks=len(plans), timeout_s=LIMIT_S)
    assert time.monotonic() - start < LIMIT_S
    messages = [each.error for each, _ in answers]
    assert all(messages), f"a rank did not raise: {messages}"
    assert len({loss for _, loss in answers}) == 1
    return [message or "" for message in messages]


# id -> (plans of three ranks, the argument that the message names)
MISMATCHES: dict[str, tuple[list[Plan], str]] = {
    "tokens": ([{}, {"tokens": (8,)}, {}], "input"),
    "no-tokens": ([{"tokens": (0,)}, {}, {}], "input"),
    "hidden": ([{}, {}, {"hidden": 6}], "hidden|D|input"),
    "dtype": ([{}, {"dtype": torch.float16}, {}], "dtype|input"),
    "fp64": ([{"dtype": torch.float64}, {}, {}], "dtype|input"),
    "vocab": ([{}, {"vocab": 24, "bounds": even_bounds(23, 3)}, {}], "vocab"),
    "bias": ([{"bias": True}, {}, {}], "bias"),
    "ignore_index": ([{}, {}, {"ignore_index": 0}], "ignore_index"),
    "reduction": ([{}, {"reduction": "sum"}, {}], "reduction"),
    "label_smoothing": ([{"label_smoothing": 0.1}, {}, {}], "label_smoothing"),
    "z_loss": ([{}, {"z_loss": 1e-3}, {}], "z_loss"),
    "logit_scale": ([{}, {}, {"logit_scale": 2.0}], "logit_scale"),
    "logit_softcap": ([{}, {"logit_softcap": 30.0}, {}], "logit_softcap"),
    "grad_filter": ([{}, {"grad_filter": cce_tp.GradFilter.paper()}, {}], "grad_filter"),
    "eps": (
        [
            {"grad_filter": cce_tp.GradFilter.paper()},
            {"grad_filter": cce_tp.GradFilter.paper(eps=0.1)},
            {"grad_filter": cce_tp.GradFilter.paper()},
        ],
        "grad_filter|eps",
    ),
    "stats": ([{"return_stats": True}, {}, {}], "return_stats"),
    "entropy": (
        [{"return_stats": True}, {"return_stats": "entropy"}, {"return_stats": True}],
        "return_stats",
    ),
    "requires-grad": ([{}, {"wanted": (False, True, True)}, {}], "requires_grad"),
    "gap": ([{"bounds": [(0, 7), (8, 15), (15, 23)]}] * 3, "vocab_shard"),
    "gap-at-start": ([{"bounds": [(1, 7), (7, 15), (15, 23)]}] * 3, "vocab_shard"),
    "gap-at-end": ([{"bounds": [(0, 7), (7, 15), (15, 22)]}] * 3, "vocab_shard"),
    "overlap": ([{"bounds": [(0, 8), (7, 15), (15, 23)]}] * 3, "vocab_shard"),
    "overlap-within": ([{"bounds": [(0, 23), (5, 9), (23, 23)]}] * 3, "vocab_shard"),
    "all-on-every-rank": ([{"bounds": [(0, 23)] * 3}] * 3, "vocab_shard"),
    "all-empty": ([{"bounds": [(0, 0)] * 3}] * 3, "vocab_shard"),
    # Wrong on one rank only, found before any communication.
    "bad-reduction": ([{}, {"reduction": "avg"}, {}], "reduction"),
    "bad-smoothing": ([{"label_smoothing": 1.5}, {}, {}], "label_smoothing"),
    "bad-weight-rows": ([{}, {}, {"weight_rows": 5}], "linear_weight"),
    "bad-target": ([{"target_len": 4}, {}, {}], "target"),
    "bad-impl": ([{}, {"impl": "cuda"}, {}], "impl"),
}


@pytest.mark.parametrize("name", MISMATCHES)
def test_a_mismatch_at_the_first_use_raises_on_every_rank(pool: RankPool, name: str) -> None:
    plans, argument = MISMATCHES[name]
    messages = raised_everywhere(pool, attempt_afresh, plans)
    assert len(set(messages)) == 1 or name.startswith("bad-"), messages
    for message in messages:
        words = argument.split("|")
        assert any(word in message for word in words), f"{words} not in {message!r}"
        assert "expected" in message and "got" in message


@pytest.mark.parametrize("name", MISMATCHES)
def test_the_debug_switch_finds_it_at_every_call(pool: RankPool, name: str) -> None:
    plans, _ = MISMATCHES[name]
    raised_everywhere(pool, attempt_after_a_good_call, plans, True)


def test_a_target_outside_on_one_rank_raises_on_every_rank_under_the_debug_switch(
    pool: RankPool,
) -> None:
    """Targets are the same on every rank, but a corrupted one may not be."""
    answers = pool.run(corrupt_one_target, ranks=3, timeout_s=LIMIT_S)
    for message, _ in answers:
        assert message is not None and "target" in message and "999" in message


def corrupt_one_target(rank: Rank) -> tuple[str | None, float]:
    group = rank.fresh_group()
    problem = Problem(tokens=(9,), vocab=23, hidden=5)
    shard = cce_tp.VocabShard.even(problem.vocab, group)
    operands = restrict(problem.build(rank.device), shard.start, shard.stop)
    if rank.rank == 1:
        operands.target[3] = 999
    with debug(True):
        found = answer(lambda: call(operands, {"impl": "torch", "vocab_shard": shard}))
        return found.error, usable(rank, group)


@pytest.mark.parametrize("option", ["label_smoothing", "logit_scale", "z_loss"])
def test_new_options_after_a_good_call_are_compared_again(pool: RankPool, option: str) -> None:
    """Every rank comes with options the group has not seen; they differ."""
    plans = [{option: 0.1 * (1 + rank)} for rank in range(3)]
    messages = raised_everywhere(pool, attempt_after_a_good_call, plans, False)
    assert all(option in message for message in messages)


@pytest.mark.parametrize("option", ["label_smoothing", "logit_scale", "z_loss"])
def test_the_two_zeros_are_one_number(pool: RankPool, option: str) -> None:
    """Whichever a rank's caches met first; after a call with one the other is agreed on, too."""
    first = [{option: 0.0}, {option: -0.0}, {option: 0.0}]
    answers = pool.run(zeros_in_turn, first, option, ranks=3, timeout_s=LIMIT_S)
    assert [each.error for each in answers] == [None] * 3


def zeros_in_turn(rank: Rank, plans: list[Plan], option: str) -> Answer:
    group = rank.fresh_group()
    options._known.cache_clear()
    options._resolve.cache_clear()
    found = attempt(rank, plans, group=group)
    return found if found.error else attempt(rank, [{option: -0.0}] * 3, group=group)


def bad_rows(rank: Rank, counts: list[Any]) -> tuple[Answer, float]:
    group = rank.fresh_group()
    found = answer(lambda: cce_tp.VocabShard.from_rows(counts[rank.rank], group))
    return found, usable(rank, group)


@pytest.mark.parametrize("counts", [[3, -1, 4], [3, 4, 2.5], [0, 0, 0]], ids=str)
def test_from_rows_raises_on_every_rank(pool: RankPool, counts: list[Any]) -> None:
    answers = pool.run(bad_rows, counts, ranks=3, timeout_s=LIMIT_S)
    assert all(each.error for each, _ in answers), answers


def first_call_in_inference(rank: Rank) -> Answer:
    """Evaluation first, training after: the same group and options, other gradients."""
    group = rank.fresh_group()

    def both() -> None:
        for wanted in ((False, False, False), (True, True, True), (False, True, False)):
            problem = Problem(tokens=(9,), vocab=23, hidden=5)
            shard = cce_tp.VocabShard.even(problem.vocab, group)
            operands = restrict(problem.build(rank.device), shard.start, shard.stop)
            call(operands, {"impl": "torch", "vocab_shard": shard}, requires_grad=wanted)

    return answer(both)


def test_evaluation_and_training_take_turns(pool: RankPool) -> None:
    answers = pool.run(first_call_in_inference, ranks=3)
    assert [each.error for each in answers] == [None, None, None]


def other_token_counts(rank: Rank) -> Answer:
    """N changes from call to call on all ranks together: no mismatch."""
    group = rank.fresh_group()

    def several() -> None:
        for tokens in (9, 4, 0, 30):
            problem = Problem(tokens=(tokens,), vocab=23, hidden=5)
            shard = cce_tp.VocabShard.even(problem.vocab, group)
            operands = restrict(problem.build(rank.device), shard.start, shard.stop)
            call(operands, {"impl": "torch", "vocab_shard": shard})

    return answer(several)


def test_token_counts_may_change_between_calls(pool: RankPool) -> None:
    answers = pool.run(other_token_counts, ranks=3)
    assert [each.error for each in answers] == [None, None, None]


def name_a_group_of_others(rank: Rank) -> str | None:
    """A group of the world's first two ranks, named by all."""
    group = dist.new_group([0, 1], backend="gloo")
    return answer(lambda: cce_tp.VocabShard(0, 4, 10, group)).error


def test_a_group_of_which_this_rank_is_no_member(pool: RankPool) -> None:
    errors = pool.run(name_a_group_of_others, group="world")
    assert errors[:2] == [None, None]
    assert all(error is not None and "group" in error for error in errors[2:])
