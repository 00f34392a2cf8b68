"""Which rank this process is, by whichever launcher started it: torchrun, mpirun or srun.

`resolve` answers once per process and sets the variables that PyTorch and Megatron read (RANK,
WORLD_SIZE, LOCAL_RANK, LOCAL_WORLD_SIZE, MASTER_ADDR, MASTER_PORT), so that whatever comes after
need not know the launcher. It imports neither torch nor, but under mpirun, mpi4py.
"""

from __future__ import annotations

import functools
import os
import re
import socket
from collections.abc import Mapping, MutableMapping
from dataclasses import dataclass
from importlib.util import find_spec

_TORCHRUN = ("RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")
# What the launchers of Open MPI, of MPICH and its kin (PMI, PMIx) and of MVAPICH set.
_MPI = ("OMPI_COMM_WORLD_SIZE", "PMI_SIZE", "PMIX_RANK", "MV2_COMM_WORLD_SIZE")
_SRUN = ("SLURM_PROCID", "SLURM_STEP_NUM_TASKS", "SLURM_LOCALID", "SLURM_STEP_NODELIST")


@dataclass(frozen=True)
class Topology:
    """This process among all that were started together.

    Attributes:
        launcher: torchrun, mpirun or srun.
        rank, world_size: among all processes.
        local_rank, local_world_size: among those of this node.
        node, nodes: number of this node, and how many there are.
        address, port: where rank 0 listens for the rendezvous of torch.distributed.
        job: name under which the launcher starts this job again after a failure; None: none.
        restarts: how often it has done so, as far as this node knows.
    """

    launcher: str
    rank: int
    world_size: int
    local_rank: int
    local_world_size: int
    node: int
    nodes: int
    address: str
    port: int
    job: str | None = None
    restarts: int = 0

    def __post_init__(self) -> None:
        for name, size in (("rank", "world_size"), ("local_rank", "local_world_size")):
            value, limit = getattr(self, name), getattr(self, size)
            if not 0 <= value < limit:
                raise ValueError(
                    f"{name}: expected 0 <= {name} < {size}, got {value} of {limit} from "
                    f"{self.launcher}"
                )
        if not 0 <= self.node < self.nodes <= self.world_size:
            raise ValueError(
                f"node: expected 0 <= node < nodes <= {self.world_size} ranks, got {self.node} of "
                f"{self.nodes} from {self.launcher}"
            )

    def export(self, environment: MutableMapping[str, str]) -> None:
        """Set the variables of torch.distributed."""
        environment.update(
            RANK=str(self.rank),
            WORLD_SIZE=str(self.world_size),
            LOCAL_RANK=str(self.local_rank),
            LOCAL_WORLD_SIZE=str(self.local_world_size),
            MASTER_ADDR=self.address,
            MASTER_PORT=str(self.port),
        )

    def __str__(self) -> str:
        again = f", restart {self.restarts}" if self.restarts else ""
        job = f"; job {self.job}{again}" if self.job else ""
        return (
            f"{self.world_size} ranks by {self.launcher} on {self.nodes} node(s), "
            f"{self.local_world_size} on the first; rendezvous at {self.address}:{self.port}{job}"
        )


@functools.cache
def resolve() -> Topology:
    """Ask the launcher, and set the variables of torch.distributed; the same answer every time.

    Under mpirun a collective: all processes of the job must call it.

    Raises:
        ValueError: not started by a launcher, or one that does not say enough.
    """
    found = read(os.environ)
    found.export(os.environ)
    return found


def read(environment: Mapping[str, str]) -> Topology:
    """The topology that these variables describe; sets nothing.

    torchrun comes first, as it may itself run under one of the others; then MPI, whose daemons
    srun may have started.

    Raises:
        ValueError: as `resolve`.
    """
    if "TORCHELASTIC_RUN_ID" in environment or all(name in environment for name in _TORCHRUN):
        return _from_torchrun(environment)
    by_srun = "SLURM_STEP_ID" in environment and all(name in environment for name in _SRUN)
    if any(name in environment for name in _MPI):
        if find_spec("mpi4py") is not None:
            return _from_mpi(environment)
        # srun speaks PMI as well, to programs that may not be MPI's: its own variables will do.
        if not by_srun or "OMPI_COMM_WORLD_SIZE" in environment:
            raise ValueError(
                "mpi4py: expected to be installed under mpirun (the extra `mpi`), got no such "
                "package"
            )
    if by_srun:
        return _from_srun(environment)
    raise ValueError(
        "launcher: expected torchrun, mpirun or srun (launch/torchrun.sh, launch/mpirun.sh, "
        "launch/slurm.sbatch), got none of their variables"
    )


