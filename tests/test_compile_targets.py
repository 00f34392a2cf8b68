"""Triton's kernels build, without a GPU, for every architecture within its shared memory.

All of them; or, where only the sizes of tiles differ, those that have such tiles.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_tp.kernels import launch, tuning
from launch_runs import python_path

# Compute capability -> shared memory that one block may take, in KiB. 8.9 is 8.6 but for fp8.
SHARED_KIB = {80: 163, 86: 99, 90: 227, 100: 227, 120: 99}
SCRIPT = Path(__file__).parent / "compile_kernels.py"
TIMEOUT_S = 580  # some 30 to 110 on two cores with nothing else to do

pytestmark = pytest.mark.timeout(TIMEOUT_S + 20)


def _only_few() -> bool:
    """Whether another interpreter's run is to show the rest."""
    return os.environ.get("CCE_TP_TEST_ONCE") == "elsewhere"


def _compile(capability: int) -> list[dict[str, Any]]:
    """What the script says of each kernel; "log": what the assembler said before.

    In a process of its own: this one may have Triton's interpreter in place of its compiler."""
    environment = {key: value for key, value in os.environ.items() if key != "TRITON_INTERPRET"}
    environment["PYTHONPATH"] = python_path()
    few = ["few"] if _only_few() else []
    done = subprocess.run(
        [sys.executable, str(SCRIPT), str(capability), *few],
        env=environment,
        capture_output=True,
        text=True,
        timeout=TIMEOUT_S,
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results: list[dict[str, Any]] = []
    log: list[str] = []
    for line in done.stdout.splitlines():
        if line.startswith("{"):
            results.append({**json.loads(line), "log": "\n".join(log)})
            log.clear()
        else:
            log.append(line)
    return results


CAPABILITIES = [
    pytest.param(capability, marks=[] if capability == 90 else [pytest.mark.once])
    for capability in SHARED_KIB
]


@pytest.mark.parametrize("capability", CAPABILITIES)
def test_kernels_build_and_fit(capability: int) -> None:
    results = _compile(capability)
    errors = [result for result in results if "error" in result]
    assert not errors, json.dumps(errors, indent=1)
    limit = SHARED_KIB[capability] * 1024
    too_large = [result for result in results if result["shared"] > limit]
    assert not too_large, too_large
    # What was compiled is what there is: every kernel, in 16 bits and in 32; but where only the
    # sizes of tiles differ, those that depend on them.
    kernels = {result["kernel"] for result in results}
    dtypes = {result["dtype"] for result in results}
    if capability in (86, 120):
        assert {"tile_statistics_kernel", "grad_logits_kernel", "sparse_product_kernel"} <= kernels
    else:
        assert kernels == _kernels_in_the_source(hopper=capability == 90 and tuning._has_gluon())
    assert dtypes >= ({"bf16", "fp16"} if _only_few() else {"bf16", "fp32"})
    if capability == 90:
        _check_registers(results)


def test_tiles_of_8_9_are_those_of_8_6() -> None:
    """For which they are built."""
    for itemsize in (2, 4):
        assert tuning.tile_config(89, itemsize) == tuning.tile_config(86, itemsize)


# The assembler cannot overlap the tensor cores' instructions with anything else.
SERIALISED = ("C7515", "wgmma.mma_async instructions are serialized")
PROPERTIES = re.compile(
    r"Function properties for (\w+)\s+\d+ bytes stack frame, (\d+) bytes spill stores, "
    r"(\d+) bytes spill loads"
)


def _complaints(log: str, bytes_spilled: int = 16) -> tuple[set[str], list[str]]:
    """(kernels that the assembler's log tells of, what it should not have said).

    Up to so many bytes may be spilled: the default is a few numbers that a loop hardly needs."""
    told = PROPERTIES.findall(log)
    found = [
        f"{kernel} spills {stores} + {loads} bytes"
        for kernel, stores, loads in told
        if max(int(stores), int(loads)) > bytes_spilled
    ]
    found += [line for line in log.splitlines() if any(word in line for word in SERIALISED)]
    return {kernel for kernel, _, _ in told}, found


def _check_registers(results: list[dict[str, Any]]) -> None:
    """Of forward pass and G^T in bf16 on Hopper: what the speed of the exact path stands on."""
    # Without options no spill at all. With a cap some 40 registers cost 1% to 2% of G^T; from a
    # hundred or so on it takes twice as long. With a cap and more terms it is made in halves, in
    # order that it spills nothing; the statistics with all options may.
    allowed = {"plain-descriptors-256": 16}
    few = _only_few()
    if not few:
        allowed["cap-descriptors-256"] = 200
        far = [each for each in results if each["variant"] == "far-field-descriptors-256"]
        logs = [each["log"] for each in far if each["kernel"] == "grad_logits_kernel"]
        kernels, complaints = _complaints("\n".join(logs))
        assert kernels == {"grad_logits_kernel"} and not complaints
    if tuning._has_gluon():
        # G^T some 20 registers of a warpgroup, in a tile's way out, beside the others' products.
        allowed["plain-3-warpgroups-256"] = 256
        allowed["plain-2-warpgroups-256"] = 0
        if not few:
            allowed["cap-3-warpgroups-256"] = 64
            allowed["added-3-warpgroups-256"] = 256
        added = [each for each in results if each["variant"] == "added-3-warpgroups-256"]
        logs = [each["log"] for each in added if each["kernel"] == "weight_gradient_kernel"]
        kernels, complaints = _complaints("\n".join(logs), 0)
        assert kernels == (set() if few else {"weight_gradient_kernel"}) and not complaints
    for variant, spilled in allowed.items():
        made = [each for each in results if each["variant"] == variant]
        kernels, complaints = _complaints("\n".join(each["log"] for each in made), spilled)
        assert {"tile_statistics_kernel", "grad_logits_kernel"} <= kernels, variant
        assert not complaints, variant
        if variant == "plain-3-warpgroups-256":
            names = [each["kernel"] for each in made]
            assert names.count("tile_statistics_kernel") == 2
            assert names.count("grad_logits_kernel") == 1
            assert names.count("weight_gradient_kernel") == 1


def test_what_the_assembler_should_not_say_is_found() -> None:
    log = """ptxas info    : Function properties for a_kernel
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : (C7515) Potential Performance Loss: wgmma.mma_async instructions are serialized
ptxas info    : Function properties for b_kernel
    64 bytes stack frame, 80 bytes spill stores, 84 bytes spill loads
"""
    kernels, complaints = _complaints(log)
    assert kernels == {"a_kernel", "b_kernel"}
    assert complaints[0] == "b_kernel spills 80 + 84 bytes" and "C7515" in complaints[1]
    assert len(complaints) == 2
    assert _complaints(log, 84)[1] == complaints[1:]


def _kernels_in_the_source(*, hopper: bool) -> set[str]:
    """Names of the kernels in cce_tp/kernels that are launched (by convention *_kernel), with or
    without those that only Hopper has."""
    names = set()
    for path in (SCRIPT.parent.parent / "cce_tp" / "kernels").glob("*.py"):
        if path.stem == "hopper" and not hopper:
            continue
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
    kinds, plain = launch._kinds(values)
    # 0 and 16 are both divisible by 16; all others differ, also as keys of a dictionary.
    assert kinds[1] == kinds[2] and len(set(kinds)) == len(values) - 1
    assert plain[:8] == values[:8] and plain[8:] == [each.data_ptr() for each in values[8:]]
