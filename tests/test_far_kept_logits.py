"""keep_logits_in_grad with the far field: logits of the first rows of the order in dC's memory.

Legend: N tokens, V vocabulary rows, D hidden size, T tiles of the sorted vocabulary, B rows per
tile.
"""

from __future__ import annotations

import contextlib
import weakref
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import replace
from typing import Any, NamedTuple
from unittest import mock

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch import Tensor

import cce_tp
from backward_passes import operands_as_they_are
from cce_tp import backward, far_field, ops
from cce_tp.backend import backend
from cce_tp.far_field import FarField, LateRows, RankBudget
from cce_tp.kernels import tuning
from cce_tp.problem import LocalLogits
from cce_tp.workspace import (
    ALIGNMENT,
    BackwardSizes,
    RunPlan,
    TokenWalk,
    default_workspace_bytes,
    for_buffers,
    gradient_pitch,
    pays,
    plan_run,
    rows_ahead,
)
from oracle import Operands, Outcome, dense
from problems import call, even_bounds, restrict, same_bits
from ranks import Rank, RankPool
from sharding_cases import shard_of
from test_far_field import kept_sizes
from tolerance import relative_error
from variants import DEVICE, HAS_CUDA, LOW_IMPL_DTYPES

pytestmark = pytest.mark.once

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.3,
    "logit_softcap": 30.0,
}
BUDGET = 0.05
# For what the host decides, without the kernels in Triton's slow interpreter.
HOST = [each for each in LOW_IMPL_DTYPES if HAS_CUDA or each.values[0] == "torch"]
# Of the two ways to the same gradients.
CLOSE = 5e-3
kept_in = LateRows.kept


def tile_of(impl: str, dtype: torch.dtype) -> int:
    return backend(impl).tile_rows(torch.empty(0, dtype=dtype, device=DEVICE))


def trained(
    impl: str,
    dtype: torch.dtype,
    *,
    tiles: int = 24,
    more: int = 0,
    tokens: int = 40,
    hidden: int = 48,
    steep: float = 4.0,
    device: str = DEVICE,
) -> Operands:
    """So many tiles of rows, whose probability falls by so many nats over each eighth of them."""
    vocab = tiles * tile_of(impl, dtype) + more
    random = torch.Generator().manual_seed(tiles + more)

    def normal(*shape: int) -> Tensor:
        return torch.randn(shape, generator=random)

    direction = normal(hidden)
    direction /= direction.norm()
    level = torch.linspace(0.0, -8 * steep, vocab)[torch.randperm(vocab, generator=random)]
    weight = 0.3 * normal(vocab, hidden) / hidden**0.5 + level[:, None] * direction / 3
    input = normal(tokens, hidden) / hidden**0.5 + 3 * direction
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


class Walked(NamedTuple):
    """What a backward pass did with kept logits.

    Attributes:
        done: the walk's result: True, False (it did not pay), or None (it did not fit).
        kept, run, count: columns whose logits were kept; how many of them led the rows that were
            walked; how many those were.
    """

    done: bool | None
    kept: int
    run: int
    count: int


def loss_of(operands: Operands, impl: str, *, stats: bool = False) -> Any:
    """The mean loss of operands that need gradients, logits kept; with statistics if asked."""
    return cce_tp.linear_cross_entropy(
        operands.input.requires_grad_(),
        operands.weight.requires_grad_(),
        operands.target,
        impl=impl,
        grad_filter=cce_tp.GradFilter.far_field(BUDGET),
        keep_logits_in_grad=True,
        return_stats=stats,
    )


def _storage(tensor: Tensor) -> int:
    return tensor.untyped_storage().data_ptr()


@contextmanager
def walks() -> Iterator[list[Walked]]:
    """Yields what each backward pass did whose logits were kept."""
    found: list[Walked] = []
    walk = backward._BackwardPass._walk_run

    def spy(self: Any, far: Any, kept: Any, workspace_bytes: int) -> bool | None:
        assert self.left_bytes == far._far.nbytes + kept.tile_max.nbytes
        # The tiles' gradient lies in dC.
        made = far._gradient.weight.nbytes + 27 * self.logits.shape[1]
        assert _storage(far._summed) == _storage(self.sinks.weight) and far.nbytes == made
        done = walk(self, far, kept, workspace_bytes)
        found.append(Walked(done, kept.columns, far.run, self.columns.count))
        return done

    with mock.patch.object(backward._BackwardPass, "_walk_run", spy):
        yield found


