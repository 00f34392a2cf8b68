"""The implementations that are compared, behind one signature, and what each can be asked.

`TABLE` holds one entry per name of `catalogue.IMPLEMENTATIONS`. An entry's `build` imports what it
needs and returns a function from `Operands` to the mean loss; what is not installed, not
implemented or cannot do what is asked raises `NotAvailable` with the reason.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

import os
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from cce_tp import GradFilter, LinearCrossEntropyLoss, LossStats, VocabShard
from launch.benchmark import peers
from launch.benchmark.catalogue import IMPLEMENTATIONS, Options
from launch.benchmark.peers import NotAvailable, Operands, Problem

_DENSE_OPTIONS = frozenset({"bias", "softcap", "z_loss", "label_smoothing"})
_OVER_RANKS: dict[str, Any] = {"sharded": True, "sequence_parallel": True}
_ALL_OPTIONS = _DENSE_OPTIONS | {"statistics", "grad_weight_out"}


@dataclass(frozen=True, slots=True)
class Implementation:
    """One way to compute the loss.

    Attributes:
        build: (problem) -> function of `Operands`.
        package: distribution whose version is recorded beside torch's.
        options: names of `Options` that it takes.
        exact: computes every element of the gradient; decides the limit of the gate.
        sharded: takes a vocabulary that is split over a group.
        sequence_parallel: and then also hidden states of a part of the tokens on each rank.
        cuda: needs a CUDA device.
        compiled: torch.compile makes code for one set of sizes; a case starts without the code of
            others, which would be for sizes that vary, or none at all once they are many.
    """

    build: Callable[[Problem], Callable[[Operands], Tensor]]
    package: str
    options: frozenset[str] = frozenset()
    exact: bool = True
    sharded: bool = False
    sequence_parallel: bool = False
    cuda: bool = False
    compiled: bool = False

    @property
    def ours(self) -> bool:
        """Whether it is this library, whose collectives can be replaced."""
        return self.package == "cce-tp"

    def prepare(self, problem: Problem) -> Callable[[Operands], Tensor]:
        """Build it for a problem.

        Raises:
            NotAvailable: with the reason.
        """
        for name in problem.options.asked():
            if name not in self.options:
                raise NotAvailable(f"has no option {name}")
        if problem.group is not None and not self.sharded:
            raise NotAvailable("takes no vocabulary that is split over ranks")
        if problem.sequence_parallel and not self.sequence_parallel:
            raise NotAvailable("takes no tokens that are split over ranks")
        if problem.rows is not None and not self.ours:
            raise NotAvailable("has collectives that one process cannot play")
        loss = self.build(problem)
        if self.cuda and problem.device.type != "cuda":
            raise NotAvailable("needs a CUDA device")
        return loss


def _shard(problem: Problem) -> VocabShard | None:
    if problem.rows is not None:
        # The sum of dE is nothing to a rank's own work, so it keeps its part.
        start, stop = problem.rows
        return VocabShard(start, stop, problem.vocab, problem.some_group(), reduce_input_grad=False)
    if problem.group is None:
        return None
    even = VocabShard.even(problem.vocab, problem.group)
    return replace(even, sequence_parallel=problem.sequence_parallel)


@dataclass(frozen=True, slots=True)
class Ours:
    """This library's loss."""

    loss: LinearCrossEntropyLoss

    def __call__(self, operands: Operands) -> Tensor:
        """The mean loss."""
        answer = self._call(operands, self.loss)
        return answer[0] if isinstance(answer, tuple) else answer

    def statistics(self, operands: Operands) -> LossStats:
        """Of the logits, whether they are asked for or not."""
        options = {**self.loss.options, "return_stats": True}
        loss = LinearCrossEntropyLoss(vocab_shard=self.loss.vocab_shard, **options)
        return self._call(operands, loss)[1]

    @staticmethod
    def _call(operands: Operands, loss: LinearCrossEntropyLoss) -> Any:
        return loss(
            operands.input,
            operands.weight,
            operands.target,
            linear_bias=operands.bias,
            grad_weight_out=operands.grad_weight_out,
        )


def _ours(make_filter: Callable[[], GradFilter]) -> Callable[[Problem], Ours]:
    def build(problem: Problem) -> Ours:
        options = problem.options
        cap, chosen = options.workspace_mib, make_filter()
        if options.keep_logits_mib > 0 and chosen.kind != "exact":
            raise NotAvailable("a size of logits is kept with the exact filter alone")
        if options.keep_logits_in_grad and chosen.kind == "paper":
            raise NotAvailable("the paper's filter keeps no logits")
        try:
            loss = LinearCrossEntropyLoss(
                vocab_shard=_shard(problem),
                grad_filter=chosen,
                label_smoothing=options.label_smoothing,
                z_loss=options.z_loss,
                logit_softcap=options.softcap,
                return_stats=options.statistics,
                workspace_bytes=None if cap is None else int(cap * 2**20),
                keep_logits_bytes=int(options.keep_logits_mib * 2**20),
                keep_logits_in_grad=options.keep_logits_in_grad,
            )
        except NotImplementedError as error:
            raise NotAvailable(str(error)) from error
        return Ours(loss)

    return build


