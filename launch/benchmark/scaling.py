"""How the loss scales with the ranks that hold the vocabulary: a table of records."""

from __future__ import annotations

from collections.abc import Sequence

from launch.benchmark.records import Record, case_key, option_words, ranks_label

_HEADERS = (
    *("shape", "implementation", "ranks", "forward ms", "of 1/W", "forward + backward ms"),
    *("of 1/W", "exposed ms", "exposed", "collectives ms", "hidden ms"),
)


def is_scaling(records: Sequence[Record]) -> bool:
    """Whether some were measured over several ranks."""
    return any(_ranks(record) > 1 for record in records)


def markdown(records: Sequence[Record]) -> str:
    """Time over W ranks against 1/W of the time on one; exposed and hidden communication.

    Exposed, collectives and hidden are of forward + backward (of forward alone, where there is no
    backward pass): what the collectives add to the time, what they take by themselves, and the
    part of it that is not added.
    """
    from tabulate import tabulate

    rows = [_row(record, records) for record in records if record["forward"] is not None]
    return tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True)


def share_of_one(record: Record, every: Sequence[Record], key: str) -> float | None:
    """W times a timing ("forward" or "both") over that on one rank; None without such a record.

    The last record of one rank counts, whether its ranks hold parts of the tokens or not.
    """
    without = ("world_size", "sequence_parallel")
    case = case_key(record, without=without)
    ones = [
        other
        for other in every
        if _ranks(other) == 1
        and other[key] is not None
        and other["implementation"] == record["implementation"]
        and case_key(other, without=without) == case
    ]
    if not ones or record[key] is None:
        return None
    return _ranks(record) * record[key]["median_ms"] / ones[-1][key]["median_ms"]


def of_pass(collectives_ms: dict[str, float], *, backward: bool) -> float:
    """Milliseconds of all collectives of a forward pass, or of forward and backward together."""
    total = collectives_ms["all-gather of statistics"]
    total += collectives_ms.get("all-gather of E", 0.0) * (2 if backward else 1)
    if backward:
        total += collectives_ms.get("all-reduce of dE", 0.0)
        total += collectives_ms.get("reduce-scatter of dE", 0.0)
    return total


def _ranks(record: Record) -> int:
    return (record["ranks"] or {}).get("world_size", 1)


def _row(record: Record, every: Sequence[Record]) -> list[str]:
    shape, ranks = record["shape"], record["ranks"] or {}
    cells = [
        f"{shape['tokens']} x {shape['hidden']} x {shape['vocab']}",
        ", ".join([record["implementation"], *option_words(record)]),
        ranks_label(record),
    ]
    for key in ("forward", "both"):
        timing, share = record[key], share_of_one(record, every, key)
        cells.append("-" if timing is None else f"{timing['median_ms']:.3f}")
        cells.append("-" if share is None or _ranks(record) == 1 else f"{share:.3f}")
    backward = record["both"] is not None
    key = "both" if backward else "forward"
    exposed = ranks.get(f"exposed_{key}_ms")
    if exposed is None:
        return [*cells, "-", "-", "-", "-"]
    cells += [f"{exposed:.3f}", f"{100 * exposed / record[key]['median_ms']:.1f}%"]
    if not ranks["collectives_ms"]:
        return [*cells, "-", "-"]
    total = of_pass(ranks["collectives_ms"], backward=backward)
    return [*cells, f"{total:.3f}", f"{max(0.0, total - max(0.0, exposed)):.3f}"]
