"""Megatron models inside the rank pool, stock and with the fused loss, and their comparison.

The functions that take a `Rank` run in the four workers of a pool of this module's own (Megatron
keeps much state per process, and on the CPU needs `launch.cpu`). A job covers the whole world of
four ranks: with tensor parallelism over two there are two replicas, and `share` gives each
replica its own part of the cases.
"""

from __future__ import annotations

import atexit
import contextlib
import math
import os
import sys
import types
import warnings
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any, TypeVar
from unittest import mock

import pytest
import torch
from torch import Tensor

import ranks
from megatron_models import MCORE, Batch, Case, batch_of, build

needs_0_19 = pytest.mark.skipif(MCORE < (0, 19), reason="not in this release of megatron-core")

_pool: ranks.RankPool | None = None
_T = TypeVar("_T")


def run_ranks(
    function: Callable[..., Any], *args: Any, timeout_s: float = 150.0, poison: bool = True
) -> list[Any]:
    """Call function(rank, *args) on the four ranks of the world, on the CPU.

    `poison` fills fresh memory with NaN. Pipelines allocate leaves that require gradients, which
    cannot be filled.
    """
    global _pool
    if _pool is None:
        _pool = ranks.RankPool(device="cpu")
        atexit.register(close_pool)
    # gloo does not offer all that Megatron needs for CUDA tensors.
    with mock.patch.dict(os.environ, {"CUDA_VISIBLE_DEVICES": ""}):
        # Not under the NaN filling, which puts back on leaving what it replaced.
        _pool.run(_prepare_rank, ranks=4, group="world", timeout_s=timeout_s, poison=False)
        return _pool.run(
            function, *args, ranks=4, group="world", timeout_s=timeout_s, poison=poison
        )


def close_pool() -> None:
    """End the ranks, the next call starts others: each has a thread or three for every group that
    it was ever in, and those of gloo wake up while there is nothing to do."""
    if _pool is not None:
        _pool.close()


# Inside the workers.


def prepare() -> None:
    """What must happen in a process before megatron.core is imported; idempotent."""
    warnings.simplefilter("ignore")
    if "fused_weight_gradient_mlp_cuda" not in sys.modules:
        # apex's kernel for gradient_accumulation_fusion, in plain torch.
        fake = types.ModuleType("fused_weight_gradient_mlp_cuda")
        fake.wgrad_gemm_accum_fp32 = _accumulate  # type: ignore[attr-defined]
        fake.wgrad_gemm_accum_fp16 = _accumulate  # type: ignore[attr-defined]
        sys.modules["fused_weight_gradient_mlp_cuda"] = fake
    from launch.cpu import run_megatron_on_cpu

    run_megatron_on_cpu()


def _prepare_rank(rank: Any) -> None:
    del rank
    prepare()


def _accumulate(inputs: Tensor, grad_output: Tensor, main_grad: Tensor) -> None:
    main_grad.add_(grad_output.t().to(main_grad.dtype) @ inputs.to(main_grad.dtype))


# Megatron's module-level state for each layout. gloo's groups keep their threads for good, so
# each is made once in a process.
_layouts: dict[tuple[int | None, ...], dict[str, Any]] = {}


@contextlib.contextmanager
def model_parallel(
    tp: int = 1,
    pp: int = 1,
    cp: int = 1,
    ep: int = 1,
    vpp: int | None = None,
    graphs: bool = False,
) -> Iterator[None]:
    """Megatron's process groups and generators, for the time of one job.

    graphs: generators whose states can be exchanged while a CUDA graph is captured.
    """
    prepare()
    from megatron.core import parallel_state
    from megatron.core.tensor_parallel.random import model_parallel_cuda_manual_seed

    layout = (tp, pp, cp, ep, vpp)
    if layout in _layouts:
        vars(parallel_state).update(_layouts[layout])
    else:
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            context_parallel_size=cp,
            expert_model_parallel_size=ep,
            # Over several ranks experts would gather uneven parts, which gloo cannot.
            expert_tensor_parallel_size=1,
        )
        _layouts[layout] = {
            name: value for name, value in vars(parallel_state).items() if name.isupper()
        }
    try:
        model_parallel_cuda_manual_seed(7, use_cudagraphable_rng=graphs, force_reset_rng=True)
        yield
    finally:
        parallel_state.destroy_model_parallel()


def share(cases: Sequence[_T]) -> list[_T]:
    """This replica's part of the cases."""
    from megatron.core import parallel_state as state

    return list(cases[state.get_data_parallel_rank() :: state.get_data_parallel_world_size()])


def forward(model: Any, batch: Batch, case: Case, labels: bool = True) -> Tensor:
    """(b, s) fp32 loss per token, or logits."""
    more = {"loss_mask": batch.mask} if case.mtp and labels else {}
    return model(
        batch.tokens, batch.positions, None, labels=batch.labels if labels else None, **more
    )


def masked_mean(loss: Tensor, mask: Tensor) -> Tensor:
    """Scalar, as pretraining forms it; 0 without tokens."""
    return (loss * mask).sum() / mask.sum().clamp(min=1)


def gradients(model: Any) -> dict[str, Tensor]:
    """Every parameter's gradient on this rank, from main_grad where there is one."""
    found = {}
    for name, parameter in model.named_parameters():
        grad = getattr(parameter, "main_grad", None)
        grad = parameter.grad if grad is None else grad
        if grad is not None:
            found[name] = grad.detach().clone()
    return found


