"""launch.compare: what is measured of a run, and the search for the largest micro-batch."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from launch import compare
from launch.compare import Attempt
from launch_runs import ROOT, python_path

pytestmark = [pytest.mark.no_poison, pytest.mark.once]


def made_up(fixed_mib: float, per_sequence_mib: float, room_mib: float) -> Any:
    """Attempts of a model whose memory is that; and the sizes that were tried."""
    tried: list[int] = []

    def attempt(size: int) -> Attempt:
        tried.append(size)
        peak = fixed_mib + per_sequence_mib * size
        if peak > room_mib:
            return Attempt("cce", size, "out of memory")
        return Attempt("cce", size, "ok", peak_mib=peak)

    return attempt, tried


@pytest.mark.parametrize("room", [79_000, 70_000], ids=["limit-is-right", "limit-is-too-high"])
@pytest.mark.parametrize(("fixed", "each"), [(10_000, 137.0), (2_000, 9_000.0), (50_000, 2.0)])
def test_search_finds_the_largest(fixed: float, each: float, room: float) -> None:
    attempt, tried = made_up(fixed, each, room)
    first = attempt(4)
    fits, fails = compare.search(attempt, first, 79_000, tries=11)
    largest = int((room - fixed) / each)
    assert fails is not None and fits.micro_batch <= max(4, largest) < fails
    assert fails - fits.micro_batch <= max(1, 0.02 * fits.micro_batch)
    assert len(tried) == len(set(tried)) <= 12


def test_a_failure_that_is_not_of_memory_ends_the_search() -> None:
    first = Attempt("cce", 4, "ok", peak_mib=100.0)
    tried: list[int] = []

    def attempt(size: int) -> Attempt:
        tried.append(size)
        return Attempt("cce", size, "failed")

    assert compare.search(attempt, first, 1000, tries=5) == (first, None)
    assert len(tried) == 1


def test_what_is_measured() -> None:
    records = [{"iteration": i, "loss": 1.0, "tokens_per_s": 1.0, "peak_mib": 5.0} for i in (1, 2)]
    records += [{"iteration": 3, "loss": 1.0, "tokens_per_s": 1.0, "peak_mib": 9.0}]
    records += [{"iteration": 4 + i, "loss": 1.0, "tokens_per_s": s, "peak_mib": 7.0}
                for i, s in enumerate((1000.0, 2000.0, 4000.0))]  # fmt: skip
    found = compare.measured("cce", 2, 4000, [*records, {"iteration": 6, "validation_loss": 1.0}])
    assert (found.step_ms, found.tokens_per_s, found.peak_mib) == (2000.0, 2000.0, 9.0)
    assert found.timed_steps == 3
    assert found.low_ms == 1000.0 and found.high_ms == 4000.0
    shown = compare.table([(found, Attempt("cce", 9, "ok"), 10)])
    assert "2000.0 (1000.0-4000.0) | 2,000 | 0.01 | at least 9, below 10" in shown


def test_one_attempt(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.chdir(ROOT)
    monkeypatch.setenv("PYTHONPATH", python_path())
    flags = ["--config", "configs/tiny_cpu.yaml", "--losses", "cce", "--steps", "2"]
    flags += ["--micro-batch", "1", "--out", str(tmp_path / "rows.jsonl"), "--commit", "abc"]
    assert compare.main([*flags, "megatron.tensor_model_parallel_size=1"]) == 0
    lines = (tmp_path / "rows.jsonl").read_text().splitlines()
    setup, found = map(json.loads, lines)
    assert setup["ranks"] == 1 and setup["versions"]["torch"] and setup["steps"] == 2
    assert setup["commit"] == "abc" and setup["date"].startswith("20")
    assert (
        found["status"] == "ok"
        and found["timed_steps"] == 1
        and found["step_ms"] > 0
        and found["peak_mib"] > 0
    )
    assert "| cce, micro-batch 1 |" in capsys.readouterr().out


def test_a_launcher_that_goes_on_is_asked_again(monkeypatch: pytest.MonkeyPatch) -> None:
    """As torchrun does where its code catches what its handler of SIGTERM raises."""
    program = """
