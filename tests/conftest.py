"""Fixtures and the parametrisation over implementations, dtypes and devices."""

from __future__ import annotations

import os
import sys
from collections.abc import Iterator
from typing import Any

import pytest
import torch

# Read by Triton when it is imported: without a GPU its kernels run in the interpreter.
if not torch.cuda.is_available():
    os.environ["TRITON_INTERPRET"] = "1"
os.environ.pop("CCE_TP_DEBUG", None)
# Read when the library is imported; ranks and runs inherit it.
os.environ.pop("CCE_TP_REPLAY", None)

import ranks
from cce_tp import replay
from interpreter import patch_all
from poison import poisoned_empty

if os.environ.get("TRITON_INTERPRET") == "1":
    patch_all()


def pytest_configure(config: pytest.Config) -> None:
    config.addinivalue_line("markers", "no_poison: fresh memory keeps its contents in this test")
    # Lanes that a kernel masks on storing may hold anything before: numpy warns of overflow.
    config.addinivalue_line("filterwarnings", "ignore::RuntimeWarning:triton.runtime.interpreter")


def pytest_addoption(parser: pytest.Parser) -> None:
    group = parser.getgroup("cce_tp")
    group.addoption("--hostile-cases", type=int, default=60, help="cases of tests/test_hostile.py")
    group.addoption(
        "--hostile-seed",
        type=int,
        default=int.from_bytes(os.urandom(4), "big"),
        help="their seed (default: a new one in every run)",
    )


def pytest_terminal_summary(terminalreporter: Any) -> None:
    """How many hostile cases ran, and how to repeat them."""
    reports = [*terminalreporter.getreports("passed"), *terminalreporter.getreports("failed")]
    for report in reports:
        for name, value in report.user_properties:
            if name == "hostile":
                terminalreporter.write_line(f"hostile {value}")


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    if os.environ.get("CCE_TP_TEST_ONCE") == "elsewhere":
        skip = pytest.mark.skip(reason="marked once: another interpreter's run is to show it")
        for item in items:
            if "once" in item.keywords:
                item.add_marker(skip)
    if torch.cuda.is_available():
        return
    skip = pytest.mark.skip(reason="needs a CUDA device, and torch sees none here")
    for item in items:
        if "gpu" in item.keywords:
            item.add_marker(skip)


@pytest.fixture(autouse=True)
def _poison(request: pytest.FixtureRequest) -> Iterator[None]:
    if "no_poison" in request.keywords:
        yield
        return
    with poisoned_empty():
        yield


@pytest.fixture(autouse=True)
def _nothing_recorded() -> None:
    # What a test replaces must not be in what others replay.
    replay.forget()


@pytest.fixture(autouse=True, scope="session")
def _one_thread_per_core() -> None:
    # Small problems: more threads only get into each other's way.
    torch.set_num_threads(1)


@pytest.fixture(autouse=True, scope="module")
def _no_idle_megatron() -> Iterator[None]:
    yield
    if "megatron_harness" in sys.modules:
        sys.modules["megatron_harness"].close_pool()


@pytest.fixture(scope="session")
def pool() -> Iterator[ranks.RankPool]:
    """Worker processes for 1 to 4 ranks (up to 8 over NCCL), started when first used."""
    pool = ranks.shared_pool or ranks.RankPool(device=ranks.default_device())
    yield pool
    pool.close()
