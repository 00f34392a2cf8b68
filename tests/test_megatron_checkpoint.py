"""Checkpoints know nothing of the fused loss: the same keys, the same bits, either way."""

from __future__ import annotations

import multiprocessing
from pathlib import Path
from typing import Any
from unittest import mock

import torch

from megatron_harness import (
    assert_nothing,
    forward,
    install_cce,
    masked_mean,
    model_parallel,
    relative,
    run_ranks,
)
from megatron_models import MCORE, Case, batch_of, build, grid

HYBRID_MTP = [0, 2] if MCORE >= (0, 19) else [0]


def _sharded(model: Any) -> Any:
    from megatron.core import parallel_state as state

    group = state.get_data_parallel_group(with_context_parallel=True)
    return model.sharded_state_dict(metadata={"dp_cp_group": group})


def _described(model: Any) -> tuple[Any, Any]:
    sharded = {
        key: {
            name: getattr(value, name, None)
            for name in (
                *("key", "dtype", "local_shape", "global_shape", "global_offset"),
                *("axis_fragmentations", "replica_id", "allow_shape_mismatch", "prepend_axis_num"),
            )
        }
        for key, value in _sharded(model).items()
    }
    plain = {
        key: (tuple(value.shape), value.dtype) if isinstance(value, torch.Tensor) else None
        for key, value in model.state_dict().items()
    }
    return sharded, plain


def _keys(rank: Any, cases: list[Case], layout: dict[str, int]) -> list[str]:
    wrong = []
    with model_parallel(**layout):
        for case in cases:
            model = build(case)
            want, buffers = _described(model), dict(model.named_buffers())
            got = _described(install_cce(model))
            if got != want or dict(model.named_buffers()).keys() != buffers.keys():
                wrong.append(f"rank {rank.rank}: {case.name}: state dicts differ")
            if _described(install_cce(build(case))) != want:
                wrong.append(f"rank {rank.rank}: {case.name}: state dicts of a fresh model differ")
    return wrong


def test_state_dicts_are_stock() -> None:
    """Check 5: keys, shapes, offsets and flags, TP 2 and PP 2."""
    cases = grid(Case(), tied=[False, True], mtp=[0, 2])
    cases += grid(Case(model="hybrid"), tied=[False, True], mtp=HYBRID_MTP)
    assert_nothing(run_ranks(_keys, cases, {"tp": 2}))
    # Tied, MTP and a pipeline together have no sharded state dict in stock either.
    cases = [*grid(Case(), tied=[False, True]), Case(mtp=2)]
    assert_nothing(run_ranks(_keys, cases, {"tp": 2, "pp": 2}))


def _whole(model: Any) -> dict[str, torch.Tensor]:
    """Every parameter, put together over the tensor-parallel ranks."""
    from megatron.core import parallel_state as state

    group = state.get_tensor_model_parallel_group()
    whole = {}
    for name, parameter in model.named_parameters():
        shards = [parameter.detach().clone()]
        if getattr(parameter, "tensor_model_parallel", False) and group.size() > 1:
            shards = [torch.empty_like(shards[0]) for _ in range(group.size())]
            torch.distributed.all_gather(shards, parameter.detach().contiguous(), group=group)
        whole[name] = torch.cat(shards, dim=max(getattr(parameter, "partition_dim", 0), 0))
    return whole


def _sgd_step(model: Any, case: Case) -> None:
    batch = batch_of(case, seed=1)
    masked_mean(forward(model, batch, case), batch.mask).backward()
    from megatron.core import parallel_state as state

    with torch.no_grad():
        for parameter in model.parameters():
            if case.sequence_parallel and getattr(parameter, "sequence_parallel", False):
                group = state.get_tensor_model_parallel_group()
                torch.distributed.all_reduce(parameter.grad, group=group)
            parameter.sub_(parameter.grad, alpha=0.1)
            parameter.grad = None


def _there(case: Case, folder: str, tp: int, fused: bool) -> tuple[Any, torch.Tensor, Any]:
    """Train a step, save; the weights, the next loss and its gradients."""
    from megatron.core import dist_checkpointing

    with model_parallel(tp=tp):
        model = build(case)
        if fused:
            install_cce(model)
        _sgd_step(model, case)
        # Saving starts a process, which the pool's workers, being daemons, may not.
        current = multiprocessing.current_process()
        with mock.patch.dict(current._config, daemon=False):  # type: ignore[attr-defined]
            dist_checkpointing.save(_sharded(model), folder)
        return _next(model, case)


def _end_saving() -> None:
    """The process of saves, one for all of them, lives as long as its parent, unless that is
    killed, as the pool's workers are."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    filesystem_async._results_queue = None
    for child in multiprocessing.active_children():
        child.terminate()
        child.join()


def _back(case: Case, folder: str, tp: int, fused: bool) -> tuple[Any, torch.Tensor, Any]:
    """Load into a model of other weights."""
    from megatron.core import dist_checkpointing

    with model_parallel(tp=tp):
        model = build(case, seed=99)
        if fused:
            install_cce(model)
        loaded = dist_checkpointing.load(_sharded(model), folder)
        model.load_state_dict(loaded)
        return _next(model, case)


def _next(model: Any, case: Case) -> tuple[Any, torch.Tensor, Any]:
    weights = _whole(model)
    batch = batch_of(case, seed=2)
    loss = forward(model, batch, case).detach()
    _sgd_step(model, case)
    return weights, loss, _whole(model)


def _round_trips(rank: Any, folder: str, trips: list[tuple[Case, int, bool, int, bool]]) -> Any:
    try:
        return _differences(rank, folder, trips)
    finally:
        _end_saving()


def _differences(rank: Any, folder: str, trips: list[tuple[Case, int, bool, int, bool]]) -> Any:
    wrong = []
    for number, (case, tp, fused, other_tp, other_fused) in enumerate(trips):
        where = Path(folder) / str(number)
        if rank.rank == 0:
            where.mkdir()
        torch.distributed.barrier()
        saved = _there(case, str(where), tp, fused)
        loaded = _back(case, str(where), other_tp, other_fused)
        found = [
            f"{name} differs in bits"
            for name, weight in saved[0].items()
            if not torch.equal(weight, loaded[0][name])
        ]
        if not (saved[1] - loaded[1]).abs().max() <= 1e-5:
            found.append(f"next loss differs by {(saved[1] - loaded[1]).abs().max():.2e}")
        found += [
            f"{name} after the next step differs"
            for name, weight in saved[2].items()
            if not relative(loaded[2][name], weight) <= 5e-6
        ]
        trip = f"TP {tp} fused={fused} to TP {other_tp} fused={other_fused}"
        wrong += [f"rank {rank.rank}: {case.name}: {trip}: {each}" for each in found]
    return wrong


def test_checkpoints_go_both_ways(tmp_path: Path) -> None:
    """Checks 6, 34: stock to fused and back, TP 2 to TP 1 and back; saving returns."""
    untied, tied = Case(), Case(tied=True)
    trips = [
        (untied, 2, False, 1, True),
        (untied, 1, True, 2, False),
        (untied, 1, False, 2, True),
        (tied, 2, True, 1, False),
        (tied, 2, False, 2, True),
        (Case(tied=True, sequence_parallel=True, mtp=2), 2, True, 2, False),
    ]
    assert_nothing(run_ranks(_round_trips, str(tmp_path), trips))
