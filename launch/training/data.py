"""Batches for training and validation, through Megatron's indexed datasets and GPT dataset."""

from __future__ import annotations

import inspect
import signal
import time
from collections import OrderedDict
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core import parallel_state
from megatron.core.utils import get_batch_on_this_cp_rank
from torch import Tensor

from launch.interleaving import Interleaving
from launch.training import text
from launch.training.options import LoopOptions

_POLL_S = 1.0


@dataclass
class Vocabulary:
    """What Megatron's datasets ask of a tokenizer object, in either release.

    Attributes:
        vocab_size: entries that can occur, before padding.
        eod, pad: ids; pad never occurs in the data.
        origin: says in one line where the ids come from.
        model_size: entries of the model before padding, where more than vocab_size.
    """

    vocab_size: int
    eod: int
    pad: int
    origin: str
    model_size: int = 0

    @property
    def eos(self) -> int:
        """The same as eod."""
        return self.eod

    @property
    def unique_identifiers(self) -> OrderedDict[str, Any]:
        """Goes into the key of Megatron's dataset cache."""
        return OrderedDict(vocab_size=self.vocab_size, eod=self.eod)

    def padded(self, divisor: int, tensor_parallel: int) -> int:
        """Entries after padding, as Megatron pads."""
        multiple = divisor * tensor_parallel
        return -(-max(self.vocab_size, self.model_size) // multiple) * multiple


@dataclass
class Source:
    """Where tokens come from: the vocabulary, and prefixes per split, or shares, or neither.

    Attributes:
        vocabulary: of the ids.
        per_split: prefixes for (train, valid); None where `blend` or made-up data are used.
        blend: prefixes that `split` divides.
    """

    vocabulary: Vocabulary
    per_split: tuple[list[str], list[str]] | None = None
    blend: list[str] | None = None


def source(options: LoopOptions, rank: int) -> Source:
    """Decide on the data, and make tokenizer and text on rank 0 where needed; called by all ranks.

    The ranks need a common file system for `data_cache_path`.

    Raises:
        ValueError: a file that does not exist, or a vocabulary too small to be trained.
    """
    if options.mock_data:
        size = options.vocab_size
        return Source(Vocabulary(size, size - 2, size - 1, f"{size} made-up ids"))
    if options.data_path or options.train_data_path:
        vocabulary = _given_vocabulary(options)
        if options.data_path:
            return Source(vocabulary, blend=_prefixes(options.data_path))
        splits = (_prefixes(options.train_data_path), _prefixes(options.valid_data_path))
        return Source(vocabulary, per_split=splits)
    data = _text_data(options, rank)
    origin = (
        f"{data.vocab_size} byte-level BPE entries trained on {data.text_bytes / 1e6:.0f} MB of"
        f" Python source and documentation ({data.files} files, {data.train_tokens} training"
        f" tokens), made in {data.seconds:.0f} s"
    )
    end, pad = 0, 1
    vocabulary = Vocabulary(data.vocab_size, end, pad, origin, model_size=options.vocab_size)
    return Source(vocabulary, per_split=([data.prefix("train")], [data.prefix("valid")]))


def _text_data(options: LoopOptions, rank: int) -> text.TextData:
    if options.vocab_size < 300:
        raise ValueError(
            "megatron.vocab_size: expected at least 300 for a byte-level tokenizer, got "
            f"{options.vocab_size}"
        )
    cache = options.data_cache_path
    if rank == 0 and text.find(cache, options.vocab_size) is None:
        text.make(cache, options.vocab_size)
    deadline = time.monotonic() + 60 * options.distributed_timeout_minutes
    while (data := text.find(cache, options.vocab_size)) is None:
        if time.monotonic() > deadline:
            raise ValueError(
                "megatron.data_cache_path: expected a folder that all ranks share, got "
                f"{cache!r}, where the text of rank 0 has not come up"
            )
        time.sleep(_POLL_S)
    return data


def _given_vocabulary(options: LoopOptions) -> Vocabulary:
    if options.tokenizer_model is None:
        size = options.vocab_size
        return Vocabulary(size, size - 1, -1, f"{size} ids of the given data")
    path = Path(options.tokenizer_model)
    if not path.is_file():
        raise ValueError(
            "megatron.tokenizer_model: expected a JSON file of the tokenizers library, got "
            f"{options.tokenizer_model!r}"
        )
    from tokenizers import Tokenizer

    tokenizer = Tokenizer.from_file(str(path))
    size = tokenizer.get_vocab_size()
    end = tokenizer.token_to_id(text.END)
    return Vocabulary(size, size - 1 if end is None else end, -1, f"{size} entries of {path}")


def _prefixes(value: Any) -> list[str]:
    found = value.split() if isinstance(value, str) else [str(item) for item in value]
    for prefix in found:
        for suffix in (".bin", ".idx"):
            if not Path(prefix + suffix).is_file():
                raise ValueError(
                    "megatron.data_path: expected prefixes of indexed datasets, got "
                    f"{prefix!r} without {prefix + suffix}"
                )
    return found


def datasets(options: LoopOptions, origin: Source, global_batch_size: int) -> tuple[Any, Any]:
    """(train, valid) GPT datasets of as many samples as the run takes; called by all ranks."""
    from megatron.core.datasets.blended_megatron_dataset_builder import (
        BlendedMegatronDatasetBuilder,
    )
    from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig, MockGPTDataset

    blend: dict[str, Any] = {}
    if origin.per_split is not None:
        blend["blend_per_split"] = [(prefixes, None) for prefixes in origin.per_split] + [None]
    elif origin.blend is not None:
        blend = {"blend": (origin.blend, None), "split": options.split}
    cache = Path(options.data_cache_path) / "index"
    config = GPTDatasetConfig(
        random_seed=options.seed,
        sequence_length=options.seq_length,
        path_to_cache=str(cache),
        tokenizer=origin.vocabulary,  # type: ignore[arg-type]
        reset_position_ids=False,
        reset_attention_mask=False,
        eod_mask_loss=options.eod_mask_loss,
        create_attention_mask=False,
        **blend,
    )
    sizes: list[Any] = [
        options.train_iters * global_batch_size,
        options.eval_iters * global_batch_size,
        0,
    ]
    kind = MockGPTDataset if options.mock_data else GPTDataset
    train, valid, _ = BlendedMegatronDatasetBuilder(kind, sizes, lambda: True, config).build()
    return train, valid


class Interleaved(torch.utils.data.Dataset[dict[str, Tensor]]):
    """A dataset whose tokens and labels are the places of their ids.

    Everything else has been made of the natural ids, such as a loss mask of the ids that end a
    document or fill a sequence up; 0, which stands for those that fill up, is its own place.
    """

    def __init__(self, dataset: Any, ids: Interleaving) -> None:
        self._dataset, self._ids = dataset, ids

    def __len__(self) -> int:
        return len(self._dataset)

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        item = dict(self._dataset[index])
        return item | {name: self._ids.places(item[name]) for name in ("tokens", "labels")}


class _Batches(torch.utils.data.Sampler[list[int]]):
    """Sample numbers of one replica, micro-batch by micro-batch, from a given sample on."""

    def __init__(self, first: int, count: int, micro: int, rank: int, replicas: int) -> None:
        self._first, self._count = first, count
        self._micro, self._rank, self._replicas = micro, rank, replicas

    def __len__(self) -> int:
        return (self._count - self._first) // (self._micro * self._replicas)

    def __iter__(self) -> Iterator[list[int]]:
        step = self._micro * self._replicas
        for start in range(self._first, self._count - step + 1, step):
            begin = start + self._rank * self._micro
            yield list(range(begin, begin + self._micro))


def batches(
    dataset: Any, options: LoopOptions, first: int, count: int, rank: int, replicas: int
) -> Iterator[dict[str, Tensor]]:
    """Micro-batches of data-parallel rank `rank`, from sample `first` up to sample `count`.

    Every item is a dict of (b, s) int64 "tokens", "labels", "position_ids" and fp32 "loss_mask"
    on the host.
    """
    loader = torch.utils.data.DataLoader(
        dataset,
        batch_sampler=_Batches(first, count, options.micro_batch_size, rank, replicas),
        num_workers=options.num_workers,
        worker_init_fn=_outlive_sigterm,
        pin_memory=torch.cuda.is_available(),
        # A generator of its own: the loader draws a number, which must not come from training's.
        generator=torch.Generator(),
    )
    return iter(loader)


def _outlive_sigterm(worker: int) -> None:
    """A scheduler sends it to every process, and the rank still has to end its step."""
    del worker
    signal.signal(signal.SIGTERM, signal.SIG_IGN)


def to_device(batch: dict[str, Tensor], device: torch.device) -> dict[str, Tensor]:
    """The same batch on the device, without waiting for the copies."""
    return {key: value.to(device, non_blocking=True) for key, value in batch.items()}


def part_of_context(batch: dict[str, Tensor]) -> dict[str, Tensor]:
    """What this context-parallel rank reads of (b, s) tensors: (b, s / cp), two chunks of each row.

    Tensors named "attention_mask" are (b, 1, s, s) and lose queries.
    """
    if parallel_state.get_context_parallel_world_size() == 1:
        return batch
    # Left out, it is all ranks in 0.19.
    more: Any = {"cp_group": parallel_state.get_context_parallel_group()}
    if "is_hybrid_cp" in inspect.signature(get_batch_on_this_cp_rank).parameters:
        more["is_hybrid_cp"] = False  # 0.19 and newer: nothing is packed here
    return get_batch_on_this_cp_rank(dict(batch), **more)


def describe(origin: Source, padded: int) -> str:
    """One line on the vocabulary for the log and the summary."""
    return f"{origin.vocabulary.origin}; padded to {padded}"
