"""Random problems with NaN, infinities, 1e30, denormals and repeated targets.

A short version by default; for a long one, whose number of cases and seed the last lines report:

    bash tests/run.sh tests/test_hostile.py --hostile-cases 2000 --hostile-seed 1
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import pytest
from hypothesis import given, seed, settings
from hypothesis import strategies as st

from hostile import check_alone, check_hostile, hostile_problems
from ranks import RankPool
from strategies import PROPERTY, shards

# Shares of the cases: one rank and several, the reference and the kernels.
SHARES = {"torch": 0.3, "triton": 0.3, "torch sharded": 0.25, "triton sharded": 0.15}


@pytest.mark.timeout(3600)
@pytest.mark.parametrize("kind", SHARES)
def test_hostile(
    request: pytest.FixtureRequest,
    record_property: Callable[[str, Any], None],
    pool: RankPool,
    kind: str,
) -> None:
    cases = max(1, round(request.config.getoption("--hostile-cases") * SHARES[kind]))
    number = request.config.getoption("--hostile-seed")
    done = 0
    impl, _, sharded = kind.partition(" ")
    size = (40, 120, 32) if impl == "triton" else (60, 200, 40)

    @seed(number)
    @settings(PROPERTY, max_examples=cases)
    @given(data=st.data())
    def run(data: st.DataObject) -> None:
        nonlocal done
        hostile = data.draw(hostile_problems(impl, largest=size))
        if sharded:
            check_hostile(pool, hostile, data.draw(shards(hostile.problem.vocab)))
        else:
            check_alone(hostile)
        done += 1

    try:
        run()
    finally:
        record_property("hostile", f"{kind}: {done} cases, seed {number}")
