"""The shards of one vocabulary against the whole, and the slowest of them: a table of records."""

from __future__ import annotations

from collections.abc import Sequence

from launch.benchmark.records import Record, case_key, case_label, played_ids

_HEADERS = (
    *("case", "implementation", "ids", "ranks", "forward ms, slowest", "of 1/W"),
    *("forward + backward ms, slowest", "fastest", "of 1/W", "tiles kept"),
)


def share_of_whole(record: Record, every: Sequence[Record], key: str = "both") -> float | None:
    """W times a timing ("forward" or "both") of a shard over that of the whole vocabulary.

    The whole is the last record of the same case without a shard; None without one.
    """
    if not record["shard"] or not record[key]:
        return None
    without = ("shard", "played")
    case = case_key(record, without=without)
    wholes = [
        other
        for other in every
        if other[key]
        and not other["shard"]
        and other["implementation"] == record["implementation"]
        and case_key(other, without=without) == case
    ]
    if not wholes:
        return None
    return record[key]["median_ms"] * record["shard"][1] / wholes[-1][key]["median_ms"]


def critical_paths(records: Sequence[Record], every: Sequence[Record]) -> str:
    """The slowest rank of each group that was played, beside the fastest and 1/W of the whole.

    A group waits for its slowest rank. The last record of each rank counts.

    Args:
        records: with `played`.
        every: where the whole is looked for.
    """
    from tabulate import tabulate

    groups: dict[tuple[str, str, int], dict[int, Record]] = {}
    for record in records:
        if record["forward"] is not None:
            rank, ranks = record["shard"]
            key = (case_key(record, without=("shard",)), record["implementation"], ranks)
            groups.setdefault(key, {})[rank] = record
    rows = [_row(list(group.values()), every) for group in groups.values()]
    return tabulate(rows, _HEADERS, tablefmt="github", disable_numparse=True)


def _row(group: list[Record], every: Sequence[Record]) -> list[str]:
    first, ranks = group[0], group[0]["shard"][1]
    cells = [
        case_label({**first, "shard": None, "played": None}),
        first["implementation"],
        played_ids(first) or "",
        str(ranks) if len(group) == ranks else f"{len(group)} of {ranks}",
    ]
    for key in ("forward", "both"):
        timed = sorted((r for r in group if r[key]), key=lambda r: r[key]["median_ms"])
        if not timed:
            cells += ["-", "-", "-"]
            continue
        slowest, share = timed[-1], share_of_whole(timed[-1], every, key)
        cells.append(f"{slowest[key]['median_ms']:.3f} (rank {slowest['shard'][0]})")
        cells += [f"{timed[0][key]['median_ms']:.3f}"] if key == "both" else []
        cells.append("-" if share is None else f"{share:.2f}")
    kept = [each for each in (r["played"]["tiles_kept"] for r in group) if each is not None]
    cells.append(f"{100 * min(kept):.1f}% to {100 * max(kept):.1f}%" if kept else "-")
    return cells
