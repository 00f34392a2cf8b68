"""Every Triton kernel builds, without a GPU, for every architecture within its shared memory."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_tp.kernels import launch

# Compute capability -> shared memory that one block may take, in KiB.
SHARED_KIB = {80: 163, 86: 99, 89: 99, 90: 227, 100: 227, 120: 99}
SCRIPT = Path(__file__).parent / "compile_kernels.py"
TIMEOUT_S = 280


def _compile(capability: int) -> list[dict[str, Any]]:
    """In a process of its own: this one may have Triton's interpreter in place of its compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    paths = [str(SCRIPT.parent.parent), environment.get("PYTHONPATH", "")]
    environment["PYTHONPATH"] = os.pathsep.join(path for path in paths if path)
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability)],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    return [json.loads(line) for line in done.stdout.splitlines() if line.startswith("{")]


@pytest.fixture(scope="module")
def compilations() -> Iterator[dict[int, Future[list[dict[str, Any]]]]]:
    with ThreadPoolExecutor(max_workers=2) as executor:
        yield {capability: executor.submit(_compile, capability) for capability in SHARED_KIB}


@pytest.mark.parametrize("capability", SHARED_KIB)
def test_kernels_build_and_fit(
    compilations: dict[int, Future[list[dict[str, Any]]]], capability: int
) -> None:
    results = compilations[capability].result()
    errors = [result for result in results if "error" in result]
    assert not errors, json.dumps(errors, indent=1)
    limit = SHARED_KIB[capability] * 1024
    too_large = [result for result in results if result["shared"] > limit]
    assert not too_large, too_large
    # What was compiled is what there is: every kernel, in every dtype.
    kernels = {result["kernel"] for result in results}
    assert kernels == _kernels_in_the_source()
    assert {result["dtype"] for result in results} == {"bf16", "fp16", "fp32"}


def _kernels_in_the_source() -> set[str]:
    """Names of the kernels in cce_tp/kernels that are launched (by convention *_kernel)."""
    names = set()
    for path in (SCRIPT.parent.parent / "cce_tp" / "kernels").glob("*.py"):
        lines = path.read_text(encoding="utf-8").splitlines()
        names |= {
            line.removeprefix("def ").split("(")[0]
            for line in lines
            if line.startswith("def ") and line.split("(")[0].endswith("_kernel")
        }
    assert names
    return names


def test_arguments_of_different_machine_code_have_different_kinds() -> None:
    """What Triton specialises on must not share a compiled kernel."""
    aligned = torch.empty(64, dtype=torch.float32)
    values = [1, 0, 16, 3, 2**31, 2**31 + 1, 1.0, None, aligned, aligned[1:], aligned.half()]
    kinds = [launch._kind(value) for value in values]
    # 0 and 16 are both divisible by 16; all others differ, also as keys of a dictionary.
    assert kinds[1] == kinds[2] and len(set(kinds)) == len(values) - 1
