"""Convert a checkpoint of launch.pretrain to `cce.interleave_ids: true`, or back.

    python -m launch.interleave_ids runs/NAME/checkpoints runs/NAME/interleaved --ranks 8
    python -m launch.interleave_ids runs/NAME/interleaved runs/NAME/natural --ranks 8 --undo

Reads the newest checkpoint of a folder and writes it to another, with the rows of embedding and
output layer in the other order, and those of the optimizer's state of them (master weights,
moments). Everything else is copied as it is. One process, no GPU; in memory is one such tensor
at a time. The ranks are `tensor_model_parallel_size`, which a run must have to load the result.
"""

from __future__ import annotations

import argparse
import io
import pickle
import shutil
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.distributed.checkpoint.metadata import Metadata, TensorStorageMetadata

from launch.interleaving import Interleaving, describe
from launch.training import files, trust
from launch.training.files import Manifest

_INDEX = ".metadata"
_EMBEDDING = "embedding.word_embeddings.weight"
# Ends of the names of what has a row per id: the parameters, and the optimizer's state of each.
_BY_ID = (_EMBEDDING, "output_layer.weight", "output_layer.bias")


def convert(source: Path, out: Path, ranks: int, *, undo: bool) -> list[str]:
    """Write the newest checkpoint of one folder to another, with its ids in the other order.

    Args:
        source, out: folders as of `megatron.save`; the second must not have anything in it.
        ranks: W.
        undo: from interleaved to natural order.

    Returns:
        Names of the tensors whose rows were moved.

    Raises:
        ValueError: no such checkpoint, a damaged one, one in another order, or ranks that do not
            fit it; nothing has been written.
    """
    iteration = _latest(source)
    checkpoint = files.folder_of(source, iteration)
    manifest = _checked(checkpoint)
    index: Metadata = trust.read_index(checkpoint)
    ids = Interleaving(_vocab(index, checkpoint), ranks)
    _require_order(manifest, ids, checkpoint, undo)
    names = _by_id(index, ids.vocab, checkpoint)
    data = _data_files(index, names, manifest, checkpoint)
    if out.exists() and (not out.is_dir() or any(out.iterdir())):
        raise ValueError(f"OUT: expected a new or empty folder, got {out}")
    target = files.folder_of(out, iteration)
    for name in {*manifest.files} - data - {_INDEX}:
        (target / name).parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(checkpoint / name, target / name)
    order = torch.arange(ids.vocab)
    order = ids.places(order) if undo else ids.natural_ids()
    _rewrite(checkpoint, target, index, names, lambda rows: rows[order])
    facts = {name: files.facts(target / name) for name in files.names(target)}
    Manifest(facts, manifest.model, None if undo else ids).write(target)
    files.write(out / files.LATEST, str(iteration))  # from here on it is a checkpoint
    return names


def _latest(source: Path) -> int:
    try:
        iteration = files.latest(source)
    except ValueError as error:
        raise ValueError(f"CHECKPOINT: {str(error).partition(': ')[2]}") from error
    if iteration is None:
        raise ValueError(
            f"CHECKPOINT: expected a folder of megatron.save, got {source} without {files.LATEST}"
        )
    return iteration


def _checked(checkpoint: Path) -> Manifest:
    """Its manifest, after everything has been compared and what is pickled is known to be data."""
    try:
        manifest = Manifest.read(checkpoint)
        if manifest is None:
            raise ValueError(f"no {files.MANIFEST}, which launch.pretrain writes")
        manifest.compare(checkpoint, manifest.files)
        trust.check(checkpoint)
    except (OSError, ValueError) as error:
        raise ValueError(
            f"CHECKPOINT: expected a whole checkpoint of launch.pretrain in {checkpoint}, got "
            f"one with a fault: {error}"
        ) from error
    return manifest


def _vocab(index: Metadata, checkpoint: Path) -> int:
    entry = index.state_dict_metadata.get(_EMBEDDING)
    if not isinstance(entry, TensorStorageMetadata):
        raise ValueError(f"CHECKPOINT: expected a tensor {_EMBEDDING}, got none in {checkpoint}")
    return entry.size[0]