@pytest.fixture(autouse=True)
def as_on_a_gpu() -> Iterator[None]:
    with operands_as_they_are():
        yield


def solve(operands: Operands, impl: str, budget: float = BUDGET, **options: Any) -> Outcome:
    fixed = {"reduction": "none", "impl": impl, "keep_logits_in_grad": False}
    fixed["grad_filter"] = cce_tp.GradFilter.far_field(budget)
    return call(operands, {**fixed, **options})


def kept(operands: Operands, impl: str, **options: Any) -> tuple[Outcome, Walked]:
    with walks() as found:
        outcome = solve(operands, impl, keep_logits_in_grad=True, **options)
    (walked,) = found
    return outcome, walked


def check_same(outcome: Outcome, expected: Outcome) -> None:
    assert relative_error(outcome.loss, expected.loss) < 1e-5
    for name in ("grad_input", "grad_weight", "grad_bias"):
        assert relative_error(getattr(outcome, name), getattr(expected, name)) < CLOSE, name


def check_each_row(found: Tensor, expected: Tensor) -> None:
    """A few wrong rows, too light to show in the norm of all."""
    size = expected.double().norm(dim=1)
    off = (found.double() - expected.double()).norm(dim=1)
    assert bool((off <= 2e-2 * size + 1e-4 * size.max()).all())


# Steepness and ragged rows for each way: all rows that are walked are kept in one piece; with the
# short last tile, which is always kept, behind them; with more of them than logits.
WAYS: dict[str, dict[str, Any]] = {
    "run": {"steep": 8.0},
    "stray": {"steep": 8.0, "more": 13},
    "rest": {"steep": 1.6, "more": 5},
}


def check_way(walked: Walked, way: str) -> None:
    assert walked.done
    if way == "run":
        assert walked.run == walked.count <= walked.kept
    else:
        assert walked.run < walked.count
        assert (walked.count <= walked.kept) == (way == "stray")


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.parametrize("way", WAYS)
def test_gradients(impl: str, dtype: torch.dtype, name: str, way: str) -> None:
    options = EVERYTHING if name == "everything" else {}
    operands = trained(impl, dtype, **WAYS[way])
    outcome, walked = kept(operands, impl, **options)
    check_way(walked, way)
    plain = solve(operands, impl, **options)
    check_same(outcome, plain)
    if name == "plain":
        check_each_row(outcome.grad_weight, plain.grad_weight)
    # No further from the exact gradients either: tiles that are kept beside the chosen ones help.
    exact = dense(operands, {"reduction": "none", **options})
    for gradient in ("grad_input", "grad_weight"):
        wanted = getattr(exact, gradient)
        with_logits = relative_error(getattr(outcome, gradient), wanted)
        assert with_logits < 1.1 * relative_error(getattr(plain, gradient), wanted) + 1e-3
    assert relative_error(outcome.grad_bias, exact.grad_bias) < 0.1


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_without_a_gradient_of_the_bias(impl: str, dtype: torch.dtype, way: str) -> None:
    operands = replace(trained(impl, dtype, **WAYS[way]), bias=None)
    outcome, walked = kept(operands, impl)
    check_way(walked, way)
    plain = solve(operands, impl)
    assert relative_error(outcome.grad_input, plain.grad_input) < CLOSE
    assert relative_error(outcome.grad_weight, plain.grad_weight) < CLOSE


def test_stored_through_pointers_or_descriptors() -> None:
    operands = trained("triton", torch.float16, **WAYS["run"])
    outcomes = []
    for descriptor in (False, True):
        with mock.patch.object(tuning, "use_branch_descriptor", return_value=descriptor) as way:
            outcomes.append(kept(operands, "triton")[0])
        assert way.called
    for name in ("loss", "grad_input", "grad_weight"):
        assert same_bits(*(getattr(outcome, name) for outcome in outcomes))


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_the_far_field_keeps_them_by_default(impl: str, dtype: torch.dtype) -> None:
    operands = trained(impl, dtype, **WAYS["run"])
    outcome, walked = kept(operands, impl)
    with walks() as found:
        default = solve(operands, impl, keep_logits_in_grad=None)
    assert found == [walked]
    assert same_bits(default.grad_weight, outcome.grad_weight)


