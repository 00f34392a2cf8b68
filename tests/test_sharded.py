"""The loss over 1 to 4 ranks against the fp64 oracle on the whole vocabulary.

Also: every rank holds the same bits of loss, statistics and dE (`join_shards` asserts it).
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import pytest
import torch

import cce_tp
from oracle import Outcome, dense
from problems import Bounds, Problem, call, even_bounds, join_shards, restrict, same_bits, solve
from ranks import COUNTS, WORKERS, Rank, RankPool
from sharding_cases import check_sharded, shard_of, solve_sharded
from tolerance import assert_close, check_outcome, relative_error
from variants import IMPL_DTYPES, IMPLS, MAIN_IMPL_DTYPES

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.2,
    "z_loss": 5e-3,
    "logit_scale": -1.3,
    "logit_softcap": 4.0,
    "return_stats": "entropy",
    "ignore_index": 11,
}
OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {},
    "sum": {"reduction": "sum"},
    "smoothing": {"label_smoothing": 0.3},
    "z-loss": {"z_loss": 1e-2},
    "scale-and-softcap": {"logit_scale": 2.0, "logit_softcap": 5.0},
    "stats": {"return_stats": True, "reduction": "none"},
    "entropy": {"return_stats": "entropy"},
}


@pytest.mark.parametrize(("impl", "dtype"), IMPL_DTYPES)
@pytest.mark.parametrize("ranks", COUNTS)
def test_even_shards(pool: RankPool, ranks: int, impl: str, dtype: torch.dtype) -> None:
    for options in ({}, EVERYTHING):
        problem = Problem(impl=impl, dtype=dtype, bias=True, options=options)
        check_sharded(pool, problem, even_bounds(problem.vocab, ranks))


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("name", OPTIONS)
def test_options(pool: RankPool, impl: str, dtype: torch.dtype, name: str) -> None:
    problem = Problem(impl=impl, dtype=dtype, options=OPTIONS[name], tokens=(5, 9))
    check_sharded(pool, problem, even_bounds(problem.vocab, 3))


SHARDS: dict[str, Bounds] = {
    "uneven": [(0, 5), (5, 150), (150, 203)],
    "reversed": [(130, 203), (60, 130), (0, 60)],
    "middle-first": [(60, 130), (130, 203), (0, 60)],
    "empty-first": [(0, 0), (0, 100), (100, 203)],
    "empty-last": [(0, 100), (100, 203), (203, 203)],
    "empty-within": [(0, 100), (100, 100), (100, 203)],
    "one-has-all": [(0, 0), (0, 203), (203, 203)],
    "single-rows": [(0, 1), (1, 202), (202, 203)],
    "four-ranks-two-empty": [(203, 203), (0, 150), (150, 150), (150, 203)],
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", SHARDS)
def test_shards_of_any_kind(pool: RankPool, impl: str, name: str) -> None:
    problem = Problem(impl=impl, bias=True, options=EVERYTHING)
    check_sharded(pool, problem, SHARDS[name])


@pytest.mark.parametrize("impl", IMPLS)
def test_the_world_group(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, bias=True, options=EVERYTHING)
    check_sharded(pool, problem, even_bounds(problem.vocab, WORKERS), group="world")


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ranks", [2, 3, 4])
def test_one_column_per_rank(pool: RankPool, impl: str, ranks: int) -> None:
    problem = Problem(impl=impl, vocab=ranks, options={"return_stats": "entropy"})
    check_sharded(pool, problem, even_bounds(ranks, ranks))


@pytest.mark.parametrize("impl", IMPLS)
def test_vocabulary_of_one_on_three_ranks(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, vocab=1, bias=True, options={"label_smoothing": 0.1})
    check_sharded(pool, problem, [(0, 0), (0, 1), (1, 1)])


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("tokens", [(0,), (7,)], ids=["no-tokens", "all-ignored"])
def test_nothing_to_learn(
    pool: RankPool, impl: str, dtype: torch.dtype, tokens: tuple[int, ...]
) -> None:
    problem = Problem(
        impl=impl, dtype=dtype, tokens=tokens, ignored=1.0, bias=True, options=EVERYTHING
    )
    bounds = SHARDS["empty-within"]
    joined = join_shards(solve_sharded(pool, problem, bounds), bounds)
    assert joined.loss.shape == tokens and bool((joined.loss == 0).all())
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert bool((getattr(joined, name) == 0).all()), name


def solve_targets(rank: Rank, problem: Problem, bounds: Bounds, targets: list[int]) -> Outcome:
    """As `solve_shard`, with the given ids in turn as targets."""
    operands = with_targets(problem.build(rank.device), targets)
    shard = shard_of(rank, bounds, problem.vocab)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard}
    return call(restrict(operands, *bounds[rank.rank]), options)


def with_targets(operands: Any, targets: list[int]) -> Any:
    ids = torch.tensor(targets, device=operands.target.device)
    places = torch.arange(operands.target.numel(), device=ids.device) % len(ids)
    return replace(operands, target=ids[places].view(operands.target.shape))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["uneven", "reversed", "empty-within"])
@pytest.mark.parametrize("kind", ["edges", "one-shard"])
def test_targets_on_edges_and_shards_without_targets(
    pool: RankPool, impl: str, name: str, kind: str
) -> None:
    bounds = SHARDS[name]
    if kind == "edges":
        targets = [id for start, stop in bounds if stop > start for id in (start, stop - 1)]
    else:
        targets = list(range(*bounds[0]))
        targets = targets or list(range(*bounds[1]))
    problem = Problem(impl=impl, bias=True, options={**EVERYTHING, "ignore_index": -100})
    outcomes = pool.run(solve_targets, problem, bounds, targets, ranks=len(bounds))
    expected = dense(with_targets(problem.build(), targets), problem.options)
    check_outcome(join_shards(outcomes, bounds), expected, problem.dtype)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("stranger", [-1, 203, 2**31 + 3])
def test_a_target_that_is_no_id_is_nan_on_every_rank(
    pool: RankPool, impl: str, stranger: int
) -> None:
    problem = Problem(impl=impl, options={"reduction": "none"}, ignored=0.0, zero_upstream=False)
    bounds = even_bounds(problem.vocab, 3)
    outcomes = pool.run(solve_targets, problem, bounds, [3, stranger, 170], ranks=3)
    clean = dense(with_targets(problem.build(), [3, 0, 170]), problem.options)
    strange = torch.arange(71) % 3 == 1
    for outcome in outcomes:
        assert torch.equal(outcome.loss.isnan(), strange)
        assert outcome.grad_input is not None and clean.grad_input is not None
        assert torch.equal(outcome.grad_input.isnan().all(dim=1), strange)
        assert_close("loss", outcome.loss[~strange], clean.loss[~strange], rtol=1e-5)
        assert_close("input", outcome.grad_input[~strange], clean.grad_input[~strange], rtol=5e-5)


@pytest.mark.parametrize("impl", IMPLS)
def test_partial_input_gradients(pool: RankPool, impl: str) -> None:
    """reduce_input_grad=False leaves each rank's own part; their sum is the gradient."""
    problem = Problem(impl=impl, bias=True, options={**EVERYTHING, "label_smoothing": 0.0})
    bounds = SHARDS["uneven"]
    outcomes = solve_sharded(pool, problem, bounds, shard_options={"reduce_input_grad": False})
    expected = dense(problem.build(), problem.options)
    parts = [outcome.grad_input for outcome in outcomes]
    assert not same_bits(parts[0], parts[1])
    for outcome in outcomes:
        outcome.grad_input = sum(part.double() for part in parts)
    check_outcome(join_shards(outcomes, bounds), expected, problem.dtype)


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
def test_two_runs_give_equal_bits(pool: RankPool, impl: str, dtype: torch.dtype) -> None:
    problem = Problem(impl=impl, dtype=dtype, bias=True, options=EVERYTHING)
    runs = [solve_sharded(pool, problem, SHARDS["uneven"]) for _ in range(2)]
    for first, second in zip(*runs, strict=True):
        for name in ("loss", "lse", "argmax", "grad_input", "grad_weight", "grad_bias"):
            assert same_bits(getattr(first, name), getattr(second, name)), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_group_of_one_rank_gives_the_bits_of_no_group(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, bias=True, options=EVERYTHING)
    (grouped,) = solve_sharded(pool, problem, [(0, problem.vocab)])
    alone = solve(problem, pool.device)
    for name in ("loss", "lse", "grad_input", "grad_weight", "grad_bias"):
        mine = getattr(alone, name).cpu()
        assert_close(name, getattr(grouped, name), mine.double(), rtol=1e-6)


