"""Problems by description: what to multiply, with which options, and the library's answer.

A `Problem` is small and picklable; every rank builds the same tensors from it.

Legend: N tokens, V global vocabulary, V_local rows of a rank, D hidden size.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, fields, replace
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

import cce_tp
from oracle import Operands, Outcome, dense
from tolerance import check_outcome

Bounds = list[tuple[int, int]]

# The interpreter's tiles are 32 tokens x 64 rows x 32 deep: several ragged tiles each way.
RAGGED = {"tokens": (71,), "vocab": 203, "hidden": 40}


@dataclass(frozen=True, kw_only=True)
class Problem:
    """One call of the loss over the whole vocabulary.

    Attributes:
        tokens: leading dims of input and target.
        vocab, hidden: V and D.
        dtype: of input, weight and bias.
        impl: "torch" or "triton".
        bias: whether there is a bias.
        seed: of the random numbers.
        ignored: share of the tokens whose target is ignore_index.
        spread: standard deviation of the logits, before scale and cap.
        zero_upstream: whether some of the upstream gradients of reduction "none" are 0.
        options: keyword arguments of `linear_cross_entropy` that define the loss, and return_stats.
    """

    tokens: tuple[int, ...] = (71,)
    vocab: int = 203
    hidden: int = 40
    dtype: torch.dtype = torch.float32
    impl: str = "torch"
    bias: bool = False
    seed: int = 0
    ignored: float = 0.2
    spread: float = 2.0
    zero_upstream: bool = True
    options: Mapping[str, Any] = field(default_factory=dict)

    @property
    def num_tokens(self) -> int:
        return math.prod(self.tokens)

    def build(self, device: str = "cpu") -> Operands:
        """The same numbers on every device and every rank."""
        random = torch.Generator().manual_seed(self.seed)

        def normal(*shape: int) -> Tensor:
            return torch.randn(shape, generator=random)

        target = torch.randint(0, self.vocab, self.tokens, generator=random)
        skip = torch.rand(self.tokens, generator=random) < self.ignored
        target = torch.where(skip, self.options.get("ignore_index", -100), target)
        upstream = torch.tensor(1.0)
        if self.options.get("reduction") == "none":
            upstream = normal(*self.tokens)
            if self.zero_upstream:
                upstream = torch.where(
                    torch.rand(self.tokens, generator=random) < 0.2, 0.0, upstream
                )
        size = self.spread / math.sqrt(self.hidden)
        return Operands(
            input=normal(*self.tokens, self.hidden).to(device, self.dtype),
            weight=(size * normal(self.vocab, self.hidden)).to(device, self.dtype),
            bias=normal(self.vocab).to(device, self.dtype) if self.bias else None,
            target=target.to(device),
            upstream=upstream.to(device),
        )


def call(
    operands: Operands,
    options: Mapping[str, Any],
    *,
    requires_grad: tuple[bool, bool, bool] = (True, True, True),
) -> Outcome:
    """Call the library and its backward pass.

    Args:
        operands: of this rank (the weight may be a shard).
        options: every keyword argument but the bias. Logits are kept in the memory of dC where it
            says so, not by default: on a GPU as on a CPU, so that tests mean the same on both.
        requires_grad: for input, weight, bias.
    """
    leaves: list[Tensor | None] = []
    for tensor, wants in zip(
        (operands.input, operands.weight, operands.bias), requires_grad, strict=True
    ):
        leaves.append(None if tensor is None else tensor.detach().requires_grad_(wants))
    input, weight, bias = leaves
    options = {"keep_logits_in_grad": False, **options}
    answer = cce_tp.linear_cross_entropy(
        input, weight, operands.target, linear_bias=bias, **options
    )
    loss, stats = answer if isinstance(answer, tuple) else (answer, None)
    if loss.requires_grad:
        loss.backward(operands.upstream.to(loss.dtype))
    return Outcome(
        loss=loss.detach(),
        grad_input=None if input is None else input.grad,
        grad_weight=None if weight is None else weight.grad,
        grad_bias=None if bias is None else bias.grad,
        **({} if stats is None else per_token(stats)),
    )


def per_token(stats: cce_tp.LossStats) -> dict[str, Any]:
    """Those statistics that an Outcome has."""
    known = {field.name for field in fields(Outcome)}
    return {name: value for name, value in stats._asdict().items() if name in known}


def solve(problem: Problem, device: str = "cpu", **more: Any) -> Outcome:
    """The library's answer on one rank."""
    return call(problem.build(device), {**problem.options, "impl": problem.impl, **more})


