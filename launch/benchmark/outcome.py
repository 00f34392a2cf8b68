"""What comes of a piece of work that may fail in another project's code, agreed on by all ranks."""

from __future__ import annotations

import gc
import sys
from collections.abc import Callable
from dataclasses import dataclass
from typing import TypeVar

import torch

from launch.benchmark.parallel import World
from launch.benchmark.peers import NotAvailable

T = TypeVar("T")


@dataclass(slots=True)
class Outcome:
    """A status of the schema (see records.py) and the reason for it."""

    status: str = "ok"
    reason: str | None = None


class DeviceLost(Exception):
    """A fault of the GPU, after which this process cannot use it; raised on all ranks.

    Attributes:
        outcome: of the work that met it.
        name: of the implementation, or None where it was none's.
    """

    def __init__(self, outcome: Outcome, name: str | None = None) -> None:
        super().__init__(outcome, name)
        self.outcome, self.name = outcome, name

    def __str__(self) -> str:
        return f"{self.name or 'inputs or reference'}: {self.outcome.reason}"


def attempt(world: World, work: Callable[[], T]) -> tuple[Outcome, T | None]:
    """Run it, and agree with the other ranks on what came of it: of any trouble, the first rank's.

    Returns:
        The outcome, the same on all ranks, and what `work` returned, None unless all is well.

    Raises:
        DeviceLost: a rank's GPU is of no use any more.
    """
    value, lost, mine = None, False, ("ok", "")
    try:
        value = work()
    except NotAvailable as error:
        mine = ("not available", str(error))
    except torch.OutOfMemoryError as error:
        mine = ("out of memory", str(error).split(" GPU ")[0].splitlines()[0])
    except DeviceLost:  # of an attempt within this one: raised on all ranks already
        raise
    except Exception as error:  # others' code may raise anything; the row says what
        text = str(error).splitlines()[:1] or [""]
        mine = ("error", f"{type(error).__name__}: {text[0]}")
        lost = _is_lost(world.device)
    bad = [each for each in world.gather((lost, mine)) if each[1][0] != "ok"]
    for is_lost, outcome in bad:
        if is_lost:
            raise DeviceLost(Outcome(*outcome))
    if not bad:
        return Outcome(), value
    del value
    forget(world.device)
    return Outcome(*bad[0][1]), None


def _is_lost(device: torch.device) -> bool:
    """Whether the GPU answers with the same error to whatever is asked of it."""
    if device.type != "cuda":
        return False
    try:
        torch.cuda.synchronize(device)
    except RuntimeError:
        return True
    return False


def forget(device: torch.device) -> None:
    """Free what is left of the work before, where memory is short: on a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def forget_compiled() -> None:
    """Drop code that torch.compile made for the sizes of a case before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
