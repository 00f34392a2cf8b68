"""Keeps a killed rank from leaving processes behind.

Megatron's checkpoint writer has a process of its own that holds its queue of results. It waits for
ever when the rank is killed, and holds the rank's output open, so that whoever reads that output
(a launcher's log, a test) waits, too.
"""

from __future__ import annotations

import ctypes
import multiprocessing
import os
import signal
import sys
from multiprocessing.managers import SyncManager
from typing import Any

_PR_SET_PDEATHSIG = 1
_kept: list[SyncManager] = []


def end_with_parent() -> None:
    """In a child: be killed when the thread that started this process ends (Linux only).

    And not before: a scheduler sends SIGTERM to every process, and the rank still has to save.
    """
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    if not sys.platform.startswith("linux"):
        return
    ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() == 1:  # it ended before
        os._exit(1)


def keep_results_queue() -> None:
    """Give Megatron's checkpoint writer its queue in a process that ends with this one."""
    from megatron.core.dist_checkpointing.strategies import filesystem_async

    module: Any = filesystem_async
    if getattr(module, "_results_queue", False) is None:
        manager = SyncManager(ctx=multiprocessing.get_context("spawn"))
        manager.start(initializer=end_with_parent)
        _kept.append(manager)
        module._results_queue = manager.Queue()