import signal, time
asked = []
signal.signal(signal.SIGTERM, lambda *_: asked.append(1))
print("ready", flush=True)
while len(asked) < 2:
    time.sleep(0.01)
"""
    monkeypatch.setattr(compare, "_GRACE_S", 1)
    with subprocess.Popen(
        [sys.executable, "-c", program], stdout=subprocess.PIPE, text=True
    ) as process:
        assert process.stdout is not None and process.stdout.readline() == "ready\n"
        compare._end_launcher(process)
    assert process.returncode == 0


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM], ids=["INT", "TERM"])
def test_an_interrupted_comparison_leaves_no_rank_behind(
    tmp_path: Path, number: signal.Signals
) -> None:
    command = [sys.executable, "-m", "launch.compare", "--config", "configs/tiny_cpu.yaml"]
    command += ["--ranks", "2", "--losses", "cce", "--steps", "100000", "--micro-batch", "1"]
    marker = f"megatron.data_cache_path={tmp_path}"
    environment = {**os.environ, "PYTHONPATH": python_path()}
    before = signal.signal(signal.SIGINT, signal.default_int_handler)  # it may be ignored here
    try:
        process = subprocess.Popen(
            [*command, marker], cwd=ROOT, env=environment, stdout=subprocess.DEVNULL
        )
    finally:
        signal.signal(signal.SIGINT, before)
    try:
        _wait_until(lambda: len(_ranks(marker)) == 2)
        process.send_signal(number)
        assert process.wait(timeout=150) != 0
        _wait_until(lambda: not _ranks(marker))
    finally:
        process.kill()
        for rank in _ranks(marker):
            os.kill(rank, signal.SIGKILL)


def _ranks(marker: str) -> list[int]:
    """Processes of launch.pretrain with this argument, but for their launcher."""
    found = []
    for folder in Path("/proc").glob("[0-9]*"):
        try:
            words = (folder / "cmdline").read_bytes().decode(errors="replace").split("\0")
        except OSError:  # gone
            continue
        if marker in words and "launch.pretrain" in words and "--nproc-per-node" not in words:
            found.append(int(folder.name))
    return found


def _wait_until(holds: Callable[[], bool], timeout_s: float = 60) -> None:
    end = time.monotonic() + timeout_s
    while not holds():
        assert time.monotonic() < end
        time.sleep(0.1)


def test_gpus_are_those_that_are_visible(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    tool = tmp_path / "nvidia-smi"
    tool.write_text('#!/bin/sh\n[ "$3" = --id=2,3 ] && echo "A, big GPU, 81559, 512"\n')
    tool.chmod(0o755)
    monkeypatch.setenv("PATH", f"{tmp_path}:{os.environ['PATH']}")
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "2,3")
    assert compare._gpus() == [compare.Gpu("A, big GPU", 81559, 512)]


def test_the_reason_of_a_failure_is_found() -> None:
    assert compare.why("a\nlaunch.pretrain: x: expected y\nb") == "launch.pretrain: x: expected y"
    assert compare.why("[rank1]: ValueError: bad\n[rank0]: x").endswith("ValueError: bad")
    assert compare.why("nothing known") == "nothing known"


@pytest.mark.parametrize(
    ("output", "memory"),
    [
        ("torch.OutOfMemoryError: CUDA out of memory. Tried to", True),
        ("DistBackendError: NCCL error in: x, unhandled cuda error (run", True),
        ("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`", True),
        ("CUDA error: CUBLAS_STATUS_NOT_INITIALIZED when calling", True),
        ("CUDA error: an illegal memory access was encountered\nunhandled cuda error", False),
        ("CUDA error: device-side assert triggered\nCUBLAS_STATUS_NOT_INITIALIZED", False),
        ("unhandled system error", False),
        ("ValueError: expected memory", False),
    ],
)
def test_lack_of_memory_is_told_from_other_failures(output: str, memory: bool) -> None:
    assert compare.ran_out_of_memory(output) is memory
