"""Where the time of a step goes: its kernels one by one, and when none of them ran.

The steps are run as they are timed (`Meter.sample`), under PyTorch's profiler, with a mark before
and after every run. A mark is a kernel that nothing else launches (on the CPU an annotation), so
what lies between two marks of the profiler's timeline is one run, whatever launched it and from
whichever thread. Where there is no GPU operators stand for kernels: the outermost ones, as an
operator's time holds those of the operators that it calls.
"""

from __future__ import annotations

import json
import re
import statistics
import tempfile
from collections import defaultdict
from collections.abc import Callable, Iterable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch.profiler import ProfilerActivity, profile, record_function, schedule

from launch.benchmark.measure import Meter

_WARM_UP_RUNS = 3
_GAPS = 5
# Of the kernel that `torch.cuda._sleep` launches.
MARK = "spin_kernel"
_DEVICE_WORK = ("kernel", "gpu_memcpy", "gpu_memset")


@dataclass(frozen=True, slots=True)
class Span:
    """A kernel, or an operator: [start_us, end_us) on the profiler's clock."""

    name: str
    start_us: float
    end_us: float


@dataclass(frozen=True, slots=True)
class Window:
    """One run, from the end of the mark before it to the start of the mark after it.

    Attributes:
        start_us, end_us: on the profiler's clock.
        spans: that started in it, by their start.
    """

    start_us: float
    end_us: float
    spans: tuple[Span, ...]

    def total_us(self) -> float:
        """Of all spans; of two that overlap both count."""
        return sum(span.end_us - span.start_us for span in self.spans)

    def span_us(self) -> float:
        """From the start of the first span to the end of the last."""
        if not self.spans:
            return 0.0
        return max(span.end_us for span in self.spans) - self.spans[0].start_us


@dataclass(frozen=True, slots=True)
class Gap:
    """A time in a run when nothing ran.

    Attributes:
        at_us: its start, from the start of the run.
        us: its length.
        before, after: names of what ran before and after it.
    """

    at_us: float
    us: float
    before: str
    after: str


def take(
    meter: Meter, step: Callable[[], Any], gemm: Callable[[], Any] | None, runs: int
) -> dict[str, Any]:
    """Profile `runs` warm runs of `step`, each followed by one of `gemm`; all ranks together.

    Args:
        meter: runs them.
        step: what to account for.
        gemm: the unit, or None.
        runs: of the step.

    Returns:
        `profile` of a record (see records.py), of this rank.

    Raises:
        RuntimeError: the profiler's timeline does not hold every mark.
    """
    steps = [step] if gemm is None else [step, gemm]
    activity = ProfilerActivity.CUDA if meter.cuda else ProfilerActivity.CPU
    plan = schedule(wait=0, warmup=1, active=1)
    mark = _mark_device if meter.cuda else _mark_host
    mark()  # loads the kernel
    with profile(activities=[activity], schedule=plan) as profiler:
        meter.sample(steps, _WARM_UP_RUNS)
        profiler.step()
        # A recording may lack the first of its kernels: these need not be in it.
        meter.sample(steps, 1)
        samples_ms = meter.sample(steps, runs, mark)
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "trace.json"
        profiler.export_chrome_trace(str(path))
        trace = json.loads(path.read_text(encoding="utf-8", errors="replace"))
    found = windows(read(trace["traceEvents"], meter.cuda), len(steps) * runs)
    gemm_us = None
    if gemm is not None:
        gemm_us = statistics.median(window.total_us() for window in found[1::2])
    step_us = 1000 * statistics.median(samples_ms[0])
    return {**account(found[:: len(steps)], gemm_us), "step_us": step_us}


def _mark_device() -> None:
    torch.cuda._sleep(1)


def _mark_host() -> None:
    with record_function(MARK):
        pass