def reset_mtp_metrics() -> None:
    """Forget what the trackers of multi-token prediction hold."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    MTPLossLoggingHelper.tracker.clear()


def mtp_metrics() -> dict[str, list[float]]:
    """What the trackers of multi-token prediction hold: loss, and with 0.19 correct and total."""
    from megatron.core.transformer.multi_token_prediction import MTPLossLoggingHelper

    return {
        key: value.tolist()
        for key, value in MTPLossLoggingHelper.tracker.items()
        if isinstance(value, Tensor)
    }


def install_cce(model: Any, case: Case | None = None, **options: Any) -> Any:
    """`megatron_integration.install` with the options of the case."""
    from megatron_integration import CceConfig, install

    return install(model, CceConfig(**{**(case.cce if case else {}), **options}))


@dataclass
class Step:
    """One forward and backward pass: loss per token, gradients, metrics, counters."""

    loss: Tensor
    grads: dict[str, Tensor]
    metrics: dict[str, list[float]]
    materialized: int = 0
    fused: int = 0


def one_step(model: Any, batch: Batch, case: Case) -> Step:
    """Forward and backward of the masked mean."""
    from megatron_integration import fused_count, materialized_count

    reset_mtp_metrics()
    loss = forward(model, batch, case)
    masked_mean(loss, batch.mask).backward()
    return Step(
        loss.detach().clone(),
        gradients(model),
        mtp_metrics(),
        materialized_count(model),
        fused_count(model),
    )


def relative(got: Tensor, want: Tensor) -> float:
    """Norm of the difference over the norm of `want`; of two zeros 0."""
    got, want = got.double(), want.double()
    difference = (got - want).norm().item()
    return difference if difference == 0 else difference / max(want.norm().item(), 1e-30)


def differences(
    got: Step,
    want: Step,
    *,
    loss_atol: float = 1e-5,
    grad_rtol: float = 5e-6,
    heads: int = 1,
    mask: Tensor | None = None,
) -> list[str]:
    """What is wrong with a fused step beside a stock one; empty if nothing.

    With `mask`, losses are compared where it is not 0.
    """
    wrong = []
    if got.loss.dtype != torch.float32 or got.loss.shape != want.loss.shape:
        wrong.append(f"loss is {got.loss.dtype} {tuple(got.loss.shape)}")
    counted = slice(None) if mask is None else mask > 0
    error = (got.loss[counted] - want.loss[counted]).abs().max().item()
    if not error <= loss_atol:
        wrong.append(f"loss differs by {error:.2e}")
    if got.grads.keys() != want.grads.keys():
        wrong.append(f"gradients of {sorted(got.grads.keys() ^ want.grads.keys())} only in one")
    for name in got.grads.keys() & want.grads.keys():
        error = relative(got.grads[name], want.grads[name])
        if not error <= grad_rtol:
            wrong.append(f"gradient of {name} differs by {error:.2e}")
    for key in want.metrics:
        if not torch.allclose(
            torch.tensor(got.metrics.get(key, [])), torch.tensor(want.metrics[key]), atol=loss_atol
        ):
            wrong.append(f"metric {key}: {got.metrics.get(key)}, stock {want.metrics[key]}")
    if got.materialized:
        wrong.append(f"{got.materialized} times real logits")
    if got.fused != heads:
        wrong.append(f"{got.fused} fused losses, expected {heads}")
    return wrong


def compare_cases(
    rank: Any,
    cases: list[Case],
    layout: dict[str, int],
    device: str = "cpu",
    grad_rtol: float = 5e-6,
) -> list[str]:
    """Stock beside CCE, one forward and backward each; the differences of this rank."""
    wrong: list[str] = []
    with model_parallel(**layout):
        for case in share(cases):
            batch = batch_of(case).to(device)
            want = one_step(build(case).to(device), batch, case)
            got = one_step(install_cce(build(case).to(device), case), batch, case)
            mask = batch.mask if case.targets == "outside" else None
            found = differences(got, want, grad_rtol=grad_rtol, heads=1 + case.mtp, mask=mask)
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


def compare_half_precision(
    rank: Any, cases: list[Case], layout: dict[str, int], device: str = "cpu"
) -> list[str]:
    """Both beside fp32 of the same weights: fused at most 1.5 times as far away as stock."""
    wrong = []
    with model_parallel(**layout):
        for case in share(cases):
            batch = batch_of(case).to(device)
            model = build(case).to(device)
            exact_model = build(replace(case, dtype=torch.float32)).to(device)
            weights = {name: p.detach().float() for name, p in model.named_parameters()}
            exact_model.load_state_dict(weights, strict=False)
            stock = one_step(model, batch, case)
            fused = one_step(install_cce(build(case).to(device), case), batch, case)
            exact = one_step(exact_model, batch, case)
            found = []
            error = (fused.loss - exact.loss).abs().max().item()
            if not error <= 1.5 * (stock.loss - exact.loss).abs().max().item() + 1e-3:
                found.append(f"loss is {error:.2e} from fp32")
            for name, want in exact.grads.items():
                ours, theirs = (relative(step.grads[name], want) for step in (fused, stock))
                # Without a loss scale stock's own fp16 is up to 4e-2 away.
                most = 2e-2 if case.dtype == torch.bfloat16 else math.inf
                if not ours <= min(max(1.5 * theirs, 5e-3), most):
                    found.append(f"gradient of {name}: {ours:.2e} from fp32, stock {theirs:.2e}")
            if fused.loss.dtype != torch.float32 or fused.materialized:
                found.append(f"{fused.loss.dtype}, {fused.materialized} times real logits")
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


def assert_nothing(answers: list[list[str]]) -> None:
    """No rank has found anything wrong."""
    wrong = [line for answer in answers for line in answer]
    assert not wrong, "\n" + "\n".join(wrong)
