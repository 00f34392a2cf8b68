"""GradFilter.far_field: what it approximates, within which bound, and what stays exact.

Legend: N tokens, V vocabulary rows, D hidden size, T tiles of the sorted vocabulary.
"""

from __future__ import annotations

import weakref
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import cce_tp
from cce_tp import backward, far_field, ops
from cce_tp.backend import backend
from cce_tp.far_field import RankBudget
from cce_tp.workspace import (
    BackwardSizes,
    StripWalk,
    TokenWalk,
    Walk,
    default_workspace_bytes,
    pays,
    plan_backward,
    plan_rest,
)
from oracle import Operands, Outcome, dense, dense_logits
from problems import Problem, call, even_bounds, join_shards, restrict, same_bits, solve
from ranks import Rank, RankPool
from sharding_cases import check_sharded, shard_of, solve_sharded
from tolerance import check_outcome, relative_error
from variants import DEVICE, HAS_CUDA, IMPLS, MAIN_IMPL_DTYPES

pytestmark = pytest.mark.once  # test_hostile and test_megatron_far_field run twice

OPTIONS: dict[str, dict[str, Any]] = {
    "plain": {"reduction": "none"},
    "smoothing": {"reduction": "none", "label_smoothing": 0.1, "z_loss": 1e-3},
    "softcap": {"reduction": "none", "logit_softcap": 9.0, "logit_scale": 1.3},
    "everything": {
        "reduction": "none",
        "label_smoothing": 0.1,
        "z_loss": 1e-3,
        "logit_scale": 1.3,
        "logit_softcap": 9.0,
    },
}
# Of all probability; the kept tiles of `trained` hold all but a few per cent.
BUDGET = 0.05


def far(budget: float = BUDGET) -> dict[str, Any]:
    """Without kept logits, which are in test_far_kept_logits."""
    return {"grad_filter": cce_tp.GradFilter.far_field(budget), "keep_logits_in_grad": False}


def trained(
    impl: str,
    *,
    seed: int = 0,
    tokens: int = 130,
    hidden: int = 24,
    dtype: torch.dtype = torch.float32,
    device: str = DEVICE,
) -> Operands:
    """A few frequent rows, many rare ones; some targets among the rare."""
    # Five tiles: of 256 rows, or of 64 in the interpreter.
    vocab = 300 if impl == "triton" and not HAS_CUDA else 1111
    random = torch.Generator().manual_seed(seed)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    direction = normal(hidden)
    direction /= direction.norm()
    level = torch.linspace(4.0, -6.0, vocab)[torch.randperm(vocab, generator=random)]
    weight = 0.1 * normal(vocab, hidden) + 0.5 * level[:, None] * direction
    input = 0.3 * normal(tokens, hidden) + 3 * direction
    probabilities = (input @ weight.t()).softmax(dim=1)
    target = torch.multinomial(probabilities, 1, generator=random)[:, 0]
    target[::5] = torch.randint(0, vocab, (len(target[::5]),), generator=random)
    target[3::9] = -100
    return Operands(
        input=input.to(device, dtype),
        weight=weight.to(device, dtype),
        bias=(0.1 * normal(vocab)).to(device, dtype),
        target=target.to(device),
        upstream=normal(tokens).to(device),
    )


def bound(
    operands: Operands, options: dict[str, Any], tile: int, rows: slice = slice(None)
) -> tuple[Tensor, Tensor, Tensor]:
    """Largest error of each element of (dE, dC, dbias) if every tile that may be left is left.

    Within a tile the gradients of the logits sum to what the far field keeps, so that dE errs by
    sum (g - mean g) (c - mean c), and dC by sum (g - mean g) e (docs/far-field.md). `rows` is the
    shard whose order and tiles are meant."""
    input = operands.input.double()
    weight, bias = operands.weight.double(), operands.bias.double()
    x = dense_logits(input, weight, bias, options)
    softcap, scale = options.get("logit_softcap"), abs(options.get("logit_scale", 1.0))
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    prob = x.softmax(dim=1)
    grad = prob * (1 + 2 * options.get("z_loss", 0.0) * lse)
    grad = grad - options.get("label_smoothing", 0.0) / x.shape[1]
    if softcap is not None:
        grad = grad * (1 - (x / softcap) ** 2)
    counted = operands.target != -100
    grad = grad * (operands.upstream.double() * scale * counted)[:, None]
    weight, bias, grad, prob = weight[rows], bias[rows], grad[:, rows], prob[:, rows]
    order = likeliest_first(input, weight, bias, options.get("logit_scale", 1.0))
    errors = [torch.zeros_like(each) for each in (input, weight, bias)]
    for start in range(0, len(order), tile):
        ids = order[start : start + tile]
        if prob[counted][:, ids].sum(dim=1).max() > 2.0**-6 * 1.001:
            continue  # certainly kept
        off = (grad[:, ids] - grad[:, ids].mean(dim=1, keepdim=True)).abs()
        errors[0] += off @ (weight[ids] - weight[ids].mean(dim=0)).abs()
        errors[1][ids] = off.t() @ input.abs()
        errors[2][ids] = off.sum(dim=0)
    return errors[0], errors[1], errors[2]


