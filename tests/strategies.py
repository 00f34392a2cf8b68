"""Hypothesis strategies for problems, shards and options."""

from __future__ import annotations

from itertools import pairwise
from typing import Any

import torch
from hypothesis import HealthCheck, settings
from hypothesis import strategies as st

from problems import Bounds, Problem
from ranks import WORKERS
from variants import HAS_CUDA

# New examples in every run; a failure prints how to repeat it.
PROPERTY = settings(
    deadline=None,
    derandomize=False,
    print_blob=True,
    database=None,
    suppress_health_check=[HealthCheck.too_slow, HealthCheck.data_too_large],
)

_DTYPES = {
    "torch": [torch.float32, torch.float64, torch.float16, torch.bfloat16],
    "triton": [torch.float32, torch.float16] + ([torch.bfloat16] if HAS_CUDA else []),
}


def _decimals(low: float, high: float) -> st.SearchStrategy[float]:
    """Numbers that fp32 can tell from 0 and from the bounds."""
    return st.floats(low, high).map(lambda value: round(value, 4))


@st.composite
def loss_options(draw: st.DrawFn, vocab: int) -> dict[str, Any]:
    """Options of the loss; each one is absent about half of the time."""
    values: dict[str, st.SearchStrategy[Any]] = {
        "reduction": st.sampled_from(["none", "mean", "sum"]),
        "ignore_index": st.sampled_from([-100, -1, 0, vocab - 1, vocab, 2**33]),
        "label_smoothing": _decimals(0.0, 0.99),
        "z_loss": _decimals(0.0, 0.1),
        "logit_scale": _decimals(-4.0, 4.0),
        "logit_softcap": _decimals(0.5, 100.0),
        "return_stats": st.sampled_from([True, "entropy"]),
    }
    return {name: draw(value) for name, value in values.items() if draw(st.booleans())}


@st.composite
def problems(draw: st.DrawFn, impl: str, *, largest: tuple[int, int, int]) -> Problem:
    """A problem of at most `largest` = (N, V, D); edge sizes 0 and 1 are common."""
    vocab = draw(st.integers(1, largest[1]))
    shape = draw(st.sampled_from(["flat", "flat", "two"]))
    tokens: tuple[int, ...] = (draw(st.integers(0, largest[0])),)
    if shape == "two":
        tokens = (draw(st.integers(0, 3)), draw(st.integers(0, largest[0] // 3)))
    return Problem(
        tokens=tokens,
        vocab=vocab,
        hidden=draw(st.integers(1, largest[2])),
        # fp32 half of the time: its tolerance is the sharpest that both implementations have.
        dtype=draw(st.sampled_from([torch.float32] * len(_DTYPES[impl]) + _DTYPES[impl])),
        impl=impl,
        bias=draw(st.booleans()),
        seed=draw(st.integers(0, 2**31 - 1)),
        ignored=draw(st.sampled_from([0.0, 0.2, 0.9, 1.0])),
        spread=draw(st.sampled_from([0.0, 0.1, 1.0, 4.0])),
        options=draw(loss_options(vocab)),
    )


@st.composite
def shards(draw: st.DrawFn, vocab: int) -> Bounds:
    """Cuts of [0, vocab) for 1 to 4 ranks, in any order, some of them empty."""
    ranks = draw(st.integers(1, min(4, WORKERS)))
    cuts = sorted(draw(st.integers(0, vocab)) for _ in range(ranks - 1))
    edges = [0, *cuts, vocab]
    bounds = list(pairwise(edges))
    return draw(st.permutations(bounds))