def _require_order(manifest: Manifest, ids: Interleaving, checkpoint: Path, undo: bool) -> None:
    if ids.ranks < 2 or ids.vocab % ids.ranks:
        raise ValueError(
            f"--ranks: expected a number above 1 that divides the {ids.vocab} rows of {_EMBEDDING} "
            f"in {checkpoint}, got {ids.ranks}"
        )
    wanted = ids if undo else None
    if manifest.ids != wanted:
        raise ValueError(
            f"CHECKPOINT: expected {describe(wanted)}, got {describe(manifest.ids)} in {checkpoint}"
        )


def _by_id(index: Metadata, vocab: int, checkpoint: Path) -> list[str]:
    found = []
    for name, entry in index.state_dict_metadata.items():
        if not name.endswith(_BY_ID):
            continue
        if not isinstance(entry, TensorStorageMetadata) or entry.size[0] != vocab:
            got = tuple(entry.size) if isinstance(entry, TensorStorageMetadata) else "no tensor"
            raise ValueError(
                f"CHECKPOINT: expected {vocab} rows of {name}, got {got} in {checkpoint}"
            )
        found.append(name)
    return found


def _data_files(
    index: Metadata, names: Sequence[str], manifest: Manifest, checkpoint: Path
) -> set[str]:
    """The files that the index points into."""
    storage: dict[Any, Any] = index.storage_data
    found = {where.relative_path for where in storage.values()}
    for path in found - {*manifest.files}:
        raise ValueError(f"CHECKPOINT: expected data in its own files, got {path} in {checkpoint}")
    for key, where in storage.items():
        if key.fqn in names and getattr(where, "transform_descriptors", None):
            raise ValueError(f"CHECKPOINT: expected plain data of {key.fqn}, got {where}")
    return found


def _rewrite(
    source: Path,
    target: Path,
    index: Metadata,
    names: Sequence[str],
    reorder: Callable[[Tensor], Tensor],
) -> None:
    """The data files with some tensors' rows in another order, and the index that fits them."""
    storage: dict[Any, Any] = index.storage_data
    moved = {key: where for key, where in storage.items() if key.fqn in names}
    for key, where in storage.items():
        if key not in moved:
            storage[key] = _append(target, where, _stored(source, where))
    for name in names:
        chunks = {key: where for key, where in moved.items() if key.fqn == name}
        parts = {key: _load(_stored(source, where)) for key, where in chunks.items()}
        entry: Any = index.state_dict_metadata[name]
        whole = torch.empty(entry.size, dtype=entry.properties.dtype)
        for key, part in parts.items():
            whole[_place(key, part)] = part
        whole = reorder(whole)
        for key, where in chunks.items():
            data = io.BytesIO()
            torch.save(whole[_place(key, parts[key])].clone(), data)
            storage[key] = _append(target, where, data.getvalue())
    with open(target / _INDEX, "wb") as file:
        pickle.dump(index, file)


def _stored(folder: Path, where: Any) -> bytes:
    with open(folder / where.relative_path, "rb") as file:
        file.seek(where.offset)
        return file.read(where.length)


def _append(folder: Path, where: Any, data: bytes) -> Any:
    """Write to the end of the same file in another folder; returns where it is now."""
    path = folder / where.relative_path
    path.parent.mkdir(parents=True, exist_ok=True)
    with open(path, "ab") as file:
        offset = file.tell()
        file.write(data)
    return replace(where, offset=offset, length=len(data))


def _load(data: bytes) -> Tensor:
    return torch.load(io.BytesIO(data), map_location="cpu", weights_only=True)


def _place(key: Any, part: Tensor) -> tuple[slice, ...]:
    """Where a chunk lies in the whole."""
    return tuple(slice(at, at + n) for at, n in zip(key.offset, part.shape, strict=True))


def main(arguments: Sequence[str] | None = None) -> int:
    """Convert; returns the exit status."""
    parser = argparse.ArgumentParser(
        prog="python -m launch.interleave_ids",
        description=__doc__,
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    parser.add_argument("checkpoint", metavar="CHECKPOINT", help="folder of megatron.save")
    parser.add_argument("out", metavar="OUT", help="new folder, for megatron.load")
    parser.add_argument("--ranks", type=int, required=True, metavar="W", help="tensor-parallel")
    parser.add_argument("--undo", action="store_true", help="from interleaved to natural order")
    args = parser.parse_args(arguments)
    try:
        names = convert(Path(args.checkpoint), Path(args.out), args.ranks, undo=args.undo)
    except (OSError, ValueError) as error:
        print(f"launch.interleave_ids: {error}", file=sys.stderr)
        return 2
    print(f"moved the rows of {', '.join(names)}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
