"""NVIDIA's memory checker over every kernel: no access outside of what was allocated."""

from __future__ import annotations

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

SANITIZER = shutil.which("compute-sanitizer")

# Ragged in every dimension; descriptors (40 and 136 columns) and pointers (37); every option.
PROGRAM = """
import itertools, torch
from cce_tp import GradFilter, linear_cross_entropy
everything = dict(label_smoothing=0.1, z_loss=1e-3, logit_scale=0.5, logit_softcap=20.0,
                  return_stats="entropy", grad_filter=GradFilter.paper(2.0**-8))
dtypes = (torch.bfloat16, torch.float16, torch.float32)
for dtype, hidden, options in itertools.product(dtypes, (37, 136), ({}, everything)):
    input = torch.randn(151, hidden, device="cuda", dtype=dtype, requires_grad=True)
    weight = torch.randn(601, hidden, device="cuda", dtype=dtype, requires_grad=True)
    bias = torch.randn(601, device="cuda", dtype=dtype, requires_grad=True) if options else None
    target = torch.randint(0, 601, (151,), device="cuda")
    target[:4] = torch.tensor([-100, -5, 601, 2**40])
    loss = linear_cross_entropy(input, weight, target, linear_bias=bias, impl="triton",
                                reduction="none", workspace_bytes=1 << 20, **options)
    (loss[0] if options else loss)[4:].sum().backward()
torch.cuda.synchronize()
print("all kernels ran")
"""


@pytest.mark.gpu
@pytest.mark.timeout(280)
@pytest.mark.skipif(SANITIZER is None, reason="compute-sanitizer is not installed")
def test_memory_checker_is_clean() -> None:
    """Each tensor has an allocation of its own, so that a neighbour cannot hide a stray access."""
    assert SANITIZER is not None
    root = str(Path(__file__).parent.parent)
    path = os.pathsep.join(filter(None, (root, os.environ.get("PYTHONPATH", ""))))
    environment = {**os.environ, "PYTORCH_NO_CUDA_MEMORY_CACHING": "1", "PYTHONPATH": path}
    done = subprocess.run(
        [SANITIZER, "--tool", "memcheck", "--error-exitcode", "9", sys.executable, "-c", PROGRAM],
        env=environment,
        capture_output=True,
        text=True,
        timeout=270,
    )
    assert done.returncode == 0, done.stdout[-4000:] + done.stderr[-4000:]
    assert "all kernels ran" in done.stdout and "ERROR SUMMARY: 0 errors" in done.stdout
