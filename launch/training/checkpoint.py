"""Saving and resuming through megatron.core's distributed checkpoints.

A checkpoint is written under another name and takes its own when it is whole; after that
`latest_checkpointed_iteration.txt` names it: that file, of Megatron's own name and content, is
replaced in one step. Beside Megatron's files lies `manifest.json`, with the size and the SHA-256 of
each. Before anything is loaded, all of it is compared, and what was pickled is checked against
`trust`; a checkpoint that fails is refused, and the one before it is used.
"""

from __future__ import annotations

import os
import random
import shutil
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from typing import Any

import numpy
import torch
import torch.distributed as dist
from megatron.core import dist_checkpointing, parallel_state, tensor_parallel
from megatron.core.dist_checkpointing.mapping import ShardedObject
from torch.distributed.checkpoint.api import CheckpointException

from launch.interleaving import Interleaving, describe
from launch.training import files, orphans, trust
from launch.training.files import Manifest, folder_of, latest

_JOB = "job.txt"
# Distributed-optimizer state by parameter, not by bucket: loads under another parallel layout.
_METADATA = {"distrib_optim_sharding_type": "fully_reshardable"}
# What a checkpoint must have in common with the model that it is loaded into.
_MODEL = ("num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size")


def owned_by(folder: str | os.PathLike[str], job: str | None) -> bool:
    """Whether a job of this name has claimed the folder before; called by all ranks."""

    def compare() -> bool:
        path = Path(folder) / _JOB
        return job is not None and path.is_file() and path.read_text(errors="replace") == job

    return _on_first_rank(compare)


def claim(folder: str | os.PathLike[str], job: str | None, *, keep: bool) -> Path | None:
    """Make a folder that of a new job; called by all ranks.

    A job that is started again must find its own checkpoints only. None is deleted.

    Args:
        job: name of the job; None: one that is not started again.
        keep: leave the checkpoints where they are, for a job that goes on from them.

    Returns:
        The subfolder into which the checkpoints of an earlier job were moved; None: there were
        none.
    """

    def move() -> Path | None:
        Path(folder).mkdir(parents=True, exist_ok=True)
        target = None if keep else _set_aside(Path(folder))
        if job is not None:
            files.write(Path(folder) / _JOB, job)
        else:
            (Path(folder) / _JOB).unlink(missing_ok=True)
        return target

    return _on_first_rank(move)


def _set_aside(folder: Path) -> Path | None:
    found = [*folder.glob("iter_*"), *folder.glob(files.LATEST)]
    if not found:
        return None
    number = 1
    while (target := folder / f"earlier-{number}").exists():
        number += 1
    target.mkdir()
    for path in sorted(found, reverse=True):  # the name of the latest first
        path.rename(target / path.name)
    return target


def save(
    folder: str,
    iteration: int,
    chunks: list[Any],
    optimizer: Any,
    schedule: Any,
    samples: int,
    *,
    ids: Interleaving | None = None,
) -> None:
    """Write model, optimizer, schedule and generators; returns when all ranks' parts are there.

    Args:
        ids: how the rows of embedding and output layer are interleaved; None: in natural order.

    Raises:
        RuntimeError: it could not be written. Earlier checkpoints are as they were.
    """
    target = folder_of(folder, iteration)
    partial_ = target.with_name(f"{target.name}.partial")
    orphans.keep_results_queue()
    try:
        _on_first_rank(lambda: _make_empty(partial_))
        state = _state(chunks, optimizer, schedule, is_loading=False)
        state["iteration"], state["consumed_samples"] = iteration, samples
        state["parallel"] = _layout()
        dist_checkpointing.save(state, str(partial_))
        dist.barrier()
        names = _on_first_rank(lambda: files.names(partial_))
        manifest = Manifest(_gather_facts(partial_, names), _model(chunks), ids)
        _on_first_rank(lambda: manifest.write(partial_))
        _on_first_rank(lambda: _publish(partial_, target, iteration))
    except (Exception, CheckpointException) as error:  # torch derives its own from BaseException
        # Nothing collective here: the other ranks may not have failed.
        if dist.get_rank() == 0:
            shutil.rmtree(partial_, ignore_errors=True)
        raise RuntimeError(
            f"megatron.save: expected to write the checkpoint of iteration {iteration} to {folder},"
            f" got {_cause(error)}; the last whole one is {_named(folder)}"
        ) from error


def _cause(error: BaseException) -> str:
    if isinstance(error, CheckpointException):
        failures = [f"rank {rank}: {failure[0]}" for rank, failure in error.failures.items()]
        return "; ".join(failures) or "a failure on another rank"
    return f"{type(error).__name__}: {error}"


def _make_empty(folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)  # left by a save that did not end
    folder.mkdir(parents=True)


def _publish(partial_: Path, target: Path, iteration: int) -> None:
    if target.exists():  # refused by `load`, or left by a release that wrote in place
        shutil.rmtree(target)
    partial_.rename(target)
    files.write(target.parent / files.LATEST, str(iteration))


