"""The pool of ranks itself: what the distributed tests stand on."""

from __future__ import annotations

import os
import time

import pytest
import torch
import torch.distributed as dist

from ranks import GROUPS, Rank, RankError, RankPool

pytestmark = pytest.mark.once


def whoami(rank: Rank) -> tuple[int, int, int]:
    total = torch.tensor([rank.rank + 1.0], device=rank.device)
    dist.all_reduce(total, group=rank.group)
    return rank.rank, rank.size, int(total)


def fail_on(rank: Rank, failing: int) -> None:
    if rank.rank == failing:
        raise ZeroDivisionError("on purpose")


def hang_on(rank: Rank, hanging: int) -> None:
    if rank.rank == hanging:
        time.sleep(600)


def die_on(rank: Rank, dying: int) -> None:
    if rank.rank == dying:
        os._exit(3)
    time.sleep(600)


@pytest.mark.parametrize("name", GROUPS)
def test_groups_have_their_ranks(pool: RankPool, name: str) -> None:
    size = len(GROUPS[name])
    expected = [(rank, size, size * (size + 1) // 2) for rank in range(size)]
    assert pool.run(whoami, group=name) == expected


def test_an_exception_comes_back_with_its_traceback(pool: RankPool) -> None:
    with pytest.raises(RankError, match="on purpose"):
        pool.run(fail_on, 1, ranks=2)
    assert len(pool.run(whoami, ranks=2)) == 2


def test_hang_and_death_end_the_pool_and_the_next_call_starts_another(pool: RankPool) -> None:
    with pytest.raises(RankError, match="did not answer in time"):
        pool.run(hang_on, 0, ranks=2, timeout_s=1)
    assert len(pool.run(whoami, ranks=3)) == 3
    with pytest.raises(RankError, match="exit code 3"):
        pool.run(die_on, 1, ranks=2)
    assert len(pool.run(whoami, ranks=3)) == 3
