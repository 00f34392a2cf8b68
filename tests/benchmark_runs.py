"""What the benchmark's tests share: a quick run, and snapshots."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.benchmark import __main__ as command
from launch.benchmark import records
from launch.benchmark.catalogue import Options, Shape
from launch.benchmark.steps import even_rows

CPU = torch.device("cpu")
TINY = Shape(48, 16, 96)
QUICK = ("--seconds-per-case", "0.002")
ALL_OPTIONS = Options(bias=True, softcap=3.0, z_loss=1e-2, label_smoothing=0.1)


def run(out: Path, *arguments: str) -> list[dict[str, Any]]:
    """`launch.benchmark run`; all records of its file."""
    assert command.main(["run", *QUICK, "--out", str(out), *arguments]) == 0
    return written(out)


def written(out: Path) -> list[dict[str, Any]]:
    """All records of a file."""
    return [record for each in records.read([str(out)]) for record in each]


def snapshot(folder: Path, ranks: int, **changes: Any) -> dict[str, Tensor]:
    """A snapshot of 40 tokens, 5 of them ignored, in `ranks` files; what it holds without them."""
    generator = torch.Generator().manual_seed(0)
    e, c = torch.randn(40, 16, generator=generator), torch.randn(96, 16, generator=generator)
    t = torch.randint(0, 96, (40,), generator=generator)
    t[:5] = -100
    folder.mkdir()
    for rank in range(ranks):
        start, stop = even_rows(96, rank, ranks)
        part = {"e": e, "c": c[start:stop], "t": t, "vocab_start": start, "vocab_size": 96}
        if ranks == 1:
            del part["vocab_start"], part["vocab_size"]
        torch.save(part | changes, folder / f"tp{rank:02d}.pt")
    return {"e": e[5:], "c": c, "t": t[5:]}
