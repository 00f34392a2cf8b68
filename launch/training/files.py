"""Checkpoints as files: where they lie, which is the latest, and what each should hold.

Nothing here imports megatron.core or communicates.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterable
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

from launch.interleaving import Interleaving

LATEST = "latest_checkpointed_iteration.txt"
MANIFEST = "manifest.json"
_CHUNK_BYTES = 1 << 22


def latest(folder: str | os.PathLike[str]) -> int | None:
    """Iteration of the last whole checkpoint; None if there is none.

    Raises:
        ValueError: the file that names it holds no number.
    """
    try:
        text = (Path(folder) / LATEST).read_text(errors="replace").strip()
    except FileNotFoundError:
        return None
    if not text.isascii() or not text.isdigit():
        raise ValueError(f"megatron.load: expected a number in {folder}/{LATEST}, got {text!r}")
    return int(text)


def folder_of(folder: str | os.PathLike[str], iteration: int) -> Path:
    """Where the checkpoint of an iteration lies."""
    return Path(folder) / f"iter_{iteration:07d}"


def write(path: Path, text: str) -> None:
    """Replace a small file in one step, and make sure that it is on the disk."""
    temporary = path.with_name(f"{path.name}.new")
    with open(temporary, "w") as file:
        file.write(text)
        file.flush()
        os.fsync(file.fileno())
    os.replace(temporary, path)
    handle = os.open(path.parent, os.O_RDONLY)
    try:
        os.fsync(handle)
    finally:
        os.close(handle)


def names(folder: Path) -> list[str]:
    """All files of a checkpoint but the manifest, relative to its folder."""
    paths = (path for path in folder.rglob("*") if path.is_file() and path.name != MANIFEST)
    return sorted(str(path.relative_to(folder)) for path in paths)


def facts(path: Path) -> dict[str, Any]:
    """`bytes` and `sha256` of a file."""
    digest = hashlib.sha256()
    with open(path, "rb") as file:
        while part := file.read(_CHUNK_BYTES):
            digest.update(part)
    return {"bytes": path.stat().st_size, "sha256": digest.hexdigest()}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What lies beside the files of a checkpoint.

    Attributes:
        files: `facts` by name.
        model: numbers of the model that it belongs to.
        ids: how they are interleaved; None: in natural order.
    """

    files: dict[str, dict[str, Any]]
    model: dict[str, int]
    ids: Interleaving | None = None

    def write(self, folder: Path) -> None:
        """Put it into a checkpoint's folder."""
        write(folder / MANIFEST, json.dumps(asdict(self), indent=1))

    @classmethod
    def read(cls, folder: Path) -> Manifest | None:
        """None if there is none, as in checkpoints that Megatron has written.

        Raises:
            ValueError: it is not what `write` writes.
        """
        try:
            found = json.loads((folder / MANIFEST).read_bytes())
            files = {
                str(name): {"bytes": each["bytes"], "sha256": each["sha256"]}
                for name, each in found["files"].items()
            }
            ids = found.get("ids")  # not there in older ones, whose ids are in natural order
            ids = None if ids is None else Interleaving(int(ids["vocab"]), int(ids["ranks"]))
            return cls(files, dict(found["model"]), ids)
        except FileNotFoundError:
            return None
        except (ValueError, KeyError, TypeError, AttributeError) as error:
            raise ValueError(f"{MANIFEST} is damaged ({type(error).__name__}: {error})") from error

    def compare(self, folder: Path, some: Iterable[str]) -> None:
        """Check some of the files.

        Raises:
            ValueError: one is missing or not what was written.
        """
        for name in some:
            path, size = folder / name, self.files[name]["bytes"]
            if not path.is_file():
                raise ValueError(f"{name} is missing")
            if path.stat().st_size != size:
                raise ValueError(f"{name} has {path.stat().st_size} bytes, not {size}")
            if facts(path) != self.files[name]:
                raise ValueError(f"{name} is not what was written (SHA-256)")
