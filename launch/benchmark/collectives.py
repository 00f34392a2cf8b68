"""This library's collectives: what they take by themselves, steps that need not wait for them, and
a group whose ranks one process plays.

Legend: N tokens, D hidden size, W ranks, R rows of statistics.
"""

from __future__ import annotations

import contextlib
import itertools
from collections.abc import Callable, Iterator
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from cce_tp import sharding, stats
from launch.benchmark.measure import Meter

# Of every loss: maximum, sum, target's logit.
_ROWS = 3


def by_themselves(
    meter: Meter, hidden: Tensor, group: Any, sequence_parallel: bool
) -> dict[str, float]:
    """Medians in milliseconds of each collective of a plain loss, by name.

    Args:
        meter: measures all ranks together.
        hidden: (N, D) of all tokens.
        group: process group of W ranks that hold the vocabulary.
        sequence_parallel: each rank holds N / W tokens.
    """
    name, ranks = group.group_name, group.size()
    packed = torch.zeros(_ROWS, len(hidden), device=hidden.device)
    partial = torch.zeros_like(hidden)
    steps: dict[str, Callable[[], Any]] = {
        "all-gather of statistics": lambda: sharding.gather_statistics(packed, name)
    }
    if sequence_parallel:
        part = partial[: len(hidden) // ranks].clone()
        steps["all-gather of E"] = lambda: sharding.TokenGather(part, name).wait()
        steps["reduce-scatter of dE"] = lambda: _reduce(partial, part, name)
    else:
        steps["all-reduce of dE"] = lambda: _reduce(partial, None, name)
    return {key: meter.time(step, share=0.5).median_ms for key, step in steps.items()}


def _reduce(partial: Tensor, out: Tensor | None, group_name: str) -> None:
    reduction = sharding.InputGradReduction(partial, out, group_name)
    reduction.start()
    reduction.wait()


@contextlib.contextmanager
def at_hand(step: Callable[[], Any]) -> Iterator[None]:
    """While this is open, what the library's collectives gave during one `step` is what they give.

    A step then does the same work on the same numbers, and neither communicates nor waits: what
    it takes less is what the collectives expose. The sum of dE is left out, as nothing reads it.

    Args:
        step: run once before; the steps to be timed are the same.
    """
    given: list[Tensor] = []

    enqueue = sharding.TokenGather._enqueue

    class Recorded(sharding.TokenGather):
        @staticmethod
        def _enqueue(local: Tensor, group: Any) -> tuple[Tensor, Any]:
            whole, work = enqueue(local, group)
            given.append(whole)
            return whole, work

    class AtHand(sharding.TokenGather):
        @staticmethod
        def _enqueue(local: Tensor, group: Any) -> tuple[Tensor, Any]:
            del local, group
            return next(again), None

    gather = sharding.gather_statistics

    def record(packed: Tensor, group_name: str) -> Tensor:
        given.append(gather(packed, group_name))
        return given[-1]

    with _replaced(TokenGather=Recorded, gather_statistics=record):
        step()
    again = itertools.cycle(given)
    silent = sharding.InputGradReduction
    with _replaced(
        TokenGather=AtHand,
        gather_statistics=lambda packed, group_name: next(again),
        InputGradReduction=lambda partial, out, group_name: silent(partial, out, ""),
    ):
        yield


class Played:
    """The collectives of a group whose ranks one process plays, one after the other.

    Every rank brings its statistics first; then what the all-gather would give is at hand to each
    rank, which merges it in its own step, as in the group. Sums over the ranks are left out.
    """

    def __init__(self) -> None:
        self._brought: dict[stats.StatRows, dict[int, Tensor]] = {}

    @contextlib.contextmanager
    def bring(self, rank: int) -> Iterator[None]:
        """While this is open, losses leave the statistics of this rank; their values are void."""

        def merge(packed: Tensor, rows: stats.StatRows, group_name: str) -> Tensor:
            del group_name
            self._brought.setdefault(rows, {})[rank] = packed.clone()
            return packed

        with _replaced(merge_over_group=merge, **_NOTHING_TO_SAY):
            yield

    @contextlib.contextmanager
    def at_hand(self) -> Iterator[None]:
        """While this is open, a rank's loss is that of the group; its dE is its own part."""
        gathered = {
            rows: torch.stack([parts[rank] for rank in sorted(parts)])
            for rows, parts in self._brought.items()
        }

        def merge(packed: Tensor, rows: stats.StatRows, group_name: str) -> Tensor:
            del packed, group_name
            return stats.merge(gathered[rows], rows)

        with _replaced(merge_over_group=merge, **_NOTHING_TO_SAY):
            yield


# One process agrees with itself.
_NOTHING_TO_SAY = {
    "agree": lambda group_name, offer: None,
    "sum_over_group": lambda local, group_name: local,
}


def _replaced(**functions: Any) -> Any:
    return mock.patch.multiple(sharding, **functions)
