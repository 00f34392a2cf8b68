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


def attempt(world: World, work: Callable[[], T]) -> tuple[Outcome, T | None]:
    """Run it, and agree with the other ranks on what came of it: of any trouble, the first rank's.

    Returns:
        The outcome, the same on all ranks, and what `work` returned, None unless all is well.
    """
    value, mine = None, ("ok", "")
    try:
        value = work()
    except NotAvailable as error:
        mine = ("not available", str(error))
    except torch.OutOfMemoryError as error:
        mine = ("out of memory", str(error).split(" GPU ")[0].splitlines()[0])
    except Exception as error:  # others' code may raise anything; the row says what
        text = str(error).splitlines()[:1] or [""]
        mine = ("error", f"{type(error).__name__}: {text[0]}")
    bad = [outcome for outcome in world.gather(mine) if outcome[0] != "ok"]
    if not bad:
        return Outcome(), value
    del value
    forget(world.device)
    return Outcome(*bad[0]), None


def forget(device: torch.device) -> None:
    """Free what is left of the work before, where memory is short: on a GPU."""
    if device.type == "cuda":
        gc.collect()
        torch.cuda.empty_cache()


def forget_compiled() -> None:
    """Drop code that torch.compile made for the sizes of a case before."""
    if "torch._dynamo" in sys.modules:
        torch.compiler.reset()
