"""Records as tables, for the terminal and for Markdown."""

from __future__ import annotations

from collections.abc import Callable, Sequence

from launch.benchmark import scaling
from launch.benchmark.records import Record, case_key, case_label, played_ids, source_label
from launch.benchmark.shards import critical_paths, share_of_whole

_HEADERS = (
    *("implementation", "gemm ms", "forward", "forward + backward", "MiB"),
    *("error of the loss", "of dE", "of dC", "note"),
)

# Suites whose question is which implementation; "" holds the cases of no suite.
_COMPARISONS = ("", "models", "bars", "host")


def terminal(records: Sequence[Record]) -> str:
    """One table of one case; of profiles one for each implementation."""
    from tabulate import tabulate

    if records[0]["kind"] == "profile":
        return "\n\n".join(_account(record, "simple") for record in records)
    rows = [_row([record], [record]) for record in records]
    return tabulate(rows, headers=_HEADERS, disable_numparse=True)


def markdown(files: Sequence[Sequence[Record]]) -> str:
    """A section per suite; values of several files stand side by side, in their order.

    Suites that compare implementations have a table per case, sweeps one with a line per case and
    implementation. What is not available is said below a table. Records of several ranks have a
    table of how they scale as well, those of a group that was played one of its slowest ranks.
    Profiles come last, each by itself.
    """
    given = [record for records in files for record in records]
    every = [record for record in given if record["kind"] == "timing"]
    profiles = [record for record in given if record["kind"] == "profile"]
    lines: list[str] = []
    for suite in dict.fromkeys(record["suite"] for record in every):
        here = [record for record in every if record["suite"] == suite]
        played = [record for record in here if played_ids(record)]
        cases = _cases([record for record in here if not played_ids(record)])
        lines += [f"## {suite or 'cases'}", ""]
        if suite in _COMPARISONS:
            for case in cases:
                lines += [f"### {case_label(case[0])}", "", *_table([case], every)]
        elif cases:
            lines += _table(cases, every)
        if played:
            lines += ["### Rank by rank", "", *_table(_cases(played), every)]
            lines += ["Critical paths:", "", critical_paths(played, every), ""]
        if scaling.is_scaling(here):
            lines += ["Over several ranks:", "", scaling.markdown(here), ""]
    if profiles:
        lines += ["## profiles", ""]
    for record in profiles:
        lines += [f"### {case_label(record)}", "", _source([record]), ""]
        lines += [_account(record, "github"), ""]
    return "\n".join(lines)


def _cases(records: Sequence[Record]) -> list[list[Record]]:
    keys = dict.fromkeys(case_key(record) for record in records)
    return [[record for record in records if case_key(record) == key] for key in keys]


def _table(cases: Sequence[Sequence[Record]], every: Sequence[Record]) -> list[str]:
    from tabulate import tabulate

    rows, missing = [], {}
    for case in cases:
        for name in dict.fromkeys(record["implementation"] for record in case):
            same = [record for record in case if record["implementation"] == name]
            if all(record["status"] == "not available" for record in same):
                missing[name] = same[0]["reason"]
                continue
            label = [case_label(same[0])] if len(cases) > 1 else []
            rows.append(label + _row(same, every))
    headers = (["case"] if len(cases) > 1 else []) + list(_HEADERS)
    lines = [_source([record for case in cases for record in case]), ""]
    lines += [tabulate(rows, headers, tablefmt="github", disable_numparse=True), ""]
    if missing:
        listed = "; ".join(f"{name} ({reason})" for name, reason in missing.items())
        lines += [f"Not available: {listed}.", ""]
    return lines


def _source(records: Sequence[Record]) -> str:
    sources = dict.fromkeys(source_label(record) for record in records)
    commits = dict.fromkeys(record["commit"] or "no revision" for record in records)
    days = dict.fromkeys(record["date"][:10] for record in records)
    packages = dict.fromkeys(
        f"{name} {found}"
        for record in records
        for name, found in record["versions"].items()
        if name not in ("python", "torch", "triton", "cce_tp") and found
    )
    listed = ("; ".join(sources), ", ".join(days), ", ".join(each[:16] for each in commits))
    return "; ".join([*listed, *packages])


