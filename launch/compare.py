"""Compare the losses in one training setup: step time, peak memory and largest micro-batch.

python -m launch.compare --config configs/h200_comparison.yaml --ranks 2 --out runs/compare.jsonl \
    megatron.tensor_model_parallel_size=2

Trains a few steps of launch.pretrain with each loss, on made-up tokens and without validation, each
in processes of its own under torchrun. On GPUs it then looks for the largest micro-batch that
fits, with three steps an attempt: it expects memory to grow in proportion, tries the size that
should just fit, and halves what is left between the largest that did and the smallest that did not,
to 2%. A JSON record of what is compared, then one per attempt, a table at the end.
"""

from __future__ import annotations

import argparse
import functools
import json
import os
import re
import shutil
import signal
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from datetime import datetime, timezone
from pathlib import Path
from typing import Any, NamedTuple, NoReturn

from launch.benchmark import machine
from launch.training.options import LOSSES, LoopOptions

_QUIET = (
    *("megatron.mock_data=true", "megatron.eval_interval=null", "megatron.tensorboard_dir=null"),
    *("megatron.save=null", "megatron.save_interval=null", "megatron.load=null"),
    "megatron.log_interval=1",
)
# Not PyTorch's own: the context, NCCL's buffers, and what the allocator cannot use.
_RESERVE_MIB = 3072
# What torchrun is given to end its workers: its own grace period, and some.
_GRACE_S = 40
# The first steps compile and warm up.
_WARM_UP = 3
# Enough to know that a micro-batch fits: the optimizer's state is there from the second step on.
_SEARCH_STEPS = 3


@dataclass(frozen=True, slots=True)
class Attempt:
    """A few steps with one loss.

    Attributes:
        loss: of the section `cce`.
        micro_batch: sequences.
        status: "ok", "out of memory", "out of time" or "failed".
        timed_steps: how many steps were timed: those after the warm-up, or the last one alone.
        step_ms, low_ms, high_ms: median, 10% and 90% quantiles over the timed steps, or None.
        tokens_per_s: median, or None.
        peak_mib: of the CUDA allocator on rank 0 (of the process on the CPU), or None.
        reason: what the output says of an attempt that failed or ran out of memory.
    """

    loss: str
    micro_batch: int
    status: str
    timed_steps: int = 0
    step_ms: float | None = None
    low_ms: float | None = None
    high_ms: float | None = None
    tokens_per_s: float | None = None
    peak_mib: float | None = None
    reason: str | None = None


def measured(loss: str, micro_batch: int, tokens: int, records: list[dict[str, Any]]) -> Attempt:
    """Summarise the metrics of a run of `tokens` tokens a step."""
    steps = [record for record in records if "loss" in record]
    speeds = [record["tokens_per_s"] for record in steps[_WARM_UP:] or steps[-1:]]
    times = sorted(1000 * tokens / speed for speed in speeds)
    deciles = statistics.quantiles(times * 2, n=10, method="inclusive")
    median = statistics.median(times)
    return Attempt(
        loss,
        micro_batch,
        "ok",
        timed_steps=len(times),
        step_ms=median,
        low_ms=deciles[0],
        high_ms=deciles[-1],
        tokens_per_s=1000 * tokens / median,
        peak_mib=max(record["peak_mib"] for record in steps),
    )


def search(
    attempt: Callable[[int], Attempt], first: Attempt, limit_mib: float, tries: int
) -> tuple[Attempt, int | None]:
    """The largest micro-batch that fits.

    Args:
        attempt: trains with a micro-batch.
        first: an attempt that went well.
        limit_mib: what PyTorch may allocate.
        tries: attempts at most.

    Returns:
        The largest attempt that went well, and the smallest micro-batch that did not, if any.
    """
    fits, fails = first, None
    points = [(0, 0.0), (first.micro_batch, first.peak_mib or 0.0)]
    for _ in range(tries):
        if fails is None:
            size = max(fits.micro_batch + 1, _expected(points, limit_mib))
        elif fails - fits.micro_batch > max(1, 0.02 * fits.micro_batch):
            size = (fits.micro_batch + fails) // 2
        else:
            break
        found = attempt(size)
        if found.status == "ok":
            fits = found
            points.append((size, found.peak_mib or 0.0))
        elif found.status == "out of memory":
            fails = size
        else:
            break
    return fits, fails


def _expected(points: list[tuple[int, float]], limit_mib: float) -> int:
    """Where the line through the last two points meets the limit; at most eight times the last."""
    (x0, y0), (x1, y1) = points[-2:]
    if y1 <= y0 or x1 <= x0:
        return 8 * x1
    return max(1, min(8 * x1, int(x0 + (limit_mib - y0) * (x1 - x0) / (y1 - y0))))