def likeliest_first(input: Tensor, weight: Tensor, bias: Tensor, scale: float) -> Tensor:
    """By average logit plus half of its variance, that about the average over at most 63 tokens."""
    average = scale * (input.mean(dim=0) @ weight.t())
    sampled = scale * (input[:: -(-len(input) // 63)] @ weight.t())
    key = average + 0.5 * ((sampled - average) ** 2).mean(dim=0) + scale * bias
    return key.argsort(descending=True, stable=True)


def check_within(outcome: Outcome, expected: Outcome, bounds: tuple[Tensor, ...]) -> None:
    """Every element within its bound plus rounding; the loss exact; something is left out."""
    for name, allowed in zip(("input", "weight", "bias"), bounds, strict=True):
        got, wanted = getattr(outcome, f"grad_{name}"), getattr(expected, f"grad_{name}")
        rounding = 2e-5 * getattr(expected, f"magnitude_{name}") + 1e-7
        excess = ((got.double() - wanted).abs() - allowed - rounding).max().item()
        assert excess <= 0, f"{name}: {excess:.2e} over the bound"
    plain = replace(outcome, grad_input=None, grad_weight=None, grad_bias=None)
    check_outcome(plain, expected, torch.float32)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("seed", [0, 1])
def test_errors_are_within_the_derived_bound(impl: str, name: str, seed: int) -> None:
    operands = trained(impl, seed=seed)
    options = OPTIONS[name]
    outcome, stats = call_with_stats(operands, {**options, **far(), "impl": impl})
    expected = dense(operands, options)
    tile = backend(impl).tile_rows(operands.input)
    check_within(outcome, expected, bound(operands, options, tile))
    assert stats.tiles_kept is not None and stats.far_mass is not None
    assert stats.far_deviation is not None
    assert float(stats.tiles_kept) < 0.9 and float(stats.far_mass) > 0
    assert 0 < float(stats.far_deviation) <= BUDGET
    # The bound is of use: what was left out is small beside the whole.
    if name in ("plain", "softcap"):
        assert relative_error(outcome.grad_input, expected.grad_input) < BUDGET
        assert relative_error(outcome.grad_weight, expected.grad_weight) < BUDGET


def call_with_stats(
    operands: Operands, options: dict[str, Any]
) -> tuple[Outcome, cce_tp.LossStats]:
    """The gradients, and the statistics that only the far field has."""
    outcome = call(operands, options)
    with torch.no_grad():
        _, stats = cce_tp.linear_cross_entropy(
            operands.input,
            operands.weight,
            operands.target,
            linear_bias=operands.bias,
            **{**options, "return_stats": True},
        )
    return outcome, stats


@pytest.mark.parametrize("impl", IMPLS)
def test_dropping_the_far_field_would_show(impl: str) -> None:
    """The bound is below what leaving the same tiles out would do to dE."""
    operands, options = trained(impl), OPTIONS["plain"]
    expected = dense(operands, options)
    outcome = call(operands, {**options, **far(), "impl": impl})
    dropped = call(
        operands, {**options, "impl": impl, "grad_filter": cce_tp.GradFilter.paper(0.01)}
    )
    error = relative_error(outcome.grad_input, expected.grad_input)
    assert error < 0.5 * relative_error(dropped.grad_input, expected.grad_input)


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_a_budget_of_zero_is_exact(impl: str, dtype: torch.dtype, name: str) -> None:
    problem = Problem(impl=impl, dtype=dtype, bias=True, options=OPTIONS[name])
    operands = problem.build(DEVICE)
    outcome = call(operands, {**OPTIONS[name], **far(0.0), "return_stats": True, "impl": impl})
    native = dense(operands, OPTIONS[name], dtype=dtype) if dtype != torch.float32 else None
    check_outcome(outcome, dense(operands, OPTIONS[name]), dtype, native=native)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("statistics", [True, "entropy"])
def test_statistics_over_the_sorted_vocabulary(impl: str, statistics: Any) -> None:
    """The same as over the unsorted one; of equal logits the lowest id is the largest."""
    operands = trained(impl)
    operands = replace(operands, weight=operands.weight.clone(), bias=None)
    twins = torch.topk(operands.weight @ operands.input.mean(dim=0), 2).indices
    operands.weight[twins[0]] = operands.weight[twins[1]]
    options = {
        "reduction": "none",
        "label_smoothing": 0.1,
        "return_stats": statistics,
        "impl": impl,
    }
    plain = call(operands, options)
    ordered = call(operands, {**options, **far()})
    assert plain.argmax is not None and ordered.argmax is not None
    # The reference's products on a GPU may round the twins differently in different tiles.
    assert torch.equal(plain.argmax, ordered.argmax) or (impl == "torch" and HAS_CUDA)
    for name in ("loss", "lse", "target_logit", "max_logit", "entropy"):
        got, wanted = getattr(ordered, name), getattr(plain, name)
        assert (got is None) == (wanted is None)
        if wanted is not None:
            assert relative_error(got, wanted) < 1e-5, name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_smaller_budget_keeps_more_and_errs_less(impl: str) -> None:
    operands, options = trained(impl), OPTIONS["plain"]
    expected = dense(operands, options)
    shares, errors = [], []
    for budget in (0.2, 1e-4, 0.0):
        outcome, stats = call_with_stats(operands, {**options, **far(budget), "impl": impl})
        assert stats.tiles_kept is not None and stats.far_deviation is not None
        assert float(stats.far_deviation) <= budget
        shares.append(float(stats.tiles_kept))
        errors.append(relative_error(outcome.grad_weight, expected.grad_weight))
    assert shares[0] < shares[1] <= shares[2] and errors[0] > errors[1] >= errors[2]
    assert errors[2] < 5e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_targets_outside_the_kept_tiles_are_exact(impl: str) -> None:
    """Half of the tokens share one unlikely target: its row of dC is theirs, to rounding."""
    operands, options = trained(impl), OPTIONS["plain"]
    rare = int((operands.weight @ operands.input.mean(dim=0)).argsort()[40])
    operands.target[::2] = rare
    expected = dense(operands, options)
    outcome, stats = call_with_stats(operands, {**options, **far(0.2), "impl": impl})
    assert stats.tiles_kept is not None and float(stats.tiles_kept) < 0.9
    tile = backend(impl).tile_rows(operands.input)
    check_within(outcome, expected, bound(operands, options, tile))
    assert outcome.grad_weight is not None and expected.grad_weight is not None
    assert relative_error(outcome.grad_weight[rare], expected.grad_weight[rare]) < 1e-4


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("workspace", [None, 1 << 20], ids=["default", "1MiB"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_with_workspace_caps_and_grad_weight_out(
    impl: str, workspace: int | None, out_dtype: torch.dtype | None
) -> None:
    operands = trained(impl)
    options: dict[str, Any] = {**OPTIONS["everything"], **far(), "impl": impl}
    plain = call(operands, options)
    out = None
    if out_dtype is not None:
        out = torch.zeros_like(operands.weight, dtype=out_dtype)
    outcome = call(operands, {**options, "workspace_bytes": workspace, "grad_weight_out": out})
    assert relative_error(outcome.grad_input, plain.grad_input) < 1e-5
    weight = outcome.grad_weight if out is None else out
    assert (outcome.grad_weight is None) == (out is not None)
    bar = 1e-5 if out_dtype != torch.bfloat16 else 4e-3
    assert relative_error(weight, plain.grad_weight.double()) < bar


@pytest.mark.parametrize("impl", IMPLS)
def test_grad_weight_out_is_added_to(impl: str) -> None:
    operands = trained(impl)
    options: dict[str, Any] = {**OPTIONS["plain"], **far(), "impl": impl}
    plain = call(operands, options)
    before = torch.randn_like(operands.weight)
    out = before.clone()
    call(operands, {**options, "grad_weight_out": out})
    assert plain.grad_weight is not None
    assert relative_error(out, before + plain.grad_weight) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize(
    "wanted", [(True, False, False), (False, True, False), (False, False, True)], ids=str
)
def test_any_gradient_alone(impl: str, wanted: tuple[bool, bool, bool]) -> None:
    operands = trained(impl)
    options: dict[str, Any] = {**OPTIONS["softcap"], **far(), "impl": impl}
    whole, part = call(operands, options), call(operands, options, requires_grad=wanted)
    for name, wants in zip(("grad_input", "grad_weight", "grad_bias"), wanted, strict=True):
        got = getattr(part, name)
        assert (got is not None) == wants
        if wants:
            assert relative_error(got, getattr(whole, name)) < 1e-5


@pytest.mark.parametrize("accumulate", [False, True])
@pytest.mark.parametrize("impl", IMPLS)
def test_rows_that_are_the_targets_of_many_tokens(impl: str, accumulate: bool) -> None:
    """Which are found among all tokens, however far apart."""
    tile = backend(impl).tile_rows(torch.empty(0, device=DEVICE))
    tokens, hidden, vocab = 1100, 24, 4 * tile - 5
    random = torch.Generator().manual_seed(int(accumulate))
    order = torch.randperm(vocab, generator=random)
    kept = torch.tensor([1, 0, 0, 0], dtype=torch.int32)
    weight, input = (torch.randn(n, hidden, generator=random) for n in (len(kept), tokens))
    before = torch.randn(vocab, hidden, generator=random) if accumulate else None
    factor = torch.randn(tokens, generator=random)
    # A few rows for many tokens, a row for each of some, and for the others none.
    place = torch.randint(tile, vocab, (tokens,), generator=random)
    place[: tokens // 2] = place[torch.randint(0, 5, (tokens // 2,), generator=random)]
    row = order[place]
    row[torch.rand(tokens, generator=random) < 0.3] = -1

    expected = (
        torch.zeros(vocab, hidden, dtype=torch.float64) if before is None else before.double()
    )
    sums = torch.zeros(vocab, dtype=torch.float64)
    counts = torch.full((len(kept),), tile).index_fill_(0, torch.tensor([3]), tile - 5)
    far_rows = (weight.double() / counts[:, None])[torch.arange(vocab) // tile]
    far_rows[:tile] = 0.0
    expected.index_add_(0, order, far_rows)
    there = row >= 0
    expected.index_add_(0, row[there], factor[there, None].double() * input[there].double())
    sums.index_add_(0, row[there], factor[there].double())

    is_target = torch.zeros(vocab, dtype=torch.uint8).index_fill_(0, row[there], 1)
    tiles = torch.where(there, place // tile, -1)
    plan = far_field.TargetPlan(row, row, tiles, factor, is_target, factor)
    plan = far_field.TargetPlan(*(each.to(DEVICE) for each in plan))
    gradient = far_field.FarGradient(
        tile=tile,
        order=order.to(DEVICE),
        kept=kept.to(DEVICE),
        weight=weight.to(DEVICE),
        targets=plan,
    )
    out = torch.zeros(vocab, hidden) if before is None else before.clone()
    out, bias = out.to(DEVICE), torch.zeros(vocab, device=DEVICE)
    write = backend(impl).write_far_rows
    whole = (0, vocab)
    write(gradient, input.to(DEVICE), out, None, whole, targets=True, accumulate=accumulate)
    write(gradient, input.to(DEVICE), None, bias, whole, targets=True, accumulate=True)
    assert torch.allclose(out.cpu().double(), expected, rtol=1e-4, atol=1e-4)
    assert torch.allclose(bias.cpu().double(), sums, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("tiles", [3, 1030])
def test_numbers_of_kept_tiles(tiles: int) -> None:
    """As the reference has them; more than a block of the kernel, and with a short last tile."""
    random = torch.Generator().manual_seed(tiles)
    order = torch.randperm(64 * tiles - 7, generator=random).to(DEVICE)
    for first_gap in (1, tiles - 1):
        kept = torch.randint(0, 2, (tiles,), generator=random, dtype=torch.int32)
        kept[:first_gap], kept[first_gap], kept[-1] = 1, 0, 1
        ours, reference = (
            backend(impl).kept_rows(kept.to(DEVICE), order, 64, len(order) // 2)
            for impl in ("triton", "torch")
        )
        assert ours.numbers.tolist() == reference.numbers.tolist()
        run = first_gap if first_gap < tiles - 1 else tiles
        assert reference.numbers.tolist()[::2] == [int(kept.sum()), run]


@pytest.mark.no_poison
@pytest.mark.parametrize("budget", [0.0, 0.3], ids=["exact-in-the-end", "walked"])
def test_the_host_waits_once(budget: float) -> None:
    """For the number of kept tiles; on a GPU nothing else synchronises."""
    operands = trained("triton")
    options = {**OPTIONS["everything"], **far(budget), "impl": "triton"}
    call(operands, options)  # compiled
    copy = far_field._HostCopy
    with mock.patch.object(copy, "wait", autospec=True, side_effect=copy.wait) as wait:
        if HAS_CUDA:
            torch.cuda.synchronize()
            torch.cuda.set_sync_debug_mode("error")
        try:
            call(operands, options)
        finally:
            if HAS_CUDA:
                torch.cuda.set_sync_debug_mode("default")
    assert wait.call_count == 1


@pytest.mark.no_poison
@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_equal_bits(impl: str) -> None:
    operands = trained(impl)
    runs = [call(operands, {**OPTIONS["everything"], **far(), "impl": impl}) for _ in range(2)]
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        assert same_bits(getattr(runs[0], name), getattr(runs[1], name)), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [(0,), (9,)], ids=["no-tokens", "all-ignored"])
def test_nothing_to_learn(impl: str, tokens: tuple[int, ...]) -> None:
    problem = Problem(impl=impl, tokens=tokens, ignored=1.0, bias=True)
    outcome = solve(problem, DEVICE, **far(), return_stats=True)
    for name in ("input", "weight", "bias"):
        assert bool((getattr(outcome, f"grad_{name}") == 0).all()), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("where", ["input", "weight", "target"])
def test_what_is_not_finite_shows(impl: str, where: str) -> None:
    """NaN mass is in no budget: everything is kept, and the exact pass spreads it."""
    operands = trained(impl)
    if where == "target":
        operands.target[7] = 10**6
    else:
        getattr(operands, where)[7] = torch.inf
    options = {**OPTIONS["plain"], "impl": impl}
    got = call(operands, {**options, **far()})
    exact = call(operands, options)
    for name in ("loss", "grad_input", "grad_weight"):
        expected = getattr(exact, name)
        assert not bool(expected.isfinite().all())
        assert torch.equal(getattr(got, name).isnan(), expected.isnan()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_without_gradients_nothing_is_sorted(impl: str) -> None:
    operands = trained(impl)
    weight = operands.weight.requires_grad_()  # as a parameter is, in evaluation too
    with torch.no_grad(), mock.patch.object(far_field, "sorted_statistics") as ordered:
        losses = [
            cce_tp.linear_cross_entropy(operands.input, weight, operands.target, impl=impl, **more)
            for more in ({}, far())
        ]
    assert not ordered.called and same_bits(losses[0], losses[1])


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("scale", [0.0, 1e-4], ids=["zero", "tiny"])
def test_a_head_that_says_nothing_yet(impl: str, scale: float) -> None:
    """Every tile could be left: one is kept all the same."""
    tile = backend(impl).tile_rows(torch.empty(0, device=DEVICE))
    vocab, random = 72 * tile, torch.Generator().manual_seed(0)
    weight = scale * torch.randn(vocab, 8, generator=random)
    operands = Operands(
        input=torch.randn(20, 8, generator=random).to(DEVICE),
        weight=weight.to(DEVICE),
        bias=None,
        target=torch.randint(0, vocab, (20,), generator=random).to(DEVICE),
        upstream=torch.ones(20, device=DEVICE),
    )
    outcome, stats = call_with_stats(operands, {**OPTIONS["plain"], **far(), "impl": impl})
    assert stats.tiles_kept is not None and 0 < float(stats.tiles_kept) < 0.5
    expected = dense(operands, OPTIONS["plain"])
    assert relative_error(outcome.grad_weight, expected.grad_weight) < 1e-3
    assert outcome.grad_input is not None and expected.grad_input is not None
    assert float((outcome.grad_input - expected.grad_input).abs().max()) <= 2e-3 * scale


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("heavy", [0.1, 12.0], ids=["fewer-kept", "more-kept"])
@pytest.mark.parametrize("case", ["biased", "accumulated", "far-below-0"])
def test_columns_taken_before_their_number_is_known(impl: str, heavy: float, case: str) -> None:
    """As without them, be the kept rows fewer or more; also those in rows of dC that are lent, with
    a bias that takes no gradient, and where a logit of 0 would have an infinite probability."""
    tile = backend(impl).tile_rows(torch.empty(0, device=DEVICE))
    vocab, rows, random = 64 * tile, int(heavy * tile), torch.Generator().manual_seed(1)
    weight = 0.1 * torch.randn(vocab, 24, generator=random)
    # The last ones among them.
    ids = torch.cat([torch.randperm(vocab, generator=random)[:rows], vocab - 1 - torch.arange(9)])
    weight[ids] += 2 + 0.3 * torch.randn(len(ids), 24, generator=random)
    input = 0.5 + 0.2 * torch.randn(40, 24, generator=random)
    target = torch.randint(0, vocab, (40,), generator=random).to(DEVICE)
    into = case == "accumulated"
    bias = None
    if case == "biased":
        bias = (0.3 * torch.randn(vocab, generator=random)).to(DEVICE)
    if case == "far-below-0":
        input[:, 0], weight[:, 0] = 1.0, -300.0

    def gradients() -> tuple[Tensor, Tensor, float]:
        leaves = [each.clone().to(DEVICE).requires_grad_() for each in (input, weight)]
        out = torch.ones(vocab, 24, device=DEVICE) if into else None
        loss, stats = cce_tp.linear_cross_entropy(
            *leaves, target, linear_bias=bias, impl=impl, return_stats=True, grad_weight_out=out,
            **far(0.3),
        )  # fmt: skip
        loss.backward()
        dE, dC = (each.grad for each in leaves)
        assert dE is not None and stats.tiles_kept is not None
        made = out if dC is None else dC
        assert made is not None
        return dE, made, float(stats.tiles_kept) * 64 * tile

    # The exact pass would write over what was taken.
    exact = mock.patch.object(backward._BackwardPass, "_walk_all", side_effect=AssertionError)
    with mock.patch.object(backward, "plan_head", wraps=backward.plan_head) as plan, exact:
        taken = gradients()
    # plan_head is a cached function: asked once more, it answers the same.
    head = backward.plan_head(*plan.call_args.args)
    assert head is not None and (taken[2] < head.columns) == (heavy < 1)
    with mock.patch.object(backward, "plan_head", return_value=None):
        without = gradients()
    assert relative_error(taken[0], without[0]) < 1e-5
    assert relative_error(taken[1], without[1]) < 1e-5


@pytest.mark.parametrize("impl", IMPLS)
def test_an_unlikely_shard_is_as_uneven_as_any(pool: RankPool, impl: str) -> None:
    """60 nats below the other shard: its masses are tiny, but not even."""
    answers = pool.run(unlikely_shard, impl, ranks=2)
    for outcome, stats in answers:
        assert outcome.grad_weight is not None and bool(outcome.grad_weight.isfinite().all())
        assert same_bits(outcome.grad_input, answers[0][0].grad_input)
        assert stats.far_deviation is not None and 0 <= float(stats.far_deviation) <= BUDGET


def unlikely_shard(rank: Rank, impl: str) -> tuple[Outcome, cce_tp.LossStats]:
    tile = backend(impl).tile_rows(torch.empty(0, device=rank.device))
    whole = trained(impl, device=rank.device)
    rows = 2 * tile
    bias = whole.bias[:rows] - 60.0 * rank.rank
    shard = cce_tp.VocabShard(rank.rank * rows, (rank.rank + 1) * rows, 2 * rows, rank.group)
    target = torch.where(whole.target >= 0, whole.target % (2 * rows), whole.target)
    operands = replace(whole, weight=whole.weight[:rows], bias=bias, target=target)
    return call_with_stats(
        operands, {**OPTIONS["plain"], **far(), "impl": impl, "vocab_shard": shard}
    )


def test_compiled_with_slopes() -> None:
    """Fake and real tensors agree in strides too."""
    operands = trained("torch", tokens=9)
    options = {**OPTIONS["everything"], **far(), "impl": "torch"}
    call_compiled = torch.compile(
        lambda e, c, t: cce_tp.linear_cross_entropy(e, c, t, **options).sum(), backend="inductor"
    )
    grads = []
    for function in (
        lambda e, c, t: cce_tp.linear_cross_entropy(e, c, t, **options).sum(),
        call_compiled,
    ):
        input = operands.input.clone().requires_grad_()
        weight = operands.weight.clone().requires_grad_()
        loss = function(input, weight, operands.target)
        grads.append(torch.autograd.grad(loss, (input, weight)))
    for got, wanted in zip(*grads, strict=True):
        assert relative_error(got, wanted) < 1e-6


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_with_a_budget_of_zero(pool: RankPool, impl: str, ranks: int) -> None:
    problem = Problem(impl=impl, bias=True, options=OPTIONS["everything"])
    check_sharded(pool, problem, even_bounds(problem.vocab, ranks), **far(0.0))


def far_shard(
    rank: Rank, impl: str, bounds: list[tuple[int, int]], name: str
) -> tuple[Outcome, cce_tp.LossStats]:
    operands = restrict(trained(impl, device=rank.device), *bounds[rank.rank])
    shard = shard_of(rank, bounds, bounds[-1][1])
    options = {**OPTIONS[name], **far(), "impl": impl, "vocab_shard": shard}
    return call_with_stats(operands, options)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_sharded_errors_are_within_the_bound(pool: RankPool, impl: str, name: str) -> None:
    """Order and tiles are local, masses global; an empty shard and one of one row take part."""
    operands = trained(impl, device="cpu")
    vocab = len(operands.weight)
    bounds = [(0, vocab // 2), (vocab // 2, vocab // 2), (vocab // 2, vocab // 2 + 1)]
    bounds.append((vocab // 2 + 1, vocab))
    answers = pool.run(far_shard, impl, bounds, name, ranks=4)
    expected = dense(operands, OPTIONS[name])
    tile = backend(impl).tile_rows(operands.input)
    parts = [bound(operands, OPTIONS[name], tile, slice(*each)) for each in bounds]
    whole = (sum(p[0] for p in parts), torch.cat([p[1] for p in parts]))
    joined = join_shards([outcome for outcome, _ in answers], bounds)
    check_within(joined, expected, (*whole, torch.cat([p[2] for p in parts])))
    first = answers[0][1]
    assert first.tiles_kept is not None and first.far_deviation is not None
    assert 0 < float(first.far_deviation) <= BUDGET and float(first.tiles_kept) < 1
    for _, stats in answers[1:]:
        for got, wanted in zip(stats, first, strict=True):
            assert got is None or same_bits(got, wanted)


def test_sequence_parallel(pool: RankPool) -> None:
    """The same bits as with the whole input on every rank."""
    problem = Problem(tokens=(72,), vocab=700, bias=True, options=OPTIONS["plain"])
    bounds = even_bounds(problem.vocab, 2)
    whole = solve_sharded(pool, problem, bounds, **far(0.3))
    local = pool.run(_sequence_parallel, problem, bounds, ranks=2)
    gathered = torch.cat([outcome.grad_input for outcome in local])
    assert whole[0].grad_input is not None
    assert relative_error(gathered, whole[0].grad_input) < 1e-6
    for got, wanted in zip(local, whole, strict=True):
        assert same_bits(got.grad_weight, wanted.grad_weight)


def _sequence_parallel(rank: Rank, problem: Problem, bounds: list[tuple[int, int]]) -> Outcome:
    operands = restrict(problem.build(rank.device), *bounds[rank.rank])
    share = problem.num_tokens // len(bounds)
    mine = slice(rank.rank * share, (rank.rank + 1) * share)
    shard = shard_of(rank, bounds, problem.vocab, sequence_parallel=True)
    options = {**problem.options, **far(0.3), "impl": problem.impl, "vocab_shard": shard}
    return call(replace(operands, input=operands.input[mine]), options)


@pytest.mark.parametrize("impl", IMPLS)
def test_the_exact_pass_has_the_memory_of_what_it_replaces(impl: str) -> None:
    """What the backward pass of the far field made is gone before the exact one is planned."""
    operands = Problem(impl=impl).build(DEVICE)
    made: list[weakref.ref[Any]] = []
    init, walk_all = far_field.FarBackward.__init__, backward._BackwardPass._walk_all

    def spy(self: Any, *args: Any, **options: Any) -> None:
        init(self, *args, **options)
        made.append(weakref.ref(self))

    def exact(self: Any, workspace_bytes: int) -> None:
        assert [each() for each in made] == [None]
        with mock.patch.object(self, "left_bytes", 0):
            nothing_left = self._sizes().fixed
        assert 0 < self.left_bytes == self._sizes().fixed - nothing_left
        walk_all(self, workspace_bytes)

    with (
        mock.patch.object(far_field.FarBackward, "__init__", spy),
        mock.patch.object(backward._BackwardPass, "_walk_all", exact),
    ):
        call(operands, {"impl": impl, **far(0.0)})
    assert made


WALKS: dict[str, tuple[Walk, ...]] = {
    "strips": (TokenWalk(chunk=60, strip=48, weight=True),),
    "loan": (TokenWalk(chunk=60, strip=48, weight=True, loan=True),),
    "loan-and-borrowed": (TokenWalk(chunk=60, strip=48, weight=True, loan=True, borrow=True),),
    "both-cut": (TokenWalk(chunk=32, strip=96, weight=True),),
    "two-passes": (TokenWalk(chunk=32, strip=96, weight=False), StripWalk(96, 32)),
}


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("name", WALKS)
def test_each_walk(impl: str, name: str) -> None:
    """The walk decides nothing but rounding."""
    dtype = torch.float16 if "borrow" in name else torch.float32
    operands = trained(impl, tokens=60, hidden=96, dtype=dtype)
    options: dict[str, Any] = {**OPTIONS["plain"], **far(), "impl": impl}
    expected = call(operands, options)
    with mock.patch.multiple(backward, plan_backward=lambda *_: WALKS[name], pays=lambda *_: True):
        outcome = call(operands, options)
    tolerance = 5e-3 if dtype == torch.float16 else 1e-5
    for gradient in ("grad_input", "grad_weight", "grad_bias"):
        got, wanted = getattr(outcome, gradient), getattr(expected, gradient)
        assert relative_error(got, wanted) < tolerance, gradient


@pytest.mark.parametrize(("impl", "dtype"), [
    ("torch", torch.bfloat16), ("triton", torch.bfloat16 if HAS_CUDA else torch.float16),
])  # fmt: skip
@pytest.mark.parametrize("name", [*WALKS, *(["kept-logits"] if HAS_CUDA else [])])
def test_rounding_the_targets_gradient_is_made_good(
    impl: str, dtype: torch.dtype, name: str
) -> None:
    """The error of dE is that of rounding dE, where the exact pass has that of rounding G, too."""
    operands, options = trained(impl, tokens=60, hidden=96, dtype=dtype), OPTIONS["everything"]
    expected = dense(operands, options).grad_input
    assert expected is not None
    exact = call(operands, {**options, "impl": impl})
    filtered = {**options, **far(0.0), "impl": impl}
    walk = {"plan_backward": lambda *_: WALKS[name]}
    if name == "kept-logits":
        filtered["keep_logits_in_grad"], walk = True, {}
    with mock.patch.multiple(backward, pays=mock.Mock(return_value=True), **walk):
        outcome = call(operands, filtered)
    rounding = relative_error(expected.to(dtype), expected)
    assert relative_error(outcome.grad_input, expected) < 1.15 * rounding
    assert relative_error(exact.grad_input, expected) > 1.3 * rounding


@pytest.mark.parametrize(("impl", "dtype"), [
    ("torch", torch.bfloat16), ("triton", torch.bfloat16 if HAS_CUDA else torch.float16),
])  # fmt: skip
def test_a_masked_token_has_no_remainder(impl: str, dtype: torch.dtype) -> None:
    """Its gradient is exactly 0 whatever its hidden state is, and so is what is made good."""
    operands = trained(impl, tokens=60, hidden=96, dtype=dtype)
    masked = operands.target == -100
    assert bool(masked.any())
    operands.target[masked] = ignored = int(operands.target[~masked][0])
    operands.input[masked] = torch.nan
    options: dict[str, Any] = {"ignore_index": ignored, "reduction": "none", "impl": impl}
    with mock.patch.object(backward, "pays", return_value=True) as pays:
        outcome = call(operands, {**options, **far(0.0)})
    assert pays.called and outcome.grad_input is not None
    masked = operands.target == ignored
    assert bool((outcome.grad_input[masked] == 0).all())
    assert bool(outcome.grad_input[~masked].isfinite().all())


def test_rows_of_the_memory_of_dc_that_holds_g_are_written_at_the_end() -> None:
    """Some kept rows lie in the loan: without holding them back they would be overwritten."""
    operands = trained("torch", tokens=60, hidden=96)
    likely = likeliest_first(
        operands.input.double(), operands.weight.double(), operands.bias.double(), 1.0
    )
    assert bool((likely[:64] >= len(likely) - len(likely) // 4).any())
    walks = mock.patch.object(backward, "plan_backward", lambda *_: WALKS["loan"])
    with walks, mock.patch.object(backward, "pays", lambda *_: True):
        outcome = call(operands, {**OPTIONS["plain"], **far(), "impl": "torch"})
    tile = backend("torch").tile_rows(operands.input)
    expected = dense(operands, OPTIONS["plain"])
    check_within(outcome, expected, bound(operands, OPTIONS["plain"], tile))


def kept_sizes(share: float, hidden: int, tokens: int = 8192) -> BackwardSizes:
    """A share of the rows of `tokens` x `hidden` x 131072 in bf16 is kept."""
    columns = int(share * VOCAB)
    return BackwardSizes(
        tokens=tokens,
        vocab=columns,
        hidden=hidden,
        element=2,
        token_row=4 * hidden,
        single_row=4 * hidden,
        can_borrow=True,
        token_tile=1,
        can_hold=False,
        strip_row=2 * hidden,
        weight_row=2 * hidden,
        weight_accumulator=4 * hidden,
        weight_accumulates=False,
        lent_row=0,
        gradient_row=2 * tokens,
        loan_columns=VOCAB // 4 * hidden // tokens,
        loan_bytes=int(0.05 * columns) * 2 * hidden,
        sequential=True,
        fixed=27 << 20,
        known=0,
        need_input=True,
        need_weight=True,
    )


VOCAB = 131072


@pytest.mark.parametrize("kept", [0.05, 0.1, 0.15, 0.3])
def test_the_planner_takes_the_loan_where_strips_would_be_narrow(kept: float) -> None:
    """Within 5% of the logits."""
    sizes = kept_sizes(kept, 2304)
    workspace = default_workspace_bytes(sizes.tokens, sizes.hidden, VOCAB, filtered=True)
    (walk,) = plan_backward(sizes, workspace)
    assert isinstance(walk, TokenWalk) and walk.loan and walk.chunk == sizes.tokens
    assert walk.strip >= min(sizes.vocab, 6144)


@pytest.mark.parametrize(("kept", "hidden", "walked"), [
    (0.1, 2304, True), (0.6, 2304, True), (0.9, 2304, False),
    (0.1, 4096, True), (0.6, 4096, False),
])  # fmt: skip
def test_what_would_be_walked_in_narrow_strips_is_not_walked(
    kept: float, hidden: int, walked: bool
) -> None:
    """At D 4096 the sum of dE is read and written again for every few hundred rows."""
    sizes = kept_sizes(kept, hidden)
    workspace = default_workspace_bytes(sizes.tokens, hidden, VOCAB, filtered=True)
    walk = plan_rest(sizes, workspace, True)
    assert pays(sizes, (walk,), VOCAB) == walked, walk


@pytest.mark.parametrize("tokens", [512, 1024, 2048])
def test_the_default_workspace_holds_wide_strips_where_tokens_are_few(tokens: int) -> None:
    """5% of their logits, or 16 MiB, make hundreds of narrow ones."""
    sizes = kept_sizes(0.3, 4096, tokens)._replace(fixed=16 << 20)
    exact = default_workspace_bytes(tokens, 4096, VOCAB)
    filtered = default_workspace_bytes(tokens, 4096, VOCAB, filtered=True)
    assert exact < filtered == 96 << 20

    def widths(workspace: int) -> list[int]:
        return [each.strip for each in plan_backward(sizes, workspace)]

    assert min(widths(exact)) < 1024 <= min(widths(filtered))


def test_the_default_workspace_is_that_of_the_filter() -> None:
    operands, paper = trained("torch", tokens=24), {"grad_filter": cce_tp.GradFilter.paper()}
    for options, filtered in (({}, False), (far(), True), (paper, True)):
        name, real = "default_workspace_bytes", default_workspace_bytes
        with mock.patch.object(ops, name, side_effect=real) as asked:
            call(operands, {**OPTIONS["plain"], **options, "impl": "torch"})
        passes = [each.kwargs["filtered"] for each in asked.mock_calls]
        # The paper's filter is of the backward pass alone.
        assert passes == [filtered and options is not paper, filtered]


def test_ranks_share_the_budget() -> None:
    """By rows a shard of rare ids may leave more than by its mass, and all together no more."""
    shares = [RankBudget.of(0.04, rows, 1000) for rows in (700, 200, 100)]
    masses = [0.9, 0.0999, 0.0001]
    parts = [each.by_mass * mass + each.by_rows for each, mass in zip(shares, masses, strict=True)]
    assert sum(parts) == pytest.approx(0.04) and parts[2] > 100 * 0.04 * masses[2]
    assert RankBudget.of(0.0, 100, 1000).is_zero and not shares[0].is_zero


def test_a_shard_of_rare_ids_keeps_few_tiles(pool: RankPool) -> None:
    """Its little mass is uneven, so by that alone it would keep most of them."""
    answers = pool.run(_rare_ids, ranks=2)
    assert answers[0] == answers[1] < 0.3, answers


def _rare_ids(rank: Rank) -> float:
    random = torch.Generator().manual_seed(3)
    weight = torch.randn(8192, 24, generator=random)
    weight[:, 0] = 0.0
    weight[:40, 0] = 3.0  # among the ids of rank 0
    input = torch.randn(70, 24, generator=random) * 0.5
    input[:, 0] = 4.0
    target = torch.randint(0, 4096, (70,), generator=random)
    shard = shard_of(rank, even_bounds(8192, 2), 8192)
    mine = weight[rank.rank * 4096 : (rank.rank + 1) * 4096].clone().to(rank.device)
    _, stats = cce_tp.linear_cross_entropy(
        input.to(rank.device).requires_grad_(),
        mine.requires_grad_(),
        target.to(rank.device),
        vocab_shard=shard,
        return_stats=True,
        impl="torch",
        **far(),
    )
    assert stats.tiles_kept is not None
    return float(stats.tiles_kept)