@pytest.mark.parametrize("none", ["paper", "into-a-tensor", "fp32", "asked-not-to"])
def test_but_not_where_it_cannot(none: str) -> None:
    dtype = torch.float32 if none == "fp32" else torch.float16
    operands = trained("torch", dtype, **WAYS["run"])
    options: dict[str, Any] = {"keep_logits_in_grad": False if none == "asked-not-to" else None}
    if none == "paper":
        options["grad_filter"] = cce_tp.GradFilter.paper()
    if none == "into-a-tensor":
        options["grad_weight_out"] = torch.zeros_like(operands.weight)
    wanted = {"lend": far_field, "_kept_inside": ops}
    with contextlib.ExitStack() as stack:
        makers = [
            stack.enter_context(mock.patch.object(where, name, side_effect=AssertionError))
            for name, where in wanted.items()
        ]
        solve(operands, "torch", **options)
    assert not any(maker.called for maker in makers)


@pytest.mark.parametrize("forgets", [False, True])
def test_rows_gathered_behind_the_mean_rows_fit(forgets: bool) -> None:
    """And what is taken out of dC's memory counts from then on."""
    operands = trained("torch", torch.float16, tiles=48, tokens=100, hidden=480, steep=2.0)
    fixed, rooms, gathered = [], [], []
    far = far_field.FarBackward
    sizes_of, gather, leave = backward._BackwardPass._sizes, far.with_means, far.leave_weight

    def spy_sizes(self: Any, **options: Any) -> BackwardSizes:
        sizes = sizes_of(self, **options)
        fixed.append(sizes.fixed)
        return sizes

    def little(sizes: BackwardSizes, workspace_bytes: int, columns: int) -> int | None:
        # 768 rows would fit, whole steps, but for the mean rows in front of them.
        rooms.append((768 + 24) * sizes.strip_row)
        workspace = fixed[0] + rooms[0]
        workspace += workspace - for_buffers(workspace, sizes.tokens)
        return rows_ahead(sizes, workspace, columns)

    def spy_gather(self: Any, count: int) -> Tensor:
        rows = gather(self, count)
        gathered.append(rows.nbytes)
        return rows

    def spy_leave(self: Any) -> None:
        before = self.nbytes
        leave(self)
        assert _storage(self._summed) != _storage(self._weight)
        assert self.nbytes == before + self._summed.nbytes

    with contextlib.ExitStack() as stack:

        def patch(where: Any, name: str, new: Any) -> None:
            stack.enter_context(mock.patch.object(where, name, new))

        patch(backward._BackwardPass, "_sizes", spy_sizes)
        patch(backward, "rows_ahead", little)
        patch(far, "with_means", spy_gather)
        patch(far, "leave_weight", spy_leave)
        if forgets:
            patch(backward, "plan_run", lambda *_: None)
        _, walked = kept(operands, "torch")
    assert (walked.done is None) == forgets
    assert rooms[0] // 2 < gathered[0] <= rooms[0]


@pytest.mark.parametrize(("impl", "dtype"), HOST)
@pytest.mark.parametrize("way", WAYS)
def test_little_room(impl: str, dtype: torch.dtype, way: str) -> None:
    """Rows gathered in pieces, dC in strips, late rows held meanwhile."""
    operands = trained(impl, dtype, **WAYS[way])
    plan, gather, rows = backward.plan_run, backend(impl).gather_rows, []
    plans: list[RunPlan] = []

    def narrow(sizes: BackwardSizes, workspace_bytes: int, run: int, rest: int) -> Any:
        """The plan of the least memory with which there is one."""
        del workspace_bytes
        sizes = sizes._replace(loan_bytes=sizes.loan_bytes % (1 << 16))
        for workspace in range(1 << 10, 1 << 20, 1 << 10):
            made = plan(sizes, workspace, run, rest)
            if made is not None:
                plans.append(made)
                return made
        raise AssertionError(sizes)

    def one_at_a_time(weight: Tensor, which: Tensor, *, out: Tensor | None = None) -> Tensor:
        assert all(each() is None for each in rows), "gathered rows beside gathered rows"
        made = gather(weight, which, out=out)
        rows.append(weakref.ref(made if out is None else out._base))
        return made

    with (
        mock.patch.object(backward, "rows_ahead", lambda *_: 48),
        mock.patch.object(backward, "plan_run", narrow),
        mock.patch.object(backend(impl), "gather_rows", one_at_a_time),
    ):
        outcome, walked = kept(operands, impl)
    assert walked.done and len(rows) >= 3
    (made,) = plans
    assert made.held and made.strip < walked.run
    check_same(outcome, solve(operands, impl))
    check_each_row(outcome.grad_weight, solve(operands, impl).grad_weight)


