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

# Ragged in every dimension; descriptors (48 and 144 columns) and pointers (37). Every option alone
# and all of them together, both gradients, a gradient that is added to a given buffer.
PROGRAM = """
import itertools, sys, torch
from cce_tp import GradFilter, linear_cross_entropy
from cce_tp.kernels import tuning
tuning._LEAST_DEPTH, tuning.product_rows = 0, lambda rows, *_: rows  # else the vendor's are faster
alone = [dict(), dict(label_smoothing=0.1), dict(z_loss=1e-3), dict(logit_scale=0.5),
         dict(logit_softcap=20.0), dict(return_stats=True), dict(return_stats="entropy"),
         dict(grad_filter=GradFilter.paper(2.0**-8)), dict(reduction="mean"), dict(reduction="sum"),
         dict(into=True), dict(keep_logits_bytes=1 << 17), dict(keep=0.3),
         dict(keep=0.3, into=True), dict(keep=0.3, return_stats=True)]
everything = dict(label_smoothing=0.1, z_loss=1e-3, logit_scale=0.5, logit_softcap=20.0,
                  return_stats="entropy", grad_filter=GradFilter.paper(2.0**-8))
dtypes = (torch.bfloat16, torch.float16, torch.float32)
cases = [(dtype, hidden, options)
         for dtype, hidden in itertools.product(dtypes, (37, 144)) for options in ({}, everything)]
cases += [(torch.bfloat16, 48, options) for options in alone]
unfiltered = {name: value for name, value in everything.items() if name != "grad_filter"}
cases += [(dtype, hidden, dict(unfiltered, keep=0.3))
          for dtype, hidden in itertools.product(dtypes, (37, 144))]
# On Hopper such sizes take two warpgroups, on whatever card; these once more by three.
tuning.few_warpgroups = lambda _: 2
terms = dict(label_smoothing=0.1, z_loss=1e-3, logit_scale=0.7)
capped = dict(terms, logit_softcap=20.0)
cases = [(*case, False) for case in cases]
cases += [(torch.bfloat16, 48, options, True)
          for options in ({}, terms, capped, dict(into=True), dict(keep=0.3),
                          dict(keep=0.3, into=True), dict(capped, keep=0.3))]
far_field = sys.argv[1] == "far-field"
cases = [case for case in cases if ("keep" in case[2]) == far_field]
for dtype, hidden, options, three in cases:
    tuning.warpgroups_pay = lambda *_, three=three: three
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


def handshakes() -> list[set[str]]:
    """For each kernel of hopper.py the lines of the bytes by which Triton tells the warps of
    `gl.warp_specialize` what to do.

    Between reading and writing them all warps pass a `barrier.sync 1`, as the PTX shows; racecheck
    takes both for a race all the same, here and in any kernel of Triton's that has partitions."""
    path = Path(__file__).parent.parent / "cce_tp" / "kernels" / "hopper.py"
    found: list[set[str]] = []
    for number, line in enumerate(path.read_text(encoding="utf-8").splitlines(), start=1):
        if re.match(r"def \w+_kernel\(", line):
            found.append({str(number)})
        elif line.startswith("    _specialize("):
            found[-1].add(str(number))
    return found


def races(report: str) -> list[str]:
    """What racecheck reports but for that; and what is not understood of its report."""
    found = []
    # Each begins with the first access, and says of all others where they are. The program's own
    # output is between the lines.
    reports = re.split(r"(?=Race reported between)", report)[1:]
    for each in reports:
        places = re.findall(r"(?:Read|Write) access at .+? in (.+?):(\d+)", each)
        lines = {line for _, line in places}
        in_hopper = all(Path(file).name == "hopper.py" for file, _ in places)
        counted = len(places) == len(re.findall(r"access at", each)) >= 2
        if not (counted and in_hopper and any(lines <= known for known in handshakes())):
            found.append(each[:400])
    summary = re.search(r"RACECHECK SUMMARY: (\d+) hazards? displayed", report)
    if summary is None or int(summary[1]) != len(reports):
        found.append(f"{len(reports)} reports, summary: {summary and summary[0]}")
    return found


def test_only_the_handshake_of_partitions_is_no_race() -> None:
    assert [len(lines) for lines in handshakes()] == [2, 2, 2]
    (start, call), (other, _), _ = (sorted(lines, key=int) for lines in handshakes())

    def report(*places: str, shown: int = 1) -> str:
        first, *others = (f"access at tile_kernel+0x1d0 in {place}" for place in places)
        lines = [f"========= Error: Race reported between Read {first}"]
        lines += [f"printed=========     and Write {each} [3 hazards]" for each in others]
        return "\n".join([*lines, f"=== RACECHECK SUMMARY: {shown} hazards displayed (1 errors)"])

    here, there = f"hopper.py:{start}", f"/my-path/cce_tp/kernels/hopper.py:{call}"
    assert races(report(here, here, there)) == []
    for found in (
        report(here),
        report(here, "hopper.py:1"),
        report(here, f"hopper.py:{other}"),
        report(here, f"other.py:{start}"),
        report(here, here, shown=2),
        report(here, here).replace(" in hopper.py", ""),
        "Potential WAW hazard detected\nRACECHECK SUMMARY: 1 hazard displayed",
        "",
    ):
        assert races(found), found


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
        [SANITIZER, "--tool", tool, "--print-limit", "0", sys.executable, "-c", PROGRAM, part],
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
        assert not races(done.stdout), "\n".join(races(done.stdout)) + said
