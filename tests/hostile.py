"""Problems with values that break arithmetic, and what the library must make of them.

An output element must be finite where dense PyTorch's is, in fp64 and in the dtype of the
inputs, and must not be where neither is. Where the two disagree (a product that overflows in one of
them), where the terms of a sum overflow if their sizes are added up (one order of the sum has an
infinity then that another has not), or where a filter may leave a tile out, anything goes. Tokens
that do not count are left out of the dense sums: 0 * NaN is NaN there, and may be 0 here. What a
token without a finite loss adds to the gradients may be all NaN, where dense PyTorch has it in some
columns only.

Legend: N tokens, V global vocabulary, D hidden size.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from hypothesis import strategies as st
from torch import Tensor

from backward_passes import operands_as_they_are
from oracle import Operands, Outcome, dense
from problems import Bounds, Problem, call, join_shards
from ranks import RankPool
from sharding_cases import solve_sharded
from strategies import problems
from variants import DEVICE

VALUES = (
    *(float("nan"), float("inf"), -float("inf"), 1e30, -1e30, 3e38, 65504.0, 1e-40, -1e-45, 0.0),
    -0.0,
)
NAMES = ("input", "weight", "bias")
# Of logits larger than this the rounding alone changes the softmax: only the kind is compared.
_LARGEST_LOGIT = 300.0
_RTOL = 1e-4


@dataclass(frozen=True)
class Hostile:
    """A problem with single elements replaced.

    Attributes:
        problem: before that.
        pokes: (tensor's name, index into the flattened tensor, value); a negative index: all of it.
        same_target: every token has the first token's target.
        inside: on one rank, keep logits in dC as a GPU does by default, where that can be.
    """

    problem: Problem
    pokes: tuple[tuple[str, int, float], ...]
    same_target: bool = False
    inside: bool = False

    def __getattr__(self, name: str) -> Any:
        return getattr(object.__getattribute__(self, "problem"), name)

    def build(self, device: str = "cpu") -> Operands:
        """As Problem.build."""
        operands = self.problem.build("cpu")
        for name, index, value in self.pokes:
            tensor = getattr(operands, name)
            if tensor is not None and tensor.numel():
                flat = tensor.view(-1)
                # Through a tensor: 1e30 in fp16 is infinity then, not an error.
                number = torch.tensor(value, dtype=torch.float64).to(tensor.dtype)
                flat[slice(None) if index < 0 else index % tensor.numel()] = number
        if self.same_target and operands.target.numel():
            operands.target.fill_(operands.target.flatten()[0])
        moved = {n: getattr(operands, n) for n in (*NAMES, "target", "upstream")}
        return Operands(**{n: t if t is None else t.to(device) for n, t in moved.items()})


@st.composite
def hostile_problems(draw: st.DrawFn, impl: str, *, largest: tuple[int, int, int]) -> Hostile:
    """Any problem, with up to four pokes: elements, or a whole tensor."""
    from cce_tp import GradFilter

    problem = draw(problems(impl, largest=largest))
    options = {k: v for k, v in problem.options.items() if k != "return_stats"}
    chosen = draw(st.sampled_from([None, None, GradFilter.paper(), GradFilter.paper(2.0**-6)]))
    if chosen is not None:
        options["grad_filter"] = chosen
    problem = replace(problem, zero_upstream=False, options=options)
    where = st.sampled_from(NAMES if problem.bias else NAMES[:2])
    index = st.one_of(st.integers(0, 2**20), st.integers(0, 2**20), st.just(-1))
    poke = st.tuples(where, index, st.sampled_from(VALUES))
    pokes = tuple(draw(st.lists(poke, max_size=4)))
    return Hostile(problem, pokes, draw(st.booleans()), draw(st.booleans()))


def _oracles(operands: Operands, options: Mapping[str, Any], dtype: torch.dtype) -> list[Outcome]:
    return [dense(operands, options, dtype=dt) for dt in (torch.float64, dtype)]


def _counting(operands: Operands, options: Mapping[str, Any]) -> tuple[Operands, Tensor]:
    """The tokens that count, flattened, and which they are, (N,) bool."""
    hidden = operands.input.shape[-1]
    target = operands.target.reshape(-1)
    counts = target != options.get("ignore_index", -100)
    upstream = operands.upstream
    if options.get("reduction") == "none":
        upstream = upstream.reshape(-1)[counts]
    input = operands.input.reshape(-1, hidden)[counts]
    return replace(operands, input=input, target=target[counts], upstream=upstream), counts


def expectations(
    operands: Operands, options: Mapping[str, Any], dtype: torch.dtype
) -> dict[str, tuple[Tensor, Tensor, Tensor]]:
    """name -> (must be finite, must not be, fp64 value), each of the output's shape."""
    options = {k: v for k, v in options.items() if k != "grad_filter"}
    part, counts = _counting(operands, options)
    whole, some = _oracles(operands, options, dtype), _oracles(part, options, dtype)
    ones = torch.ones(operands.target.shape, device=operands.target.device)
    each = _oracles(replace(operands, upstream=ones), {**options, "reduction": "none"}, dtype)
    limit = torch.finfo(torch.promote_types(dtype, torch.float32)).max
    fits = (_logit_sizes(operands, options) <= limit).all(dim=1).view(operands.target.shape)
    sound = torch.stack([o.loss.isfinite() for o in each]).all(0) & fits
    found = {}
    for name in ("loss", "grad_input", "grad_weight", "grad_bias"):
        if getattr(whole[0], name) is None:
            continue
        finite = torch.stack([getattr(o, name).isfinite() for o in whole]).all(0)
        if name == "loss":
            finite = finite & (fits if finite.shape == fits.shape else fits.all())
        else:
            finite = finite & (getattr(whole[0], name.replace("grad", "magnitude")) <= limit)
            finite = finite & (sound.unsqueeze(-1) if name == "grad_input" else sound.all())
        broken = torch.stack([~getattr(o, name).isfinite() for o in some]).all(0)
        value = getattr(some[0], name)
        if broken.shape != finite.shape:  # per token: those that do not count are 0
            shape = finite.shape
            rows = counts.numel()
            spread = torch.zeros(rows, *broken.shape[1:], dtype=torch.bool, device=broken.device)
            spread[counts] = broken
            numbers = torch.zeros(rows, *value.shape[1:], dtype=value.dtype, device=value.device)
            numbers[counts] = value
            broken, value = spread.view(shape), numbers.view(shape)
            if name == "loss":  # 0 whatever the dense one says; dE may be 0 * NaN
                finite = finite | ~counts.view(operands.target.shape)
        found[name] = (finite, broken, value)
    return found


def _logit_sizes(operands: Operands, options: Mapping[str, Any]) -> Tensor:
    """(N, V) fp64 sums of the sizes of what a logit before its cap is summed from, where finite."""

    def sizes(tensor: Tensor) -> Tensor:
        return torch.where(tensor.isfinite(), tensor, 0.0).double().abs()

    x = sizes(operands.input).reshape(-1, operands.input.shape[-1]) @ sizes(operands.weight).t()
    if operands.bias is not None:
        x = x + sizes(operands.bias)
    return x * max(1.0, abs(options.get("logit_scale", 1.0)))


def _largest_logit(operands: Operands, options: Mapping[str, Any]) -> float:
    from oracle import dense_logits

    flat = operands.input.reshape(-1, operands.input.shape[-1]).double()
    bias = None if operands.bias is None else operands.bias.double()
    x = dense_logits(flat, operands.weight.double(), bias, {**options, "logit_softcap": None})
    finite = x[x.isfinite()].abs()
    return finite.max().item() if finite.numel() else 0.0


def check_outcome(hostile: Hostile, operands: Operands, outcome: Outcome) -> None:
    """Hold one answer over the whole vocabulary against the dense ones."""
    options, dtype = hostile.problem.options, hostile.problem.dtype
    tame = _largest_logit(operands, options) < _LARGEST_LOGIT
    exact = "grad_filter" not in options and dtype in (torch.float32, torch.float64)
    filtered = "grad_filter" in options
    for name, (finite, broken, value) in expectations(operands, options, dtype).items():
        got = getattr(outcome, name)
        assert got.shape == finite.shape, name
        wrong = finite & ~got.isfinite()
        assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} elements are not finite"
        if filtered and name != "loss":
            # A tile left out adds nothing; but a token without a finite loss is never left out.
            continue
        wrong = broken & got.isfinite()
        assert not bool(wrong.any()), f"{name}: {int(wrong.sum())} elements hide NaN or infinity"
        if tame and exact:
            error = (
                torch.where(finite & ~broken, got.double() - value, 0.0).abs().max().item()
                if got.numel()
                else 0.0
            )
            size = (
                torch.where(value.isfinite(), value, 0.0).abs().max().item() if got.numel() else 0
            )
            scale = _scale(operands)
            assert error <= _RTOL * (size + scale), f"{name}: error {error:.2e} of {size:.2e}"


def _scale(operands: Operands) -> float:
    """What the terms that cancel may be as large as."""
    parts = [t for t in (operands.input, operands.weight, operands.upstream) if t.numel()]
    largest = [t[t.isfinite()].abs().max().item() for t in parts if bool(t.isfinite().any())]
    return max([1.0, *largest]) * max(1, operands.target.numel())


def check_hostile(pool: RankPool, hostile: Hostile, bounds: Bounds) -> list[Outcome]:
    """Over the ranks of `bounds`; also: equal bits on all of them, of what all must hold."""
    outcomes = solve_sharded(pool, hostile, bounds)  # type: ignore[arg-type]
    check_outcome(hostile, hostile.build(), join_shards(outcomes, bounds))
    return outcomes


def check_alone(hostile: Hostile) -> None:
    """On one rank."""
    operands = hostile.build(DEVICE)
    options = {**hostile.problem.options, "impl": hostile.problem.impl}
    if hostile.inside:
        options["keep_logits_in_grad"] = None
    with operands_as_they_are():
        outcome = call(operands, options)
    check_outcome(hostile, operands, outcome)
