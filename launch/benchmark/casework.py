"""One case: its inputs, the gate, then time and memory of each implementation.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Any

import torch
import torch.distributed as dist

from launch.benchmark import reference
from launch.benchmark.catalogue import Case
from launch.benchmark.implementations import Implementation
from launch.benchmark.inputs import Inputs, Snapshot, take
from launch.benchmark.inputs import make as make_inputs
from launch.benchmark.measure import Meter, Timing
from launch.benchmark.outcome import Outcome, attempt
from launch.benchmark.parallel import World
from launch.benchmark.peers import Problem
from launch.benchmark.steps import Steps, alone, even_rows


class CaseWork:
    """The tensors of one case and what is done with them; call `begin`, `gate`, then `measure`.

    Attributes:
        outcomes: of every implementation, filled by `gate` and changed by `measure`.
    """

    def __init__(
        self, world: World, meter: Meter, table: Mapping[str, Implementation], case: Case
    ) -> None:
        self.world, self.meter, self.table, self.case = world, meter, table, case
        rank, ranks = case.shard or (self.world.rank, self.world.size)
        self.rows = even_rows(case.shape.vocab, rank, ranks)
        self.outcomes: dict[str, Outcome] = {}
        self._losses: dict[str, Any] = {}
        self._errors: dict[str, dict[str, float]] = {}
        self._gemm_before: Timing | None = None
        self._collectives: dict[str, float] | None = None

    def begin(self, seed: int, snapshot: Snapshot | None) -> Outcome:
        """Make the inputs: those of the snapshot, if there is one.

        Under a group the targets are global; a shard alone is a problem of its own.
        """
        case, device = self.case, self.world.device

        def make() -> Inputs:
            if snapshot is not None:
                return take(snapshot, case.shape.tokens, self.rows, case.dtype, device)
            return make_inputs(case.inputs, case.shape, self.rows, case.dtype, device, seed)

        outcome, made = attempt(self.world, make)
        if made is None:
            outcome.reason = f"the inputs: {outcome.reason}"
            return outcome
        self.inputs = made if case.shard is None else alone(made, self.rows[0])
        self.vocab = case.shape.vocab if case.shard is None else made.weight.shape[0]
        return outcome

    def gate(self, names: list[str]) -> Outcome:
        """Build every implementation and compare it with fp32; fills `outcomes`."""
        case = self.case
        start = self.rows[0] if case.shard is None else 0
        outcome, want = attempt(
            self.world,
            lambda: reference.compute(
                self.inputs, case.options, start, self.vocab, self.world.group
            ),
        )
        if want is None:
            outcome.reason = f"the fp32 reference: {outcome.reason}"
            return outcome
        for name in names:
            self.outcomes[name] = self._gate_one(name, want)
        del want  # before anything is timed
        self._gemm_before = self._gemm()
        return outcome

    def _gate_one(self, name: str, want: reference.Results) -> Outcome:
        case, entry = self.case, self.table[name]

        def compare() -> dict[str, float]:
            self._losses[name] = entry.prepare(self._problem(self.world.group, self.vocab))
            steps = Steps(self._losses[name], self.inputs, case.options)
            found = reference.errors(steps.results(case.options.forward_only), want)
            return {key: value if value == value else torch.inf for key, value in found.items()}

        outcome, mine = attempt(self.world, compare)
        if mine is None:
            return outcome
        ranks = self.world.gather(mine)
        errors = {key: max(each[key] for each in ranks) for key in mine}
        self._errors[name] = errors
        allowed = reference.limits(case.dtype, case.tf32, entry.exact)
        wrong = [key for key in errors if not errors[key] <= allowed[key]]
        if wrong:
            listed = ", ".join(f"{key} {errors[key]:.1e} > {allowed[key]:.0e}" for key in wrong)
            return Outcome("failed", f"relative error against fp32: {listed}")
        return outcome

    def _problem(self, group: Any, vocab: int) -> Problem:
        return Problem(vocab, self.case.options, self.world.device, group, self.world.alone)

    def _gemm(self) -> Timing | None:
        """E @ C^T of the rows held here; None where it cannot be held."""
        hidden, weight = self.inputs.input, self.inputs.weight
        step = lambda: torch.mm(hidden, weight.t())  # noqa: E731
        return attempt(self.world, lambda: self.meter.time(step, share=0.5))[1]

    def measure(self, name: str) -> dict[str, Any]:
        """Gate, timings and memory of one implementation, as fields of its record."""
        found: dict[str, Any] = {"gemm": None}
        if name in self._errors:
            limits = reference.limits(self.case.dtype, self.case.tf32, self.table[name].exact)
            found["gate"] = {"errors": self._errors[name], "limits": limits}
        if self.outcomes[name].status != "ok":
            return found
        outcome, timings = attempt(self.world, lambda: self._time(name))
        self.outcomes[name] = outcome
        self._losses.pop(name)
        if timings is None:
            return found
        before, after = self._gemm_before, self._gemm()
        self._gemm_before = after
        unit = None
        if before is not None and after is not None:
            unit = (before.median_ms + after.median_ms) / 2
        found["gemm"] = {"before": _plain(before), "after": _plain(after), "ms": unit}
        for key in ("forward", "both"):
            timing, extra = timings.pop(key)
            if timing is not None:
                gemms = timing.median_ms / unit if unit else None
                found[key] = {**asdict(timing), "gemms": gemms, "extra_bytes": extra}
        return found | timings

    def _time(self, name: str) -> dict[str, Any]:
        """forward, both: (timing, extra bytes); host; ranks."""
        options, meter = self.case.options, self.meter
        steps = Steps(self._losses[name], self.inputs, options)
        found: dict[str, Any] = {"both": (None, None), "host": None}
        extra = meter.peak_bytes(steps.forward, lambda: 0)
        found["forward"] = (meter.time(steps.forward), extra)
        if not options.forward_only:
            extra = meter.peak_bytes(steps.both, steps.release)
            found["both"] = (meter.time(steps.both), extra)
        steps.release()
        if self.case.host_time:
            backward = None if options.forward_only else meter.host_us(steps.host_backward)
            found["host"] = {
                "forward_us": meter.host_us(steps.host_forward),
                "backward_us": backward,
            }
        if self.world.group is not None:
            found["ranks"] = self._group_cost(name, found["forward"][0], found["both"][0])
        return found

    def _group_cost(self, name: str, forward: Timing, both: Timing | None) -> dict[str, Any]:
        """The same rows without the group; the difference is what the collectives expose."""
        entry, options = self.table[name], self.case.options
        inputs = alone(self.inputs, self.rows[0])
        loss = entry.prepare(self._problem(None, inputs.weight.shape[0]))
        steps = Steps(loss, inputs, options)
        alone_forward = self.meter.time(steps.forward)
        alone_both = None if both is None else self.meter.time(steps.both)
        found = {
            "world_size": self.world.size,
            "backend": self.world.backend,
            "alone_forward": _plain(alone_forward),
            "alone_both": _plain(alone_both),
            "exposed_forward_ms": forward.median_ms - alone_forward.median_ms,
            "exposed_both_ms": None,
            "collectives_ms": self._collectives_ms() if entry.package == "cce-tp" else {},
        }
        if both is not None and alone_both is not None:
            found["exposed_both_ms"] = both.median_ms - alone_both.median_ms
        return found

    def _collectives_ms(self) -> dict[str, float]:
        """Medians of this library's collectives by themselves; measured once per case."""
        if self._collectives is None:
            hidden, group = self.inputs.input, self.world.group
            packed = torch.zeros(3, hidden.shape[0], device=hidden.device)
            parts = [torch.empty_like(packed) for _ in range(self.world.size)]
            gradient = torch.zeros_like(hidden)
            steps: dict[str, Callable[[], Any]] = {
                "all-gather of statistics": lambda: dist.all_gather(parts, packed, group=group),
                "all-reduce of dE": lambda: dist.all_reduce(gradient, group=group),
            }
            self._collectives = {
                name: self.meter.time(step, share=0.5).median_ms for name, step in steps.items()
            }
        return self._collectives


def _plain(timing: Timing | None) -> dict[str, Any] | None:
    return None if timing is None else asdict(timing)
