"""The ranks that measure together: one process, or those of a launcher such as torchrun."""

from __future__ import annotations

import os
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any

import torch
import torch.distributed as dist

# A rank that fails alone leaves the others in a collective: this ends them.
_TIMEOUT = timedelta(minutes=5)


@dataclass(frozen=True, slots=True)
class Team:
    """The ranks that hold one vocabulary between them; the world is cut into equal teams.

    Attributes:
        rank, size: of this process in the team.
        group: its process group, or None for a team of one.
    """

    rank: int = 0
    size: int = 1
    group: Any = None


@dataclass(slots=True)
class World:
    """This process and its place among the ranks. Use it as a context manager.

    Attributes:
        rank, size: of the launcher; 0 and 1 without one.
        device: where tensors of this rank belong.
        backend: of the group, or "".
        group: all ranks, or None for one process.
    """

    rank: int = 0
    size: int = 1
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    backend: str = ""
    group: Any = None
    _owns: bool = False
    _alone: Any = None
    _hosts: Any = None
    _teams: dict[int, Team] = field(default_factory=dict)
    _token: Any = None

    @classmethod
    def from_environment(cls) -> World:
        """Read RANK, WORLD_SIZE and LOCAL_RANK; nothing is started yet."""
        rank, size = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
        if not torch.cuda.is_available():
            return cls(rank, size, torch.device("cpu"), "gloo")
        devices = torch.cuda.device_count()
        local, local_size = (
            int(os.environ.get(name, default))
            for name, default in (("LOCAL_RANK", "0"), ("LOCAL_WORLD_SIZE", "1"))
        )
        device = torch.device("cuda", local % devices)
        # NCCL refuses two ranks on one device; gloo reduces CUDA tensors through the host.
        return cls(rank, size, device, "nccl" if local_size <= devices else "gloo")

    def __enter__(self) -> World:
        if self.device.type == "cuda":
            torch.cuda.set_device(self.device)
        if self.size > 1:
            if not dist.is_initialized():
                dist.init_process_group(self.backend, timeout=_TIMEOUT)
                self._owns = True
            self.group = self._hosts = dist.group.WORLD
            if self.backend == "nccl":
                # What is said between the hosts must not need a GPU: it may be what is broken.
                self._hosts = dist.new_group(backend="gloo", timeout=_TIMEOUT)
        return self

    def __exit__(self, *_: object) -> None:
        # After an error the other ranks may be in a collective, so there is no barrier here.
        if self._owns:
            dist.destroy_process_group()
        self.group = self._alone = self._hosts = self._token = None
        self._teams.clear()

    def abandon(self) -> None:
        """Leave the group as it is at the end: to take it down needs a GPU that works."""
        self._owns = False

    def team(self, size: int | None = None) -> Team:
        """This process's team of `size` ranks, which divides the world's; None: of all.

        A collective of all ranks at the first call with a size.
        """
        size = self.size if size is None else size
        if size not in self._teams:
            group = self.group
            if 1 < size < self.size:
                blocks = [[*range(first, first + size)] for first in range(0, self.size, size)]
                group = dist.new_subgroups_by_enumeration(blocks)[0]
            self._teams[size] = Team(self.rank % size, size, None if size == 1 else group)
        return self._teams[size]

    def alone(self) -> Any:
        """A process group of this rank alone, for what takes no None; made at the first call."""
        if self._alone is not None:
            return self._alone
        if dist.is_initialized():
            self._alone = dist.new_group(
                [dist.get_rank()], use_local_synchronization=True, backend=self.backend
            )
        else:
            store: Any = dist.HashStore()  # pyright: ignore[reportPrivateImportUsage]
            dist.init_process_group(
                self.backend, store=store, rank=0, world_size=1, timeout=_TIMEOUT
            )
            self._owns = True
            self._alone = dist.group.WORLD
        return self._alone

    def gather(self, value: Any) -> list[Any]:
        """What every rank brings, in the order of the ranks; between the hosts alone."""
        group = self._hosts or self.group
        if group is None:
            return [value]
        answers: list[Any] = [None] * self.size
        dist.all_gather_object(answers, value, group=group)
        return answers

    def align(self) -> None:
        """Let what follows start at the same time on all ranks.

        Over NCCL on the devices alone: the host runs ahead, as in training, and what it takes to
        start a kernel does not count.
        """
        if self.group is None:
            return
        if self.backend != "nccl":
            self.barrier()
            return
        if self._token is None:
            self._token = torch.zeros(1, device=self.device)
        dist.all_reduce(self._token, group=self.group)

    def barrier(self) -> None:
        """Wait for the device and for the other ranks."""
        if self.device.type == "cuda":
            torch.cuda.synchronize(self.device)
        if self.group is not None:
            dist.barrier(group=self.group)
