"""One case: its inputs, the gate, then time and memory of each implementation.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import nullcontext
from dataclasses import asdict, replace
from typing import Any

import torch

from launch.benchmark import collectives, machine, reference
from launch.benchmark.catalogue import Case
from launch.benchmark.implementations import Implementation
from launch.benchmark.inputs import Inputs, Snapshot, take
from launch.benchmark.inputs import make as make_inputs
from launch.benchmark.measure import Meter, Timing
from launch.benchmark.outcome import Outcome, attempt
from launch.benchmark.parallel import World
from launch.benchmark.peers import NotAvailable, Problem
from launch.benchmark.played import Part, PlayedGroup
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
        self.team = world.team(1 if case.shard else case.ranks)
        rank, ranks = case.shard or (self.team.rank, self.team.size)
        self.rows = even_rows(case.shape.vocab, rank, ranks)
        self.outcomes: dict[str, Outcome] = {}
        self._losses: dict[str, Any] = {}
        self._group: PlayedGroup | None = None
        self._parts: dict[str, Part] = {}
        self._errors: dict[str, dict[str, float]] = {}
        self._gemm_before: Timing | None = None
        self._collectives: dict[str, float] | None = None

    def begin(self, seed: int, snapshot: Snapshot | None) -> Outcome:
        """Make the inputs: those of the snapshot, if there is one.

        Under a group the targets are global; a shard alone is a problem of its own.
        """
        case, device = self.case, self.world.device
        rows = (0, case.shape.vocab) if case.played else self.rows

        def make() -> Inputs:
            if case.sequence_parallel and case.shape.tokens % self.team.size:
                raise NotAvailable(f"equal parts of {case.shape.tokens} tokens do not exist")
            if snapshot is not None:
                return take(snapshot, case.shape.tokens, rows, case.dtype, device)
            return make_inputs(case.inputs, case.shape, rows, case.dtype, device, seed)

        outcome, made = attempt(self.world, make)
        if made is None:
            outcome.reason = f"the inputs: {outcome.reason}"
            return outcome
        self.inputs, self.vocab = made, case.shape.vocab
        if case.shard is not None and case.played:
            self._group = PlayedGroup(made, case, self._problem(None, self.vocab))
            self.inputs = self._group.inputs(case.shard[0])
        elif case.shard is not None:
            self.inputs, self.vocab = alone(made, self.rows[0]), made.weight.shape[0]
        # What this rank passes to the loss.
        self.own = replace(self.inputs, input=self._part(self.inputs.input))
        return outcome

    def _part(self, tokens: torch.Tensor) -> torch.Tensor:
        """(N, D) -> the rows whose hidden states this rank has."""
        if not self.case.sequence_parallel:
            return tokens
        return tokens.tensor_split(self.team.size)[self.team.rank].contiguous()

    def gate(self, names: list[str]) -> Outcome:
        """Build every implementation and compare it with fp32; fills `outcomes`."""
        outcome, want = attempt(self.world, self._reference)
        if want is None:
            outcome.reason = f"the fp32 reference: {outcome.reason}"
            return outcome
        if want.input_grad is not None:
            want = replace(want, input_grad=self._part(want.input_grad))
        for name in names:
            self.outcomes[name] = self._gate_one(name, want)
        del want  # before anything is timed
        self._gemm_before = self._gemm()
        return outcome

    def _reference(self) -> reference.Results:
        if self._group is not None:
            return self._group.reference()
        start = self.rows[0] if self.case.shard is None else 0
        return reference.compute(self.inputs, self.case.options, start, self.vocab, self.team.group)

    def _results(self, name: str) -> reference.Results:
        """Build an implementation, and run it once."""
        entry = self.table[name]
        if self._group is not None:
            self._parts[name], results = self._group.play(entry)
            self._losses[name] = self._parts[name].loss
            return results
        self._losses[name] = entry.prepare(self._problem(self.team.group, self.vocab))
        steps = Steps(self._losses[name], self.own, self.case.options)
        return steps.results(self.case.options.forward_only)

    def _gate_one(self, name: str, want: reference.Results) -> Outcome:
        case, entry = self.case, self.table[name]

        def compare() -> dict[str, float]:
            found = reference.errors(self._results(name), want)
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
        parts = self.case.sequence_parallel and group is not None
        return Problem(vocab, self.case.options, self.world.device, group, self.world.alone, parts)

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
        part = self._parts.pop(name, None)
        with nullcontext() if part is None else part.in_group():
            outcome, timings = attempt(self.world, lambda: self._time(name))
        if part is not None:
            found["played"] = {"ids": self.case.played, **part.about}
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
        steps = Steps(self._losses[name], self.own, options)
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
        if self.team.group is not None:
            found["ranks"] = self._group_cost(name, steps, found["forward"][0], found["both"][0])
        return found

    def _group_cost(
        self, name: str, steps: Steps, forward: Timing, both: Timing | None
    ) -> dict[str, Any]:
        """What the collectives expose: the same rows without them, and the difference."""
        ours = self.table[name].ours
        without = self._at_hand(steps) if ours else self._on_their_own(name)
        found: dict[str, Any] = self.about_ranks() or {}
        for key, timing in (("forward", forward), ("both", both)):
            alone_timing = None if timing is None else without[key]
            found[f"alone_{key}"] = _plain(alone_timing)
            found[f"exposed_{key}_ms"] = None
            if timing is not None and alone_timing is not None:
                found[f"exposed_{key}_ms"] = timing.median_ms - alone_timing.median_ms
        found["collectives_ms"] = self._collectives_ms() if ours else {}
        return found

    def about_ranks(self) -> dict[str, Any] | None:
        """Who measures together, for the record; None for one process."""
        world = self.world
        if world.size == 1:
            return None
        return {
            "world_size": self.team.size,
            "processes": world.size,
            "backend": world.backend,
            "sequence_parallel": self.case.sequence_parallel,
            "environment": machine.communication(),
        }

    def _at_hand(self, steps: Steps) -> dict[str, Timing | None]:
        """The library's own steps, the results of their collectives being at hand."""
        found: dict[str, Timing | None] = {"both": None}
        with collectives.at_hand(steps.forward):
            found["forward"] = self.meter.time(steps.forward)
        if not self.case.options.forward_only:
            with collectives.at_hand(steps.both):
                found["both"] = self.meter.time(steps.both)
        steps.release()
        return found

    def _on_their_own(self, name: str) -> dict[str, Timing | None]:
        """Others: the same rows as a problem of their own, without the group."""
        inputs = alone(self.inputs, self.rows[0])
        loss = self.table[name].prepare(self._problem(None, inputs.weight.shape[0]))
        steps = Steps(loss, inputs, self.case.options)
        forward_only = self.case.options.forward_only
        return {
            "forward": self.meter.time(steps.forward),
            "both": None if forward_only else self.meter.time(steps.both),
        }

    def _collectives_ms(self) -> dict[str, float]:
        """Medians of this library's collectives by themselves; measured once per case."""
        if self._collectives is None:
            self._collectives = collectives.by_themselves(
                self.meter, self.inputs.input, self.team.group, self.case.sequence_parallel
            )
        return self._collectives


def _plain(timing: Timing | None) -> dict[str, Any] | None:
    return None if timing is None else asdict(timing)
