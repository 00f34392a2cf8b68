"""One case: its inputs, the gate, then time and memory, or the kernels, of each implementation.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, nullcontext
from dataclasses import asdict, replace
from functools import partial
from typing import Any, TypeVar, cast

import torch

from cce_tp.workspace import default_workspace_bytes
from launch.benchmark import collectives, machine, profiling, reference
from launch.benchmark.catalogue import Case
from launch.benchmark.implementations import Implementation
from launch.benchmark.inputs import Inputs, Snapshot, take
from launch.benchmark.inputs import make as make_inputs
from launch.benchmark.measure import Comparison, Meter, Timing
from launch.benchmark.outcome import DeviceLost, Outcome, attempt
from launch.benchmark.parallel import World
from launch.benchmark.peers import NotAvailable, Problem
from launch.benchmark.played import Part, PlayedGroup
from launch.benchmark.steps import Steps, alone, even_rows, nothing

T = TypeVar("T")


class CaseWork:
    """The tensors of one case and what is done with them.

    Call `begin`, `gate`, and then `measure` or `profile`, once for each implementation.

    Attributes:
        outcomes: of every implementation, filled by `gate` and changed by what follows it.
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
            with _blaming(name):
                self.outcomes[name] = self._gate_one(name, want)
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
        problem = self._problem(self.team.group, self.vocab, filtered=not entry.exact)
        self._losses[name] = entry.prepare(problem)
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

    def _problem(self, group: Any, vocab: int, *, filtered: bool = False) -> Problem:
        parts = self.case.sequence_parallel and group is not None
        options, shape = self.case.options, self.case.shape
        apart = self.case.shard is not None and not self.case.played
        if apart and options.workspace_mib is None:
            # As in a group, where the default follows from the whole vocabulary.
            sizes = shape.tokens, shape.hidden, shape.vocab
            cap = default_workspace_bytes(*sizes, filtered=filtered)
            options = replace(options, workspace_mib=cap / 2**20)
        return Problem(vocab, options, self.world.device, group, self.world.alone, parts)

    def _beside_gemm(self, work: Callable[[Callable[[], Any] | None], T]) -> T:
        """`work` with E @ C^T of the rows held here, to be run between the runs of a step.

        The product's output is there as long as `work` goes on and no longer. Where there is no
        room for it, or none for `work` beside it, `work` gets None instead.
        """
        hidden, weight = self.inputs.input, self.inputs.weight
        size = (hidden.shape[0], weight.shape[0])
        output = attempt(self.world, lambda: hidden.new_empty(size))[1]
        if output is not None:
            gemm = partial(torch.mm, hidden, weight.t(), out=output)
            outcome, found = attempt(self.world, lambda: work(gemm))
            del gemm, output
            if outcome.status == "ok":
                return cast("T", found)
            # Whatever else it was that failed fails again.
        return work(None)

    def _compare(self, step: Callable[[], Any]) -> Comparison:
        return self._beside_gemm(partial(self.meter.compare, step))

    def measure(self, name: str) -> dict[str, Any]:
        """Gate, timings and memory of one implementation, as fields of its record."""
        return self._of_steps(name, partial(self._time, name))

    def profile(self, name: str, runs: int) -> dict[str, Any]:
        """Gate, and the kernels of one implementation, as fields of its record."""

        def kernels(steps: Steps) -> dict[str, Any]:
            step = steps.forward if self.case.options.forward_only else steps.both
            return {
                "profile": self._beside_gemm(
                    lambda gemm: profiling.take(self.meter, step, gemm, runs)
                )
            }

        return self._of_steps(name, kernels)

    def _of_steps(self, name: str, work: Callable[[Steps], dict[str, Any]]) -> dict[str, Any]:
        """The gate, and what `work` finds if that was passed."""
        found: dict[str, Any] = {}
        if name in self._errors:
            limits = reference.limits(self.case.dtype, self.case.tf32, self.table[name].exact)
            found["gate"] = {"errors": self._errors[name], "limits": limits}
        if self.outcomes[name].status != "ok":
            return found
        loss, part = self._losses.pop(name), self._parts.pop(name, None)
        with _blaming(name), nullcontext() if part is None else part.in_group():
            steps = Steps(loss, self.own, self.case.options)
            outcome, more = attempt(self.world, lambda: work(steps))
        if part is not None:
            found["played"] = {"ids": self.case.played, **part.about}
        self.outcomes[name] = outcome
        return found | (more or {})

    def _time(self, name: str, steps: Steps) -> dict[str, Any]:
        """forward, both, host and ranks of the record."""
        options, meter = self.case.options, self.meter
        found: dict[str, Any] = {"both": None, "host": None}
        extra = meter.peak_bytes(steps.forward, lambda: 0)
        forward, both = self._compare(steps.forward), None
        found["forward"] = _timing(forward, extra)
        if not options.forward_only:
            extra = meter.peak_bytes(steps.both, steps.release)
            both = self._compare(steps.both)
            found["both"] = _timing(both, extra)
        steps.release()
        if self.case.host_time:
            host: dict[str, float | None] = {}
            for prefix, each in (("", steps), ("empty_", Steps(nothing, self.own, options))):
                backward = None if options.forward_only else meter.host_us(each.host_backward)
                host[f"{prefix}forward_us"] = meter.host_us(each.host_forward)
                host[f"{prefix}backward_us"] = backward
            found["host"] = host
        if self.team.group is not None:
            found["ranks"] = self._group_cost(name, steps, {"forward": forward, "both": both})
        return found

    def _group_cost(
        self, name: str, steps: Steps, together: dict[str, Comparison | None]
    ) -> dict[str, Any]:
        """What the collectives expose: the same rows without them, and the difference.

        Those are measured beside the product as well, so that they run at the same clocks.
        """
        ours = self.table[name].ours
        without = self._at_hand(steps) if ours else self._on_their_own(name)
        found: dict[str, Any] = self.about_ranks() or {}
        for key, timing in together.items():
            alone_timing = None if timing is None else without[key]
            found[f"alone_{key}"] = _plain(alone_timing)
            found[f"exposed_{key}_ms"] = None
            if timing is not None and alone_timing is not None:
                found[f"exposed_{key}_ms"] = timing.step.median_ms - alone_timing.median_ms
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
            found["forward"] = self._compare(steps.forward).step
        if not self.case.options.forward_only:
            with collectives.at_hand(steps.both):
                found["both"] = self._compare(steps.both).step
        steps.release()
        return found

    def _on_their_own(self, name: str) -> dict[str, Timing | None]:
        """Others: the same rows as a problem of their own, without the group."""
        inputs = alone(self.inputs, self.rows[0])
        loss = self.table[name].prepare(self._problem(None, inputs.weight.shape[0]))
        steps = Steps(loss, inputs, self.case.options)
        forward_only = self.case.options.forward_only
        return {
            "forward": self._compare(steps.forward).step,
            "both": None if forward_only else self._compare(steps.both).step,
        }

    def _collectives_ms(self) -> dict[str, float]:
        """Medians of this library's collectives by themselves; measured once per case."""
        if self._collectives is None:
            self._collectives = collectives.by_themselves(
                self.meter, self.inputs.input, self.team.group, self.case.sequence_parallel
            )
        return self._collectives


@contextmanager
def _blaming(name: str) -> Iterator[None]:
    """A GPU that is lost inside was lost to this implementation."""
    try:
        yield
    except DeviceLost as lost:
        raise DeviceLost(lost.outcome, name) from lost


def _timing(compared: Comparison, extra_bytes: int | None) -> dict[str, Any]:
    """A timing of the record."""
    return {
        **asdict(compared.step),
        "gemm": _plain(compared.unit),
        "gemms": compared.ratio,
        "gemms_low": compared.low,
        "gemms_high": compared.high,
        "extra_bytes": extra_bytes,
    }


def _plain(timing: Timing | None) -> dict[str, Any] | None:
    return None if timing is None else asdict(timing)
