"""The far field in Megatron's output layer: training beside exact, and its metrics."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

import megatron_trainer
from cce_tp import GradFilter, LossStats, reference
from megatron_harness import (
    assert_nothing,
    forward,
    install_cce,
    masked_mean,
    model_parallel,
    run_ranks,
)
from megatron_models import Case, batch_of, build
from megatron_trainer import Plan, train

FAR = {"grad_filter": GradFilter.far_field(0.02)}
BASE = Case(vocab=1024)
# Between the losses of any of ten Adam steps. Without what stands for the tiles that are left they
# differ by 2e-3.
LOSS_BOUND = 2e-4


def _skewed(case: Case, *args: Any, **kwargs: Any) -> Any:
    """A model whose logits differ by 10 nats over the vocabulary, as those of a trained one.

    The norm before the head has a weight of ones, so that hidden states sum to the norm's bias.
    """
    from megatron.core import parallel_state as state

    model = build(case, *args, **kwargs)
    if getattr(model, "output_layer", None) is None:
        return model
    random = torch.Generator().manual_seed(5)
    level = torch.linspace(4.0, -6.0, case.vocab)[torch.randperm(case.vocab, generator=random)]
    weight = model.output_layer.weight
    first = state.get_tensor_model_parallel_rank() * weight.shape[0]
    with torch.no_grad():
        weight += level[first : first + weight.shape[0], None] / case.hidden
        for name, parameter in model.named_parameters():
            if name.endswith("final_layernorm.bias"):
                parameter.fill_(1.0)
    return model


@contextlib.contextmanager
def _skewed_models() -> Iterator[None]:
    """Also small tiles, of which such a vocabulary has many."""
    with (
        mock.patch.object(megatron_trainer, "build", _skewed),
        mock.patch.object(reference, "TILE_V", 8),
    ):
        yield


def _metrics(run: dict[str, Any]) -> dict[str, float]:
    from megatron_integration import far_field_metrics

    found = far_field_metrics(run["trainer"].ddp)
    return {key: value.item() for key, value in found.items()}


def _losses(run: dict[str, Any]) -> list[float | None]:
    return [step["loss"] for step in run["steps"]]


def _trains_as_exact(rank: Any, plans: list[Plan]) -> list[str]:
    """The differences of this rank between far-field and exact, and what is odd about either."""
    wrong = []
    with model_parallel(**plans[0].layout), _skewed_models():
        for plan in plans:
            exact = train(plan, fused=True)
            far = train(replace(plan, case=replace(plan.case, cce=FAR)), fused=True)
            found = []
            if _metrics(exact):
                found.append(f"exact has the metrics {_metrics(exact)}")
            if far["fused"] != exact["fused"] or far["materialized"]:
                found.append(f"{far['fused']} fused losses, {far['materialized']} materialised")
            metrics = _metrics(far)
            if not far["fused"]:
                found += [f"metrics without a head: {metrics}"] * bool(metrics)
                wrong += [f"rank {rank.rank}: {plan}: {each}" for each in found]
                continue
            if not 0.02 < metrics["far-field/tiles_kept"] < 0.7:
                found.append(f"the test shows nothing: {metrics}")
            if not 1e-4 < metrics["far-field/mass"] < 0.5:
                found.append(f"the test shows nothing: {metrics}")
            if _losses(far) == _losses(exact):
                found.append("the test shows nothing: all losses are the same")
            for number, (got, want) in enumerate(zip(_losses(far), _losses(exact), strict=True)):
                if not abs(got - want) <= LOSS_BOUND:  # type: ignore[operator]
                    found.append(f"step {number}: loss {got}, exact {want}")
            wrong += [f"rank {rank.rank}: {plan}: {each}" for each in found]
    return wrong


def test_ten_adam_steps() -> None:
    """TP 2 x DP 2, with and without sequence parallelism, two micro batches a step."""
    sequence_parallel = replace(BASE, sequence_parallel=True)
    plans = [
        Plan(BASE, {"tp": 2}),
        Plan(sequence_parallel, {"tp": 2}, overlap=True),
    ]
    assert_nothing(run_ranks(_trains_as_exact, plans))


def test_pipeline_and_multi_token_prediction() -> None:
    """TP 2 x PP 2: the first stage has no metrics; two more heads through the same layer."""
    layout = {"tp": 2, "pp": 2}
    plans = [Plan(BASE, layout, steps=3), Plan(replace(BASE, mtp=2), layout, steps=3)]
    assert_nothing(run_ranks(_trains_as_exact, plans, poison=False))


def _recomputes(rank: Any) -> list[str]:
    full = {
        "recompute_granularity": "full",
        "recompute_method": "uniform",
        "recompute_num_layers": 1,
    }
    runs = []
    with model_parallel(tp=2), _skewed_models():
        for config in ({}, full):
            case = replace(BASE, sequence_parallel=True, config=config, cce=FAR)
            runs.append(train(Plan(case, {"tp": 2}, steps=2), fused=True))
        losses, metrics = map(_losses, runs), map(_metrics, runs)
        pairs = {"losses": [*losses], "metrics": [*metrics]}
    return [
        f"rank {rank.rank}: {what} {plain}, recomputed {recomputed}"
        for what, (plain, recomputed) in pairs.items()
        if plain != recomputed or not plain
    ]


def test_recompute() -> None:
    """Full activation recompute changes no bit, and measures nothing twice."""
    assert_nothing(run_ranks(_recomputes))


def _reads(rank: Any) -> list[str]:
    from megatron_integration import far_field_metrics

    wrong: list[str] = []

    def expect(condition: bool, text: str) -> None:
        if not condition:
            wrong.append(f"rank {rank.rank}: {text}")

    with model_parallel(tp=2), _skewed_models():
        case = replace(BASE, cce=FAR)
        model = install_cce(_skewed(case), case)
        batch = batch_of(case)
        with torch.no_grad():
            forward(model, batch, case)
        expect(far_field_metrics(model) == {}, "a loss without gradients is measured")
        measured = []
        for number in range(9):
            masked_mean(forward(model, batch, case), batch.mask).backward()
            # One rank alone reads in between: the others must not wait for it, nor it for them.
            if rank.rank == 0 or number in (0, 8):
                measured.append(far_field_metrics(model))
        expect(all(m.keys() == measured[0].keys() for m in measured), f"{measured}")
        expect(len(measured[0]) == 2, f"{measured[0]}")
        # The weights have not changed since the first loss.
        expect(measured[0] == measured[-1], f"{measured[0]}, then {measured[-1]}")
    return wrong


def test_who_reads_does_not_matter() -> None:
    """Metrics can be read on any rank at any time, and stay until there are new ones."""
    assert_nothing(run_ranks(_reads))


def test_meter_averages_since_the_last_reading() -> None:
    from megatron_integration.far_field import FarFieldMeter

    def stats(kept: float, mass: float) -> LossStats:
        nothing = torch.empty(0)
        kept_, mass_ = torch.tensor(kept), torch.tensor(mass)
        return LossStats(nothing, nothing, nothing, nothing, None, kept_, mass_)

    meter = FarFieldMeter()
    assert meter.read() is None
    assert [i for i in range(20) if meter.due()] == [0, 8, 16]
    meter.add(stats(0.5, 0.01))
    meter.add(stats(0.25, 0.03))
    for _ in range(2):
        assert meter.read().tolist() == pytest.approx([0.375, 0.02])  # type: ignore[union-attr]
    meter.add(stats(1.0, 0.0))
    assert meter.read().tolist() == [1.0, 0.0]  # type: ignore[union-attr]
