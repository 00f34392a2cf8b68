"""Short versions of tests/endurance.py: memory and file handles stay where they are.

The long ones: python tests/endurance.py --calls 5000; ... --megatron-steps 1000.
"""

from __future__ import annotations

import sys

import pytest

import endurance
from launch_runs import ROOT, python_path, run_to_end
from test_topology import environment

pytestmark = [pytest.mark.no_poison, pytest.mark.once]


def run(*arguments: str) -> str:
    command = [sys.executable, str(ROOT / "tests" / "endurance.py"), *arguments]
    return run_to_end(command, environment(PYTHONPATH=python_path()), timeout_s=200)


@pytest.mark.timeout(250)
def test_calls_of_the_loss_and_megatron_steps_leave_nothing_behind() -> None:
    output = run("--calls", "600", "--impl", "torch", "--megatron-steps", "60")
    assert '"calls": 600' in output and '"step": 60' in output
    assert "nothing has grown" in output


@pytest.mark.gpu
@pytest.mark.timeout(280)
def test_calls_on_the_device_leave_nothing_behind() -> None:
    assert endurance.loss_calls(5000, "triton") == []


def test_growth_is_seen() -> None:
    before = {"resident": 100.0, "handles": 9.0}
    assert endurance.growth(before, {"resident": 100.0 + endurance.SLACK_MIB, "handles": 9.0}) == []
    assert endurance.growth(before, {"resident": 200.0, "handles": 10.0}) == [
        "resident: 100.0 -> 200.0",
        "handles: 9.0 -> 10.0",
    ]