def _named(folder: str | os.PathLike[str]) -> str:
    try:
        iteration = latest(folder)
    except (OSError, ValueError):
        return "not known"
    return "none" if iteration is None else f"of iteration {iteration}"


def _on_first_rank(function: Callable[..., Any], *args: Any) -> Any:
    """Call on rank 0; what it returns or raises, on every rank."""
    outcome: list[Any] = [None, None]
    if dist.get_rank() == 0:
        try:
            outcome[0] = function(*args)
        except (OSError, ValueError) as error:
            outcome[1] = f"{type(error).__name__}: {error}"
    dist.broadcast_object_list(outcome)
    if outcome[1] is not None:
        raise RuntimeError(outcome[1])
    return outcome[0]


def _gather_facts(folder: Path, names: list[str]) -> dict[str, Any]:
    """{file: facts} of all files, each read by one of the ranks."""
    rank, size = dist.get_rank(), dist.get_world_size()
    parts: list[Any] = [None] * size
    dist.all_gather_object(parts, {name: files.facts(folder / name) for name in names[rank::size]})
    return {name: facts for part in parts for name, facts in part.items()}


def _model(chunks: list[Any]) -> dict[str, int]:
    return {name: getattr(chunks[0].config, name) for name in _MODEL}


def _problem(folder: Path) -> str | None:
    """What is wrong with a checkpoint, or None; the same on all ranks, who share the work."""
    problem = None
    try:
        if not folder.is_dir():
            raise ValueError("there is no such folder")
        manifest = Manifest.read(folder)
        if manifest is not None:
            manifest.compare(folder, [*manifest.files][dist.get_rank() :: dist.get_world_size()])
        if dist.get_rank() == 0:
            trust.check(folder)
    except (OSError, ValueError) as error:
        problem = str(error)
    everyone: list[Any] = [None] * dist.get_world_size()
    dist.all_gather_object(everyone, problem)
    return next((text for text in everyone if text is not None), None)


def _candidates(folder: str | os.PathLike[str]) -> Iterator[int]:
    """Iterations to try, best first: the one that is named, then older ones that were whole."""
    try:
        named = latest(folder)
        if named is None:
            return
        yield named
    except ValueError as error:
        _say(f"{error}; taking the newest whole checkpoint")
        named = None
    numbers = [
        int(path.name[5:])
        for path in Path(folder).glob("iter_*")
        if path.name[5:].isdigit() and (path / files.MANIFEST).exists()
    ]
    yield from sorted((n for n in numbers if named is None or n < named), reverse=True)


def _say(line: str) -> None:
    if dist.get_rank() == 0:
        print(f"launch.pretrain: {line}", flush=True)


def find(folder: str | os.PathLike[str]) -> int | None:
    """Iteration of the newest checkpoint that is whole and may be trusted; called by all ranks.

    Returns:
        None if the folder has no checkpoint at all.

    Raises:
        ValueError: it has, but none that can be used; on every rank.
    """
    tried = _on_first_rank(lambda: [*_candidates(folder)])
    refused = []
    for iteration in tried:
        problem = _problem(folder_of(folder, iteration))
        if problem is None:
            return iteration
        refused.append(f"iteration {iteration}: {problem}")
        _say(f"checkpoint of {refused[-1]}; refused")
    if refused:
        raise ValueError(
            f"megatron.load: expected a whole checkpoint in {folder}, got {'; '.join(refused)}"
        )
    return None


def load(
    folder: str,
    chunks: list[Any],
    optimizer: Any,
    schedule: Any,
    *,
    with_optimizer: bool = True,
    with_generators: bool = True,
    ids: Interleaving | None = None,
) -> tuple[int, int]:
    """Read the newest usable checkpoint of a folder into the objects; called by all ranks.

    It may come from another parallel layout. Generators are restored where the layout is the one
    of the save.

    Args:
        ids: as in `save`; must be the checkpoint's.

    Returns:
        (iteration, samples consumed); (0, 0) if there is no checkpoint.

    Raises:
        ValueError: on every rank, no checkpoint that is whole, or one of another model or with
            other ids.
    """
    iteration = find(folder)
    if iteration is None:
        return 0, 0
    source = str(folder_of(folder, iteration))
    manifest = Manifest.read(Path(source)) or Manifest({}, {})
    for name, here in _model(chunks).items():
        there = manifest.model.get(name, here)
        if there != here:
            raise ValueError(
                f"megatron.{name}: expected {there}, as in the checkpoint {source}, got {here}"
            )
    if manifest.ids != ids:
        raise ValueError(
            f"cce.interleave_ids: expected {describe(manifest.ids)}, as in the checkpoint "
            f"{source}, got {describe(ids)}; python -m launch.interleave_ids converts checkpoints"
        )
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
