"""Measures cases, and makes a record for each implementation on each of them."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import asdict
from datetime import datetime, timezone
from typing import Any

from launch.benchmark import machine, reference
from launch.benchmark.casework import CaseWork
from launch.benchmark.catalogue import Case
from launch.benchmark.implementations import TABLE, Implementation
from launch.benchmark.inputs import Snapshot
from launch.benchmark.measure import Meter
from launch.benchmark.outcome import DeviceLost, Outcome, forget, forget_compiled
from launch.benchmark.parallel import World
from launch.benchmark.records import SCHEMA, Record, measurement_key
from launch.benchmark.steps import even_rows


class Session:
    """Measurements with one set of conditions.

    Args:
        world: this rank and the others.
        seconds: of measuring for each of forward, and forward + backward.
        seed: of made-up inputs.
        snapshot: inputs of the cases whose inputs are "snapshot".
        commit: revision for the record.
        table: implementations by name.
    """

    def __init__(
        self,
        world: World,
        *,
        seconds: float,
        seed: int = 0,
        snapshot: Snapshot | None = None,
        commit: str | None = None,
        table: Mapping[str, Implementation] = TABLE,
    ) -> None:
        self.world, self.seed, self.snapshot = world, seed, snapshot
        self.meter = Meter(world, seconds)
        self.table = table
        self._commit = commit
        self._hardware = machine.hardware(world.device)

    def measure(self, case: Case, names: list[str]) -> Iterator[Record]:
        """One record per implementation, as soon as it is measured; all ranks must iterate.

        Raises:
            DeviceLost: after the record of the implementation that it was lost to.
        """
        return self._records(case, names, "timing", CaseWork.measure)

    def profile(self, case: Case, names: list[str], runs: int) -> Iterator[Record]:
        """The same of the kernels of forward + backward, or of forward alone if that is asked for.

        Args:
            case: to profile.
            names: of implementations.
            runs: of the step.
        """
        return self._records(case, names, "profile", lambda work, name: work.profile(name, runs))

    def key(self, case: Case, name: str, kind: str) -> str:
        """What records of this measurement have in common, see `records.measurement_key`."""
        ranks = None
        if self.world.size > 1:
            size = case.ranks or self.world.size
            ranks = {"world_size": size, "sequence_parallel": case.sequence_parallel}
            ranks["processes"] = self.world.size
        fields = {"ranks": ranks, "host": {} if case.host_time and kind == "timing" else None}
        return measurement_key(self._record(case, name, kind, Outcome(), fields))

    def _records(
        self,
        case: Case,
        names: list[str],
        kind: str,
        fields_of: Callable[[CaseWork, str], dict[str, Any]],
    ) -> Iterator[Record]:
        if any(self.table[name].compiled for name in names):
            forget_compiled()
        forget(self.world.device)
        with reference.matmul_precision("high" if case.tf32 else "highest"):
            work = CaseWork(self.world, self.meter, self.table, case)
            try:
                outcome = work.begin(self.seed, self.snapshot)
                if outcome.status == "ok":
                    outcome = work.gate(names)
                for name in names:
                    fields: dict[str, Any] = {"ranks": work.about_ranks()}
                    if outcome.status != "ok":
                        yield self._record(case, name, kind, outcome, fields)
                        continue
                    fields |= fields_of(work, name)
                    yield self._record(case, name, kind, work.outcomes[name], fields)
            except DeviceLost as lost:
                if lost.name is not None:
                    fields = {"ranks": work.about_ranks()}
                    yield self._record(case, lost.name, kind, lost.outcome, fields)
                raise

    def _record(
        self, case: Case, name: str, kind: str, outcome: Outcome, fields: dict[str, Any]
    ) -> Record:
        inputs: dict[str, Any] = {"kind": case.inputs, "seed": self.seed}
        if self.snapshot is not None:
            inputs = {"kind": case.inputs, "snapshot": self.snapshot.name}
        ranks = (case.ranks or self.world.size) if case.shard is None else case.shard[1]
        start, stop = even_rows(case.shape.vocab, 0, ranks)
        record = {
            "schema": SCHEMA,
            "kind": kind,
            "date": datetime.now(timezone.utc).isoformat(timespec="seconds"),
            "commit": self._commit,
            "hardware": self._hardware,
            "versions": machine.versions(self.table[name].package),
            "suite": case.suite,
            "model": case.name,
            "implementation": name,
            "status": outcome.status,
            "reason": outcome.reason,
            "shape": {**asdict(case.shape), "rows": stop - start},
            "dtype": case.dtype,
            "tf32": case.tf32,
            "inputs": inputs,
            "options": case.options.changed(),
            "shard": case.shard,
            "played": None,
            **dict.fromkeys(("gate", "forward", "both", "host", "profile", "ranks")),
        }
        if case.played is not None:
            record["played"] = {"ids": case.played, "tiles_kept": None, "far_mass": None}
        return record | fields
