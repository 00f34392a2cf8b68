"""Hidden states, classifier rows and targets to measure on.

`random`: independent normal numbers, logits of variance 1. The softmax is nearly uniform, as at
the start of training.

`peaked`: a distribution made up to be as peaked as a trained language model's. Every id has a
frequency rank r, ids being in the order of their ranks up to noise, and all logits carry
log((r + 2.7)^-1.3). A passage of 128 tokens has 256 ids of its own, drawn by frequency; each token
takes 32 of them as candidates, whose logits are raised so that the k-th has probability in
proportion to k^-1.2 and only a few percent are left for the rest. The target is a candidate, drawn
by its probability. At V = 131072, D = 1024: loss 2.8, 27 probabilities per token above
2^-12, and 5% of the 128 x 256 tiles hold one if the vocabulary is sorted by average logit, 13% in
the order of the ids. No substitute for a snapshot: real classifier rows are not independent of
each other.

A snapshot is a file {e: (N, D), c: (V, D), t: (N,) int64}, or a folder of such files, one per
tensor-parallel rank, with vocab_start and vocab_size beside them (`--cce-capture` writes those).

Classifier rows are made in blocks, each with a generator of its own, so that they do not depend
on how the vocabulary is cut.

Legend: N tokens, D hidden size, V global vocabulary, V_local rows held here, K candidates.
"""

from __future__ import annotations

from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from launch.benchmark.catalogue import Shape

DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}

_ROWS_PER_BLOCK = 4096
# The made-up distribution; see above.
_RANK_OFFSET, _RANK_EXPONENT, _RANK_NOISE = 2.7, 1.3, 2.0
_PASSAGE, _PASSAGE_IDS = 128, 256
_CANDIDATES, _DECAY, _TOP_LOGIT = 32, 1.2, 5.0


@dataclass(frozen=True, slots=True)
class Inputs:
    """Tensors of one problem on its device, all but `target` in the measured dtype.

    Attributes:
        input: (N, D).
        weight: (V_local, D).
        target: (N,) int64, global ids.
        bias: (V_local,).
    """

    input: Tensor
    weight: Tensor
    target: Tensor
    bias: Tensor


@dataclass(frozen=True, slots=True)
class Snapshot:
    """What `--snapshot` names, on the CPU.

    Attributes:
        name: of the file or folder, for the record.
        input, weight, target: (N, D), (V, D), (N,) int64 without ignored tokens.
    """

    name: str
    input: Tensor
    weight: Tensor
    target: Tensor

    @property
    def shape(self) -> Shape:
        """Sizes."""
        tokens, hidden = self.input.shape
        return Shape(tokens, hidden, self.weight.shape[0])


