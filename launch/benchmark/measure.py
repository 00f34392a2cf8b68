"""Time and memory of a step: CUDA events and the allocator's peak, or the wall clock on a CPU."""

from __future__ import annotations

import math
import statistics
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch

from launch.benchmark.parallel import World

MIN_RUNS, MAX_RUNS = 5, 100
_WARM_UP_SHARE = 0.2
# Written before each run, so that no run finds its inputs in the cache of the one before.
_FLUSH_BYTES = 256 * 2**20
# Few calls at a time: a full launch queue would make the host wait.
HOST_CALLS = 10
_HOST_BATCHES = 20


@dataclass(frozen=True, slots=True)
class Timing:
    """Milliseconds: the median, and the 10% and 90% quantiles.

    Under a group these are of the rank with the largest median, and `ranks_ms` holds the median
    of every rank.
    """

    median_ms: float
    low_ms: float
    high_ms: float
    runs: int
    ranks_ms: tuple[float, ...]

    @classmethod
    def of(cls, samples_ms: list[float], world: World) -> Timing:
        """Summarise one rank's samples, and pick the slowest rank."""
        ranks = world.gather(_spread(samples_ms))
        median, low, high = max(ranks)
        return cls(median, low, high, len(samples_ms), tuple(each[0] for each in ranks))


@dataclass(frozen=True, slots=True)
class Comparison:
    """A step beside a unit that was run in turn with it.

    Attributes:
        step: its timing.
        unit: that of the unit, of as many runs; None if there was no unit.
        ratio, low, high: median, 10% and 90% quantiles of the ratios of a run of the step to the
            run of the unit after it, of the rank where their median is the largest; None without a
            unit.
    """

    step: Timing
    unit: Timing | None = None
    ratio: float | None = None
    low: float | None = None
    high: float | None = None


def _spread(samples: list[float]) -> tuple[float, float, float]:
    """The median, and the 10% and 90% quantiles."""
    if len(samples) == 1:
        samples = samples * 2
    deciles = statistics.quantiles(samples, n=10, method="inclusive")
    return statistics.median(samples), deciles[0], deciles[-1]


class Meter:
    """Measures steps on one device, in step with the other ranks.

    Args:
        world: this rank and the others.
        seconds: of measuring per step; at least MIN_RUNS and at most MAX_RUNS runs are made.
    """

    def __init__(self, world: World, seconds: float) -> None:
        self.world, self.seconds = world, seconds
        self.cuda = world.device.type == "cuda"

    def time(self, step: Callable[[], Any], share: float = 1.0) -> Timing:
        """Time of `step`, after a warm-up of a fifth of the time.

        Under a group all ranks start each run together, and all of them make as many runs.

        Args:
            step: what to time; called several times.
            share: of the seconds per step.
        """
        (samples_ms,) = self._warm([step], share)
        return Timing.of(samples_ms, self.world)

    def compare(self, step: Callable[[], Any], unit: Callable[[], Any] | None) -> Comparison:
        """Time of `step` as `time` measures it, each run of it followed by one of `unit`.

        A device whose clocks follow its load runs both at the same clocks then, so that the ratio
        does not depend on how long either is measured.

        Args:
            step: what to time; the seconds per step are its own.
            unit: what to compare it with; None times the step alone.
        """
        if unit is None:
            return Comparison(self.time(step))
        steps_ms, units_ms = self._warm([step, unit], 1.0)
        ratios = [one / other for one, other in zip(steps_ms, units_ms, strict=True)]
        timings = (Timing.of(steps_ms, self.world), Timing.of(units_ms, self.world))
        return Comparison(*timings, *max(self.world.gather(_spread(ratios))))

    def _warm(self, steps: list[Callable[[], Any]], share: float) -> list[list[float]]:
        """Milliseconds of warm runs of each step, made in turn; the first decides how many."""
        for step in steps:
            step()
        estimate_s = self.sample(steps, 1)[0][0] / 1000
        seconds = share * self.seconds
        wanted = (self._runs(seconds * part, estimate_s) for part in (_WARM_UP_SHARE, 1.0))
        # The same counts on all ranks, or they would wait for each other's collectives.
        warm_up, runs = (
            max(counts) for counts in zip(*self.world.gather(tuple(wanted)), strict=True)
        )
        for _ in range(warm_up):
            for step in steps:
                step()
        return self.sample(steps, max(MIN_RUNS, runs))

    @staticmethod
    def _runs(seconds: float, estimate_s: float) -> int:
        return min(MAX_RUNS, math.ceil(seconds / max(estimate_s, 1e-9)))

    def sample(
        self, steps: list[Callable[[], Any]], runs: int, mark: Callable[[], None] = lambda: None
    ) -> list[list[float]]:
        """Milliseconds of each step's runs: one of each step in turn, `runs` times.

        Under a group all ranks must ask for as many.

        Args:
            steps: what to time.
            runs: of each step.
            mark: called before and after each run, outside its time.
        """
        taken = (self._events if self.cuda else self._clock)(steps * runs, mark)
        return [taken[place :: len(steps)] for place in range(len(steps))]

    def _clock(self, steps: list[Callable[[], Any]], mark: Callable[[], None]) -> list[float]:
        samples = []
        for step in steps:
            self.world.barrier()
            mark()
            start = time.perf_counter()
            step()
            samples.append(1000 * (time.perf_counter() - start))
            mark()
        return samples

    def _events(self, steps: list[Callable[[], Any]], mark: Callable[[], None]) -> list[float]:
        flush = torch.empty(_FLUSH_BYTES, dtype=torch.int8, device=self.world.device)
        events = [tuple(torch.cuda.Event(enable_timing=True) for _ in range(2)) for _ in steps]
        for step, (start, end) in zip(steps, events, strict=True):
            flush.zero_()
            self.world.align()
            mark()
            start.record()
            step()
            end.record()
            mark()
        torch.cuda.synchronize(self.world.device)
        return [start.elapsed_time(end) for start, end in events]

    def peak_bytes(self, step: Callable[[], Any], release: Callable[[], int]) -> int | None:
        """Most that was allocated during a warm step, beyond what was allocated before it.

        Args:
            step: what to measure.
            release: frees what the step leaves behind, and returns the bytes of it that are not
                to be counted (gradients).

        Returns:
            Bytes of the CUDA caching allocator, the largest over the ranks; None on the CPU.
        """
        if not self.cuda:
            return None
        step()
        release()
        torch.cuda.synchronize(self.world.device)
        before = torch.cuda.memory_allocated(self.world.device)
        torch.cuda.reset_peak_memory_stats(self.world.device)
        step()
        torch.cuda.synchronize(self.world.device)
        peak = torch.cuda.max_memory_allocated(self.world.device)
        return max(self.world.gather(peak - before - release()))

    def host_us(self, prepare: Callable[[], list[Callable[[], Any]]]) -> float:
        """Microseconds that a call keeps the host, without waiting for the device.

        Args:
            prepare: makes the calls of one batch, of which each is made once.

        Returns:
            The median over batches of the mean over a batch.
        """
        means = []
        for _ in range(_HOST_BATCHES):
            calls = prepare()
            self.world.barrier()
            start = time.perf_counter()
            for call in calls:
                call()
            means.append(1e6 * (time.perf_counter() - start) / len(calls))
            self.world.barrier()
        return statistics.median(means)