def _number(environment: Mapping[str, str], name: str, default: int | None = None) -> int:
    text = environment.get(name)
    if text is None and default is not None:
        return default
    if text is None or not re.fullmatch(r"\d{1,9}", text):
        raise ValueError(f"{name}: expected a number from the launcher, got {text!r}")
    return int(text)


def _from_torchrun(environment: Mapping[str, str]) -> Topology:
    if not environment.get("MASTER_ADDR"):
        raise ValueError("MASTER_ADDR: expected the address of rank 0, got none")
    world_size = _number(environment, "WORLD_SIZE")
    return Topology(
        launcher="torchrun" if "TORCHELASTIC_RUN_ID" in environment else "environment",
        rank=_number(environment, "RANK"),
        world_size=world_size,
        local_rank=_number(environment, "LOCAL_RANK", 0),
        local_world_size=_number(environment, "LOCAL_WORLD_SIZE", 1),
        node=_number(environment, "GROUP_RANK", 0),
        nodes=_number(environment, "GROUP_WORLD_SIZE", 1),
        address=environment["MASTER_ADDR"],
        port=_number(environment, "MASTER_PORT"),
        job=environment.get("TORCHELASTIC_RUN_ID"),
        restarts=_number(environment, "TORCHELASTIC_RESTART_COUNT", 0)
        + _number(environment, "SLURM_RESTART_COUNT", 0),
    )


def _from_srun(environment: Mapping[str, str]) -> Topology:
    """One task per rank: ranks from Slurm, the port from the number of the job."""
    job = _number(environment, "SLURM_JOB_ID", 0)
    nodes = _number(environment, "SLURM_STEP_NUM_NODES", 1)
    here = _number(environment, "SLURM_NODEID", 0)
    first = first_host(environment["SLURM_STEP_NODELIST"])
    return Topology(
        launcher="srun",
        rank=_number(environment, "SLURM_PROCID"),
        world_size=_number(environment, "SLURM_STEP_NUM_TASKS"),
        local_rank=_number(environment, "SLURM_LOCALID"),
        local_world_size=tasks_of_node(environment.get("SLURM_STEP_TASKS_PER_NODE", "1"), here),
        node=here,
        nodes=nodes,
        address=environment.get("MASTER_ADDR") or first,
        port=_number(environment, "MASTER_PORT", 20000 + job % 20000),
        job=f"slurm-{job}.{environment['SLURM_STEP_ID']}",
        restarts=_number(environment, "SLURM_RESTART_COUNT", 0),
    )


def first_host(nodelist: str) -> str:
    """The first name of Slurm's list: "gpu[07-09,12],login" -> "gpu07"."""
    found = re.match(r"([^,\[\]]+)(?:\[([^\],-]+)[^\]]*\]([^,\[\]]*))?", nodelist)
    if found is None:
        raise ValueError(f"SLURM_STEP_NODELIST: expected names of nodes, got {nodelist!r}")
    prefix, number, suffix = found.groups()
    return prefix + (number or "") + (suffix or "")


def tasks_of_node(counts: str, node: int) -> int:
    """Tasks of one node by Slurm's notation: "2(x3),1" is 2, 2, 2, 1."""
    every: list[int] = []
    for part in counts.split(","):
        found = re.fullmatch(r"(\d+)(?:\(x(\d+)\))?", part)
        if found is None:
            raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: expected as 2(x3),1, got {counts!r}")
        every += [int(found[1])] * int(found[2] or 1)
    if node >= len(every):
        raise ValueError(f"SLURM_STEP_TASKS_PER_NODE: expected node {node} in it, got {counts!r}")
    return every[node]


def _from_mpi(environment: Mapping[str, str]) -> Topology:
    """Ranks from MPI, which also carries the address; MPI is not needed after that.

    It is finalised here: left up, a rank that fails would wait at its exit for the others, which
    wait for it.
    """
    import mpi4py  # type: ignore[import-not-found]

    mpi4py.rc.finalize = False
    from mpi4py import MPI  # type: ignore[import-not-found]

    world = MPI.COMM_WORLD
    local = world.Split_type(MPI.COMM_TYPE_SHARED, key=world.rank)
    first = world.allgather(local.allgather(world.rank)[0])
    nodes = sorted(set(first))
    where = None
    if world.rank == 0:
        address = environment.get("MASTER_ADDR")
        if not address:
            address = "127.0.0.1" if len(nodes) == 1 else socket.gethostname()
        where = (address, _number(environment, "MASTER_PORT", _free_port()))
    address, port = world.bcast(where)
    found = Topology(
        launcher="mpirun",
        rank=world.rank,
        world_size=world.size,
        local_rank=local.rank,
        local_world_size=local.size,
        node=nodes.index(first[world.rank]),
        nodes=len(nodes),
        address=address,
        port=port,
    )
    local.Free()
    MPI.Finalize()
    return found


def _free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("", 0))
        return probe.getsockname()[1]