class Runner:
    """Starts launch.pretrain and reads what it wrote.

    Args:
        args: of the command line.
        note: takes each attempt.
    """

    def __init__(self, args: argparse.Namespace, note: Callable[[Attempt], None]) -> None:
        self.args, self._note = args, note
        self._end = time.monotonic() + 60 * args.minutes

    def __call__(self, loss: str, steps: int, micro_batch: int) -> Attempt:
        """Train so many steps with a loss and a micro-batch."""
        found = self._run(loss, steps, micro_batch)
        self._note(found)
        return found

    def _run(self, loss: str, steps: int, micro_batch: int) -> Attempt:
        left_s = min(self.args.timeout_s, self._end - time.monotonic())
        if left_s < 5:
            return Attempt(loss, micro_batch, "out of time")
        args = self.args
        with tempfile.TemporaryDirectory(prefix="compare-") as folder:
            command = [sys.executable, "-m", "torch.distributed.run", "--standalone"]
            command += ["--nproc-per-node", str(args.ranks), "-m", "launch.pretrain"]
            command += ["--config", args.config, *args.overrides, *_QUIET, f"cce.loss={loss}"]
            command += [f"run_dir={folder}", f"megatron.train_iters={steps}"]
            command += ["megatron.lr_warmup_iters=0", f"megatron.micro_batch_size={micro_batch}"]
            command += [f"megatron.global_batch_size={micro_batch * args.micro_batches}"]
            try:
                output = _output(command, left_s)
            except subprocess.TimeoutExpired:
                return Attempt(loss, micro_batch, "out of time")
            metrics = Path(folder) / "metrics.jsonl"
            if not (Path(folder) / "summary.json").exists():
                status = "out of memory" if ran_out_of_memory(output) else "failed"
                return Attempt(loss, micro_batch, status, reason=why(output))
            records = [json.loads(line) for line in metrics.read_text().splitlines()]
        tokens = micro_batch * args.micro_batches * _sequence_length(args)
        return measured(loss, micro_batch, tokens, records)


def ran_out_of_memory(output: str) -> bool:
    """Whether a failed run lacked GPU memory, as far as one can tell.

    Where PyTorch has taken all of it, NCCL's own allocations fail with "unhandled cuda error" and
    nothing else, and cuBLAS cannot make its handle. A fault of the device ends in the same
    messages, after its own.
    """
    if re.search("OutOfMemoryError|out of memory", output):
        return True
    faults = "illegal (memory|instruction)|misaligned|device-side assert|launch failure"
    if re.search(faults, output):
        return False
    others = "unhandled cuda error|CUBLAS_STATUS_(ALLOC_FAILED|NOT_INITIALIZED)"
    return re.search(others, output) is not None


def why(output: str) -> str:
    """The line of a failed run that says the reason, as far as one can tell."""
    lines = [line for line in output.splitlines() if re.search(r"launch\.pretrain: |Error: ", line)]
    return lines[0][-600:] if lines else output[-600:]


def _output(command: list[str], timeout_s: float) -> str:
    """Standard output and error together; the launcher ends its workers when it is ended.

    Also where this process is interrupted: a rank that waits for ever in a collective would keep
    its memory, and the next attempt would lack it.
    """
    with subprocess.Popen(
        command, stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, errors="replace"
    ) as process:
        try:
            return process.communicate(timeout=timeout_s)[0]
        except BaseException:
            _end_launcher(process)
            raise


def _end_launcher(process: subprocess.Popen[str]) -> None:
    """Have torchrun end its workers, and wait for that.

    It raises an exception where SIGTERM finds it, which may be in code that catches any: then it
    goes on, and is asked again. Its workers have 30 s from then on.
    """
    for _ in range(3):
        process.terminate()
        try:
            process.communicate(timeout=_GRACE_S)
        except subprocess.TimeoutExpired:
            continue
        return
    process.kill()


def _end(number: int, frame: Any) -> NoReturn:
    """Turn SIGTERM into an exception."""
    del frame
    sys.exit(128 + number)


def _sequence_length(args: argparse.Namespace) -> int:
    from launch.training import settings

    given = settings.read(args.config, args.overrides)["megatron"]
    return given.get("seq_length", LoopOptions.seq_length)


class Gpu(NamedTuple):
    """Attributes:
    name: of the model.
    total_mib, used_mib: its memory, and what of it is taken before anything is started.
    """

    name: str
    total_mib: float
    used_mib: float


def _gpus() -> list[Gpu]:
    """The GPUs that are visible; asked of the driver, which takes none of their memory."""
    if shutil.which("nvidia-smi") is None:
        return []
    query = ["nvidia-smi", "--query-gpu=name,memory.total,memory.used"]
    query += ["--format=csv,noheader,nounits"]
    if visible := os.environ.get("CUDA_VISIBLE_DEVICES"):
        query.append(f"--id={visible}")
    done = subprocess.run(query, capture_output=True, text=True, timeout=60, check=False)
    found = []
    for line in done.stdout.splitlines():
        name, *sizes = (cell.strip() for cell in line.rsplit(",", 2))
        if len(sizes) == 2 and all(size.isdecimal() for size in sizes):
            found.append(Gpu(name, *map(float, sizes)))
    return found