def expect(operands: Operands, problem: Problem) -> tuple[Outcome, Outcome | None]:
    """(oracle, PyTorch's own path for 16-bit dtypes or None)."""
    native = None
    if problem.dtype in (torch.float16, torch.bfloat16):
        native = dense(operands, problem.options, dtype=problem.dtype)
    return dense(operands, problem.options), native


def check(problem: Problem, device: str = "cpu", **more: Any) -> Outcome:
    """Solve on one rank and hold everything against the oracle. Returns the library's outcome."""
    operands = problem.build(device)
    outcome = call(operands, {**problem.options, "impl": problem.impl, **more})
    expected, native = expect(operands, problem)
    check_outcome(outcome, expected, problem.dtype, native=native)
    check_ignored(operands, outcome, problem.options)
    return outcome


def check_ignored(operands: Operands, outcome: Outcome, options: Mapping[str, Any]) -> None:
    """An ignored token has loss and gradient exactly 0; so has one whose upstream gradient is 0."""
    ignored = operands.target == options.get("ignore_index", -100)
    if options.get("reduction") == "none":
        assert bool((outcome.loss[ignored] == 0).all()), "loss of an ignored token is not 0"
        ignored = ignored | (operands.upstream == 0)
    if outcome.grad_input is not None:
        assert bool((outcome.grad_input[ignored] == 0).all()), "gradient of an ignored token"


def even_bounds(vocab: int, ranks: int) -> Bounds:
    """Shards in rank order whose sizes differ by at most one."""
    cuts = [vocab * rank // ranks for rank in range(ranks + 1)]
    return list(pairwise(cuts))


def restrict(operands: Operands, start: int, stop: int) -> Operands:
    """What the rank that holds rows [start, stop) passes to the library."""
    return replace(
        operands,
        weight=operands.weight[start:stop],
        bias=None if operands.bias is None else operands.bias[start:stop],
    )


def join_shards(outcomes: list[Outcome], bounds: Bounds) -> Outcome:
    """One outcome over the whole vocabulary from all ranks'; checks what must be equal bits."""
    first = outcomes[0]
    for rank, other in enumerate(outcomes[1:], start=1):
        for name in ("loss", "lse", "target_logit", "max_logit", "argmax", "entropy", "grad_input"):
            mine, theirs = getattr(first, name), getattr(other, name)
            assert same_bits(mine, theirs), f"{name}: rank {rank} differs from rank 0"
    order = sorted(range(len(bounds)), key=lambda rank: bounds[rank])

    def cat(pick: Callable[[Outcome], Tensor | None]) -> Tensor | None:
        parts = [pick(outcomes[rank]) for rank in order]
        return None if parts[0] is None else torch.cat([part for part in parts if part is not None])

    return replace(
        first,
        grad_weight=cat(lambda outcome: outcome.grad_weight),
        grad_bias=cat(lambda outcome: outcome.grad_bias),
    )


def same_bits(a: Tensor | None, b: Tensor | None) -> bool:
    """Equal shape, dtype and bits (NaN equals the same NaN); None equals None."""
    if a is None or b is None:
        return a is b
    if a.shape != b.shape or a.dtype != b.dtype:
        return False
    integers = {1: torch.uint8, 2: torch.int16, 4: torch.int32, 8: torch.int64}
    kind = integers[a.element_size()]
    return torch.equal(a.contiguous().view(kind), b.contiguous().view(kind))