@pytest.mark.parametrize(("impl", "dtype"), HOST)
@pytest.mark.parametrize("forgets", ["rows_ahead", "plan_run"])
def test_logits_are_forgotten_where_no_walk_fits(
    impl: str, dtype: torch.dtype, forgets: str
) -> None:
    operands = trained(impl, dtype, **WAYS["stray"])
    with mock.patch.object(backward, forgets, lambda *_: None):
        outcome, walked = kept(operands, impl)
    assert walked.done is None
    check_same(outcome, solve(operands, impl))


@pytest.mark.parametrize(("impl", "dtype"), HOST)
def test_forgotten_logits_leave_no_trace_in_token_chunks(impl: str, dtype: torch.dtype) -> None:
    """dC, whose memory holds the tiles' gradient, is written before the second chunk reads it."""
    operands = trained(impl, dtype, **WAYS["stray"])
    given = [each.float().requires_grad_() for each in (operands.input, operands.weight)]

    def grads(keep: bool) -> tuple[Tensor, ...]:
        with torch.autocast(DEVICE, dtype=dtype):
            loss = cce_tp.linear_cross_entropy(
                *given,
                operands.target,
                impl=impl,
                grad_filter=cce_tp.GradFilter.far_field(BUDGET),
                keep_logits_in_grad=keep,
            )
        return torch.autograd.grad(loss, given)

    chunks = (TokenWalk(chunk=32, strip=1 << 20, weight=True),)
    with (
        walks() as found,
        mock.patch.object(backward, "plan_run", lambda *_: None),
        mock.patch.object(backward, "plan_backward", lambda *_: chunks),
    ):
        forgotten = grads(True)
    assert [walked.done for walked in found] == [None]
    for one, other in zip(forgotten, grads(False), strict=True):
        assert one.dtype == torch.float32
        assert relative_error(one, other) < CLOSE


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_what_does_not_pay_is_exact(impl: str, dtype: torch.dtype) -> None:
    operands = trained(impl, dtype, steep=0.0)
    outcome, walked = kept(operands, impl)
    assert walked.done is False
    exact = call(operands, {"reduction": "none", "impl": impl})
    # But for the statistics, whose sums are in the order of the far field.
    assert relative_error(outcome.grad_weight, exact.grad_weight) < 1e-3
    assert relative_error(outcome.grad_input, exact.grad_input) < 1e-3


