"""Many calls in one process: memory and file handles must stay where they are.

python tests/endurance.py --calls 5000                     the loss, on the CPU or a GPU
python tests/endurance.py --calls 5000 --impl triton       its kernels (without a GPU: interpreted)
python tests/endurance.py --megatron-steps 1000            training steps through launch.pretrain

Prints one line of numbers per measurement, and ends with status 1 if anything has grown.
"""

from __future__ import annotations

import argparse
import gc
import json
import os
import sys
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).resolve().parents[1]
if not torch.cuda.is_available():
    os.environ.setdefault("TRITON_INTERPRET", "1")

# What an allocator may keep for itself, in MiB, over all of the calls.
SLACK_MIB = 24.0


def measure() -> dict[str, float]:
    """Resident memory, file handles and, on a GPU, allocated and reserved memory, in MiB."""
    gc.collect()
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    found = {
        "resident": pages * os.sysconf("SC_PAGE_SIZE") / 2**20,
        "handles": float(len(os.listdir("/proc/self/fd"))),
    }
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        found["allocated"] = torch.cuda.memory_allocated() / 2**20
        found["reserved"] = torch.cuda.memory_reserved() / 2**20
    return found


def growth(before: dict[str, float], after: dict[str, float]) -> list[str]:
    """What has grown, in words."""
    found = []
    for name, value in after.items():
        allowed = {"handles": 0.0, "allocated": 0.0}.get(name, SLACK_MIB)
        if value > before[name] + allowed:
            found.append(f"{name}: {before[name]:.1f} -> {value:.1f}")
    return found


def loss_calls(calls: int, impl: str) -> list[str]:
    """Calls of changing shape and options, both passes; returns what has grown."""
    import cce_tp

    device = "cuda" if torch.cuda.is_available() else "cpu"
    weight = torch.randn(203, 40, device=device, requires_grad=True)
    options: list[dict[str, Any]] = [
        {},
        {"reduction": "none", "label_smoothing": 0.1},
        {"z_loss": 1e-3, "return_stats": True},
        {"grad_filter": cce_tp.GradFilter.paper()},
        {"logit_softcap": 20.0, "reduction": "sum"},
    ]

    def one(number: int) -> None:
        tokens = 1 + number % 71
        input = torch.randn(tokens, 40, device=device, requires_grad=True)
        target = torch.randint(0, 203, (tokens,), device=device)
        more = options[number % len(options)]
        answer = cce_tp.linear_cross_entropy(input, weight, target, impl=impl, **more)
        loss = answer[0] if isinstance(answer, tuple) else answer
        loss.sum().backward()
        weight.grad = None

    # All shapes and options once, so that whatever is kept per kind is there.
    for number in range(max(355, calls // 10)):
        one(number)
    before = measure()
    print(json.dumps({"calls": 0, **before}), flush=True)
    for number in range(calls):
        one(number)
    after = measure()
    print(json.dumps({"calls": calls, **after}), flush=True)
    return growth(before, after)


def megatron_steps(steps: int, folder: Path) -> list[str]:
    """One rank, no saving; the first tenth is for warming up."""
    from launch import pretrain

    pretrain.prepare()
    from fault_runs import SMALL, TINY
    from launch.training import settings
    from launch.training.loop import Trainer

    os.environ.update(RANK="0", WORLD_SIZE="1", MASTER_ADDR="127.0.0.1", MASTER_PORT="0")
    os.environ["MASTER_PORT"] = str(_free_port())
    more = (
        *("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false"),
        *("megatron.save=null", "megatron.save_interval=null", f"run_dir={folder / 'run'}"),
        *(f"megatron.train_iters={steps}", f"megatron.data_cache_path={folder / 'cache'}"),
        *("megatron.global_batch_size=2", "megatron.micro_batch_size=1", "megatron.num_layers=1"),
    )
    run = settings.load(TINY, [*SMALL, *more])
    seen: dict[int, dict[str, float]] = {}
    stock = Trainer._step

    def step(self: Any, *args: Any) -> Any:
        if self.iteration in (max(2, steps // 10), steps):
            seen[self.iteration] = measure()
            print(json.dumps({"step": self.iteration, **seen[self.iteration]}), flush=True)
        return stock(self, *args)

    Trainer._step = step  # type: ignore[method-assign]
    pretrain.train(run)
    before, after = (seen[number] for number in sorted(seen))
    return growth(before, after)


def _free_port() -> int:
    import socket

    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


def main() -> int:
    """Status 1 if something has grown."""
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--calls", type=int, default=0)
    parser.add_argument("--impl", default="auto")
    parser.add_argument("--megatron-steps", type=int, default=0)
    found = parser.parse_args()
    sys.path.insert(0, str(ROOT))
    grown: list[str] = []
    if found.calls:
        grown += loss_calls(found.calls, found.impl)
    if found.megatron_steps:
        with tempfile.TemporaryDirectory() as folder:
            grown += megatron_steps(found.megatron_steps, Path(folder))
    print("nothing has grown" if not grown else f"GROWN: {'; '.join(grown)}")
    return bool(grown)


if __name__ == "__main__":
    sys.exit(main())