def make(
    kind: str, shape: Shape, rows: tuple[int, int], dtype: str, device: torch.device, seed: int
) -> Inputs:
    """Made-up inputs; the same numbers for every way to cut the vocabulary.

    Args:
        kind: "random" or "peaked".
        shape: sizes, V being global.
        rows: [start, stop) of the classifier that is held here.
        dtype: name.
        device: where to.
        seed: of the generators.
    """
    generator = torch.Generator(device).manual_seed(seed)
    made: dict[str, Any] = {"generator": generator, "device": device}
    peaks = None
    if kind == "random":
        hidden = torch.randn(shape.tokens, shape.hidden, **made)
        target = torch.randint(0, shape.vocab, (shape.tokens,), **made)
    else:
        hidden = torch.zeros(shape.tokens, shape.hidden, device=device)
        peaks = _peaks(shape, made)
        target = peaks.target
    start, stop = rows
    weight = torch.empty(stop - start, shape.hidden, dtype=DTYPES[dtype], device=device)
    bias = torch.empty(stop - start, dtype=DTYPES[dtype], device=device)
    for first in range(0, shape.vocab, _ROWS_PER_BLOCK):
        last = min(first + _ROWS_PER_BLOCK, shape.vocab)
        generator.manual_seed(seed + 1 + first // _ROWS_PER_BLOCK)
        block = torch.randn(last - first, shape.hidden, **made).div_(shape.hidden**0.5)
        offsets = torch.randn(last - first, **made).mul_(0.1)
        if peaks is not None:
            _add_candidates(hidden, block, first, peaks)
            block[:, 0] = peaks.log_frequency[first:last]
        low, high = max(first, start), min(last, stop)
        if low < high:
            weight[low - start : high - start] = block[low - first : high - first]
            bias[low - start : high - start] = offsets[low - first : high - first]
    if peaks is not None:
        hidden[:, 0] = 1.0
    return Inputs(hidden.to(DTYPES[dtype]), weight, target, bias)


@dataclass(frozen=True, slots=True)
class _Peaks:
    """log_frequency (V,); ids and boost (N, K): candidates, what is added to their logits;
    target (N,)."""

    log_frequency: Tensor
    ids: Tensor
    boost: Tensor
    target: Tensor


def _peaks(shape: Shape, made: dict[str, Any]) -> _Peaks:
    device = made["device"]
    logs = (torch.arange(shape.vocab, device=device) + _RANK_OFFSET).log()
    noise = torch.randn(shape.vocab, **made).mul_(_RANK_NOISE)
    id_of_rank = (logs + noise).argsort(stable=True)
    log_frequency = torch.empty_like(logs)
    log_frequency[id_of_rank] = -_RANK_EXPONENT * logs

    passages = -(-shape.tokens // _PASSAGE)
    # Ranks by the inverse of the distribution function of a density in proportion to frequency.
    power = 1 - _RANK_EXPONENT
    low, high = _RANK_OFFSET**power, (shape.vocab + _RANK_OFFSET) ** power
    drawn = torch.rand((passages, _PASSAGE_IDS), **made).mul_(high - low).add_(low)
    ranks = drawn.pow_(1 / power).sub_(_RANK_OFFSET).long().clamp_(0, shape.vocab - 1)
    chosen = torch.rand((shape.tokens, _PASSAGE_IDS), **made).argsort(1)[:, :_CANDIDATES]
    passage = torch.arange(shape.tokens, device=device)[:, None] // _PASSAGE
    ids = id_of_rank[ranks[passage, chosen]]

    repeats = (ids[:, :, None] == ids[:, None, :]).tril(-1).any(-1)
    places = torch.arange(1, _CANDIDATES + 1, device=device)
    wanted = (_TOP_LOGIT - _DECAY * places.log()).expand(ids.shape)
    boost = torch.where(repeats, 0.0, wanted - log_frequency[ids])
    weights = torch.where(repeats, 0.0, wanted.exp())
    place = torch.multinomial(weights, 1, generator=made["generator"])
    return _Peaks(log_frequency, ids, boost, ids.gather(1, place).squeeze(1))


def _add_candidates(hidden: Tensor, block: Tensor, first: int, peaks: _Peaks) -> None:
    """hidden += boost * row of each candidate in this block, rows scaled to a product of 1."""
    ids, boost = peaks.ids, peaks.boost
    token, place = ((ids >= first) & (ids < first + block.shape[0])).nonzero(as_tuple=True)
    for part in torch.arange(len(token), device=token.device).split(_ROWS_PER_BLOCK):
        rows = block[ids[token[part], place[part]] - first]
        rows[:, 0] = 0  # where the frequencies stand
        scale = boost[token[part], place[part]] / rows.square().sum(1).clamp_(min=1e-12)
        hidden.index_add_(0, token[part], rows * scale[:, None])


def load(path: str) -> Snapshot:
    """Read a snapshot; tokens whose target is negative (ignored) are left out.

    Raises:
        ValueError: no such file, other contents, or files of ranks that do not fit together.
    """
    where = Path(path)
    files = sorted(where.glob("*.pt")) if where.is_dir() else [where]
    if not files or not files[0].is_file():
        raise ValueError(f"--snapshot: expected a file or a folder of .pt files, got {path!r}")
    parts = sorted((_read(file) for file in files), key=lambda part: part["vocab_start"])
    position, vocab = 0, parts[0]["vocab_size"]
    for part in parts:
        if (part["vocab_start"], part["vocab_size"]) != (position, vocab):
            raise ValueError(
                f"--snapshot: expected rows [{position}, ...) of {vocab} next, got a file with "
                f"[{part['vocab_start']}, ...) of {part['vocab_size']} in {path!r}"
            )
        if not torch.equal(part["t"], parts[0]["t"]):
            raise ValueError(f"--snapshot: expected the same targets in all files of {path!r}")
        position += part["c"].shape[0]
    if position != vocab:
        raise ValueError(
            f"--snapshot: expected all {vocab} rows of the vocabulary, got {position}: give the "
            "folder with the files of all tensor-parallel ranks"
        )
    counted = parts[0]["t"] >= 0
    if not counted.any():
        raise ValueError(f"--snapshot: expected tokens with a target, got none in {path!r}")
    weight = torch.cat([part["c"] for part in parts]) if len(parts) > 1 else parts[0]["c"]
    hidden = parts[0]["e"][counted] * parts[0].get("logit_scale", 1.0)
    return Snapshot(where.name, hidden, weight, parts[0]["t"][counted])


def _read(file: Path) -> dict[str, Any]:
    try:
        part = torch.load(file, map_location="cpu", weights_only=True, mmap=True)
    except Exception as error:  # torch.load raises many kinds
        reason = str(error).splitlines()[0]
        raise ValueError(f"--snapshot: cannot read {str(file)!r}: {reason}") from error
    if not isinstance(part, dict) or not all(isinstance(part.get(key), Tensor) for key in "ect"):
        raise ValueError(f"--snapshot: expected tensors e, c and t in {str(file)!r}")
    e, c, t = (part[key] for key in "ect")
    dims = (e.dim(), c.dim(), t.dim())
    if dims != (2, 2, 1) or e.shape[1] != c.shape[1] or len(e) != len(t):
        raise ValueError(
            f"--snapshot: expected e (N, D), c (V, D) and t (N,) in {str(file)!r}, got "
            f"{tuple(e.shape)}, {tuple(c.shape)} and {tuple(t.shape)}"
        )
    part.setdefault("vocab_start", 0)
    part.setdefault("vocab_size", len(c))
    return part


def take(
    snapshot: Snapshot, tokens: int, rows: tuple[int, int], dtype: str, device: torch.device
) -> Inputs:
    """The first tokens of a snapshot, and the classifier's rows that are held here."""
    weight = snapshot.weight[rows[0] : rows[1]]
    return Inputs(
        snapshot.input[:tokens].to(device, DTYPES[dtype]),
        weight.to(device, DTYPES[dtype]),
        snapshot.target[:tokens].to(device),
        torch.zeros(weight.shape[0], dtype=DTYPES[dtype], device=device),
    )