@pytest.mark.no_poison
@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("way", WAYS)
def test_the_gradient_is_the_memory_itself(impl: str, dtype: torch.dtype, way: str) -> None:
    """And a second pass through the same graph, without the logits, has memory of its own."""
    operands = trained(impl, dtype, **WAYS[way])
    given = (operands.input, operands.weight)
    with walks() as found, mock.patch.object(LateRows, "kept", autospec=True) as lent:
        lent.side_effect = kept_in
        loss = loss_of(operands, impl)
        address = lent.call_args.args[1].data_ptr()
        lent.reset_mock()  # forgets the tensor
        first = torch.autograd.grad(loss, given, retain_graph=True)
        assert first[1].data_ptr() == address
        second = torch.autograd.grad(loss, given)
        again = torch.autograd.grad(loss_of(operands, impl), given)
    assert len(found) == 2
    for one, two, three in zip(first, second, again, strict=True):
        assert one.data_ptr() != two.data_ptr()
        assert relative_error(two, one) < CLOSE
        assert same_bits(three, one)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_statistics_tell_what_was_kept(impl: str, dtype: torch.dtype) -> None:
    operands = trained(impl, dtype, **WAYS["run"])
    with walks() as found:
        loss, stats = loss_of(operands, impl, stats=True)
        loss.backward()
    (walked,) = found
    tiles = len(operands.weight) / tile_of(impl, dtype)
    assert float(stats.tiles_kept) == pytest.approx(
        walked.count / tile_of(impl, dtype) / tiles, abs=1e-6
    )


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_infinities_show(impl: str, dtype: torch.dtype) -> None:
    operands = trained(impl, dtype, **WAYS["run"])
    operands.weight[7] = torch.inf
    exact = call(operands, {"reduction": "none", "impl": impl})
    outcome = solve(operands, impl, keep_logits_in_grad=True)
    for name in ("loss", "grad_input", "grad_weight"):
        assert not bool(getattr(exact, name).isfinite().all())
        assert not bool(getattr(outcome, name).isfinite().all()), name


def _shard(rank: Rank, impl: str, bounds: list[tuple[int, int]], more: dict[str, Any]) -> Outcome:
    whole = trained(impl, torch.float16, steep=6.0, more=9, device=rank.device)
    vocab = len(whole.weight)
    operands = restrict(whole, *bounds[rank.rank])
    sequence_parallel = more.pop("sequence_parallel", False)
    shard = shard_of(rank, bounds, vocab, sequence_parallel=sequence_parallel)
    if sequence_parallel:
        part = operands.input.tensor_split(len(bounds))[rank.rank].contiguous()
        operands = replace(operands, input=part)
    with operands_as_they_are(), walks() as found:
        outcome = solve(operands, impl, vocab_shard=shard, **more)
    assert len(found) == more.get("keep_logits_in_grad", False)
    return outcome


@pytest.mark.parametrize("impl", ["torch", "triton"])
@pytest.mark.parametrize("parts", [False, True], ids=["whole-tokens", "sequence-parallel"])
def test_sharded(pool: RankPool, impl: str, parts: bool) -> None:
    """Each rank keeps logits of the first rows of its own order."""
    vocab = len(trained(impl, torch.float16, more=9).weight)
    bounds = even_bounds(vocab, 2)
    more = {"sequence_parallel": parts}
    plain = pool.run(_shard, impl, bounds, more, ranks=2)
    found = pool.run(_shard, impl, bounds, {**more, "keep_logits_in_grad": True}, ranks=2)
    for outcome, expected in zip(found, plain, strict=True):
        assert relative_error(outcome.grad_weight, expected.grad_weight) < CLOSE
        assert relative_error(outcome.grad_input, expected.grad_input) < CLOSE


