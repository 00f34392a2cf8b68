"""Other projects' losses behind the benchmark's signature. Each is imported when it is built.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows of this rank.
"""

from __future__ import annotations

import importlib
import inspect
import warnings
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from launch.benchmark.catalogue import Options


class NotAvailable(Exception):
    """This implementation cannot be measured here; the text says why."""


@dataclass(frozen=True, slots=True)
class Problem:
    """What an implementation is built for.

    Attributes:
        vocab: V; that of the rows held here where there is no group.
        options: of the loss.
        device: of the tensors.
        group: process group over which the vocabulary is split evenly, or None.
        own_group: makes a process group of this rank alone, for what takes no None.
        sequence_parallel: every rank holds an equal part of the tokens' hidden states.
        rows: [start, stop) of a rank that this process plays, whose collectives are replaced; or
            None.
    """

    vocab: int
    options: Options
    device: torch.device
    group: Any
    own_group: Callable[[], Any]
    sequence_parallel: bool = False
    rows: tuple[int, int] | None = None

    def some_group(self) -> Any:
        """The group, or one of this rank alone."""
        return self.group if self.group is not None else self.own_group()


@dataclass(slots=True)
class Operands:
    """Tensors of one call.

    Attributes:
        input: (N, D), or (N / W, D) of each of W ranks under sequence parallelism.
        weight: (V_local, D).
        target: (N,) int64 global ids.
        bias: (V_local,) or None.
        grad_weight_out: (V_local, D) fp32, where dC is added to it; or None.
    """

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor | None = None
    grad_weight_out: Tensor | None = None


Loss = Callable[[Operands], Tensor]


def _load(module: str, package: str) -> Any:
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            return importlib.import_module(module)
    except Exception as error:  # a package that is there may fail in its own ways
        missing = isinstance(error, ModuleNotFoundError)
        reason = "is not installed" if missing else "cannot be imported"
        line = str(error).splitlines()[0] if str(error) else type(error).__name__
        raise NotAvailable(f"{package} {reason}: {line}") from error


def _megatron(problem: Problem, loss: Callable[[Tensor, Tensor, Any], Tensor]) -> Loss:
    """Megatron's product, whose backward pass reduces dE beside that of dC, and a loss."""
    layers = _load("megatron.core.tensor_parallel.layers", "megatron-core")
    product = layers.linear_with_grad_accumulation_and_async_allreduce
    group, parts = problem.some_group(), problem.sequence_parallel
    if parts:
        if problem.device.type != "cuda":
            raise NotAvailable("gathers the tokens on a CUDA device")
        state = _load("megatron.core.parallel_state", "megatron-core")
        if state._GLOBAL_MEMORY_BUFFER is None:  # where it gathers the tokens
            state._set_global_memory_buffer()
    if problem.vocab % group.size():
        raise NotAvailable(f"cuts a vocabulary evenly, {problem.vocab} not over {group.size()}")

    def call(operands: Operands) -> Tensor:
        # (s, b, h) with s = N and b = 1.
        logits = product(
            operands.input[:, None],
            operands.weight,
            operands.bias,
            gradient_accumulation_fusion=False,
            allreduce_dgrad=group.size() > 1 and not parts,
            sequence_parallel=parts,
            tp_group=group,
        )
        return loss(logits, operands.target[:, None], group).mean()

    return call


def megatron_unfused(problem: Problem) -> Loss:
    """vocab_parallel_cross_entropy, which takes its group as an argument since release 0.17."""
    module = _load("megatron.core.tensor_parallel.cross_entropy", "megatron-core")
    state = _load("megatron.core.parallel_state", "megatron-core")
    function = module.vocab_parallel_cross_entropy
    smoothing = problem.options.label_smoothing
    if "tp_group" in inspect.signature(function).parameters:
        return _megatron(
            problem,
            lambda logits, target, group: function(logits, target, smoothing, tp_group=group),
        )

    def through_state(logits: Tensor, target: Tensor, group: Any) -> Tensor:
        before = state._TENSOR_MODEL_PARALLEL_GROUP
        state._TENSOR_MODEL_PARALLEL_GROUP = group
        try:
            return function(logits, target, smoothing)
        finally:
            state._TENSOR_MODEL_PARALLEL_GROUP = before

    return _megatron(problem, through_state)


def megatron_native(problem: Problem) -> Loss:
    """fused_vocab_parallel_cross_entropy."""
    module = _load("megatron.core.fusions.fused_cross_entropy", "megatron-core")
    return _megatron(problem, module.fused_vocab_parallel_cross_entropy)


def _apple(problem: Problem, **how: Any) -> Loss:
    module = _load("cut_cross_entropy", "cut-cross-entropy")
    softcap = problem.options.softcap
    if problem.group is not None:
        # Not in all releases.
        shards = getattr(module, "VocabParallelOptions", None)
        if shards is None:
            raise NotAvailable("this release takes no vocabulary that is split over ranks")
        how["vocab_parallel_options"] = shards.from_vocab(problem.vocab, problem.group)

    def call(operands: Operands) -> Tensor:
        return module.linear_cross_entropy(
            operands.input, operands.weight, operands.target, softcap=softcap, **how
        )

    return call


def apple_cce(problem: Problem) -> Loss:
    """With the filter that is its default."""
    return _apple(problem)


def apple_cce_exact(problem: Problem) -> Loss:
    """Without a filter."""
    return _apple(problem, filter_eps=None)


def liger(problem: Problem) -> Loss:
    """LigerFusedLinearCrossEntropyLoss; its forward pass makes the gradients as well."""
    module = _load("liger_kernel.transformers.fused_linear_cross_entropy", "liger-kernel")
    loss = module.LigerFusedLinearCrossEntropyLoss(
        lse_square_scale=problem.options.z_loss,
        label_smoothing=problem.options.label_smoothing,
        softcap=problem.options.softcap,
    )
    return lambda operands: loss(operands.weight, operands.input, operands.target, operands.bias)


def liger_logits(problem: Problem) -> Loss:
    """LigerVocabParallelCrossEntropy on the logits that Megatron's product makes."""
    module = _load("liger_kernel.transformers.vocab_parallel_cross_entropy", "liger-kernel")
    loss = module.LigerVocabParallelCrossEntropy(label_smoothing=problem.options.label_smoothing)
    return _megatron(problem, loss)


def liger_tp(problem: Problem) -> Loss:
    """liger_fused_linear_scaled_cross_entropy_tp, which chooses its kernels itself."""
    module = _load("liger_kernel.transformers.functional", "liger-kernel")
    function = getattr(module, "liger_fused_linear_scaled_cross_entropy_tp", None)
    if function is None:
        raise NotAvailable("this release takes no vocabulary that is split over ranks")
    group = problem.some_group()
    if problem.vocab % group.size():
        raise NotAvailable(f"cuts a vocabulary evenly, {problem.vocab} not over {group.size()}")
    return lambda operands: function(operands.input, operands.weight, operands.target, group).mean()


def transformer_engine(problem: Problem) -> Loss:
    """parallel_cross_entropy on logits that PyTorch makes."""
    module = _load("transformer_engine.pytorch.cross_entropy", "transformer-engine")
    smoothing = problem.options.label_smoothing

    def call(operands: Operands) -> Tensor:
        logits = F.linear(operands.input, operands.weight, operands.bias)
        # By position: older releases offer a Function.apply, which takes no names.
        loss = module.parallel_cross_entropy(logits[None], operands.target[None], smoothing, False)
        return loss.mean()

    return call
