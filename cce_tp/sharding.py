"""Who owns which rows of the vocabulary, and every collective of the library.

Forward: one all-gather of the packed per-token statistics, merged in rank order, so that all
ranks hold the same bits. Backward, its counterpart: one all-reduce (sum) of dE. Under sequence
parallelism, where each rank has a slice of the tokens' hidden states, an all-gather at the start of
either pass, beside work on the rank's own tokens, and a reduce-scatter of dE in place of the
all-reduce. Nothing else in `cce_tp` calls torch.distributed.

Legend: N tokens, V_local vocabulary rows of this rank, W ranks of the group.
"""

from __future__ import annotations

import os
from collections.abc import Iterator
from dataclasses import dataclass, field
from typing import Any

import torch.distributed as dist
from torch import Tensor

from cce_tp import stats
from cce_tp.stats import StatRows

# Own tokens of a rank from which it begins with them while the others' come. Two or three launches
# in place of one: a guess at where they pay, measured at 1024 alone.
_FEW_TOKENS = 512
# What the tensor memory accelerator writes at a time, also where a matrix ends before (measured on
# an H200).
_UNIT_BYTES = 16


def debug_enabled() -> bool:
    """Whether CCE_TP_DEBUG=1 asks for a handshake and a check of the targets at every call."""
    return os.environ.get("CCE_TP_DEBUG", "0") == "1"


@dataclass(slots=True)
class _Group:
    """A process group that some VocabShard names, and what its ranks have already agreed on."""

    group: dist.ProcessGroup
    agreed: set[str] = field(default_factory=set)


# Operators take a group by name (torch.library has no process-group type).
_groups: dict[str, _Group] = {}


def _register(group: dist.ProcessGroup) -> str:
    name = group.group_name
    known = _groups.get(name)
    if (
        known is None or known.group is not group
    ):  # names are used again after destroy_process_group
        _groups[name] = _Group(group)
    return name


def _require_member(group: object) -> None:
    if not isinstance(group, dist.ProcessGroup):  # new_group gives others than its members no group
        raise ValueError(f"group: expected a ProcessGroup that this rank is in, got {group!r}")
    if dist.get_rank(group) < 0:
        raise ValueError("group: expected a ProcessGroup that this rank is in, got another one")


def _entry(name: str) -> _Group:
    if name not in _groups:
        # A shard that torch.compile made while tracing (of a DTensor) has not registered its group
        # yet. Functional collectives look it up so; torch has no public function for it.
        resolve: Any = getattr(dist.distributed_c10d, "_resolve_process_group")  # noqa: B009
        _register(resolve(name))
    return _groups[name]