# Which tiles are chosen, and which of the first six are kept: all up to the last chosen one with
# which three of four are.
@pytest.mark.parametrize(
    ("chosen", "expected"),
    [
        ("11111111", "11111111"),
        ("11010000", "11110000"),
        ("10100000", "10100000"),
        ("11100100", "11100100"),
        ("11110111", "11111111"),
        ("11110010", "11110010"),
        ("10000011", "10000011"),
    ],
)
@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_holes_are_filled(impl: str, chosen: str, expected: str) -> None:
    dtype = torch.float16
    tile, tokens, count = tile_of(impl, dtype), 20, len(chosen)
    heavy = torch.tensor([each == "1" for each in chosen], device=DEVICE)
    mass = torch.where(heavy, 1.0 / heavy.sum(), 1e-9)[:, None].expand(count, tokens)
    zeros = torch.zeros_like(mass)
    # Maximum, sum, sum of squares, and what the reference has beside: nothing with a cap.
    rows = [zeros, mass, mass * mass] if impl == "triton" else [zeros, mass, mass**2, mass, zeros]
    made = {"dtype": dtype, "device": DEVICE}
    logits = LocalLogits(
        torch.zeros(tokens, 16, **made),
        torch.zeros(count * tile, 16, **made),
        None,
        torch.zeros(tokens, dtype=torch.int64, device=DEVICE),
        0,
        1.0,
        None,
    )
    for leading, wanted in ((0, chosen), (6, expected)):
        masses = backend(impl).tile_masses(
            torch.stack(rows, dim=1).contiguous(),
            torch.zeros(2, tokens, device=DEVICE),
            logits.target,
            logits,
            ignore_index=-100,
            budget=RankBudget.of(1e-3, count * tile, count * tile),
            slopes=False,
            leading=leading,
        )
        assert "".join(str(each) for each in masses.kept.tolist()) == wanted, leading


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_a_tile_apart_from_the_others(impl: str, dtype: torch.dtype) -> None:
    """Whose logits are kept but do not lie in one piece with the others."""
    operands = trained(impl, dtype, tiles=48, steep=1.0)
    masses = backend(impl).tile_masses

    def sparse(*args: Any, **options: Any) -> Any:
        found = masses(*args, **{**options, "leading": 0})
        found.kept.zero_()
        found.kept[torch.tensor([0, 1, 5, 20])] = 1
        return found

    with mock.patch.object(backend(impl), "tile_masses", sparse):
        outcome, walked = kept(operands, impl)
        expected = solve(operands, impl)
    tile = tile_of(impl, dtype)
    assert walked == (True, 6 * tile, 2 * tile, 4 * tile)
    check_same(outcome, expected)
    check_each_row(outcome.grad_weight, expected.grad_weight)
    check_each_row(outcome.grad_bias[:, None], expected.grad_bias[:, None])


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("inside", [False, True])
def test_holes_are_filled_where_logits_are_kept(
    impl: str, dtype: torch.dtype, inside: bool
) -> None:
    operands = trained(impl, dtype)
    masses = backend(impl).tile_masses
    with mock.patch.object(backend(impl), "tile_masses", side_effect=masses) as chosen:
        solve(operands, impl, keep_logits_in_grad=inside)
    assert chosen.call_args.kwargs["leading"] == 3 * inside  # 13.5% of 24


@pytest.mark.parametrize("hidden", [48, 50, 66])
def test_rows_are_gathered_beside_the_logits(hidden: int) -> None:
    operands, chosen = trained("torch", torch.bfloat16, hidden=hidden), backend("torch")
    real = chosen.sorted_statistics
    with mock.patch.object(chosen, "sorted_statistics", side_effect=real) as made:
        solve(operands, "torch", keep_logits_in_grad=True)
    *_, free, logits = made.call_args.args
    stop = free.data_ptr() + 2 * ((len(free) - 1) * free.stride(0) + hidden)
    assert len(free) > 0 and free.stride(0) % 8 == 0
    assert stop <= logits.below_max.data_ptr()


@pytest.mark.parametrize("stats", [False, True])
@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_the_fake_loss_has_the_outputs_of_the_real_one(
    impl: str, dtype: torch.dtype, stats: bool
) -> None:
    calls: list[tuple[Any, Any]] = []
    loss = ops.loss

    def spy(*arguments: Any, name: Any) -> Any:
        made = loss(*arguments, name=name)
        calls.append((arguments, [*made[:4], *made[4]]))
        return made

    operands = trained(impl, dtype)
    with mock.patch.object(ops, "loss", spy):
        loss_of(operands, impl, stats=stats)
    ((arguments, real),) = calls
    fake = ops._loss_fake(*arguments)
    fake = [*fake[:4], *fake[4]]
    # dC and maxima, the far field's fields, totals.
    assert len(real) == len(fake) == 4 + 2 + len(FarField._fields) + stats
    for one, other in zip(real, fake, strict=True):
        assert (one is None) == (other is None)
        if one is not None:
            assert (one.shape, one.dtype) == (other.shape, other.dtype)


def sizes_of(run: int, rest: int, hidden: int, *, loan_bytes: int, fixed: int) -> BackwardSizes:
    """16-bit operands of 512 tokens; `rest` rows beside the run."""
    return kept_sizes(0.1, hidden)._replace(
        tokens=512,
        vocab=rest,
        gradient_row=1024,
        loan_columns=run,
        loan_bytes=loan_bytes,
        fixed=fixed,
    )


