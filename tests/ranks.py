"""Worker processes that stay up for the whole test session and act as the ranks of process groups.

`RankPool.run(function, *args, ranks=3)` calls `function(rank, *args)` on every rank of a group,
`rank` being a `Rank`, and returns what the calls returned, in the order of the group's ranks.
Function and arguments travel by pickle. gloo, over a file rendezvous: no ports. A rank that hangs
costs the call its time limit; the pool is then killed and started anew by the next call, so that
one failure does not become many.

With CCE_TP_TEST_BACKEND=nccl in the environment the ranks talk over NCCL, each with a GPU of its
own; what needs more ranks than there are GPUs is skipped.
"""

from __future__ import annotations

import contextlib
import inspect
import io
import itertools
import os
import pickle
import shutil
import signal
import tempfile
import time
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from datetime import timedelta
from multiprocessing.connection import Connection, wait
from multiprocessing.process import BaseProcess
from typing import Any
from unittest import mock

import numpy as np
import pytest
import torch
import torch.distributed as dist
import torch.multiprocessing as mp

BACKEND = os.environ.get("CCE_TP_TEST_BACKEND", "gloo")
assert BACKEND in ("gloo", "nccl"), f"CCE_TP_TEST_BACKEND: expected gloo or nccl, got {BACKEND!r}"
WORKERS = min(8, torch.cuda.device_count()) if BACKEND == "nccl" else 4
assert WORKERS > 1, f"CCE_TP_TEST_BACKEND=nccl: expected two GPUs or more, got {WORKERS}"


def _groups() -> dict[str, tuple[int, ...]]:
    """Group name -> worker ids in the order of their group ranks.

    All but "world" leave workers out or are in an order that is not that of the ids (where torch
    allows it).
    """
    last = {size: tuple(range(WORKERS - size, WORKERS)) for size in range(1, WORKERS + 1)}
    rotated = {str(size): (*ids[1:], ids[0]) for size, ids in last.items()}
    return {**rotated, "world": tuple(range(WORKERS))}


GROUPS = _groups()
# Sizes of groups to test; those that there are too few GPUs for are skipped.
COUNTS = (1, 2, 3, 4, 8) if WORKERS > 4 else (1, 2, 3, 4)
DEFAULT_TIMEOUT_S = 60.0
_START_TIMEOUT_S = 180.0
# How long the other ranks may still take once one rank has failed.
_GRACE_S = 15.0
_CAN_PERMUTE = "sort_ranks" in inspect.signature(dist.new_group).parameters


class RankError(RuntimeError):
    """A rank raised, died, or did not answer in time."""


def default_device() -> str:
    """Over gloo all ranks share one GPU where there is one (gloo reduces CUDA tensors)."""
    return "cuda" if torch.cuda.is_available() else "cpu"


# What takes most of the time that a rank needs to start.
_IMPORTED_ONCE = ["torch._dynamo", "torch.distributed.checkpoint", "triton", "cce_tp"]


def _context() -> Any:
    """How workers are started: each a process of its own; on the CPU from one server that has
    imported what all of them need, and has done nothing else."""
    if torch.cuda.is_available() or BACKEND == "nccl":
        return mp.get_context("spawn")
    context = mp.get_context("forkserver")
    context.set_forkserver_preload(_IMPORTED_ONCE)
    return context


def _new_group(ids: tuple[int, ...], **more: Any) -> Any:
    if _CAN_PERMUTE:
        more["sort_ranks"] = False
    return dist.new_group(list(ids), backend=BACKEND, **more)


@dataclass(frozen=True)
class Rank:
    """One rank of the group that a function runs on.

    Attributes:
        rank, size: in the group.
        group: its process group.
        device: where this rank's tensors belong.
        ids: worker ids of the group in the order of the group's ranks.
        serial: number of the command, the same on all ranks.
    """

    rank: int
    size: int
    group: Any
    device: str
    ids: tuple[int, ...]
    serial: int
    _made: Iterator[int] = field(default_factory=itertools.count)

    def fresh_group(self) -> Any:
        """A new process group of the same ranks, which the library has not met.

        torch names groups by how many its process has made, and workers have been in different
        ones: here the name comes from the command. Never destroyed: torch would give the name, and
        what the rendezvous stored under it, to another group.
        """
        name = f"fresh-{self.serial}-{next(self._made)}"
        with mock.patch.object(dist.distributed_c10d, "_process_group_name", lambda *_, **__: name):
            return _new_group(self.ids, use_local_synchronization=True)


