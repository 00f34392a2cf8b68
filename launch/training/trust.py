"""Refuses checkpoints whose pickled parts name anything but plain data.

A pickle can name any function of any installed package, and loading it calls that function.
PyTorch's reader of distributed checkpoints unpickles `.metadata`, and objects inside the data
files, without a limit. So each of them is first read here by an unpickler that knows only what such
files need; a checkpoint with anything else is refused before anyone loads it.
"""

from __future__ import annotations

import io
import pickle
from pathlib import Path
from typing import Any

import torch
from torch.distributed.checkpoint import metadata as torch_metadata

# Classes by the modules whose pickles name them; all hold data and do nothing else.
_KNOWN: dict[str, set[str]] = {
    "torch.distributed.checkpoint.metadata": {
        "BytesStorageMetadata",
        "ChunkStorageMetadata",
        "Metadata",
        "MetadataIndex",
        "StorageMeta",
        "TensorProperties",
        "TensorStorageMetadata",
        "_MEM_FORMAT_ENCODING",
    },
    "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
    "torch.distributed.checkpoint.planner": {
        "SavePlan",
        "TensorWriteData",
        "WriteItem",
        "WriteItemType",
    },
    "torch.serialization": {"_get_layout"},
    "torch": {"Size", *(n for n, value in vars(torch).items() if isinstance(value, torch.dtype))},
    "collections": {"OrderedDict"},
    "builtins": {"set"},
}


class _Unpickler(pickle.Unpickler):
    def find_class(self, module: str, name: str) -> Any:
        if name not in _KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it names {module}.{name}")
        return super().find_class(module, name)


def check(folder: Path) -> None:
    """Read whatever is pickled in one checkpoint, with nothing but plain data admitted.

    Raises:
        ValueError: something else is in it, or it cannot be read.
    """
    index: Any = None
    for path in (folder / "common.pt", folder / ".metadata"):
        if not path.exists():
            continue
        try:
            if path.suffix == ".pt":
                torch.load(path, map_location="cpu", weights_only=True)
            else:
                index = read_index(folder)
        except Exception as error:  # a damaged pickle can raise anything
            raise ValueError(f"{path.name} is not plain data: {_short(error)}") from error
    if index is not None:
        _check_objects(folder, index)


def read_index(folder: Path) -> Any:
    """What `.metadata` holds, of plain data alone: torch's Metadata, after a `check`."""
    with open(folder / ".metadata", "rb") as file:
        return _Unpickler(file).load()


def _check_objects(folder: Path, index: Any) -> None:
    """Objects in the data files; tensors PyTorch itself reads without unpickling."""
    if not isinstance(index, torch_metadata.Metadata):
        raise ValueError(f".metadata is not plain data: expected Metadata, got {type(index)}")
    for key, where in (index.storage_data or {}).items():
        kind = index.state_dict_metadata.get(key.fqn)
        if isinstance(kind, torch_metadata.TensorStorageMetadata):
            continue
        path = (folder / where.relative_path).resolve()
        if folder.resolve() not in path.parents:
            raise ValueError(f".metadata names a file outside of the checkpoint: {path}")
        try:
            with open(path, "rb") as file:
                file.seek(where.offset)
                data = file.read(where.length)
            torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)
        except Exception as error:
            raise ValueError(f"{key.fqn} is not plain data: {_short(error)}") from error


def _short(error: Exception) -> str:
    lines = str(error).splitlines() or [""]
    named = [line.strip() for line in lines if "GLOBAL" in line or "names" in line]
    return f"{type(error).__name__}: {(named or lines)[0][:300]}"