@given(
    run=st.integers(16, 20000),
    rest=st.integers(0, 3000),
    hidden=st.integers(8, 4096),
    loan=st.integers(0, 1 << 24),
    fixed=st.integers(0, 1 << 22),
    workspace=st.integers(1 << 20, 1 << 27),
)
def test_plans_stay_within_the_workspace(
    run: int, rest: int, hidden: int, loan: int, fixed: int, workspace: int
) -> None:
    sizes = sizes_of(run, rest, hidden, loan_bytes=loan, fixed=fixed)
    left = for_buffers(workspace, sizes.tokens) - fixed
    row = 2 * hidden
    ahead = rows_ahead(sizes, workspace, run)
    if ahead is not None and fixed < left:
        assert 0 < ahead <= run and ahead * row <= left
    plan = plan_run(sizes, workspace, run, rest)
    if plan is None or fixed >= left:
        return
    assert plan.held or (plan.strip == run and rest == 0)
    assert plan.strip * row + plan.held * loan <= left
    assert (plan.rest is None) == (rest == 0)
    if plan.rest is not None:
        assert plan.rest.loan and plan.rest.strip * row + loan <= left


def test_rows_whose_gradient_is_there_cost_two_products() -> None:
    sizes = sizes_of(100, 0, 64, loan_bytes=0, fixed=0)
    assert pays(sizes, (), 200, run=100)  # two products of three, of half of the rows
    assert not pays(sizes, (), 80, run=100)


@pytest.mark.parametrize(
    ("tokens", "hidden", "vocab", "lent"),
    [
        (8192, 2304, 131072, True),
        (8192, 1536, 131072, True),
        (8192, 4096, 128256, True),
        (2048, 4096, 128256, True),
        (4096, 4096, 32000, True),
        (1024, 16384, 128256, False),  # too many rows of dC to hold
        (8192, 8192, 128256, False),
        (8192, 8192, 16032, False),  # no room for dE's sum
    ],
)
def test_logits_are_kept_where_there_is_use_for_them(
    tokens: int, hidden: int, vocab: int, lent: bool
) -> None:
    """At the default workspace."""
    made = {"dtype": torch.bfloat16, "device": "meta"}
    logits = LocalLogits(
        torch.empty(tokens, hidden, **made),
        torch.empty(vocab, hidden, **made),
        None,
        torch.empty(tokens, dtype=torch.int64, device="meta"),
        0,
        1.0,
        None,
    )
    workspace = default_workspace_bytes(tokens, hidden, vocab, filtered=True)
    memory, found = far_field.lend(logits, torch.bfloat16, 256, workspace)
    assert (found is not None) == (memory is not None) == lent


@given(
    tokens=st.integers(1, 3000),
    vocab=st.integers(1, 20000),
    hidden=st.integers(1, 600),
    itemsize=st.sampled_from([2, 4]),
    tile=st.sampled_from([64, 256]),
)
def test_what_lies_in_the_memory_fits(
    tokens: int, vocab: int, hidden: int, itemsize: int, tile: int
) -> None:
    weight = torch.empty(vocab, hidden, device="meta")
    late = LateRows.with_logits(tokens, weight, itemsize, tile)
    if late is None:
        return
    row = hidden * itemsize
    assert late.columns % tile == 0 and tile <= late.columns <= max(tile, 0.135 * vocab)
    assert 0 <= late.first_row * row <= late.sum_byte
    assert late.sum_byte % ALIGNMENT == late.first_byte % ALIGNMENT == 0
    assert late.sum_byte + 4 * tokens * hidden <= late.far_byte
    far_rows = -(-vocab // tile)
    assert late.far_byte + far_rows * 2 * gradient_pitch(tokens) == late.first_byte
    assert late.first_byte + late.columns * 2 * gradient_pitch(tokens) <= vocab * row


def test_no_room_for_a_tile() -> None:
    """Few rows beside the tokens: the far field goes without."""
    operands = trained("torch", torch.float16, tokens=600, hidden=16)
    made = LateRows.with_logits(600, operands.weight, 2, 256)
    assert made is None
    with mock.patch.object(far_field, "lend", side_effect=far_field.lend) as lend, walks() as found:
        outcome = solve(operands, "torch", keep_logits_in_grad=True)
    assert lend.called and not found
    assert same_bits(outcome.grad_weight, solve(operands, "torch").grad_weight)
