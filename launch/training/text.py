"""Real text that needs no download: source and documentation of the running Python installation.

The standard library comes first; packages beside it only as far as the vocabulary asks for more
text. Every file is a document; one in fifty, chosen by its name, is held out for validation.
"""

from __future__ import annotations

import hashlib
import json
import os
import shutil
import sys
import sysconfig
import time
import uuid
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

_SUFFIXES = (".py", ".pyi", ".rst", ".txt", ".md", ".h", ".hpp", ".cuh")
_HELD_OUT = 50
_MAX_FILE_BYTES = 1_000_000
_MIN_FILE_BYTES = 200
# How much text a tokenizer is trained on: enough that the last merges are not of one place alone.
_MIN_TEXT_BYTES = 2_000_000
_TEXT_BYTES_PER_ENTRY = 1500
_RECIPE = 1  # raise when the text or the tokenizer is made differently
END = "<|endoftext|>"
PAD = "<|pad|>"


@dataclass
class TextData:
    """What was made.

    Attributes:
        folder: holds tokenizer.json, train.bin and .idx, valid.bin and .idx, data.json.
        vocab_size: entries that the tokenizer really has; at most the number asked for.
        train_tokens, valid_tokens, files, text_bytes, seconds: of the making.
    """

    folder: str
    vocab_size: int
    train_tokens: int
    valid_tokens: int
    files: int
    text_bytes: int
    seconds: float

    @property
    def tokenizer(self) -> str:
        """Path of the tokenizer's JSON file."""
        return os.path.join(self.folder, "tokenizer.json")

    def prefix(self, split: str) -> str:
        """Path of an indexed dataset without its suffix; split: train or valid."""
        return os.path.join(self.folder, split)


def folder_of(cache: str | os.PathLike[str], vocab_size: int) -> Path:
    """Where `make` keeps the data of this installation for this vocabulary."""
    key = repr((_RECIPE, sys.version, sys.prefix, sysconfig.get_paths()["stdlib"]))
    digest = hashlib.sha256(key.encode()).hexdigest()[:10]
    return Path(cache) / f"python-{vocab_size}-{digest}"


def find(cache: str | os.PathLike[str], vocab_size: int) -> TextData | None:
    """What `make` has left earlier; None if there is nothing whole."""
    folder = folder_of(cache, vocab_size)
    try:
        return TextData(**{**json.loads((folder / "data.json").read_text()), "folder": str(folder)})
    except FileNotFoundError:
        return None


def make(cache: str | os.PathLike[str], vocab_size: int) -> TextData:
    """Train a byte-level BPE tokenizer and write the two indexed datasets; call it on one rank.

    All is made in a folder of another name, which takes its own in one step at the end: what
    an interruption leaves is never taken for whole.
    """
    start = time.perf_counter()
    folder = folder_of(cache, vocab_size)
    partial = folder.with_name(f"{folder.name}.partial-{uuid.uuid4().hex[:8]}")
    partial.mkdir(parents=True)
    try:
        files = list(_files(max(_MIN_TEXT_BYTES, vocab_size * _TEXT_BYTES_PER_ENTRY)))
        print(
            f"tokenizer: training {vocab_size} entries on "
            f"{sum(size for _, size in files) / 1e6:.0f} MB of text in {len(files)} files",
            flush=True,
        )
        tokenizer = _train(files, vocab_size)
        tokenizer.save(str(partial / "tokenizer.json"))
        tokens = _write(files, tokenizer, partial)
        data = TextData(
            folder=str(folder),
            vocab_size=tokenizer.get_vocab_size(),
            train_tokens=tokens["train"],
            valid_tokens=tokens["valid"],
            files=len(files),
            text_bytes=sum(size for _, size in files),
            seconds=round(time.perf_counter() - start, 1),
        )
        (partial / "data.json").write_text(json.dumps(asdict(data), indent=1))
        try:
            os.rename(partial, folder)
        except OSError:
            if find(cache, vocab_size) is None:  # not another process that was faster
                raise
    finally:
        shutil.rmtree(partial, ignore_errors=True)
    found = find(cache, vocab_size)
    assert found is not None
    return found


def _files(limit: int) -> Iterator[tuple[Path, int]]:
    """(path, bytes) up to `limit` bytes, without files of equal content; always the same order."""
    paths = sysconfig.get_paths()
    seen: set[bytes] = set()
    total = 0
    for root, skip in ((paths["stdlib"], "site-packages"), (paths["purelib"], None)):
        found = sorted(_walk(Path(root), skip), key=lambda path: _digest(path, Path(root)))
        for path in found:
            try:
                content = path.read_bytes()
                content.decode()
            except (OSError, UnicodeDecodeError):
                continue
            digest = hashlib.blake2b(content, digest_size=16).digest()
            if not _MIN_FILE_BYTES <= len(content) <= _MAX_FILE_BYTES or digest in seen:
                continue
            seen.add(digest)
            total += len(content)
            yield path, len(content)
            if total >= limit:
                return


def _walk(root: Path, skip: str | None) -> Iterator[Path]:
    for folder, folders, names in os.walk(root):
        folders[:] = [name for name in folders if name not in (skip, "__pycache__")]
        yield from (Path(folder, name) for name in names if name.endswith(_SUFFIXES))


def _digest(path: Path, root: Path) -> str:
    """A fixed shuffle, so that any part of the list is a fair sample of the whole."""
    return hashlib.sha256(path.relative_to(root).as_posix().encode()).hexdigest()


def _train(files: list[tuple[Path, int]], vocab_size: int) -> Any:
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    trainer = trainers.BpeTrainer(
        vocab_size=vocab_size,
        min_frequency=2,
        special_tokens=[END, PAD],
        initial_alphabet=pre_tokenizers.ByteLevel.alphabet(),
        show_progress=False,
    )
    training = (path.read_text("utf-8") for path, _ in files if not _held_out(path))
    tokenizer.train_from_iterator(training, trainer)
    return tokenizer


def _held_out(path: Path) -> bool:
    digest = hashlib.sha256(path.name.encode() + str(path.parent.name).encode()).digest()
    return int.from_bytes(digest[:4], "big") % _HELD_OUT == 0


def _write(files: list[tuple[Path, int]], tokenizer: Any, folder: Path) -> dict[str, int]:
    """Write train and valid as indexed datasets; returns the number of tokens of each."""
    import numpy
    import torch
    from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder

    dtype: Any = DType.optimal_dtype(tokenizer.get_vocab_size())
    end = tokenizer.token_to_id(END)
    splits: list[str] = ["train", "valid"]
    builders = {s: IndexedDatasetBuilder(str(folder / f"{s}.bin"), dtype=dtype) for s in splits}
    tokens = dict.fromkeys(splits, 0)
    for first in range(0, len(files), 256):
        part = [path for path, _ in files[first : first + 256]]
        encoded = tokenizer.encode_batch([path.read_text("utf-8") for path in part])
        for path, encoding in zip(part, encoded, strict=True):
            split = "valid" if _held_out(path) else "train"
            ids = torch.from_numpy(numpy.array([*encoding.ids, end], dtype=numpy.int64))
            builders[split].add_item(ids)
            builders[split].end_document()
            tokens[split] += len(ids)
    for split, builder in builders.items():
        builder.finalize(str(folder / f"{split}.idx"))
    return tokens
