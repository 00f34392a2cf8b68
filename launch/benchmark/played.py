"""A group that one process plays, one rank after the other, with the softmax of the group.

What a rank of a real group computes, without the group: its statistics are merged with those that
the other ranks bring, so the log-sum-exp is that of the whole vocabulary, and with it whatever a
filter decides.

Legend: N tokens, D hidden size, V global vocabulary, W ranks.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace

import torch

from launch.benchmark import reference
from launch.benchmark.catalogue import Case
from launch.benchmark.collectives import Played
from launch.benchmark.implementations import Implementation, Ours
from launch.benchmark.inputs import Inputs
from launch.benchmark.peers import Problem
from launch.benchmark.reference import Results
from launch.benchmark.steps import Steps, even_rows
from launch.interleaving import Interleaving


@dataclass(frozen=True, slots=True)
class Part:
    """A rank's loss of one implementation, once the other ranks have brought theirs.

    Attributes:
        about: `tiles_kept` and `far_mass` of its rows; None but for the far field.
    """

    loss: Ours
    about: dict[str, float | None]
    _collectives: Played

    @contextmanager
    def in_group(self) -> Iterator[None]:
        """While this is open, the loss takes part in the group."""
        with self._collectives.at_hand():
            yield


class PlayedGroup:
    """The W ranks of a case, of which this process is one at a time.

    Args:
        whole: hidden states, targets, and the classifier of all ranks in natural order.
        case: with `shard` and `played`.
        problem: of the whole, in a group of this process alone.
    """

    def __init__(self, whole: Inputs, case: Case, problem: Problem) -> None:
        assert case.shard is not None
        self._options, self._problem = case.options, problem
        self._rank, self._ranks = case.shard
        if case.played == "interleaved":
            whole = _interleaved(whole, self._ranks)
        self._whole = whole

    def _rows(self, rank: int) -> tuple[int, int]:
        return even_rows(self._problem.vocab, rank, self._ranks)

    def inputs(self, rank: int) -> Inputs:
        """A rank's own rows, and all tokens; targets are places in the whole."""
        start, stop = self._rows(rank)
        weight, bias = (each[start:stop].clone() for each in (self._whole.weight, self._whole.bias))
        return replace(self._whole, weight=weight, bias=bias)

    def reference(self) -> Results:
        """The fp32 reference of what `play` gives."""
        vocab, options = self._problem.vocab, self._options
        whole = reference.statistics(self._whole, options, vocab)

        def of_rank(rank: int) -> Results:
            start = self._rows(rank)[0]
            return reference.compute(self.inputs(rank), options, start, vocab, None, whole)

        return self._sum_over_ranks(of_rank)

    def play(self, entry: Implementation) -> tuple[Part, Results]:
        """All ranks' passes, one after the other.

        Returns:
            This rank's part; and the loss of the group, dE summed over the ranks in fp32, dC and
            the bias's gradient of this rank's rows.

        Raises:
            NotAvailable: an implementation that cannot be played, with the reason.
        """
        collectives, losses = Played(), [self._loss(entry, rank) for rank in range(self._ranks)]
        for rank, loss in enumerate(losses):
            steps = Steps(loss, self.inputs(rank), self._options)
            with collectives.bring(rank):
                steps.training_forward()
                steps.without_gradients(loss.statistics)

        def of_rank(rank: int) -> Results:
            steps = Steps(losses[rank], self.inputs(rank), self._options)
            return steps.results(self._options.forward_only)

        mine = losses[self._rank]
        with collectives.at_hand():
            results = self._sum_over_ranks(of_rank)
            steps = Steps(mine, self.inputs(self._rank), self._options)
            statistics = steps.without_gradients(mine.statistics)
        kept, mass = (
            None if each is None else each.item()
            for each in (statistics.tiles_kept, statistics.far_mass)
        )
        return Part(mine, {"tiles_kept": kept, "far_mass": mass}, collectives), results

    def _loss(self, entry: Implementation, rank: int) -> Ours:
        loss = entry.prepare(replace(self._problem, rows=self._rows(rank)))
        assert isinstance(loss, Ours)
        return loss

    def _sum_over_ranks(self, of_rank: Callable[[int], Results]) -> Results:
        """This rank's results, with the dE of all; one rank's tensors at a time."""
        mine = of_rank(self._rank)
        if mine.input_grad is None:
            return mine
        total = torch.zeros_like(mine.input_grad, dtype=torch.float32)
        for rank in range(self._ranks):
            part = (mine if rank == self._rank else of_rank(rank)).input_grad
            assert part is not None
            total += part
        return replace(mine, input_grad=total)


def _interleaved(whole: Inputs, ranks: int) -> Inputs:
    """The same problem with the ids at their places."""
    ids = Interleaving(whole.weight.shape[0], ranks)
    order = ids.natural_ids(whole.weight.device)
    return replace(
        whole,
        weight=whole.weight[order],
        bias=whole.bias[order],
        target=ids.places(whole.target),
    )
