"""GradFilter.paper: what it may leave out, what it must keep, and that it sorts the vocabulary."""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import cce_tp
import cce_tp.backward
from cce_tp.kernels import backward
from cce_tp.workspace import TokenWalk
from oracle import Operands, Outcome, dense, dense_logits
from problems import Problem, call, even_bounds, join_shards, restrict, same_bits, solve
from ranks import Rank, RankPool
from sharding_cases import check_sharded, shard_of, solve_sharded
from tolerance import check_outcome, relative_error
from variants import DEVICE, IMPLS, LOW_IMPL_DTYPES, MAIN_IMPL_DTYPES

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.3,
    "logit_softcap": 9.0,
}


def paper(eps: float) -> dict[str, Any]:
    return {"grad_filter": cce_tp.GradFilter.paper(eps=eps)}


def slack(operands: Operands, options: dict[str, Any], eps: float) -> tuple[Tensor, ...]:
    """Largest error of each element of (dE, dC, dbias) if every |d loss_n / d x_nv| < eps is 0."""
    input = operands.input.double().reshape(-1, operands.input.shape[-1])
    weight, target = operands.weight.double(), operands.target.reshape(-1)
    x = dense_logits(input, weight, operands.bias.double(), options)
    softcap, scale = options.get("logit_softcap"), abs(options.get("logit_scale", 1.0))
    smoothing, z_loss = options.get("label_smoothing", 0.0), options.get("z_loss", 0.0)
    lse = torch.logsumexp(x, dim=1, keepdim=True)
    grad = x.softmax(dim=1) * (1 + 2 * z_loss * lse) - smoothing / x.shape[1]
    known = target >= 0
    grad[known, target[known]] -= 1 - smoothing
    if softcap is not None:
        grad = grad * (1 - (x / softcap) ** 2)
    small = torch.where(grad.abs() < eps, grad.abs(), 0.0)
    upstream = torch.where(known, operands.upstream.double().abs(), 0.0)
    small = small * (scale * upstream)[:, None]
    return small @ weight.abs(), small.t() @ input.abs(), small.sum(dim=0)


def check_filtered(outcome: Outcome, operands: Operands, options: dict, eps: float) -> None:
    """Every element is within its own bound (plus rounding), and the loss is exact."""
    expected = dense(operands, options)
    names = ("input", "weight", "bias")
    for name, bound in zip(names, slack(operands, options, eps), strict=True):
        got, wanted = getattr(outcome, f"grad_{name}"), getattr(expected, f"grad_{name}")
        rounding = 1e-5 * getattr(expected, f"magnitude_{name}") + 1e-7
        excess = ((got.double() - wanted).abs() - bound - rounding).max().item()
        assert excess <= 0, f"{name}: {excess:.2e} over the bound"
    plain = replace(outcome, grad_input=None, grad_weight=None, grad_bias=None)
    check_outcome(plain, expected, torch.float32)


def confident(impl: str, vocab: int = 700, tokens: int = 150, device: str = DEVICE) -> Operands:
    """Tokens that know their target: most of the softmax is far below any threshold."""
    problem = Problem(
        impl=impl,
        tokens=(tokens,),
        vocab=vocab,
        hidden=16,
        bias=True,
        spread=1.0,
        options={"reduction": "none"},
    )
    operands = problem.build(device)
    known = operands.target >= 0
    rows = operands.weight[torch.where(known, operands.target, 0)]
    return replace(operands, input=operands.input * 0.3 + 8.0 * rows)


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("eps", [2.0**-12, 2.0**-7, 0.05], ids=str)
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_errors_stay_within_what_the_threshold_allows(impl: str, eps: float, name: str) -> None:
    options = EVERYTHING if name == "everything" else {"reduction": "none"}
    operands = confident(impl, vocab=300 if impl == "triton" else 700)
    outcome = call(operands, {**options, **paper(eps), "impl": impl})
    check_filtered(outcome, operands, options, eps)