def read(events: Iterable[dict[str, Any]], cuda: bool) -> list[Span]:
    """What ran, from the events of a Chrome trace, by its start; marks are named MARK.

    Args:
        events: of the profiler.
        cuda: take what ran on the devices; else operators.
    """
    complete = sorted(
        (event for event in events if event.get("ph") == "X"), key=lambda event: event["ts"]
    )
    if cuda:
        chosen = [event for event in complete if event.get("cat") in _DEVICE_WORK]
    else:
        chosen = _outermost(complete)
    return [
        Span(
            MARK if MARK in event["name"] else plain_name(event["name"]),
            event["ts"],
            event["ts"] + event["dur"],
        )
        for event in chosen
    ]


def _outermost(events: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Marks, and the operators that no other operator called; nodes of autograd are none."""
    chosen = []
    until: dict[Any, float] = defaultdict(lambda: float("-inf"))
    for event in events:
        category, name = event.get("cat"), event["name"]
        operator = category == "cpu_op" and "::" in name and not name.startswith("autograd::")
        if (operator or name == MARK) and event["ts"] >= until[event["tid"]]:
            until[event["tid"]] = event["ts"] + event["dur"]
            chosen.append(event)
    return chosen


def plain_name(name: str) -> str:
    """A kernel's name without return type, namespaces and parameters; others as they are."""
    short = name.replace("(anonymous namespace)::", "")
    depth = 0
    for place, letter in enumerate(short):
        depth += (letter == "<") - (letter == ">")
        # "Memset (Device)" is no function with a parameter.
        if letter == "(" and depth == 0 and place and short[place - 1] != " ":
            short = short[:place]
            break
    else:
        if "<" not in short:
            return name
    return re.sub(r"\b\w+::", "", short).removeprefix("void ")


def windows(spans: list[Span], runs: int) -> list[Window]:
    """The runs between the marks.

    Args:
        spans: by their start.
        runs: how many there must be.

    Raises:
        RuntimeError: another number of marks.
    """
    marks = [span for span in spans if span.name == MARK]
    if len(marks) != 2 * runs:
        raise RuntimeError(
            f"the profiler's timeline: expected {2 * runs} marks, got {len(marks)}: it lost some"
        )
    work = [span for span in spans if span.name != MARK]
    return [
        Window(
            first.end_us,
            last.start_us,
            tuple(span for span in work if first.end_us <= span.start_us < last.start_us),
        )
        for first, last in zip(marks[::2], marks[1::2], strict=True)
    ]


def gaps(window: Window) -> Iterator[Gap]:
    """When nothing ran, from the start of a run to its end."""
    now, before = window.start_us, "start of the step"
    for span in window.spans:
        if span.start_us > now:
            yield Gap(now - window.start_us, span.start_us - now, before, span.name)
        if span.end_us > now:
            now, before = span.end_us, span.name
    if window.end_us > now:
        yield Gap(now - window.start_us, window.end_us - now, before, "end of the step")


def account(runs: list[Window], gemm_us: float | None) -> dict[str, Any]:
    """Kernels and gaps of several runs of one step, see records.py; medians over the runs.

    Args:
        runs: at least one.
        gemm_us: the unit, or None.
    """
    per_run: list[dict[str, list[float]]] = []
    for window in runs:
        per_run.append(defaultdict(list))
        for span in window.spans:
            per_run[-1][span.name].append(span.end_us - span.start_us)
    kernels = []
    for name in dict.fromkeys(name for taken in per_run for name in taken):
        us = statistics.median(sum(taken.get(name, ())) for taken in per_run)
        calls = statistics.median(len(taken.get(name, ())) for taken in per_run)
        gemms = us / gemm_us if gemm_us else None
        kernels.append({"name": name, "calls": calls, "us": us, "gemms": gemms})
    idle = [sum(gap.us for gap in gaps(window)) for window in runs]
    typical = runs[idle.index(statistics.median_low(idle))]
    largest = sorted(gaps(typical), key=lambda gap: -gap.us)[:_GAPS]
    return {
        "runs": len(runs),
        "gemm_us": gemm_us,
        "kernels": sorted(kernels, key=lambda kernel: -kernel["us"]),
        "kernels_us": statistics.median(window.total_us() for window in runs),
        "span_us": statistics.median(window.span_us() for window in runs),
        "idle_us": statistics.median(idle),
        "gaps": [asdict(gap) for gap in largest],
    }