def _dense(options: Options, upcast: bool) -> Callable[[Operands], Tensor]:
    def call(operands: Operands) -> Tensor:
        logits = F.linear(operands.input, operands.weight, operands.bias)
        if upcast:
            logits = logits.float()
        if options.softcap is not None:
            logits = torch.tanh(logits / options.softcap) * options.softcap
        loss = F.cross_entropy(logits, operands.target, label_smoothing=options.label_smoothing)
        if options.z_loss:
            loss = loss + options.z_loss * logits.logsumexp(1).square().mean()
        return loss

    return call


def _eager(problem: Problem) -> Callable[[Operands], Tensor]:
    return _dense(problem.options, upcast=False)


def _eager_fp32(problem: Problem) -> Callable[[Operands], Tensor]:
    return _dense(problem.options, upcast=True)


def _compiled(problem: Problem) -> Callable[[Operands], Tensor]:
    if os.environ.get("TORCHDYNAMO_DISABLE", "0") == "1":
        raise NotAvailable("TORCHDYNAMO_DISABLE=1 makes torch.compile do nothing")
    return torch.compile(_dense(problem.options, upcast=True), dynamic=False)


def _linear_ce(problem: Problem) -> Callable[[Operands], Tensor]:
    del problem
    function: Any = getattr(F, "linear_cross_entropy", None)
    options: Any = getattr(torch.nn, "LinearCrossEntropyOptions", None)
    if function is None or options is None:
        raise NotAvailable(f"not in torch {torch.__version__}, which has no linear_cross_entropy")
    chunked = options()

    def call(operands: Operands) -> Tensor:
        return function(
            operands.input,
            operands.weight,
            operands.target,
            linear_bias=operands.bias,
            options=chunked,
        )

    return call


TABLE: dict[str, Implementation] = {
    "cce-tp-exact": Implementation(
        _ours(GradFilter.exact), "cce-tp", options=_ALL_OPTIONS, **_OVER_RANKS
    ),
    "cce-tp-paper": Implementation(
        _ours(GradFilter.paper), "cce-tp", options=_ALL_OPTIONS, exact=False, **_OVER_RANKS
    ),
    "cce-tp-far-field": Implementation(
        _ours(GradFilter.far_field), "cce-tp", options=_ALL_OPTIONS, exact=False, **_OVER_RANKS
    ),
    "torch-eager": Implementation(_eager, "torch", options=_DENSE_OPTIONS),
    "torch-eager-fp32": Implementation(_eager_fp32, "torch", options=_DENSE_OPTIONS),
    "torch-compiled": Implementation(_compiled, "torch", options=_DENSE_OPTIONS, compiled=True),
    "torch-linear-ce": Implementation(_linear_ce, "torch", options=frozenset({"bias"})),
    "megatron-unfused": Implementation(
        peers.megatron_unfused,
        "megatron-core",
        options=frozenset({"bias", "label_smoothing"}),
        **_OVER_RANKS,
    ),
    "megatron-native": Implementation(
        peers.megatron_native,
        "megatron-core",
        options=frozenset({"bias"}),
        compiled=True,
        **_OVER_RANKS,
    ),
    "apple-cce": Implementation(
        peers.apple_cce,
        "cut-cross-entropy",
        options=frozenset({"softcap"}),
        exact=False,
        sharded=True,
        cuda=True,
    ),
    "apple-cce-exact": Implementation(
        peers.apple_cce_exact,
        "cut-cross-entropy",
        options=frozenset({"softcap"}),
        sharded=True,
        cuda=True,
    ),
    "liger": Implementation(peers.liger, "liger-kernel", options=_DENSE_OPTIONS, cuda=True),
    "liger-logits": Implementation(
        peers.liger_logits,
        "liger-kernel",
        options=frozenset({"bias", "label_smoothing"}),
        cuda=True,
        **_OVER_RANKS,
    ),
    "liger-tp": Implementation(peers.liger_tp, "liger-kernel", sharded=True, cuda=True),
    "te": Implementation(
        peers.transformer_engine,
        "transformer-engine",
        options=frozenset({"bias", "label_smoothing"}),
        cuda=True,
    ),
}
assert tuple(TABLE) == tuple(IMPLEMENTATIONS)
