"""Ranks with a GPU each, over NCCL, at a size at which communication and kernels overlap.

Run with CCE_TP_TEST_BACKEND=nccl (see `ranks`); the small tests of sharding take it as well:

    CCE_TP_TEST_BACKEND=nccl python -m pytest tests/test_nccl.py tests/test_sharded.py

Legend: N tokens, V global vocabulary, W ranks, D hidden size.
"""

from __future__ import annotations

from typing import Any

import pytest
import torch
from torch import Tensor

import cce_tp
from problems import same_bits
from ranks import BACKEND, COUNTS, Rank, RankPool
from tolerance import relative_error

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.no_poison,
    pytest.mark.skipif(BACKEND != "nccl", reason="needs CCE_TP_TEST_BACKEND=nccl, a GPU per rank"),
]

# N: equal parts for 1 to 4 and 8 ranks, of 512 tokens or more; of 2, 4 and 8 not multiples of 8.
N, D, V = 6264, 1024, 64000
REPEATS = 4
OPTIONS: dict[str, Any] = {
    "plain": {},
    "options": {"label_smoothing": 0.1, "z_loss": 1e-3, "logit_softcap": 30.0},
    "kept": {"keep_logits_in_grad": True},
}
# Relative to the norm: 16-bit parts of dE are rounded on each rank and added in 16 bits.
LIMITS = {torch.bfloat16: 6e-3, torch.float16: 1e-3, torch.float32: 3e-5}


def operands(device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor]:
    """The same numbers on every GPU of a kind."""
    random = torch.Generator(device).manual_seed(0)
    input = torch.randn(N, D, generator=random, device=device)
    weight = torch.randn(V, D, generator=random, device=device).mul_(2 * D**-0.5)
    target = torch.randint(0, V, (N,), generator=random, device=device)
    target[::17] = -100
    return input.to(dtype), weight.to(dtype), target


def answer(
    input: Tensor, weight: Tensor, target: Tensor, options: dict[str, Any]
) -> dict[str, Tensor]:
    input, weight = input.detach().requires_grad_(), weight.detach().requires_grad_()
    loss, stats = cce_tp.linear_cross_entropy(
        input, weight, target, reduction="none", return_stats=True, **options
    )
    loss.sum().backward()
    assert input.grad is not None and weight.grad is not None
    return {
        "loss": loss.detach(),
        "lse": stats.lse,
        "argmax": stats.argmax,
        "input": input.grad,
        "weight": weight.grad,
    }


def beside_one_rank(
    rank: Rank, dtype: torch.dtype, options: dict[str, Any], parts: bool
) -> dict[str, Any]:
    """This rank's answers, several times; and how far they are from those without a group."""
    input, weight, target = operands(rank.device, dtype)
    alone = answer(input, weight, target, options)
    shard = cce_tp.VocabShard.even(V, rank.group)
    tokens = slice(0, N)
    if parts:
        shard = cce_tp.VocabShard(shard.start, shard.stop, V, rank.group, sequence_parallel=True)
        tokens = slice(rank.rank * N // rank.size, (rank.rank + 1) * N // rank.size)
    rows = slice(shard.start, shard.stop)
    options = {**options, "vocab_shard": shard}
    side, busy = torch.cuda.Stream(), torch.randn(2048, 2048, device=rank.device)
    first: dict[str, Tensor] = {}
    for _ in range(REPEATS):
        again = answer(input[tokens], weight[rows], target, options)
        assert all(same_bits(first.setdefault(name, each), each) for name, each in again.items())
        with torch.cuda.stream(side):  # ranks that are late by different times
            for _ in range(8 * rank.rank):
                busy = (busy @ busy).clamp(-1, 1)
    errors = {
        "loss": relative_error(first["loss"], alone["loss"].double()),
        "lse": relative_error(first["lse"], alone["lse"].double()),
        "input": relative_error(first["input"], alone["input"][tokens].double()),
        "weight": relative_error(first["weight"], alone["weight"][rows].double()),
    }
    del first["weight"]
    if parts:
        del first["input"]
    return {"errors": errors, "argmax": same_bits(first["argmax"], alone["argmax"]), "bits": first}


@pytest.mark.parametrize("parts", [False, True], ids=["whole-input", "sequence-parallel"])
@pytest.mark.parametrize("name", OPTIONS)
@pytest.mark.parametrize("dtype", LIMITS, ids=lambda dtype: str(dtype).removeprefix("torch."))
@pytest.mark.parametrize("ranks", COUNTS[1:])
def test_equal_bits_on_all_ranks_and_one_rank_within_rounding(
    pool: RankPool, ranks: int, dtype: torch.dtype, name: str, parts: bool
) -> None:
    if name == "kept" and dtype == torch.float32:
        pytest.skip("keeps logits of 16-bit inputs alone")
    answers = pool.run(beside_one_rank, dtype, OPTIONS[name], parts, ranks=ranks, poison=False)
    for each in answers:
        errors = each["errors"]
        assert errors["loss"] < 1e-5 and errors["lse"] < 1e-6, errors
        assert errors["input"] < LIMITS[dtype] and errors["weight"] < LIMITS[dtype], errors
        assert each["argmax"]
        for key, bits in each["bits"].items():
            assert same_bits(bits, answers[0]["bits"][key]), key
