"""keep_logits_bytes: logits kept from the forward pass give the gradients of recomputed ones.

Legend: N tokens, V vocabulary rows, D hidden size.
"""

from __future__ import annotations

from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from cce_tp import backward
from cce_tp.backend import backend
from cce_tp.problem import KeptLogits
from cce_tp.workspace import TailWalk, TokenWalk
from oracle import dense
from problems import Problem, call, even_bounds, same_bits
from ranks import RankPool
from sharding_cases import check_sharded
from tolerance import check_outcome, relative_error
from variants import DEVICE, LOW_IMPL_DTYPES

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
    ],
)
def test_what_is_refused(dtype: torch.dtype, more: dict[str, Any], text: str) -> None:
    operands = Problem(dtype=dtype).build(DEVICE)
    with pytest.raises(ValueError, match=rf"^keep_logits_bytes\b.*{text}"):
        cce_tp.linear_cross_entropy(operands.input, operands.weight, operands.target, **more)