@pytest.mark.parametrize(("impl", "dtype"), MAIN_IMPL_DTYPES)
def test_a_threshold_of_zero_is_exact(impl: str, dtype: torch.dtype) -> None:
    problem = Problem(impl=impl, dtype=dtype, bias=True, options=EVERYTHING)
    operands = problem.build(DEVICE)
    outcome = call(operands, {**EVERYTHING, **paper(0.0), "impl": impl})
    native = dense(operands, EVERYTHING, dtype=dtype) if dtype != torch.float32 else None
    check_outcome(outcome, dense(operands, EVERYTHING), dtype, native=native)


@pytest.mark.parametrize("impl", IMPLS)
def test_a_huge_threshold_leaves_nothing(impl: str) -> None:
    problem = Problem(impl=impl, bias=True, options={"reduction": "none"})
    outcome = solve(problem, DEVICE, **paper(100.0))
    for name in ("input", "weight", "bias"):
        assert bool((getattr(outcome, f"grad_{name}") == 0).all()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_choice_does_not_depend_on_the_scale_of_the_loss(impl: str) -> None:
    """The threshold is for the token's own loss, before the upstream gradient."""
    operands = confident(impl, vocab=300)
    ones = torch.ones_like(operands.upstream)
    outcomes = [
        call(replace(operands, upstream=factor * ones), {**EVERYTHING, **paper(0.01), "impl": impl})
        for factor in (1.0, 2.0**-14)
    ]
    for name in ("input", "weight", "bias"):
        large, small = (getattr(outcome, f"grad_{name}") for outcome in outcomes)
        assert same_bits(large * 2.0**-14, small), name


@pytest.mark.parametrize("impl", IMPLS)
def test_the_vocabulary_is_sorted_first(impl: str) -> None:
    """One row in eight is likely: in natural order every tile has some of them; sorted, few do."""
    tokens, vocab, hidden = 64, 2048, 8
    input = torch.ones(tokens, hidden, device=DEVICE)
    weight = torch.full((vocab, hidden), -2.0, device=DEVICE)
    weight[::8] = 1.0
    target = 8 * torch.arange(tokens, device=DEVICE)
    operands = Operands(
        input=input,
        weight=weight,
        bias=None,
        target=target,
        upstream=torch.ones(tokens, device=DEVICE),
    )
    options = {"reduction": "none", **paper(1e-4), "impl": impl}
    outcome = call(operands, options)
    assert outcome.grad_weight is not None
    zero_rows = (outcome.grad_weight == 0).all(dim=1)
    assert float(zero_rows.float().mean()) > 0.6
    assert not bool(zero_rows[::8].any())
    expected = dense(operands, {"reduction": "none"})
    assert relative_error(outcome.grad_weight, expected.grad_weight) < 1e-3


@pytest.mark.once
@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("workspace", [None, 1 << 20], ids=["default", "1MiB"])
@pytest.mark.parametrize("out_dtype", [None, torch.float32, torch.bfloat16], ids=str)
def test_with_workspace_caps_and_grad_weight_out(
    impl: str, workspace: int | None, out_dtype: torch.dtype | None
) -> None:
    operands = confident(impl, vocab=300)
    options: dict[str, Any] = {**EVERYTHING, **paper(2.0**-12), "impl": impl}
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


@pytest.mark.no_poison
@pytest.mark.parametrize("impl", IMPLS)
def test_two_runs_give_equal_bits(impl: str) -> None:
    operands = confident(impl, vocab=300)
    runs = [call(operands, {**EVERYTHING, **paper(0.01), "impl": impl}) for _ in range(2)]
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        assert same_bits(getattr(runs[0], name), getattr(runs[1], name)), name


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("tokens", [(0,), (9,)], ids=["no-tokens", "all-ignored"])
def test_nothing_to_learn(impl: str, tokens: tuple[int, ...]) -> None:
    problem = Problem(impl=impl, tokens=tokens, ignored=1.0, bias=True)
    outcome = solve(problem, DEVICE, **paper(2.0**-12))
    for name in ("input", "weight", "bias"):
        assert bool((getattr(outcome, f"grad_{name}") == 0).all()), name


@pytest.mark.parametrize("impl", IMPLS)
def test_a_target_that_is_no_id_still_shows(impl: str) -> None:
    """NaN is not small: the token's tiles are kept."""
    problem = Problem(impl=impl, ignored=0.0, zero_upstream=False, options={"reduction": "none"})
    operands = problem.build(DEVICE)
    operands.target[5] = 5000
    outcome = call(operands, {"reduction": "none", **paper(0.5), "impl": impl})
    assert bool(outcome.loss[5].isnan())
    assert outcome.grad_input is not None and bool(outcome.grad_input[5].isnan().all())


@pytest.mark.parametrize("of_input", [True, False], ids=["dE", "dC"])
@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
def test_products_over_the_kept_tiles(of_input: bool, accumulate: bool) -> None:
    """More tiles than are listed at a time along the sum, rows of tiles of which none or all are
    kept, and a last tile that is cut."""
    tile, hidden, many, few = 16, 24, 150 * 16 - 5, 3 * 16 - 7
    tokens, vocab = (few, many) if of_input else (many, few)
    mask = (torch.rand(-(-tokens // tile), -(-vocab // tile)) < 0.3).int()
    along = mask if of_input else mask.t()
    along[0], along[1] = 0, 1
    elements = mask.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:tokens, :vocab]
    grad_VN = (torch.randn(tokens, vocab) * elements).t().contiguous()
    other = torch.randn(vocab if of_input else tokens, hidden)
    out = torch.randn(tokens if of_input else vocab, hidden)
    factor = grad_VN.t() if of_input else grad_VN
    expected = factor.double() @ other.double() + (out.double() if accumulate else 0.0)
    found, parts = out.to(DEVICE), out.clone().to(DEVICE)
    kept = backward.KeptTiles(mask.to(DEVICE), tile, tile)
    operands = grad_VN.to(DEVICE), other.to(DEVICE)
    backward.sparse_product(found, *operands, kept, of_input=of_input, accumulate=accumulate)
    assert relative_error(found.cpu(), expected) < 1e-6
    if not accumulate:
        assert bool((found[:tile] == 0).all())
    if of_input:
        # The first tokens, whole tiles of them, and the others by themselves: the same bits.
        cut = 2 * tile
        for start, stop in ((0, cut), (cut, tokens)):
            backward.sparse_product(
                parts[start:stop], operands[0][:, start:stop], operands[1],
                kept.tokens(start, stop), of_input=True, accumulate=accumulate,
            )  # fmt: skip
        assert torch.equal(parts, found)


@pytest.mark.parametrize("accumulate", [False, True], ids=["written", "added"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_rows_of_dc_go_where_they_belong(dtype: torch.dtype, accumulate: bool) -> None:
    """By a list, times a factor, rounded once; other rows are left alone."""
    tile, tokens, vocab, hidden = 16, 70, 45, 24
    mask = (torch.rand(-(-tokens // tile), -(-vocab // tile)) < 0.5).int()
    elements = mask.repeat_interleave(tile, 0).repeat_interleave(tile, 1)[:tokens, :vocab]
    grad_VN = (torch.randn(tokens, vocab) * elements).t().contiguous().to(dtype)
    input = torch.randn(tokens, hidden).to(dtype)
    rows, factor = torch.randperm(100)[:vocab], torch.tensor(0.25)
    before = torch.randn(100, hidden).to(dtype)
    found = before.clone().to(DEVICE)
    backward.sparse_product(
        found, grad_VN.to(DEVICE), input.to(DEVICE),
        backward.KeptTiles(mask.to(DEVICE), tile, tile), of_input=False, accumulate=accumulate,
        rows=rows.to(DEVICE), factor=factor.to(DEVICE),
    )  # fmt: skip
    expected = before.double()
    product = 0.25 * grad_VN.double() @ input.double()
    expected[rows] = product + (expected[rows] if accumulate else 0.0)
    others = torch.ones(100, dtype=torch.bool).index_fill(0, rows, False)
    assert torch.equal(found.cpu()[others], before[others])
    bound = torch.finfo(dtype).eps * expected.abs() / 2 + 1e-5
    assert bool(((found.cpu().double() - expected).abs() <= bound).all())


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("into", [False, True], ids=["returned", "added"])
def test_half_of_the_sum_of_de_in_its_own_memory(impl: str, dtype: torch.dtype, into: bool) -> None:
    """The same bits as in memory apart. The halves keep other tiles, if the kernels choose them."""
    problem = Problem(
        impl=impl, dtype=dtype, tokens=(256,), vocab=300, hidden=40, bias=True, spread=2.0
    )
    operands, made, masks = problem.build(DEVICE), [], []
    operands.target[:128], operands.target[128:] = 3, 200
    operands.input[:128] *= 0.2
    operands.input[128:] *= 2.0
    cut = backward.KeptTiles.tokens

    def tokens(self: backward.KeptTiles, start: int, stop: int) -> backward.KeptTiles:
        found = cut(self, start, stop)
        masks.append(found.mask.amax(0).cpu())
        return found

    for borrow in (False, True):
        walk = TokenWalk(chunk=256, strip=128, weight=True, borrow=borrow)
        options = {"impl": impl, **paper(2.0**-3)}
        if into:
            options["grad_weight_out"] = torch.ones(300, 40, device=DEVICE)
        with (
            mock.patch.object(cce_tp.backward, "plan_backward", lambda *_, w=walk: (w,)),
            mock.patch.object(backward.KeptTiles, "tokens", tokens),
        ):
            outcome = call(operands, options)
        made.append((outcome, options.get("grad_weight_out", outcome.grad_weight)))
    (apart, weight_apart), (inside, weight_inside) = made
    assert same_bits(apart.grad_input, inside.grad_input)
    assert same_bits(weight_apart, weight_inside)
    assert len(masks) % 2 == 0 and bool(masks) == (impl == "triton")
    assert not masks or any(not torch.equal(*masks[i : i + 2]) for i in range(0, len(masks), 2))
    assert bool((apart.grad_input != 0).any()) and bool((weight_apart != 0).any())


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("ranks", [2, 3])
def test_sharded_with_a_threshold_of_zero(pool: RankPool, impl: str, ranks: int) -> None:
    problem = Problem(impl=impl, bias=True, options=EVERYTHING)
    check_sharded(pool, problem, even_bounds(problem.vocab, ranks), **paper(0.0))


def filtered_shard(rank: Rank, impl: str, bounds: list[tuple[int, int]], eps: float) -> Outcome:
    operands = confident(impl, vocab=bounds[-1][1], device=rank.device)
    shard = shard_of(rank, bounds, bounds[-1][1])
    options = {**EVERYTHING, **paper(eps), "impl": impl, "vocab_shard": shard}
    return call(restrict(operands, *bounds[rank.rank]), options)


@pytest.mark.parametrize("impl", IMPLS)
def test_sharded_errors_stay_within_what_the_threshold_allows(pool: RankPool, impl: str) -> None:
    """The threshold meets the global softmax: a shard of unlikely rows may be left out whole."""
    bounds = [(0, 40), (40, 41), (41, 300)]
    outcomes = pool.run(filtered_shard, impl, bounds, 0.01, ranks=3)
    joined = join_shards(outcomes, bounds)
    check_filtered(joined, confident(impl, vocab=300, device="cpu"), EVERYTHING, 0.01)


def test_an_empty_shard(pool: RankPool) -> None:
    problem = Problem(bias=True, options=EVERYTHING)
    bounds = [(0, 100), (100, 100), (100, 203)]
    joined = join_shards(solve_sharded(pool, problem, bounds, **paper(0.0)), bounds)
    check_outcome(joined, dense(problem.build(), EVERYTHING), torch.float32)
