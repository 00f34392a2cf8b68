"""What a measurement leaves behind: one JSON object per line, and tables made of them.

Schema 3. A record is the measurement of one implementation on one case:

| key | value |
|---|---|
| `schema` | 3 |
| `kind` | "timing" (of `run`) or "profile" (of `profile`) |
| `date`, `commit` | UTC, ISO 8601; revision of the checkout, "-dirty" if changed, or null |
| `hardware` | `name` of the GPU or CPU, `count` of GPUs seen, `driver`, `cuda` |
| `versions` | `python`, `torch`, `triton`, `cce_tp`, and the implementation's own package |
| `suite`, `model` | names, or "" |
| `implementation` | a name of `catalogue.IMPLEMENTATIONS` |
| `status` | "ok", "failed" (the gate), "not available", "out of memory" or "error" |
| `reason` | one line where the status is not "ok", else null |
| `shape` | `tokens` N, `hidden` D, `vocab` V, `rows` of it per rank (at most) |
| `dtype`, `tf32` | of inputs and products |
| `inputs` | `kind` ("random", "peaked", "snapshot"), `seed` or `snapshot` (its name) |
| `options` | those that are not at their defaults, see `catalogue.Options` |
| `shard` | [r, W]: rank r's rows of W, measured without a group; or null |
| `played` | null, or of a shard of a group that one process plays: see below |
| `gate` | `errors` by name (null: not finite), `limits`: see `reference.py`; or null |
| `forward`, `both` | timings of the forward pass without gradients, and of forward + backward |
| `profile` | the kernels of a step, see below; null in a timing |
| `host` | what a call keeps the host, see below; or null |
| `ranks` | null for one rank; else see below |

A timing is {`median_ms`, `low_ms`, `high_ms` (10% and 90% quantiles), `runs`, `ranks_ms` (median
of each rank)}, or null. `forward` and `both` also have `gemm` (the timing of E @ C^T of the same
rows, run once after each run of the step, or null), `gemms`, `gemms_low` and `gemms_high` (median,
10% and 90% quantiles of the ratios of a run of the step to the product after it; or null), and
`extra_bytes`.

`extra_bytes` is the peak of the CUDA caching allocator during a warm step, less what was allocated
before it (the inputs) and less the gradients that the step leaves (dE, dC, the bias's); null on a
CPU. What libraries allocate outside of the allocator, and cuBLAS's workspace, which the first call
leaves, are not in it.

`host` has `forward_us` and `backward_us`, and `empty_forward_us` and `empty_backward_us` of a
`torch.autograd.Function` of the same operands that computes nothing; these are absent in older
files.

`profile` is of forward + backward, or of forward alone with the option `forward_only`. All are
microseconds and medians over `runs` runs under the profiler: `kernels` (by `name`: `calls` and `us`
per run, `gemms`), `kernels_us` (their sum), `span_us` (from the start of the first to the end of
the last), `step_us` (from the start of the step to its end, by CUDA events; without a GPU by the
wall clock), `idle_us` (of it, when no kernel ran), `gemm_us` (the kernels of one E @ C^T, which ran
once after each run; or null) and `gaps` (the largest of the run whose idle time is the median:
`at_us` from the step's start, `us`, names of the kernels `before` and `after`). Under a group they
are rank 0's. Without a GPU operators stand for kernels.
`played`: `ids` ("natural", or "interleaved": rank r holds the ids r, r + W, ...), and of these rows
`tiles_kept` (share of the tiles) and `far_mass` (mass per token that is left), null but for the far
field. Times are those of the rank's own work, the results of its collectives being at hand; the
loss is the group's, and the error of dE that of the sum over the ranks, in fp32. Absent in
older files.

`ranks`: `world_size` (how many hold the vocabulary between them), `processes` (how many measure
together: `processes / world_size` teams, all at once), `backend`, `sequence_parallel`,
`environment` (the variables that steer NCCL and its overlap with kernels); and if there
are several to a team `alone_forward` and `alone_both` (timings of the same rows without
collectives), `exposed_forward_ms` and `exposed_both_ms` (what the collectives add), and
`collectives_ms` (of each collective of this library by itself, by name).

In schema 2 `gemms` was the step's median over the product's, which may lie outside of the quantiles
of the ratios.

Schema 1 measured the product by itself, before and after each implementation. It had `gemm` beside
`forward` and `both` (`before`, `after`: timings, `ms`: mean of their medians) and `gemms` was over
that mean. `read` gives such records the fields of schema 3 and leaves theirs: the product's timing
has `median_ms` alone, and `gemms_low` and `gemms_high` are the step's quantiles over it.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

SCHEMA = 3
_READABLE = (1, 2, SCHEMA)

Record = dict[str, Any]


def clean(value: Any) -> Any:
    """The same with null for numbers that JSON does not have."""
    if isinstance(value, dict):
        return {key: clean(each) for key, each in value.items()}
    if isinstance(value, (list, tuple)):
        return [clean(each) for each in value]
    if isinstance(value, float) and not math.isfinite(value):
        return None
    return value


def append(path: Path, record: Record) -> None:
    """Add a line to a file; it is on disk when this returns."""
    with open(path, "a", encoding="utf-8") as file:
        file.write(json.dumps(clean(record), allow_nan=False) + "\n")


def read(paths: Sequence[str]) -> list[list[Record]]:
    """The records of each file, those of schema 1 with the fields of schema 3.

    Raises:
        ValueError: no such file, or a line that is no record of these schemas.
    """
    found = []
    for path in paths:
        if not Path(path).is_file():
            raise ValueError(f"FILE: expected a file of records, got {path!r}, which is none")
        lines = Path(path).read_text(encoding="utf-8").splitlines()
        records = [_parse(path, number, line) for number, line in enumerate(lines, start=1) if line]
        if not records:
            raise ValueError(f"FILE: expected records, got none in {path!r}")
        found.append(records)
    return found


def _parse(path: str, number: int, line: str) -> Record:
    try:
        record = json.loads(line)
    except json.JSONDecodeError:
        record = None
    if not isinstance(record, dict) or record.get("schema") not in _READABLE:
        raise ValueError(f"FILE: expected a record of schema {SCHEMA}, got line {number} of {path}")
    return _from_first(record) if record["schema"] == 1 else record


def _from_first(record: Record) -> Record:
    """A record of schema 1 with the fields of schema 3."""
    record |= {"kind": "timing", "profile": None}
    unit = (record["gemm"] or {}).get("ms")
    for timing in (record["forward"], record["both"]):
        if timing is None:
            continue
        timing["gemm"] = {"median_ms": unit} if unit else None
        for name in ("low", "high"):
            timing[f"gemms_{name}"] = timing[f"{name}_ms"] / unit if unit else None
    return record


# What this library alone can be told: about memory, which leaves the problem as it is.
_OF_MEMORY = ("workspace_mib", "keep_logits_mib", "keep_logits_in_grad")


def without_memory_options(record: Record) -> Record:
    """The same with those options in the implementation's name instead, so that it stands beside
    others of the problem."""
    options = {name: value for name, value in record["options"].items() if name in _OF_MEMORY}
    if not options:
        return record
    words = option_words({**record, "options": options})
    rest = {name: value for name, value in record["options"].items() if name not in options}
    name = ", ".join([record["implementation"], *words])
    return {**record, "options": rest, "implementation": name}


def case_key(record: Record, *, without: Iterable[str] = ()) -> str:
    """What makes two records measurements of one case, whatever the implementation, as text."""
    parts = {
        **{name: record["shape"][name] for name in ("tokens", "hidden", "vocab")},
        **{name: record[name] for name in ("suite", "dtype", "tf32", "inputs", "options", "shard")},
        "played": played_ids(record),
        "hardware": record["hardware"]["name"],
        "world_size": (record["ranks"] or {}).get("world_size", 1),
        "sequence_parallel": (record["ranks"] or {}).get("sequence_parallel", False),
    }
    for name in without:
        del parts[name]
    return json.dumps(parts, sort_keys=True)


def measurement_key(record: Record) -> str:
    """What makes two records repetitions of one measurement, of one revision, as text."""
    parts = [case_key(record), (record["ranks"] or {}).get("processes", 1)]
    parts += [record[name] for name in ("kind", "implementation", "commit", "versions")]
    return json.dumps([*parts, record["host"] is not None], sort_keys=True)


def finished(path: Path) -> set[str]:
    """`measurement_key` of all that a file has a record of; an unfinished last line is cut off.

    What was not available may be by now, and does not count. What failed has no host's time and
    counts with and without.

    Raises:
        ValueError: a line that is no record.
    """
    if not path.exists():
        return set()
    text = path.read_bytes()
    whole = text[: text.rfind(b"\n") + 1]
    if len(whole) < len(text):
        with open(path, "r+b") as file:
            file.truncate(len(whole))
    found: set[str] = set()
    for number, line in enumerate(whole.decode().splitlines(), start=1):
        record = _parse(str(path), number, line)
        if record["status"] == "not available":
            continue
        found.add(measurement_key(record))
        if record["status"] != "ok":
            found.add(measurement_key(record | {"host": {}}))
    return found


def played_ids(record: Record) -> str | None:
    """How the ids lie on the ranks of a group that was played; None: it was not."""
    return (record.get("played") or {}).get("ids")


def dtype_label(record: Record) -> str:
    """Such as "bf16" or "fp32 (TF32)"."""
    return record["dtype"] + (" (TF32)" if record["tf32"] else "")


def case_label(record: Record) -> str:
    """A case in words: shape, dtype, inputs, options."""
    shape = record["shape"]
    words = [f"{shape['tokens']} x {shape['hidden']} x {shape['vocab']}", dtype_label(record)]
    if record["model"]:
        words.insert(0, record["model"])
    words.append(record["inputs"].get("snapshot") or record["inputs"]["kind"])
    if record["shard"]:
        words.append("rows of rank {} of {}".format(*record["shard"]))
    if played_ids(record):
        words.append(f"{played_ids(record)} ids in a group")
    words += option_words(record)
    if record["ranks"]:
        words.append(ranks_label(record))
    return ", ".join(words)


def option_words(record: Record) -> list[str]:
    """The options that were asked for, such as "softcap=30"."""
    words = {True: "{}", False: "no {}"}
    return [
        words[value].format(name) if isinstance(value, bool) else f"{name}={value:g}"
        for name, value in record["options"].items()
    ]


def ranks_label(record: Record) -> str:
    """Such as "2 ranks, nccl, sequence parallel"."""
    ranks = record["ranks"] or {"world_size": 1, "backend": ""}
    words = ["1 rank" if ranks["world_size"] == 1 else f"{ranks['world_size']} ranks"]
    words.append(ranks["backend"])
    words.append("sequence parallel" if ranks.get("sequence_parallel") else "")
    return ", ".join(word for word in words if word)


def source_label(record: Record) -> str:
    """Where a record was measured: hardware and versions."""
    versions = record["versions"]
    found = f"{record['hardware']['name']}, torch {versions['torch']}"
    return found + (f", Triton {versions['triton']}" if versions["triton"] else "")
