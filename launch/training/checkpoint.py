"""Saving and resuming through megatron.core's distributed checkpoints.

A checkpoint is whole before `latest_checkpointed_iteration.txt` names it: that file, of Megatron's
own name and content, is replaced in one step at the end.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject

_LATEST = "latest_checkpointed_iteration.txt"
# Distributed-optimizer state by parameter, not by bucket: loads under another parallel layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}


def latest(folder: str | os.PathLike[str]) -> int | None:
    """Iteration of the last whole checkpoint; None if there is none."""
    try:
        return int((Path(folder) / _LATEST).read_text())
    except FileNotFoundError:
        return None


def folder_of(folder: str | os.PathLike[str], iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(folder) / f"iter_{iteration:07d}"


def save(
    folder: str, iteration: int, chunks: list[Any], optimizer: Any, schedule: Any, samples: int
) -> None:
    """Write model, optimizer, schedule and generators; returns when all ranks' parts are there."""
    target = folder_of(folder, iteration)
    if dist.get_rank() == 0:
        if latest(folder) == iteration:  # of an earlier run in the same folder
            (Path(folder) / _LATEST).unlink()
        shutil.rmtree(target, ignore_errors=True)  # left by a save that did not end
        target.mkdir(parents=True)
    dist.barrier()
    state = _state(chunks, optimizer, schedule, is_loading=False)
    state["iteration"], state["consumed_samples"] = iteration, samples
    state["parallel"] = _layout()
    dist_checkpointing.save(state, str(target))
    dist.barrier()
    if dist.get_rank() == 0:
        temporary = Path(folder) / f"{_LATEST}.new"
        with open(temporary, "w") as file:
            file.write(str(iteration))
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, Path(folder) / _LATEST)
    dist.barrier()


def load(
    folder: str,
    chunks: list[Any],
    optimizer: Any,
    schedule: Any,
    *,
    with_optimizer: bool = True,
    with_generators: bool = True,
) -> tuple[int, int]:
    """Read the last checkpoint of a folder into the objects.

    Generators are restored where the parallel layout is the one of the save.

    Returns:
        (iteration, samples consumed); (0, 0) if there is no checkpoint.
    """
    iteration = latest(folder)
    if iteration is None:
        return 0, 0
    source = str(folder_of(folder, iteration))
    common = dist_checkpointing.load_common_state_dict(source)
    with_generators = with_generators and common.get("parallel") == _layout()
    asked = (optimizer, schedule) if with_optimizer else (None, None)
    if with_optimizer:
        _prepare_adam(optimizer)
    wanted = _state(chunks, *asked, is_loading=True, generators=with_generators)
    state: Any = dist_checkpointing.load(wanted, source)
    for number, chunk in enumerate(chunks):
        _bare(chunk).load_state_dict(state[_key(number, chunks)])
    if with_optimizer:
        optimizer.load_state_dict(state["optimizer"])
        schedule.load_state_dict(state["schedule"])
    elif hasattr(optimizer, "reload_model_params"):
        optimizer.reload_model_params()
    if with_generators:
        _set_generators(state["generators"])
    return iteration, common["consumed_samples"]


def _prepare_adam(optimizer: Any) -> None:
    """Let Megatron's distributed optimizer load where its Adam is PyTorch's.

    That is so without apex and Transformer Engine. PyTorch's keeps its number of steps beside the
    moments, and Megatron's loading trips over that: it asks a new optimizer, which has done none,
    for the number; it looks for it among the loaded moments, where it is not; and it gives all
    parameters one tensor, which would then count every parameter's step.
    """
    for part in getattr(optimizer, "chained_optimizers", [optimizer]):
        inner = part.optimizer
        stock = getattr(part, "load_parameter_state_from_fully_reshardable", None)
        if stock is None or not isinstance(inner, torch.optim.Adam):
            continue
        for parameter in (p for group in inner.param_groups for p in group["params"]):
            moments = {name: torch.zeros_like(parameter) for name in ("exp_avg", "exp_avg_sq")}
            inner.state[parameter] = {"step": torch.tensor(0.0), **moments}
        part.load_parameter_state_from_fully_reshardable = partial(_load_moments, inner, stock)


def _load_moments(inner: torch.optim.Adam, stock: Callable[[Any], None], moments: Any) -> None:
    steps = {parameter: state.pop("step") for parameter, state in inner.state.items()}
    stock(moments)
    for parameter, step in steps.items():
        inner.state[parameter]["step"] = step.clone()


def _key(number: int, chunks: list[Any]) -> str:
    return "model" if len(chunks) == 1 else f"model{number}"


def _bare(chunk: Any) -> Any:
    """The model inside its wrappers."""
    while hasattr(chunk, "module"):
        chunk = chunk.module
    return chunk


def _layout() -> dict[str, int]:
    return {
        "tensor": parallel_state.get_tensor_model_parallel_world_size(),
        "pipeline": parallel_state.get_pipeline_model_parallel_world_size(),
        "data": parallel_state.get_data_parallel_world_size(with_context_parallel=True),
    }


def _state(
    chunks: list[Any], optimizer: Any, schedule: Any, *, is_loading: bool, generators: bool = True
) -> dict[str, Any]:
    metadata: dict[str, Any] = dict(_METADATA)
    metadata["dp_cp_group"] = parallel_state.get_data_parallel_group(with_context_parallel=True)
    state: dict[str, Any] = {
        _key(number, chunks): _bare(chunk).sharded_state_dict(metadata=metadata)
        for number, chunk in enumerate(chunks)
    }
    if optimizer is not None:
        model = state if len(chunks) > 1 else state["model"]
        state["optimizer"] = optimizer.sharded_state_dict(
            dict(model), is_loading=is_loading, metadata=metadata
        )
        state["schedule"] = schedule.state_dict()
    if generators:
        state["generators"] = _generators()
    return state


def _generators() -> ShardedObject:
    """States of this rank's generators, one entry per pipeline, tensor and data rank."""
    shape = tuple(_layout()[kind] for kind in ("pipeline", "tensor", "data"))
    place = (
        parallel_state.get_pipeline_model_parallel_rank(),
        parallel_state.get_tensor_model_parallel_rank(),
        parallel_state.get_data_parallel_rank(with_context_parallel=True),
    )
    name, keys, *more = numpy.random.get_state()
    states = {
        "python": random.getstate(),
        # As a list: unpickling of arrays is off in some releases.
        "numpy": (name, [int(key) for key in keys], *more),
        "torch": torch.get_rng_state(),
        "device": torch.cuda.get_rng_state(),
        "tracker": _tracker().get_states(),
    }
    return ShardedObject("generators", states, shape, place)


def _tracker() -> Any:
    return tensor_parallel.get_cuda_rng_tracker()


def _set_generators(states: dict[str, Any]) -> None:
    random.setstate(states["python"])
    numpy.random.set_state(states["numpy"])
    torch.set_rng_state(states["torch"])
    torch.cuda.set_rng_state(states["device"])
    _tracker().set_states(states["tracker"])
