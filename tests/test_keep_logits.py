"""keep_logits_bytes, keep_logits_in_grad: logits kept from the forward pass give the gradients of
recomputed ones.

Legend: N tokens, V vocabulary rows, D hidden size.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from backward_passes import kept_columns, operands_as_they_are
from cce_tp import backward
from cce_tp.backend import backend
from cce_tp.kernels import tuning
from cce_tp.problem import KeptLogits
from cce_tp.workspace import TailWalk, TokenWalk
from oracle import dense
from problems import Problem, call, even_bounds, same_bits
from ranks import RankPool
from sharding_cases import check_sharded
from tolerance import check_outcome, relative_error
from variants import DEVICE, LOW_IMPL_DTYPES

pytestmark = pytest.mark.once

EVERYTHING: dict[str, Any] = {
    "reduction": "none",
    "label_smoothing": 0.1,
    "z_loss": 1e-3,
    "logit_scale": 1.3,
    "logit_softcap": 9.0,
}
PLENTY = 1 << 30


def bytes_of(problem: Problem, tiles: int) -> int:
    """Room for exactly so many tiles."""
    tile = backend(problem.impl).tile_rows(torch.empty(0, dtype=problem.dtype, device=DEVICE))
    return tiles * tile * 2 * (-(-problem.num_tokens // 16) * 16)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("tiles", [1, 2, None], ids=["one", "two", "all"])
@pytest.mark.parametrize("name", ["plain", "everything"])
def test_gradients_from_kept_logits(
    impl: str, dtype: torch.dtype, tiles: int | None, name: str
) -> None:
    options = EVERYTHING if name == "everything" else {"reduction": "none"}
    problem = Problem(impl=impl, dtype=dtype, vocab=703, bias=True, options=options)
    operands = problem.build(DEVICE)
    keep = PLENTY if tiles is None else bytes_of(problem, tiles)
    with mock.patch.object(KeptLogits, "empty", side_effect=KeptLogits.empty) as empty:
        outcome = call(operands, {**options, "impl": impl, "keep_logits_bytes": keep})
    assert empty.called
    native = dense(operands, options, dtype=dtype)
    check_outcome(outcome, dense(operands, options), dtype, native=native)
    plain = call(operands, {**options, "impl": impl})
    assert same_bits(outcome.loss, plain.loss) or tiles is not None  # merged in other pieces
    assert relative_error(outcome.grad_weight, plain.grad_weight) < 5e-3


def test_stored_through_pointers_or_descriptors() -> None:
    """Hopper's way and that of all others; the last tile and the last tokens are cut short."""
    problem = Problem(impl="triton", dtype=torch.float16, tokens=(75,), vocab=703, hidden=200)
    operands = problem.build(DEVICE)
    options: dict[str, Any] = {"impl": "triton", "keep_logits_bytes": PLENTY}
    outcomes = []
    for descriptor in (False, True):
        with mock.patch.object(tuning, "use_branch_descriptor", return_value=descriptor) as way:
            outcomes.append(call(operands, options))
        assert way.called
    for name in ("loss", "grad_input", "grad_weight"):
        assert same_bits(*(getattr(outcome, name) for outcome in outcomes))


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_strips_across_the_edge_and_token_chunks(impl: str, dtype: torch.dtype) -> None:
    """A strip of which one part is kept, in every chunk of tokens."""
    problem = Problem(impl=impl, dtype=dtype, vocab=703)
    operands = problem.build(DEVICE)
    options = {"impl": impl, "keep_logits_bytes": bytes_of(problem, 1)}
    expected = call(operands, {"impl": impl})
    for walk in (
        TokenWalk(chunk=71, strip=48, weight=True),
        TokenWalk(chunk=71, strip=48, weight=True, borrow=True),
    ):
        with mock.patch.object(backward, "plan_backward", lambda *_, w=walk: (w,)):
            outcome = call(operands, options)
        assert relative_error(outcome.grad_weight, expected.grad_weight) < 5e-3
        assert relative_error(outcome.grad_input, expected.grad_input) < 5e-3


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("columns", [64, 384], ids=["before-the-tail", "into-the-tail"])
@pytest.mark.parametrize("borrow", [False, True])
def test_strips_of_a_tail(impl: str, dtype: torch.dtype, columns: int, borrow: bool) -> None:
    """The tail's logits are looked at twice, kept or not."""
    problem = Problem(impl=impl, dtype=dtype, tokens=(75,), vocab=703, hidden=200)
    operands = problem.build(DEVICE)
    tile = backend(impl).tile_rows(operands.input)
    keep = bytes_of(problem, -(-columns // tile))
    expected = call(operands, {"impl": impl})
    walk = TailWalk(tail=400, strip=16, borrow=borrow)
    with mock.patch.object(backward, "plan_backward", lambda *_: (walk,)):
        outcome = call(operands, {"impl": impl, "keep_logits_bytes": keep})
    assert relative_error(outcome.grad_weight, expected.grad_weight) < 5e-3
    assert relative_error(outcome.grad_input, expected.grad_input) < 5e-3


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
def test_twice_through_the_same_graph(impl: str, dtype: torch.dtype) -> None:
    operands = Problem(impl=impl, dtype=dtype).build(DEVICE)
    input = operands.input.clone().requires_grad_()
    weight = operands.weight.clone().requires_grad_()
    loss = cce_tp.linear_cross_entropy(
        input, weight, operands.target, impl=impl, keep_logits_bytes=PLENTY
    )
    first = torch.autograd.grad(loss, (input, weight), retain_graph=True)
    second = torch.autograd.grad(loss, (input, weight))
    for a, b in zip(first, second, strict=True):
        assert same_bits(a, b)


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_sharded(pool: RankPool, impl: str) -> None:
    problem = Problem(impl=impl, dtype=torch.float16, bias=True, options=EVERYTHING)
    check_sharded(pool, problem, even_bounds(problem.vocab, 2), keep_logits_bytes=PLENTY)


# Of dC's memory: all logits fit, with strips that free each other's or are copied; or some do.
INSIDE = {
    "all": {"tokens": (75,), "vocab": 703, "hidden": 200},
    "all-just": {"tokens": (75,), "vocab": 703, "hidden": 82},
    "half": {"tokens": (75,), "vocab": 1703, "hidden": 40},
    "most": {"tokens": (75,), "vocab": 703, "hidden": 72},
}


@pytest.fixture
def as_on_a_gpu() -> Iterator[None]:
    with operands_as_they_are():
        yield


def in_grad(operands: Any, options: dict[str, Any]) -> tuple[Any, int]:
    """The outcome, and how many columns' logits lay in dC's memory during the backward pass."""
    with kept_columns() as columns:
        outcome = call(operands, {**options, "keep_logits_in_grad": True})
    (count,) = columns
    return outcome, count


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("shape", INSIDE)
@pytest.mark.parametrize("name", ["plain", "everything"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_gradients_from_logits_in_the_memory_of_dC(
    impl: str, dtype: torch.dtype, shape: str, name: str
) -> None:
    options = EVERYTHING if name == "everything" else {"reduction": "none"}
    problem = Problem(impl=impl, dtype=dtype, bias=True, options=options, **INSIDE[shape])
    operands = problem.build(DEVICE)
    outcome, columns = in_grad(operands, {**options, "impl": impl})
    assert columns == problem.vocab if shape.startswith("all") else 0 < columns < problem.vocab
    native = dense(operands, options, dtype=dtype)
    check_outcome(outcome, dense(operands, options), dtype, native=native)
    plain = call(operands, {**options, "impl": impl})
    # The statistics of some columns alone are merged in other pieces.
    assert same_bits(outcome.loss, plain.loss) or not shape.startswith("all")
    torch.testing.assert_close(outcome.loss, plain.loss)
    assert relative_error(outcome.grad_weight, plain.grad_weight) < 5e-3


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_exact_filter_keeps_them_in_dC_by_default(impl: str, dtype: torch.dtype) -> None:
    operands = Problem(impl=impl, dtype=dtype, **INSIDE["half"]).build(DEVICE)
    expected, columns = in_grad(operands, {"impl": impl})
    with kept_columns() as found:
        default = call(operands, {"impl": impl, "keep_logits_in_grad": None})
    assert found == [columns] and columns > 0
    for name in ("loss", "grad_input", "grad_weight"):
        assert same_bits(getattr(default, name), getattr(expected, name))


@pytest.mark.parametrize("why", ["beside", "into-a-tensor", "fp32", "asked-not-to"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_but_not_where_it_cannot(why: str) -> None:
    dtype = torch.float32 if why == "fp32" else torch.float16
    operands = Problem(dtype=dtype, **INSIDE["all"]).build(DEVICE)
    options: dict[str, Any] = {"keep_logits_in_grad": False if why == "asked-not-to" else None}
    if why == "beside":
        options["keep_logits_bytes"] = PLENTY
    if why == "into-a-tensor":
        options["grad_weight_out"] = torch.zeros_like(operands.weight)
    with mock.patch.object(KeptLogits, "inside") as inside:
        call(operands, options)
    assert not inside.called


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("shape", INSIDE)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_the_gradient_is_the_memory_itself(impl: str, dtype: torch.dtype, shape: str) -> None:
    """Not a copy, which would take as much again; and a second pass has memory of its own."""
    operands = Problem(impl=impl, dtype=dtype, **INSIDE[shape]).build(DEVICE)
    input = operands.input.clone().requires_grad_()
    weight = operands.weight.clone().requires_grad_()
    with mock.patch.object(KeptLogits, "inside", side_effect=KeptLogits.inside) as inside:
        loss = cce_tp.linear_cross_entropy(
            input, weight, operands.target, impl=impl, keep_logits_in_grad=True
        )
        (memory, *_), _ = inside.call_args
    address = memory.data_ptr()
    inside.reset_mock()
    del memory
    loss.backward(retain_graph=True)
    assert weight.grad is not None and weight.grad.data_ptr() == address
    first, weight.grad = weight.grad, None
    before = first.clone()
    loss.backward()
    assert weight.grad is not None and weight.grad.data_ptr() != address
    assert same_bits(first, before)
    assert relative_error(weight.grad, first) < 5e-3
    plain = call(operands, {"impl": impl})
    # Recomputed, with the statistics of the first pass.
    assert relative_error(weight.grad, plain.grad_weight) < 1e-3


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("shape", ["all", "half"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_gradient_in_fp32_has_room_for_twice_as_many(
    impl: str, dtype: torch.dtype, shape: str
) -> None:
    problem = Problem(impl=impl, dtype=dtype, **INSIDE[shape])
    operands = problem.build(DEVICE)
    wide = replace(operands, weight=operands.weight.float())
    _, columns = in_grad(operands, {"impl": impl})
    with torch.autocast(DEVICE, dtype=dtype):
        outcome, twice = in_grad(wide, {"impl": impl})
    assert outcome.grad_weight.dtype == torch.float32
    assert twice == problem.vocab if shape == "all" else twice >= 2 * columns > 0
    expected = call(operands, {"impl": impl})
    assert relative_error(outcome.grad_weight, expected.grad_weight.float()) < 5e-3
    assert relative_error(outcome.grad_input, expected.grad_input) < 5e-3


@pytest.mark.usefixtures("as_on_a_gpu")
def test_no_logits_are_kept_where_the_workspace_is_too_small() -> None:
    problem = Problem(dtype=torch.bfloat16, tokens=(2000,), vocab=703, hidden=300)
    operands = problem.build(DEVICE)
    options = {"workspace_bytes": 1 << 20}
    outcome, columns = in_grad(operands, options)
    assert columns == 0
    assert same_bits(outcome.grad_weight, call(operands, options).grad_weight)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("shape", ["all", "half"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_logits_are_forgotten_where_no_walk_fits(impl: str, dtype: torch.dtype, shape: str) -> None:
    """The forward pass and the plan of the backward pass need not agree."""
    operands = Problem(impl=impl, dtype=dtype, **INSIDE[shape]).build(DEVICE)
    with mock.patch.object(backward, "plan_kept", return_value=None) as plan:
        outcome, columns = in_grad(operands, {"impl": impl})
    assert plan.called and columns == 0
    expected = call(operands, {"impl": impl})
    assert relative_error(outcome.grad_weight, expected.grad_weight) < 1e-3
    assert relative_error(outcome.grad_input, expected.grad_input) < 1e-3


@pytest.mark.parametrize("wants", [(True, False), (False, True), (False, False)], ids=str)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_nothing_is_kept_in_a_gradient_that_is_not_both(wants: tuple[bool, bool]) -> None:
    operands = Problem(dtype=torch.bfloat16, **INSIDE["all"]).build(DEVICE)
    with mock.patch.object(KeptLogits, "inside") as inside:
        outcome = call(operands, {"keep_logits_in_grad": True}, requires_grad=(*wants, False))
    assert not inside.called
    expected = call(operands, {}, requires_grad=(*wants, False))
    for name in ("grad_input", "grad_weight"):
        given, wanted = getattr(outcome, name), getattr(expected, name)
        assert (given is None) == (wanted is None)
        assert given is None or same_bits(given, wanted)


@pytest.mark.parametrize("shape", ["all", "half"])
@pytest.mark.usefixtures("as_on_a_gpu")
def test_compiled_code_keeps_nothing(shape: str) -> None:
    operands = Problem(dtype=torch.bfloat16, **INSIDE[shape]).build(DEVICE)
    input, weight = operands.input.clone(), operands.weight.clone()

    def function(input: torch.Tensor, weight: torch.Tensor) -> torch.Tensor:
        return cce_tp.linear_cross_entropy(input, weight, operands.target, keep_logits_in_grad=True)

    given = [each.requires_grad_() for each in (input, weight)]
    with mock.patch.object(KeptLogits, "inside") as inside:
        loss = torch.compile(function, backend="aot_eager", fullgraph=True)(input, weight)
        found = torch.autograd.grad(loss, given)
    assert not inside.called
    expected = call(operands, {})
    for gradient, wanted in zip(found, (expected.grad_input, expected.grad_weight), strict=True):
        assert relative_error(gradient, wanted) < 1e-3


def test_the_cpu_keeps_nothing() -> None:
    operands = Problem(dtype=torch.bfloat16, **INSIDE["all"]).build("cpu")
    outcome, columns = in_grad(operands, {})
    assert columns == 0 and same_bits(outcome.grad_weight, call(operands, {}).grad_weight)


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_a_cap_that_16_bits_do_not_hold(impl: str, dtype: torch.dtype) -> None:
    """Logits further below their tile's maximum than fp16 can say have a slope of the cap."""
    options = {"impl": impl, "logit_softcap": 1e5, "logit_scale": 3e3}
    operands = Problem(impl=impl, dtype=dtype, spread=20.0, **INSIDE["all"]).build(DEVICE)
    plain, (kept, columns) = call(operands, options), in_grad(operands, options)
    assert columns > 0
    for name in ("loss", "grad_input", "grad_weight"):
        assert bool(getattr(plain, name).isfinite().all())
        assert bool(getattr(kept, name).isfinite().all()), name


@pytest.mark.parametrize(("impl", "dtype"), LOW_IMPL_DTYPES)
@pytest.mark.parametrize("shape", INSIDE)
@pytest.mark.usefixtures("as_on_a_gpu")
def test_infinities_show_in_the_memory_of_dC(impl: str, dtype: torch.dtype, shape: str) -> None:
    operands = Problem(impl=impl, dtype=dtype, **INSIDE[shape]).build(DEVICE)
    operands.weight[7] = torch.inf
    exact, (kept, _) = call(operands, {"impl": impl}), in_grad(operands, {"impl": impl})
    for name in ("loss", "grad_input", "grad_weight"):
        expected = getattr(exact, name)
        assert not bool(expected.isfinite().all())
        assert torch.equal(getattr(kept, name).isnan(), expected.isnan()), name


@pytest.mark.parametrize("impl", ["torch", "triton"])
def test_infinities_show(impl: str) -> None:
    problem = Problem(impl=impl, dtype=torch.float16, options={"reduction": "none"})
    operands = problem.build(DEVICE)
    operands.weight[7] = torch.inf
    options = {"reduction": "none", "impl": impl}
    exact, kept = call(operands, options), call(operands, {**options, "keep_logits_bytes": PLENTY})
    for name in ("loss", "grad_input", "grad_weight"):
        expected = getattr(exact, name)
        assert not bool(expected.isfinite().all())
        assert torch.equal(getattr(kept, name).isnan(), expected.isnan()), name


def test_nothing_is_kept_without_gradients() -> None:
    operands = Problem(dtype=torch.bfloat16).build(DEVICE)
    with mock.patch.object(KeptLogits, "empty") as empty, torch.no_grad():
        cce_tp.linear_cross_entropy(
            operands.input, operands.weight, operands.target, keep_logits_bytes=PLENTY
        )
    assert not empty.called


@pytest.mark.parametrize(
    ("dtype", "more", "text"),
    [
        pytest.param(torch.bfloat16, {"keep_logits_bytes": -1}, "int >= 0", id="negative"),
        pytest.param(torch.bfloat16, {"keep_logits_bytes": True}, "int >= 0", id="bool"),
        pytest.param(torch.float32, {"keep_logits_bytes": 1}, "16 bits", id="fp32"),
        pytest.param(
            torch.bfloat16,
            {"keep_logits_bytes": 1, "grad_filter": cce_tp.GradFilter.far_field()},
            "far-field",
            id="far-field",
        ),
        pytest.param(
            torch.bfloat16, {"keep_logits_bytes": 1, "keep_logits_in_grad": True}, "0", id="both"
        ),
        pytest.param(
            torch.bfloat16, {"keep_logits_in_grad": 1}, "True, False or None", id="not-bool"
        ),
        pytest.param(torch.float32, {"keep_logits_in_grad": True}, "16 bits", id="in-grad-fp32"),
        pytest.param(
            torch.bfloat16,
            {"keep_logits_in_grad": True, "grad_filter": cce_tp.GradFilter.paper()},
            "paper",
            id="in-grad-paper",
        ),
        pytest.param(
            torch.bfloat16,
            {"keep_logits_in_grad": True, "grad_weight_out": torch.zeros(0)},
            "False with grad_weight_out",
            id="in-grad-out",
        ),
    ],
)
def test_what_is_refused(dtype: torch.dtype, more: dict[str, Any], text: str) -> None:
    operands = Problem(dtype=dtype).build(DEVICE)
    if "grad_weight_out" in more:
        more = {**more, "grad_weight_out": torch.zeros_like(operands.weight)}
    name = next(iter(more))
    with pytest.raises(ValueError, match=rf"^{name}\b.*{text}"):
        cce_tp.linear_cross_entropy(operands.input, operands.weight, operands.target, **more)
