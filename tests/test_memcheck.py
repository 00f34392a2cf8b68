"""NVIDIA's checkers over every kernel and every option: no stray access, no race.

compute-sanitizer's memcheck finds accesses outside of what was allocated, racecheck two threads of
a block that use the same shared memory without a barrier between them.
"""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from launch_runs import python_path

SANITIZER = shutil.which("compute-sanitizer")

# Ragged in every dimension; descriptors (40 and 136 columns) and pointers (37). Every option alone
# and all of them together, both gradients, a gradient that is added to a given buffer.
PROGRAM = """
import itertools, sys, torch
from cce_tp import GradFilter, linear_cross_entropy
alone = [dict(), dict(label_smoothing=0.1), dict(z_loss=1e-3), dict(logit_scale=0.5),
         dict(logit_softcap=20.0), dict(return_stats=True), dict(return_stats="entropy"),
         dict(grad_filter=GradFilter.paper(2.0**-8)), dict(reduction="mean"), dict(reduction="sum"),
         dict(into=True), dict(keep_logits_bytes=1 << 17), dict(keep=0.3),
         dict(keep=0.3, into=True), dict(keep=0.3, return_stats=True)]
everything = dict(label_smoothing=0.1, z_loss=1e-3, logit_scale=0.5, logit_softcap=20.0,
                  return_stats="entropy", grad_filter=GradFilter.paper(2.0**-8))
dtypes = (torch.bfloat16, torch.float16, torch.float32)
cases = [(dtype, hidden, options)
         for dtype, hidden in itertools.product(dtypes, (37, 136)) for options in ({}, everything)]
cases += [(torch.bfloat16, 40, options) for options in alone]
del everything["grad_filter"]
cases += [(dtype, hidden, dict(everything, keep=0.3))
          for dtype, hidden in itertools.product(dtypes, (37, 136))]
far_field = sys.argv[1] == "far-field"
cases = [case for case in cases if ("keep" in case[2]) == far_field]
for dtype, hidden, options in cases:
    options = dict(options)
    into, keep = options.pop("into", False), options.pop("keep", None)
    # With the far field a few likely rows, so that their tiles are kept and others are not; without
    # a bias it takes its first columns ahead.
    vocab, spread = (601, 1.0) if keep is None else (5003, 0.05)
    has_bias = bool(options) and (keep is None or len(options) > 1)
    input = torch.randn(151, hidden, device="cuda")
    weight = spread * torch.randn(vocab, hidden, device="cuda")
    if keep is not None:
        input = 0.5 + 0.1 * input
        weight[::9][:300] += 20 / hidden
        options["grad_filter"] = GradFilter.far_field(keep)
    input, weight = (each.to(dtype).requires_grad_() for each in (input, weight))
    bias = torch.randn(vocab, device="cuda", dtype=dtype, requires_grad=True) if has_bias else None
    target = torch.randint(0, vocab, (151,), device="cuda")
    # A target that is no id makes its token NaN, for which the far field keeps everything.
    target[:4] = torch.tensor([-100, -5, vocab, 2**40] if keep is None else [-100] * 4)
    if into:
        options["grad_weight_out"] = torch.zeros(vocab, hidden, device="cuda")
    options.setdefault("reduction", "none")
    answer = linear_cross_entropy(input, weight, target, linear_bias=bias, impl="triton",
                                  workspace_bytes=(1 if keep is None else 16) << 20, **options)
    loss = answer[0] if isinstance(answer, tuple) else answer
    (loss[4:] if loss.dim() else loss).sum().backward()
    print(dtype, hidden, options, flush=True)
torch.cuda.synchronize()
print(f"all kernels ran: {len(cases)} cases")
"""


def handshake() -> set[tuple[str, str]]:
    """(file, line) of the bytes by which Triton tells the warps of `gl.warp_specialize` what to do.

    Between reading and writing them all warps pass a `barrier.sync 1`, as the PTX shows; racecheck
    takes both for a race all the same, here and in any kernel of Triton's that has partitions."""
    path = Path(__file__).parent.parent / "cce_tp" / "kernels" / "hopper.py"
    lines = enumerate(path.read_text(encoding="utf-8").splitlines(), start=1)
    at = re.compile(r"def \w+_kernel\(|    gl\.warp_specialize\(")
    return {(path.name, str(number)) for number, line in lines if at.match(line)}


def races(report: str) -> list[str]:
    """What racecheck reports, but for that."""
    known, found = handshake(), []
    # The program's own output is between the lines.
    access = re.compile(r"(?:Read|Write) access at (\S+) in ([\w./]+):(\d+)")
    for place, file, line in access.findall(report):
        if (Path(file).name, line) not in known:
            found.append(f"{place} in {file}:{line}")
    return found


def test_only_the_handshake_of_partitions_is_no_race() -> None:
    assert len(handshake()) == 4  # of two kernels
    (file, line), *_ = sorted(handshake())
    report = "========= Error: Race reported between Read access at kernel+0x1d0 in "
    report += f"{file}:{line}\n=========     and Write access at kernel+0x20 in {file}:"
    assert races(report + f"{line} [1 hazards]") == []
    assert races(report + "1 [1 hazards]") == [f"kernel+0x20 in {file}:1"]


@pytest.mark.gpu
@pytest.mark.timeout(580)
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
@pytest.mark.parametrize("part", ["all-rows", "far-field"])
@pytest.mark.parametrize("tool", ["memcheck", "racecheck"])
def test_checker_is_clean(tool: str, part: str) -> None:
    """Each tensor has an allocation of its own, so that a neighbour cannot hide a stray access."""
    assert SANITIZER is not None
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": python_path()}
    done = subprocess.run(
        [SANITIZER, "--tool", tool, sys.executable, "-c", PROGRAM, part],
        env=environment,
        capture_output=True,
        text=True,
        timeout=570,
    )
    said = done.stdout[-4000:] + done.stderr[-4000:]
    assert done.returncode == 0 and "all kernels ran" in done.stdout, said
    if tool == "memcheck":
        assert "ERROR SUMMARY: 0 errors" in done.stdout, said
    else:
        assert "RACECHECK SUMMARY" in done.stdout and not races(done.stdout), said