def setup(args: argparse.Namespace, gpus: Sequence[Gpu]) -> dict[str, Any]:
    """What was compared, where: the first record.

    `gpus_used_mib` is what others held on the fullest GPU: a result beside them says little.
    """
    packages = ("torch", "triton", "megatron-core", "cce-tp")
    return {
        "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
        "commit": args.commit or machine.commit(),
        "config": args.config,
        "overrides": args.overrides,
        "ranks": args.ranks,
        "micro_batches": args.micro_batches,
        "steps": args.steps,
        "gpus": [gpu.name for gpu in gpus],
        "gpus_used_mib": max((gpu.used_mib for gpu in gpus), default=None),
        "versions": {name: machine.installed(name) for name in packages},
    }


def table(rows: Sequence[tuple[Attempt, Attempt | None, int | None]]) -> str:
    """Markdown of (attempt, largest that fits, smallest that does not) per loss."""
    lines = [
        "| loss | step ms | tokens/s | peak GiB | largest micro-batch |",
        "|---|---|---|---|---|",
    ]
    for first, fits, fails in rows:
        cells = [f"{first.loss}, micro-batch {first.micro_batch}"]
        if first.status != "ok":
            cells += [first.status, "-", "-", "-"]
        else:
            cells.append(f"{first.step_ms:.1f} ({first.low_ms:.1f}-{first.high_ms:.1f})")
            cells += [f"{first.tokens_per_s:,.0f}", f"{(first.peak_mib or 0) / 1024:.2f}"]
            most = "-" if fits is None else f"at least {fits.micro_batch}"
            cells.append(most if fails is None else f"{most}, below {fails}")
        lines.append("| " + " | ".join(cells) + " |")
    return "\n".join(lines)


def parser() -> argparse.ArgumentParser:
    """The command line."""
    made = argparse.ArgumentParser(
        prog="python -m launch.compare",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    add = made.add_argument
    add("--config", required=True, metavar="FILE", help="YAML file of launch.pretrain")
    add("--ranks", type=int, default=1, metavar="W", help="processes on this machine (1)")
    add("--losses", default=",".join(LOSSES), metavar="NAME,...", help="default: all")
    add("--micro-batch", type=int, default=4, metavar="B", help="sequences to time with (4)")
    add("--micro-batches", type=int, default=1, metavar="M", help="a step, of all replicas (1)")
    add("--steps", type=int, default=20, metavar="N", help="to time each loss (20)")
    add("--tries", type=int, default=4, metavar="N", help="to find the largest micro-batch (4)")
    add("--minutes", type=float, default=60, metavar="T", help="no attempt starts later (60)")
    add("--timeout-s", type=float, default=300, metavar="T", help="of one attempt (300)")
    add("--commit", metavar="REV", help="revision to record where there is no git checkout")
    add("--out", metavar="FILE", help="JSON lines; records are added to it")
    add("overrides", nargs="*", metavar="section.key=value")
    return made


def main(arguments: Sequence[str] | None = None) -> int:
    """Run; returns the exit status: 1 if an attempt failed for another reason than memory."""
    args = parser().parse_args(arguments)
    unknown = [loss for loss in args.losses.split(",") if loss not in LOSSES]
    if unknown:
        parser().error(f"--losses: expected names among {', '.join(LOSSES)}, got {unknown[0]!r}")
    attempts: list[Attempt] = []

    def write(record: dict[str, Any]) -> None:
        line = json.dumps(record)
        print(line, flush=True)
        if args.out:
            Path(args.out).parent.mkdir(parents=True, exist_ok=True)
            with open(args.out, "a", encoding="utf-8") as file:
                file.write(line + "\n")

    def note(found: Attempt) -> None:
        attempts.append(found)
        write(asdict(found))

    signal.signal(signal.SIGTERM, _end)
    run, gpus = Runner(args, note), _gpus()[: args.ranks]
    if not gpus and shutil.which("nvidia-smi") is not None:
        print("launch.compare: nvidia-smi names no GPU's memory, so nothing is searched")
    memory = min((gpu.total_mib - gpu.used_mib for gpu in gpus), default=None)
    write(setup(args, gpus))
    firsts = [run(loss, args.steps, args.micro_batch) for loss in args.losses.split(",")]
    rows: list[tuple[Attempt, Attempt | None, int | None]] = []
    for first in firsts:
        fits, fails = None, None
        if memory is not None and first.status == "ok" and args.tries:
            attempt = functools.partial(run, first.loss, min(args.steps, _SEARCH_STEPS))
            fits, fails = search(attempt, first, memory - _RESERVE_MIB, args.tries)
        rows.append((first, fits, fails))
    print(table(rows))
    return int(any(found.status == "failed" for found in attempts))


if __name__ == "__main__":
    sys.exit(main())
