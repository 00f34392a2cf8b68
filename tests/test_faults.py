"""Faults in a training run, on the CPU: killed ranks, damaged checkpoints, numbers, settings."""

from __future__ import annotations

import fcntl
import json
import os
import re
import sys
import time
from pathlib import Path
from typing import Any

import pytest

import fault_runs
from fault_runs import ITERATIONS, SMALL, losses
from launch_runs import ROOT, python_path, run_to_end, torchrun

pytestmark = [pytest.mark.no_poison, pytest.mark.once]
KILL_AT = 5


@pytest.fixture(scope="session")
def answers(tmp_path_factory: pytest.TempPathFactory) -> list[dict[str, Any]]:
    """What the series of runs in tests/fault_runs.py came to, on each of two ranks.

    Run once, whichever of pytest's processes comes first.
    """
    root = tmp_path_factory.getbasetemp()
    if "PYTEST_XDIST_WORKER" in os.environ:
        root = root.parent
    folder = root / "faults"
    folder.mkdir(exist_ok=True)
    with open(root / "faults.lock", "w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not (folder / "answers.json").exists():
            torchrun(2, fault_runs.__file__, str(folder), timeout_s=300)
    return json.loads((folder / "answers.json").read_text())


def of(answers: list[dict[str, Any]], name: str) -> Any:
    """An answer that is the same on both ranks."""
    assert answers[0][name] == answers[1][name], name
    return answers[0][name]


def whole(answers: list[dict[str, Any]]) -> list[Any]:
    """Losses of the run to which nothing happened."""
    found = answers[0]["whole"]
    assert [step for step, _ in found] == [*range(1, ITERATIONS + 1)]
    return found


@pytest.mark.timeout(600)
def test_a_rank_killed_in_mid_step(tmp_path: Path, answers: list[dict[str, Any]]) -> None:
    """The others stop, torchrun starts all again, and the losses are those of a whole run."""
    run_dir = tmp_path / "killed"
    environment = {
        **os.environ,
        "PYTHON": sys.executable,
        "PYTHONPATH": python_path(ROOT / "tests"),
        "CUDA_VISIBLE_DEVICES": "",
        "ENTRY": "fault_runs",
        "NPROC_PER_NODE": "2",
        "MAX_RESTARTS": "1",
        "FAULT_KILL_RANK": "1",
        "FAULT_KILL_ITERATION": str(KILL_AT),
    }
    start = time.monotonic()
    output = run_to_end(
        [
            *("bash", str(ROOT / "launch" / "torchrun.sh"), "--config", str(fault_runs.TINY)),
            *(*SMALL, f"run_dir={run_dir}", f"megatron.data_cache_path={tmp_path / 'cache'}"),
        ],
        environment,
        timeout_s=120,
    )
    # The survivor says what happened to it, the launcher which rank began and of what it died.
    lost = f"iteration {KILL_AT}: rank 0 has lost another rank in a collective"
    assert lost in output or "SIGTERM" in output, output[-4000:]
    assert "exitcode: -9) local_rank: 1" in output, output[-4000:]
    assert "restart 1" in output and f"from iteration {(KILL_AT - 1) // 2 * 2}" in output
    assert losses(run_dir) == [tuple(each) for each in whole(answers)]
    # Far below the 30 minutes after which a collective gives up by itself.
    assert time.monotonic() - start < 120


@pytest.mark.timeout(600)
@pytest.mark.parametrize(
    ("name", "iteration"),
    [
        ("undamaged", 6),
        ("cut short", 4),
        ("one byte", 4),
        ("metadata cut", 4),
        ("file missing", 4),
        ("folder missing", 4),
        ("manifest cut", 4),
        ("tracker empty", 6),
        ("tracker odd", 6),
    ],
)
def test_a_damaged_checkpoint_is_refused_and_the_one_before_is_used(
    answers: list[dict[str, Any]], name: str, iteration: int
) -> None:
    assert of(answers, name) == iteration


def test_training_goes_on_from_the_one_before(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["resumed"] == whole(answers)[4:]


def test_no_checkpoint_left_is_an_error_with_all_reasons(answers: list[dict[str, Any]]) -> None:
    text = of(answers, "all damaged")
    for iteration in (2, 4, 6):
        assert re.search(rf"iteration {iteration}: __\S+ has \d+ bytes, not \d+", text), text


@pytest.mark.parametrize("name", ["metadata", "common", "embedded"])
def test_a_checkpoint_that_would_run_code_is_refused(
    answers: list[dict[str, Any]], name: str
) -> None:
    """Its manifest fits, as an attacker can see to that."""
    assert of(answers, f"hostile {name}") == 4
    assert of(answers, "canary") is False


def test_another_tensor_parallel_size_loads(answers: list[dict[str, Any]]) -> None:
    two, one = answers[0]["two parts"], answers[0]["one part"]
    assert [step for step, _ in two] == [7, 8, 9]
    for got, want in zip(one, two, strict=True):
        assert got == pytest.approx(want, abs=1e-5)


def test_another_model_is_refused_on_every_rank(answers: list[dict[str, Any]]) -> None:
    assert re.match(
        r"ValueError: megatron\.hidden_size: expected 32, .*, got 64", of(answers, "other model")
    )


def test_sigterm_on_one_rank_loses_nothing(answers: list[dict[str, Any]]) -> None:
    assert answers[0]["terminated"] == whole(answers)[:3]
    assert answers[0]["terminated again"] == whole(answers)[3:]


def test_a_full_disk_loses_no_checkpoint(answers: list[dict[str, Any]]) -> None:
    for answer in answers:
        text = answer["full disk"]
        assert "megatron.save: expected to write the checkpoint of iteration 8" in text
        assert "the last whole one is of iteration 6" in text
    assert "rank 1" in answers[0]["full disk"]
    assert of(answers, "after full disk") == 6
    assert not any("partial" in name for name in of(answers, "left by full disk"))


def test_a_new_run_in_the_same_folder_keeps_the_old_checkpoints(
    answers: list[dict[str, Any]],
) -> None:
    assert of(answers, "set aside") == [2, 6]


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("nan", "loss: expected a finite number, got nan at iteration 3 on rank 1"),
        ("inf", "loss: expected a finite number, got (inf|nan) at iteration 3 on rank 1"),
        ("gradient", "gradient: expected a finite number, .* at iteration 3 on rank"),
    ],
)
def test_what_is_not_finite_stops_the_run(
    answers: list[dict[str, Any]], name: str, message: str
) -> None:
    assert re.search(message, of(answers, f"{name}, stop"))


def test_what_is_not_finite_can_be_skipped(answers: list[dict[str, Any]]) -> None:
    found, untouched = answers[0]["nan, skip"], whole(answers)
    assert found[:2] == untouched[:2]
    assert found[2] == [3, [1]]
    assert [step for step, _ in found[3:]] == [4, 5, 6]
    # The skipped step changed no parameter: the fourth loss is not that of a run with three.
    assert all(5 < loss < 8 for _, loss in found[3:])
    assert found[3] != untouched[3]


def test_skipping_has_an_end(answers: list[dict[str, Any]]) -> None:
    assert "10 iterations in a row" in of(answers, "always")


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("without the fused loss", "cce.loss: .* got 'cce' on rank 0 and 'stock' on rank 1"),
        ("another vocabulary", "megatron.vocab_size: .* got 768 on rank 0 and 1024 on rank 1"),
        ("another dtype", "megatron.bf16: .* on rank 0 and True on rank 1"),
    ],
)
def test_ranks_with_other_settings_are_refused_on_every_rank(
    answers: list[dict[str, Any]], name: str, message: str
) -> None:
    assert re.match(f"ValueError: {message}", of(answers, name))