def _worker(
    worker: int, folder: str, pipe: Connection, device: str, environment: dict[str, str]
) -> None:
    """Main function of a worker process: answers commands until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    # What a process of one's own would have, and forked ones share with their server.
    os.environ.clear()
    os.environ.update(environment)
    torch.seed()
    np.random.seed()
    torch.set_num_threads(1)
    if BACKEND == "nccl":
        os.environ.setdefault("NCCL_NVLS_ENABLE", "0")  # not every host can do NVLink multicast
        device = f"cuda:{worker}"
        torch.cuda.set_device(device)
    dist.init_process_group(
        BACKEND,
        init_method=f"file://{folder}/rendezvous",
        rank=worker,
        world_size=WORKERS,
        timeout=timedelta(seconds=600),
    )
    from interpreter import patch_all
    from poison import poisoned_empty

    if os.environ.get("TRITON_INTERPRET") == "1":
        patch_all()
    groups = {name: _new_group(ids) for name, ids in GROUPS.items() if name != "world"}
    groups["world"] = dist.group.WORLD
    pipe.send_bytes(b"ready")
    with contextlib.suppress(EOFError, OSError):
        while True:
            serial, name, function, args, poison = pickle.loads(pipe.recv_bytes())
            group = groups[name]
            ids = tuple(dist.get_process_group_ranks(group))
            rank = Rank(dist.get_rank(group), len(ids), group, device, ids, serial)
            try:
                with poisoned_empty() if poison else contextlib.nullcontext():
                    answer = (rank.rank, True, function(rank, *args))
                data = io.BytesIO()
                torch.save(answer, data)
            except BaseException:
                data = io.BytesIO()
                torch.save((rank.rank, False, traceback.format_exc()), data)
            pipe.send_bytes(data.getvalue())
    # No orderly shutdown: the other workers may be gone already.
    os._exit(0)


# Takes the place of the pool of the session, where another launcher has started the ranks.
shared_pool: RankPool | None = None


def _no_work(rank: Rank) -> None:
    dist.barrier(group=rank.group)


class RankPool:
    """See the module's text. Started by the first `run`.

    Args:
        device: "cpu", or "cuda": all ranks on one GPU over gloo, one GPU each over NCCL.
    """

    def __init__(self, device: str = "cpu") -> None:
        self.device = device
        self._processes: list[BaseProcess] = []
        self._pipes: list[Connection] = []
        self._folder: str | None = None
        self._serial = 0

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = 2,
        group: str | None = None,
        timeout_s: float = DEFAULT_TIMEOUT_S,
        poison: bool = True,
    ) -> list[Any]:
        """Call a module-level function on every rank of a group.

        Args:
            function: called as function(rank, *args).
            ranks: size of the group.
            group: "world", or a name from GROUPS; by default the group of `ranks` ranks.
            timeout_s: limit for the whole call.
            poison: fill fresh memory with NaN.

        Raises:
            RankError: with the traceback of every rank that raised.
        """
        name = group or str(ranks)
        if name not in GROUPS:
            pytest.skip(f"{name} ranks over NCCL need as many GPUs; torch sees {WORKERS}")
        if not self._processes:
            self._start()
        self._serial += 1
        command = pickle.dumps((self._serial, name, function, args, poison))
        for worker in GROUPS[name]:
            self._pipes[worker].send_bytes(command)
        answers = self._collect(GROUPS[name], timeout_s)
        failed = [(rank, text) for rank, ok, text in answers if not ok]
        if failed:
            if function is not _no_work:
                self._check_health()
            raise RankError(
                "\n".join(f"--- rank {rank} of {name}:\n{text}" for rank, text in failed)
            )
        return [value for _, _, value in sorted(answers, key=lambda answer: answer[0])]

    def close(self) -> None:
        """Kill the workers; the next `run` starts new ones."""
        for process in self._processes:
            process.kill()
        for process in self._processes:
            process.join()
        for pipe in self._pipes:
            pipe.close()
        self._processes, self._pipes = [], []
        if self._folder is not None:
            shutil.rmtree(self._folder, ignore_errors=True)
            self._folder = None

    def _start(self) -> None:
        context = _context()
        self._folder = tempfile.mkdtemp(prefix="ranks-")
        for worker in range(WORKERS):
            ours, theirs = context.Pipe()
            args = (worker, self._folder, theirs, self.device, dict(os.environ))
            process = context.Process(target=_worker, args=args, daemon=True)
            process.start()
            theirs.close()
            self._processes.append(process)
            self._pipes.append(ours)
        self._receive(tuple(range(WORKERS)), _START_TIMEOUT_S, lambda data: data)

    def _collect(self, workers: tuple[int, ...], timeout_s: float) -> list[tuple[int, bool, Any]]:
        def load(data: bytes) -> tuple[int, bool, Any]:
            return torch.load(io.BytesIO(data), map_location="cpu", weights_only=False)

        return self._receive(workers, timeout_s, load)

    def _receive(
        self, workers: tuple[int, ...], timeout_s: float, load: Callable[[bytes], Any]
    ) -> list[Any]:
        """One message of each worker; kills the pool if one dies or is late."""
        deadline = time.monotonic() + timeout_s
        waiting = {self._pipes[worker]: worker for worker in workers}
        answers = []
        failures: list[str] = []
        while waiting:
            ready = wait(list(waiting), timeout=max(0.0, deadline - time.monotonic()))
            if not ready:
                late = sorted(waiting.values())
                self.close()
                raise RankError("\n".join([f"workers {late} did not answer in time", *failures]))
            for pipe in ready:
                assert isinstance(pipe, Connection)
                worker = waiting.pop(pipe)
                try:
                    answers.append(load(pipe.recv_bytes()))
                except (EOFError, OSError):
                    code = self._exit_code(worker)
                    self.close()
                    raise RankError(f"worker {worker} died with exit code {code}") from None
                if isinstance(answers[-1], tuple) and not answers[-1][1]:
                    failures.append(answers[-1][2])
                    deadline = min(deadline, time.monotonic() + _GRACE_S)
        return answers

    def _exit_code(self, worker: int) -> int | None:
        self._processes[worker].join(timeout=5)
        return self._processes[worker].exitcode

    def _check_health(self) -> None:
        """After a failure: are the workers still in step? Otherwise away with them."""
        try:
            for name in GROUPS:
                self.run(_no_work, group=name, timeout_s=_GRACE_S)
        except RankError:
            self.close()
