"""Tile configurations measured on this machine by `python -m launch.tune`, kept in a file.

Read only where the environment asks for it with CCE_TP_TUNED=1: another configuration sums in
another order, so results may differ by rounding, and the paper's filter decides by other tiles. The
file is CCE_TP_TUNING_CACHE, or cce_tp/tuning.json in XDG_CACHE_HOME (~/.cache). An entry holds for
one kind of device, element size and release of torch and Triton. What cannot be used is warned of
once, and the shipped configuration is used.
"""

from __future__ import annotations

import dataclasses
import json
import logging
import os
import tempfile
import warnings
from pathlib import Path
from typing import Any, TypeVar

import torch

SCHEMA = 1
_log = logging.getLogger(__name__)
T = TypeVar("T")
# Least and largest value of each field; all are powers of two but the stages.
_LIMITS = {
    "block_n": (16, 512),
    "block_v": (16, 512),
    "block_d": (16, 256),
    "group_mib": (0, 1024),
    "least_group": (1, 1024),
    "num_warps": (1, 16),
    "num_stages": (1, 8),
}


def enabled() -> bool:
    """Whether CCE_TP_TUNED=1 asks for measured configurations."""
    return os.environ.get("CCE_TP_TUNED", "0") == "1"


def path() -> Path:
    """Of the cache file; it need not exist."""
    given = os.environ.get("CCE_TP_TUNING_CACHE")
    if given:
        return Path(given)
    folder = os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache"
    return Path(folder) / "cce_tp" / "tuning.json"


def key(device: str, capability: int, itemsize: int) -> str:
    """What an entry holds for."""
    import triton

    versions = f"torch {torch.__version__}, triton {triton.__version__}"
    return f"{device}, capability {capability}, {itemsize} bytes, {versions}"


def find(name: str, kind: type[T]) -> T | None:
    """The configuration of an entry, or None, with a warning, if there is none that can be used.

    Args:
        name: a `key`.
        kind: dataclass of the configuration.
    """
    try:
        entries = _read(path())
        if name not in entries:
            raise ValueError(f"no entry for {name}; python -m launch.tune makes one")
        config = _configuration(entries[name], kind)
    except (OSError, ValueError) as error:
        warnings.warn(
            f"CCE_TP_TUNED=1, but the shipped tile configuration is used: {path()}: {error}",
            stacklevel=2,
        )
        return None
    _log.info("tile configuration of %s: %s", path(), config)
    return config


def store(name: str, config: Any, measured: dict[str, Any]) -> Path:
    """Add an entry, or replace it; other entries stay.

    Args:
        name: a `key`.
        config: dataclass of integers.
        measured: what chose it; kept beside it.

    Raises:
        ValueError: a file that is there and is not a cache.
    """
    file = path()
    entries = _read(file) if file.exists() else {}
    entries[name] = {"config": dataclasses.asdict(config), "measured": measured}
    file.parent.mkdir(parents=True, exist_ok=True)
    # Replaced as a whole: a reader never sees half of it.
    with tempfile.NamedTemporaryFile("w", dir=file.parent, delete=False, encoding="utf-8") as new:
        json.dump({"schema": SCHEMA, "entries": entries}, new, indent=1)
    os.replace(new.name, file)
    return file


def _read(file: Path) -> dict[str, Any]:
    try:
        found = json.loads(file.read_text(encoding="utf-8"))
    except ValueError as error:  # of JSON, or of UTF-8
        raise ValueError(f"expected a cache of tile configurations, got no JSON: {error}") from None
    entries = found.get("entries") if isinstance(found, dict) else None
    if not isinstance(entries, dict) or found.get("schema") != SCHEMA:
        raise ValueError(f"expected a cache of tile configurations of schema {SCHEMA}")
    return entries


def _configuration(entry: Any, kind: type[T]) -> T:
    values = entry.get("config") if isinstance(entry, dict) else None
    if not isinstance(values, dict) or values.keys() != _LIMITS.keys():
        raise ValueError(f"expected an entry with {', '.join(_LIMITS)}")
    for name, (least, most) in _LIMITS.items():
        value = values[name]
        good = isinstance(value, int) and not isinstance(value, bool) and least <= value <= most
        if not good or (name != "num_stages" and value & (value - 1)):
            raise ValueError(f"{name}: expected a size from {least} to {most}, got {value!r}")
    return kind(**values)