def _account(record: Record, form: str) -> str:
    """The kernels of a step and its idle gaps, as two tables."""
    from tabulate import tabulate

    name, found = record["implementation"], record["profile"]
    if found is None:
        return f"{name}: {record['status']}: {record['reason']}"
    unit = found["gemm_us"]

    def line(label: str, us: float, calls: str = "") -> list[str]:
        return [_cut(label), calls, f"{us:,.1f}", _number(us / unit if unit else None)]

    rows = [line(each["name"], each["us"], f"{each['calls']:g}") for each in found["kernels"]]
    rows.append(line("all kernels", found["kernels_us"]))
    rows.append(line("first kernel's start to last one's end", found["span_us"]))
    rows.append(line("the step, from start to end", found["step_us"]))
    rows.append(line("of it idle", found["idle_us"]))
    headers = (f"kernels of {name}", "calls", "us", "gemms")
    gaps = [
        [f"{gap['us']:,.1f}", f"{gap['at_us']:,.1f}", _cut(gap["before"]), _cut(gap["after"])]
        for gap in found["gaps"]
    ]
    about = f"{name}: {found['runs']} runs"
    about += f", gemm {unit:,.1f} us" if unit else ", no gemm"
    kernels = tabulate(rows, headers, tablefmt=form, disable_numparse=True)
    idle = tabulate(
        gaps,
        ("idle us", "at us", "kernel before", "kernel after"),
        tablefmt=form,
        disable_numparse=True,
    )
    return f"{about}\n\n{kernels}\n\n{idle}"


def _cut(name: str) -> str:
    """A name that fits into a cell: kernels' differ at either end."""
    return name if len(name) <= 64 else f"{name[:40]}...{name[-21:]}"


def _row(records: Sequence[Record], every: Sequence[Record]) -> list[str]:
    """One implementation on one case; several records are repetitions."""

    def cell(text: Callable[[Record], str]) -> str:
        texts = [text(record) for record in records]
        return texts[0] if len(set(texts)) == 1 else " / ".join(texts)

    def error(name: str) -> Callable[[Record], str]:
        return lambda record: _error(record, name)

    return [
        records[0]["implementation"],
        cell(_unit),
        cell(lambda record: _timing(record["forward"])),
        cell(lambda record: _timing(record["both"])),
        cell(_memory),
        *(cell(error(name)) for name in ("loss", "input_grad", "weight_grad")),
        cell(lambda record: _note(record, every)),
    ]


def _number(value: float | None) -> str:
    if value is None:
        return "-"
    return f"{value:.3g}" if value < 1 else f"{value:.2f}"


def _unit(record: Record) -> str:
    """Milliseconds of the product between the runs of forward + backward, or else of forward."""
    timing = record["both"] or record["forward"]
    return _number(timing and timing["gemm"] and timing["gemm"]["median_ms"])


def _timing(timing: dict | None) -> str:
    """Gemms with their spread; milliseconds where there is no gemm to compare with."""
    if timing is None:
        return "-"
    if timing["gemms"] is None:
        return f"{_number(timing['median_ms'])} ms"
    gemms, low, high = (_number(timing[name]) for name in ("gemms", "gemms_low", "gemms_high"))
    return f"{gemms} ({low}-{high})"


def _memory(record: Record) -> str:
    timing = record["both"] or record["forward"]
    if timing is None or timing["extra_bytes"] is None:
        return "-"
    return f"{timing['extra_bytes'] / 2**20:,.0f}"


def _error(record: Record, name: str) -> str:
    if record["gate"] is None or name not in record["gate"]["errors"]:
        return "-"
    value = record["gate"]["errors"][name]
    return "not finite" if value is None else f"{value:.1e}"


def _note(record: Record, every: Sequence[Record]) -> str:
    notes = []
    if record["status"] != "ok":
        notes.append(f"{record['status']}: {record['reason']}")
    apart = record.get("gemm") or {}  # of schema 1 alone
    if apart.get("before") and apart.get("after"):
        drift = apart["after"]["median_ms"] / apart["before"]["median_ms"] - 1
        notes.append(f"gemm measured apart, drift {100 * drift:+.0f}%")
    if record["host"]:
        us, empty = (
            " + ".join(f"{record['host'][name]:.0f}" for name in names if record["host"].get(name))
            for names in (
                ("forward_us", "backward_us"),
                ("empty_forward_us", "empty_backward_us"),
            )
        )
        notes.append(f"host {us} us" + (f", an empty function {empty}" if empty else ""))
    ranks = record["ranks"] or {}
    if "exposed_forward_ms" in ranks:
        exposed = [ranks["exposed_forward_ms"], ranks["exposed_both_ms"]]
        shown = " and ".join(f"{each:.2f}" for each in exposed if each is not None)
        notes.append(f"the group adds {shown} ms")
        notes += [f"{name} alone {ms:.2f} ms" for name, ms in ranks["collectives_ms"].items()]
    kept = (record.get("played") or {}).get("tiles_kept")
    if kept is not None:
        notes.append(f"keeps {100 * kept:.1f}% of its tiles")
    share = share_of_whole(record, every)
    if share is not None:
        notes.append(f"{share:.2f} of 1/{record['shard'][1]} of the whole")
    return "; ".join(notes)