def accumulate(rank: Rank, problem: Problem, bounds: Bounds, out_dtype: torch.dtype) -> Any:
    """grad_weight_out over two calls, and the weight's own gradient (none)."""
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    out = torch.ones_like(operands.weight, dtype=out_dtype)
    shard = shard_of(rank, bounds, problem.vocab)
    options = {**problem.options, "impl": problem.impl, "vocab_shard": shard}
    for _ in range(2):
        outcome = call(operands, {**options, "grad_weight_out": out})
        assert outcome.grad_weight is None
    return out


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("out_dtype", [torch.float32, torch.bfloat16], ids=["fp32", "bf16"])
def test_grad_weight_out(
    pool: RankPool, impl: str, dtype: torch.dtype, out_dtype: torch.dtype
) -> None:
    problem = Problem(impl=impl, dtype=dtype, options={"reduction": "sum"})
    bounds = SHARDS["empty-within"]
    out = torch.cat(pool.run(accumulate, problem, bounds, out_dtype, ranks=3))
    expected = 1 + 2 * dense(problem.build(), problem.options).grad_weight
    rtol = max(torch.finfo(out_dtype).eps, torch.finfo(dtype).eps / 2, 5e-5)
    assert_close("grad_weight_out", out, expected, rtol=rtol)


def one_needs_weight_grad(rank: Rank, problem: Problem, bounds: Bounds) -> Any:
    """Frozen weights: only the input's gradient is asked for, on every rank."""
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    shard = shard_of(rank, bounds, problem.vocab)
    wanted = (True, False, False)
    return call(operands, {"impl": problem.impl, "vocab_shard": shard}, requires_grad=wanted)


