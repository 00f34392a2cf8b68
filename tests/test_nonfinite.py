"""NaN and infinity come out wherever dense PyTorch lets them out, on every rank; and no memory.

Nothing may hide them: no filter, no mask, no rank that does not hold the row.
"""

from __future__ import annotations

from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from cce_tp.backend import backend
from cce_tp.problem import LocalLogits, LogitGradient
from hostile import Hostile, check_hostile
from oracle import Operands
from problems import Problem, call, even_bounds, same_bits
from ranks import RankPool
from variants import DEVICE, IMPLS

BAD = {"nan": float("nan"), "inf": float("inf"), "minus-inf": -float("inf")}
FILTERS = {"exact": None, "paper": cce_tp.GradFilter.paper(2.0**-8)}


def poisoned(problem: Problem, where: str, value: float) -> Hostile:
    """One element of one tensor; the row of the weight is one of the last rank's."""
    place = {"input": 3 * problem.hidden + 1, "weight": (problem.vocab - 5) * problem.hidden + 2}
    return Hostile(problem, ((where, place.get(where, problem.vocab - 5), value),))


@pytest.mark.parametrize("impl", IMPLS)
@pytest.mark.parametrize("chosen", FILTERS)
@pytest.mark.parametrize("value", BAD)
@pytest.mark.parametrize("where", ["input", "weight", "bias"])
def test_it_reaches_loss_and_gradients_on_every_rank(
    pool: RankPool, where: str, value: str, chosen: str, impl: str
) -> None:
    options: dict[str, Any] = {"reduction": "none"}
    if FILTERS[chosen] is not None:
        options["grad_filter"] = FILTERS[chosen]
    problem = Problem(
        impl=impl, bias=True, ignored=0.1, tokens=(37,), zero_upstream=False, options=options
    )
    outcomes = check_hostile(
        pool, poisoned(problem, where, BAD[value]), even_bounds(problem.vocab, 3)
    )
    assert all(same_bits(outcome.loss, outcomes[0].loss) for outcome in outcomes)
    if value == "nan":
        for outcome in outcomes:
            assert not bool(torch.isfinite(outcome.loss).all())
            for name in ("grad_input", "grad_weight", "grad_bias"):
                assert not bool(torch.isfinite(getattr(outcome, name)).all()), name


def test_a_logit_above_its_maximum_is_a_probability_still() -> None:
    """As one may be that the backward pass rounds otherwise; but NaN stays, and infinity."""
    input = torch.tensor([[1.0], [1.0], [float("inf")], [float("nan")]])
    weight = torch.tensor([[1.000001e30], [1e30], [0.999e30]])
    target = torch.tensor([1, 0, 0, 0])
    logits = LocalLogits(input, weight, None, target, 0, 1.0, None)
    maxima, log_sum = torch.tensor([1e30, 1e30, float("inf"), 1.0]), torch.full((4,), 0.6931472)
    out = torch.empty(3, 4)
    upstream = LogitGradient(torch.ones(4), maxima, log_sum, 0.0, 0.0, 3)
    backend("torch").grad_logits(logits, upstream, out, None)
    assert out[0, :2].tolist() == [1.0, 0.0]
    torch.testing.assert_close(out[1:, 0], torch.tensor([-0.5, 0.0]))
    assert not out[:, 2:].isfinite().any()


@pytest.mark.parametrize("impl", IMPLS)
def test_a_mean_over_one_bad_token_is_bad(impl: str) -> None:
    problem = Problem(impl=impl)
    operands = problem.build(DEVICE)
    operands.input[5, 0] = float("nan")
    operands = replace(operands, target=torch.where(operands.target < 0, 1, operands.target))
    outcome = call(operands, {"impl": impl})
    assert bool(outcome.loss.isnan())
    assert outcome.grad_weight is not None and bool(outcome.grad_weight.isnan().any())


def test_no_memory_for_the_workspace_names_the_option() -> None:
    def exhausted(*_: Any, **__: Any) -> Any:
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 3.00 GiB.")

    problem = Problem(impl="torch")
    operands: Operands = problem.build(DEVICE)
    for place in ("cce_tp.ops.gradients", "cce_tp.ops._with_all_tokens"):
        for budget, said in ((None, "its default"), (1 << 22, "4194304 bytes")):
            with (
                mock.patch(place, exhausted),
                pytest.raises(
                    torch.OutOfMemoryError, match=r"workspace_bytes: .*cce-workspace-mb"
                ) as e,
            ):
                call(operands, {"impl": "torch", "workspace_bytes": budget})
            assert said in str(e.value) and "Tried to allocate 3.00 GiB" in str(e.value)


def test_no_memory_names_kept_logits_where_there_are_any() -> None:
    operands = Problem(dtype=torch.bfloat16, impl="torch").build(DEVICE)
    error = torch.OutOfMemoryError("Tried to allocate 3.00 GiB")
    for option in ({"keep_logits_bytes": 1 << 20}, {"keep_logits_in_grad": True}, {}):
        with (
            mock.patch("cce_tp.ops._with_all_tokens", side_effect=error),
            pytest.raises(torch.OutOfMemoryError, match=r"^workspace_bytes: ") as caught,
        ):
            call(operands, {"impl": "torch", **option})
        assert ("keep_logits_in_grad" in str(caught.value)) == bool(option)


@pytest.mark.gpu
def test_no_memory_on_the_device_names_the_option() -> None:
    # dE alone: there is no dC to lend G its memory, so that the workspace takes most of a GiB.
    weight = torch.randn(65536, 256, device="cuda", dtype=torch.bfloat16)
    input = torch.randn(16384, 256, device="cuda", dtype=torch.bfloat16, requires_grad=True)
    target = torch.randint(0, 65536, (16384,), device="cuda")
    loss = cce_tp.linear_cross_entropy(input, weight, target, workspace_bytes=1 << 30)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    free, total = torch.cuda.mem_get_info()
    held = torch.cuda.memory_reserved()
    # For dE, 8 MiB, and small tensors; what other tests left free in pieces is less than a GiB.
    torch.cuda.set_per_process_memory_fraction((held + (128 << 20)) / total)
    try:
        with pytest.raises(torch.OutOfMemoryError, match=r"workspace_bytes: .*cce-workspace-mb"):
            loss.backward()
    finally:
        torch.cuda.set_per_process_memory_fraction(1.0)
    assert free > 0
