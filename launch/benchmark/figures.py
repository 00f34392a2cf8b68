"""Figures of records. Colours are Okabe and Ito's, told apart by every kind of colour vision;
each implementation has its colour and marker in all figures."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from launch.benchmark.catalogue import IMPLEMENTATIONS
from launch.benchmark.records import (
    Record,
    case_key,
    case_label,
    dtype_label,
    source_label,
    without_memory_options,
)
from launch.benchmark.roofline import share_of_roofline

_COLOURS = ("#0072B2", "#D55E00", "#009E73", "#CC79A7", "#E69F00", "#56B4E9", "#000000")
_MARKERS = ("o", "s", "^", "D", "v", "P", "X")


def draw(files: Sequence[Sequence[Record]], folder: Path, form: str) -> list[str]:
    """Draw what the records allow.

    Args:
        files: records by file.
        folder: where to; made if it is not there.
        form: "png" or "svg".

    Returns:
        A line for each figure: its path, or why there is none of its kind.
    """
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    # Of one process: what ranks take together belongs beside 1/W of one, which `table` does.
    records = [
        record
        for each in files
        for record in each
        if record["status"] == "ok" and not record["ranks"]
    ]
    folder.mkdir(parents=True, exist_ok=True)
    kinds: dict[str, tuple[Callable[[list[Record]], list[Any]], str]] = {
        "error": (_error_figures, "a case with forward + backward and the error of dE"),
        "memory": (_memory_figures, "cases that differ in V, with memory (measured on CUDA)"),
        "tokens": (_token_figures, "cases that differ in N"),
        "roofline": (_roofline_figures, "cases on hardware whose peak rates are known"),
    }
    lines = []
    for kind, (make, needs) in kinds.items():
        made = make(records)
        for number, figure in enumerate(made):
            path = folder / f"{kind}{f'-{number + 1}' if len(made) > 1 else ''}.{form}"
            figure.savefig(path, dpi=130)
            lines.append(str(path))
        if not made:
            lines.append(f"no figure '{kind}': it needs {needs}")
    pyplot.close("all")
    return lines


def _style(name: str) -> dict[str, Any]:
    plain, *options = name.split(", ")
    known = plain in IMPLEMENTATIONS
    place = list(IMPLEMENTATIONS).index(plain) if known else len(IMPLEMENTATIONS)
    laps, colour = divmod(place, len(_COLOURS))
    style = {"color": _COLOURS[colour], "marker": _MARKERS[(colour + 3 * laps) % len(_MARKERS)]}
    return {**style, "fillstyle": "none"} if options else style


def _axes(title: str, source: str) -> tuple[Any, Any]:
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(8, 4.8), layout="constrained")
    axes.set_title(f"{title}\n{source}", fontsize=9)
    axes.grid(alpha=0.3)
    return figure, axes


def _legend(axes: Any) -> None:
    axes.legend(fontsize=7, loc="center left", bbox_to_anchor=(1.0, 0.5), frameon=False)


def _groups(records: list[Record], key: Callable[[Record], str]) -> list[list[Record]]:
    groups: dict[str, list[Record]] = {}
    for record in records:
        groups.setdefault(key(record), []).append(record)
    return list(groups.values())


def _error_figures(records: list[Record]) -> list[Any]:
    """Forward + backward in gemms against the error of dE, one figure for each case."""
    chosen = [
        without_memory_options(record)
        for record in records
        if record["both"]
        and record["both"]["gemms"]
        and record["gate"]["errors"].get("input_grad")
        and not record["shard"]
        and record["suite"] in ("", "models", "bars")
    ]
    from matplotlib.ticker import NullFormatter

    figures = []
    for group in _groups(chosen, case_key):
        figure, axes = _axes(case_label(group[0]), source_label(group[0]))
        for record in group:
            axes.loglog(
                record["gate"]["errors"]["input_grad"],
                record["both"]["gemms"],
                linestyle="",
                label=record["implementation"],
                **_style(record["implementation"]),
            )
        axes.set(
            xlabel="relative error of dE against fp32",
            ylabel="forward + backward [gemms of the same shape]",
        )
        _plain_numbers(axes.yaxis)
        low, high = (math.log10(edge) for edge in axes.get_xlim())
        axes.set_xlim(10 ** math.floor(low), 10 ** math.ceil(high))
        axes.xaxis.set_minor_formatter(NullFormatter())
        _legend(_once(axes))
        figures.append(figure)
    return figures


def _plain_numbers(axis: Any) -> None:
    from matplotlib.ticker import ScalarFormatter

    formatter = ScalarFormatter()
    formatter.set_scientific(False)
    axis.set_major_formatter(formatter)
    axis.set_minor_formatter(formatter)


def _once(axes: Any) -> Any:
    """One entry of the legend for points that share a label."""
    seen: set[str] = set()
    for line in axes.lines:
        label = line.get_label()
        line.set_label("_" if label in seen else label)
        seen.add(label)
    return axes


def _sweeps(records: list[Record], size: str) -> list[list[Record]]:
    """Groups of cases that differ in nothing but one size, two values of it at least."""

    def others(record: Record) -> str:
        return case_key(record, without=(size, "suite"))

    groups = _groups([r for r in records if not r["shard"]], others)
    return [group for group in groups if len({r["shape"][size] for r in group}) > 1]


def _curves(group: list[Record], size: str, value: Callable[[Record], float], axes: Any) -> None:
    for name in dict.fromkeys(record["implementation"] for record in group):
        points: dict[int, list[float]] = {}
        for record in group:
            if record["implementation"] == name:
                points.setdefault(record["shape"][size], []).append(value(record))
        sizes = sorted(points)
        if len(sizes) > 1:
            means = [sum(points[each]) / len(points[each]) for each in sizes]
            axes.plot(sizes, means, label=name, linewidth=1.2, **_style(name))
    axes.set_xscale("log", base=2)
    axes.set_xlabel(size)
    _plain_numbers(axes.xaxis)


def _memory_figures(records: list[Record]) -> list[Any]:
    measured = [r for r in records if r["both"] and r["both"]["extra_bytes"] is not None]
    figures = []
    for group in _sweeps(measured, "vocab"):
        shape = group[0]["shape"]
        title = f"{shape['tokens']} tokens, D {shape['hidden']}, {dtype_label(group[0])}"
        figure, axes = _axes(title, source_label(group[0]))
        # Of nothing at all there is no place on a logarithmic axis.
        _curves(group, "vocab", lambda r: max(r["both"]["extra_bytes"], 2**10) / 2**20, axes)
        sizes = sorted({record["shape"]["vocab"] for record in group})
        logits = [2 * shape["tokens"] * size / 2**20 for size in sizes]
        axes.plot(sizes, logits, ":", color="#999999", label="logits in 16 bits")
        axes.set(yscale="log", ylabel="memory beyond inputs and gradients [MiB]")
        _legend(axes)
        figures.append(figure)
    return figures


def _token_figures(records: list[Record]) -> list[Any]:
    from matplotlib.ticker import LogLocator, NullFormatter, ScalarFormatter

    figures = []
    for group in _sweeps([record for record in records if record["both"]], "tokens"):
        shape = group[0]["shape"]
        title = f"D {shape['hidden']}, vocabulary {shape['vocab']}, {dtype_label(group[0])}"
        figure, axes = _axes(title, source_label(group[0]))
        _curves(
            group,
            "tokens",
            lambda r: 1000 * r["both"]["median_ms"] / r["shape"]["tokens"],
            axes,
        )
        # Logarithmic: who takes a hundred times as long would press all others on the axis.
        axes.set(yscale="log", ylabel="forward + backward [microseconds per token]")
        low, high = axes.get_ylim()
        axes.set_ylim(low / 1.5, high * 1.5)
        axes.yaxis.set_major_locator(LogLocator(subs=(1, 2, 5)))
        axes.yaxis.set_minor_formatter(NullFormatter())
        axes.yaxis.set_major_formatter(ScalarFormatter())
        _legend(axes)
        figures.append(figure)
    return figures


def _roofline_figures(records: list[Record]) -> list[Any]:
    """Bars: the least time that the hardware needs over what was measured.

    A filter that leaves products out can come to more than 1.
    """
    chosen = [
        record
        for record in records
        if record["both"]
        and not record["shard"]
        and record["suite"] in ("", "models", "bars")
        and share_of_roofline(record) is not None
    ]
    figures = []
    for group in _groups(chosen, case_key):
        figure, axes = _axes(case_label(group[0]), source_label(group[0]))
        names = list(dict.fromkeys(record["implementation"] for record in group))[::-1]
        for place, name in enumerate(names):
            shares = [
                share_of_roofline(record) or 0.0
                for record in group
                if record["implementation"] == name
            ]
            share = sum(shares) / len(shares)
            axes.barh(place, share, color=_style(name)["color"])
            axes.text(share, place, f" {share:.2f}", va="center", fontsize=8)
        axes.set_yticks(range(len(names)), names, fontsize=8)
        axes.set(
            xlim=(0, max(1, axes.get_xlim()[1])),
            xlabel="share of the roofline, forward + backward (three products, datasheet rates)",
        )
        figures.append(figure)
    return figures