@pytest.mark.parametrize("impl", IMPLS)
def test_frozen_weight(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, bias=True)
    outcomes = pool.run(one_needs_weight_grad, problem, SHARDS["uneven"], ranks=3)
    joined = join_shards(outcomes, SHARDS["uneven"])
    assert joined.grad_weight is None and joined.grad_bias is None
    assert relative_error(joined.grad_input, dense(problem.build(), {}).grad_input) < 5e-5


def constructors(rank: Rank, vocab: int, local_rows: list[int]) -> Any:
    """(start, stop, vocab_size) from both constructors, and what the ranks' ids are."""
    even = cce_tp.VocabShard.even(vocab, rank.group)
    rows = cce_tp.VocabShard.from_rows(local_rows[rank.rank], rank.group)
    assert rows.group is rank.group and even.reduce_input_grad
    return [(each.start, each.stop, each.vocab_size) for each in (even, rows)], rank.ids


@pytest.mark.parametrize("local_rows", [[3, 3, 4], [0, 9, 1], [5, 0, 0]], ids=str)
def test_shard_constructors_follow_the_order_of_the_group(
    pool: RankPool, local_rows: list[int]
) -> None:
    answers = pool.run(constructors, 10, local_rows, ranks=3)
    position = even_position = 0
    for ((even, rows), _), count in zip(answers, local_rows, strict=True):
        assert even[0] == even_position and even[1] - even[0] in (3, 4) and even[2] == 10
        assert rows == (position, position + count, sum(local_rows))
        even_position, position = even[1], rows[1]
    assert even_position == 10


def differs_per_rank(rank: Rank, problem: Problem, bounds: Bounds) -> Any:
    """The same problem over two groups at once, as pipeline stages or two models would."""
    shard = shard_of(rank, bounds, problem.vocab)
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    outcomes = []
    other = cce_tp.VocabShard(shard.start, shard.stop, shard.vocab_size, rank.fresh_group())
    for each in (shard, other, shard):
        outcomes.append(call(operands, {"impl": problem.impl, "vocab_shard": each}))
    return outcomes


@pytest.mark.parametrize("impl", IMPLS)
def test_one_group_with_several_cuts_of_one_vocabulary(pool: RankPool, impl: str) -> None:
    """Two models over one group: some ranks hold the same rows in both, others do not."""
    problem = Problem(impl=impl, tokens=(9,), hidden=17)
    for bounds in (
        [(0, 100), (100, 150), (150, 203)],
        [(0, 100), (100, 203), (203, 203)],
        [(0, 90), (90, 203), (203, 203)],
        [(0, 100), (100, 150), (150, 203)],
    ):
        check_sharded(pool, problem, bounds)


@pytest.mark.parametrize("impl", IMPLS)
def test_several_groups_side_by_side(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, tokens=(9,))
    answers = pool.run(differs_per_rank, problem, even_bounds(problem.vocab, 3), ranks=3)
    for outcomes in answers:
        for outcome in outcomes[1:]:
            assert same_bits(outcome.loss, outcomes[0].loss)
            assert same_bits(outcome.grad_weight, outcomes[0].grad_weight)


def solve_ties(rank: Rank, impl: str, bounds: Bounds, winners: list[int]) -> Any:
    """Argmax where the given rows of the weight have the largest logit, all the same."""
    operands = Problem(tokens=(9,), hidden=8).build(rank.device)
    weight = torch.zeros_like(operands.weight)
    weight[winners] = operands.input[0]
    input = operands.input[:1].expand(9, -1)
    start, stop = bounds[rank.rank]
    _, stats = cce_tp.linear_cross_entropy(
        input,
        weight[start:stop],
        operands.target,
        vocab_shard=shard_of(rank, bounds, 203),
        return_stats=True,
        impl=impl,
    )
    return stats.argmax


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["reversed", "empty-first", "four-ranks-two-empty"])
@pytest.mark.parametrize("winners", [[], [202], [131, 70, 190, 71]], ids=str)
def test_argmax_of_equal_logits_is_the_lowest_global_id(
    pool: RankPool, impl: str, name: str, winners: list[int]
) -> None:
    bounds = SHARDS[name]
    for argmax in pool.run(solve_ties, impl, bounds, winners, ranks=len(bounds)):
        assert bool((argmax == min(winners, default=0)).all())
