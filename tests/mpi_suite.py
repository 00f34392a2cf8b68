"""Runs tests of the sharded loss with MPI's processes as the ranks.

mpirun -n 4 python tests/mpi_suite.py tests/test_sharded.py -k even

Rank 0 runs pytest; the `pool` of the tests is then this one, in which rank 0 takes part, too.
Groups are made over gloo, at the address that launch.topology got through MPI.
"""

from __future__ import annotations

import contextlib
import os
import sys
import traceback
from collections.abc import Callable
from typing import Any

os.environ["TRITON_INTERPRET"] = "1"

import pytest
import torch
import torch.distributed as dist

import ranks
from launch import topology
from poison import poisoned_empty

_STOP = "stop"


class MpiPool(ranks.RankPool):
    """Commands go out, and answers come back, over gloo."""

    def __init__(self) -> None:
        super().__init__(device="cpu")
        self.groups = {name: ranks._new_group(ids) for name, ids in ranks.GROUPS.items()}

    def run(
        self,
        function: Callable[..., Any],
        *args: Any,
        ranks: int = 2,
        group: str | None = None,
        timeout_s: float = 0.0,
        poison: bool = True,
    ) -> list[Any]:
        """As RankPool.run; the time limit is that of the whole program."""
        del timeout_s
        self._serial += 1
        return self.act((self._serial, group or str(ranks), function, args, poison))

    def act(self, command: Any) -> list[Any]:
        """One command, on every process; returns the answers, and raises on rank 0."""
        box = [command]
        dist.broadcast_object_list(box)
        if box[0] == _STOP:
            raise EOFError("no more commands")
        serial, name, function, args, poison = box[0]
        group, answer = self.groups[name], None
        ids = ranks.GROUPS[name]
        if dist.get_rank() in ids:
            place = dist.get_rank(group)
            ids = tuple(dist.get_process_group_ranks(group))
            rank = ranks.Rank(place, len(ids), group, "cpu", ids, serial)
            try:
                with poisoned_empty() if poison else contextlib.nullcontext():
                    answer = (place, True, function(rank, *args))
            except Exception:
                answer = (place, False, traceback.format_exc())
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, answer)
        answers = sorted((a for a in everyone if a is not None), key=lambda answer: answer[0])
        failed = [f"--- rank {place} of {name}:\n{text}" for place, ok, text in answers if not ok]
        if failed and dist.get_rank() == 0:
            raise ranks.RankError("\n".join(failed))
        return [value for _, _, value in answers]

    def close(self) -> None:
        """Nothing to kill."""


def main(arguments: list[str]) -> int:
    """pytest's exit status on rank 0."""
    place = topology.resolve()
    if place.world_size != ranks.WORKERS:
        print(f"expected {ranks.WORKERS} processes, got {place.world_size}", file=sys.stderr)
        return 2
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    pool = MpiPool()
    if place.rank == 0:
        print(f"topology: {place}", flush=True)
        ranks.shared_pool = pool
        status = int(pytest.main(["-p", "no:cacheprovider", *arguments]))
        with contextlib.suppress(EOFError):
            pool.act(_STOP)
    else:
        status = 0
        with contextlib.suppress(EOFError):
            while True:
                pool.act(None)
    sys.stdout.flush()
    os._exit(status)


if __name__ == "__main__":
    sys.exit(main(sys.argv[1:]))