@dataclass(frozen=True, slots=True)
class VocabShard:
    """The rows [start, stop) of a global vocabulary that this rank's weight holds.

    Attributes:
        start, stop: global ids; may be equal (an empty shard).
        vocab_size: global vocabulary size V. Shards of the group must tile [0, V) without gap or
            overlap, in any order of ranks; they may be uneven. Padding rows count as rows of the
            vocabulary.
        group: process group over which the vocabulary is split; any subset of ranks. None: no
            group, and the shard is the whole vocabulary.
        reduce_input_grad: sum dE over the group (all-reduce in dE's dtype). False leaves each
            rank's partial sum, for callers that reduce it themselves.
        sequence_parallel: `input` holds this rank's part of the tokens, one of W equal parts along
            the first dimension, in the order of the group's ranks; `target` and the loss have all
            of them. The whole is gathered for the forward pass and again for the backward pass, and
            not kept in between; dE is reduce-scattered.

    Raises:
        ValueError: bounds that are not 0 <= start <= stop <= vocab_size with vocab_size >= 1, or
            a part of the vocabulary without a group; sequence_parallel without a group or with
            reduce_input_grad=False.
    """

    start: int
    stop: int
    vocab_size: int
    group: dist.ProcessGroup | None = None
    reduce_input_grad: bool = field(default=True, kw_only=True)
    sequence_parallel: bool = field(default=False, kw_only=True)
    group_name: str = field(init=False, repr=False, default="")

    def __post_init__(self) -> None:
        for name in ("start", "stop", "vocab_size"):
            value = getattr(self, name)
            if isinstance(value, bool) or not isinstance(value, int):
                raise ValueError(f"{name}: expected an int, got {value!r}")
        if not 1 <= self.vocab_size < 2**31:
            raise ValueError(f"vocab_size: expected 1 <= vocab_size < 2**31, got {self.vocab_size}")
        if not 0 <= self.start <= self.stop <= self.vocab_size:
            raise ValueError(
                "start, stop: expected 0 <= start <= stop <= vocab_size, got "
                f"start={self.start}, stop={self.stop}, vocab_size={self.vocab_size}"
            )
        if self.sequence_parallel and (self.group is None or not self.reduce_input_grad):
            raise ValueError(
                "sequence_parallel: expected False without a process group or with "
                f"reduce_input_grad=False, got group={self.group!r}, "
                f"reduce_input_grad={self.reduce_input_grad}"
            )
        if self.group is None:
            if (self.start, self.stop) != (0, self.vocab_size):
                raise ValueError(
                    "group: part of a vocabulary needs a process group, got None for "
                    f"rows [{self.start}, {self.stop}) of {self.vocab_size}"
                )
            return
        _require_member(self.group)
        object.__setattr__(self, "group_name", _register(self.group))

    def __deepcopy__(self, memo: object) -> VocabShard:
        # A process group cannot be copied, and a shard cannot change: a copied model shares it.
        return self

    @property
    def num_rows(self) -> int:
        """Rows on this rank."""
        return self.stop - self.start

    @property
    def token_parts(self) -> int:
        """Into how many parts, one per rank, `input` is cut along its first dimension."""
        return self.group.size() if self.sequence_parallel and self.group is not None else 1

    @classmethod
    def even(cls, vocab_size: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """Contiguous shards in group-rank order, sizes differing by one at most; no collective."""
        if group is None:
            return cls(0, vocab_size, vocab_size)
        _require_member(group)
        world, rank = group.size(), group.rank()
        base, extra = divmod(vocab_size, world)
        start = rank * base + min(rank, extra)
        return cls(start, start + base + (rank < extra), vocab_size, group)

    @classmethod
    def from_rows(cls, local_rows: int, group: dist.ProcessGroup | None = None) -> VocabShard:
        """Contiguous shards in group-rank order from each rank's own row count.

        A collective: every rank of the group must call it. The counts are gathered on the host.

        Args:
            local_rows: rows this rank's weight holds; ranks may differ, and may hold none.
        """
        problem = None
        if isinstance(local_rows, bool) or not isinstance(local_rows, int) or local_rows < 0:
            problem = f"local_rows: expected an int >= 0, got {local_rows!r}"
        if group is None:
            if problem is not None:
                raise ValueError(problem)
            return cls(0, local_rows, local_rows)
        _require_member(group)
        answers: list[tuple[int, str | None]] = [(0, None)] * group.size()
        dist.all_gather_object(answers, (local_rows, problem), group=group)
        _raise_problems([message for _, message in answers])
        counts = [count for count, _ in answers]
        start = sum(counts[: group.rank()])
        return cls(start, start + local_rows, sum(counts), group)


def _raise_problems(problems: list[str | None]) -> None:
    """Raise the same ValueError on every rank if any rank of the group has a problem."""
    found = [f"{text} (rank {rank} of the group)" for rank, text in enumerate(problems) if text]
    if found:
        raise ValueError("; ".join(dict.fromkeys(found)))


@dataclass(frozen=True, slots=True)
class Agreement:
    """What one rank brings to the handshake.

    Attributes:
        shard: (start, stop, vocab_size) of this rank.
        terms: name=value pairs that must be equal on all ranks.
        num_tokens: N of this call.
        problem: text of a ValueError this rank found in its own arguments.
    """

    shard: tuple[int, int, int] | None
    terms: str
    num_tokens: int
    problem: str | None = None


# The numbers of a call that ranks must share, in the order in which an operator carries them.
AGREED_NUMBERS = (
    "input.shape[-1]",
    "ignore_index",
    "label_smoothing",
    "z_loss",
    "logit_scale",
    "logit_softcap",
    "grad_filter.eps",
    "grad_filter.budget",
)


def agreement_terms(vocab_size: int, terms: str, numbers: list[float]) -> str:
    """The terms of an Agreement as one text, "name=value; name=value"."""
    named = zip(AGREED_NUMBERS, numbers, strict=True)
    # The two zeros are one number, also to caches of options: either may come for the other.
    values = "; ".join(f"{name}={value + 0.0:.17g}" for name, value in named)
    return f"vocab_shard.vocab_size={vocab_size}; {terms}; {values}"


def _disagreement(offers: list[Agreement]) -> str | None:
    """Why the offers of a group's ranks do not fit together, or None."""
    first = offers[0].terms.split("; ")
    for rank, offer in enumerate(offers[1:], start=1):
        for mine, theirs in zip(first, offer.terms.split("; "), strict=True):
            if mine != theirs:
                name, _, value = mine.partition("=")
                return (
                    f"{name}: expected the same on every rank of the group, got {value} on rank 0 "
                    f"and {theirs.partition('=')[2]} on rank {rank}"
                )
        if offer.num_tokens != offers[0].num_tokens:
            return (
                "input: expected the same number of tokens on every rank of the group, got "
                f"{offers[0].num_tokens} on rank 0 and {offer.num_tokens} on rank {rank}"
            )
    shards = sorted(
        (offer.shard, rank) for rank, offer in enumerate(offers) if offer.shard is not None
    )
    position, vocab_size = 0, shards[0][0][2]
    for (start, stop, _), rank in shards:
        if start != position and start != stop:
            kind = "gap" if start > position else "overlap"
            return (
                f"vocab_shard: expected shards that tile [0, {vocab_size}), got a {kind} at id "
                f"{min(start, position)}: rank {rank} holds [{start}, {stop})"
            )
        position = max(position, stop)
    if position != vocab_size:
        return (
            f"vocab_shard: expected shards that tile [0, {vocab_size}), got no rank that holds ids "
            f"[{position}, {vocab_size})"
        )
    return None


def agree(group_name: str, offer: Agreement) -> None:
    """Handshake: when the group first meets these terms, check that all ranks mean one call.

    A rank with a problem of its own takes part if the group has not agreed on anything yet (or in
    debug mode), so that every rank raises; later nothing is exchanged, and the caller raises alone.

    Raises:
        ValueError: on every rank, naming the argument, what was expected and what came.
    """
    entry = _entry(group_name)
    # No rank's own bounds in it: the same on all ranks, so that either all take part or none.
    key = offer.terms
    if not debug_enabled():
        if offer.problem is None and key in entry.agreed:
            return
        if offer.problem is not None and entry.agreed:
            return
    offers: list[Agreement] = [offer] * entry.group.size()
    dist.all_gather_object(offers, offer, group=entry.group)
    _raise_problems([each.problem for each in offers])
    problem = _disagreement(offers)
    if problem is not None:
        raise ValueError(problem)
    entry.agreed.add(key)


# torch 2.13 renames these two.
_all_gather_whole: Any = getattr(dist, "all_gather_single", None) or dist.all_gather_into_tensor
_reduce_scatter_whole: Any = (
    getattr(dist, "reduce_scatter_single", None) or dist.reduce_scatter_tensor
)


def merge_over_group(packed_RN: Tensor, rows: StatRows, group_name: str) -> Tensor:
    """Join the ranks' packed statistics: one all-gather, merged in rank order on every rank.

    Args:
        packed_RN: (rows, N) of this rank's vocabulary rows.

    Returns:
        (rows, N) of the global vocabulary, the same bits on every rank.
    """
    return stats.merge(gather_statistics(packed_RN, group_name), rows)


def gather_statistics(packed_RN: Tensor, group_name: str) -> Tensor:
    """(rows, N) of each of W ranks -> (W, rows, N) on all."""
    group = _entry(group_name).group
    gathered_WRN = packed_RN.new_empty((group.size(), *packed_RN.shape))
    _all_gather_whole(gathered_WRN.flatten(0, 1), packed_RN.contiguous(), group=group)
    return gathered_WRN


def sum_over_group(local: Tensor, group_name: str) -> Tensor:
    """Sum of a small tensor over the ranks, the same bits on every rank."""
    dist.all_reduce(local, group=_entry(group_name).group)
    return local


class TokenGather:
    """The hidden states of all ranks' tokens, on their way from the moment it is made.

    Pairs with `InputGradReduction`.

    Attributes:
        whole: (N, D) in rank order, filled after `wait`.
        own: (start, stop) of this rank's tokens among all.
    """

    def __init__(self, local: Tensor, group_name: str) -> None:
        """
        Args:
            local: (N / W, D) of this rank, not to be written before `wait`.
            group_name: registered name.
        """
        group, count = _entry(group_name).group, local.shape[0]
        self._local, self.own = local, (group.rank() * count, (group.rank() + 1) * count)
        self.whole, self._work = self._enqueue(local, group)

    @staticmethod
    def _enqueue(local: Tensor, group: Any) -> tuple[Tensor, Any]:
        whole = local.new_empty((group.size() * local.shape[0], local.shape[1]))
        work = _all_gather_whole(whole, local.contiguous(), group=group, async_op=True)
        return whole, work

    def wait(self) -> None:
        """Make `whole` visible to the current stream."""
        if self._work is not None:
            self._work.wait()
            self._work = None

    def pieces(self, start: int = 0, stop: int | None = None) -> Iterator[tuple[int, int, Tensor]]:
        """(start, stop, hidden states) of this rank's own tokens among [start, stop), then of the
        others before and after them, for work that can begin with its own; or of all at once, where
        its own are few. Pieces begin and end at whole units of 16 bytes of a row of tokens, from
        `start` on, in the hidden states' dtype; own tokens in a broken unit go with the others.
        """
        stop = self.whole.shape[0] if stop is None else stop
        first, last = max(start, self.own[0]), min(stop, self.own[1])
        # G^T is written in whole units: what ended inside one would go over tokens that are done.
        unit = _UNIT_BYTES // self.whole.itemsize
        first = start + -(-(first - start) // unit) * unit
        if last < stop:
            last -= (last - start) % unit
        if last - first < _FEW_TOKENS or (first, last) == (start, stop):
            self.wait()
            yield start, stop, self.whole[start:stop]
            return
        yield first, last, self._local[first - self.own[0] : last - self.own[0]]
        self.wait()
        if start < first:
            yield start, first, self.whole[start:first]
        if last < stop:
            yield last, stop, self.whole[last:stop]


class InputGradReduction:
    """The sum of dE over the group, started as soon as dE is complete, beside what is left to do.

    Pairs with the replicated `input` of the forward pass (all-reduce, in place), or with
    `TokenGather` (reduce-scatter).
    """

    def __init__(self, partial: Tensor | None, out: Tensor | None, group_name: str) -> None:
        """
        Args:
            partial: (N, D) this rank's part of dE, to be filled before `start`; None with no group.
            out: (N / W, D) for this rank's tokens of the sum; None: `partial` takes the whole sum.
            group_name: registered name, or "" to leave the partial sum.
        """
        self._partial, self._out, self._group_name = partial, out, group_name
        self._work: Any = None

    def start(self) -> None:
        """Enqueue the collective, asynchronously."""
        if not self._group_name:
            return
        assert self._partial is not None
        group = _entry(self._group_name).group
        if self._out is None:
            self._work = dist.all_reduce(self._partial, group=group, async_op=True)
        else:
            self._work = _reduce_scatter_whole(self._out, self._partial, group=group, async_op=True)

    def wait(self) -> None:
        """Make the result visible to the current stream."""
        if self._work is not None:
            self._work.wait()
