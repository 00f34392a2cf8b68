"""The least time that the hardware needs for loss and gradients, from its datasheet.

Counted are what no exact implementation can leave out: three products of 2 N D V operations each
(the logits, dE, dC), and reading E and C and writing dE and dC once. An implementation that
computes the logits a second time rather than keep them can reach 3/4 at most. Products in fp32
have no such least time: made of three in TF32 they pass the rate of the fp32 units.

Legend: N tokens, D hidden size, V vocabulary rows of a rank.
"""

from __future__ import annotations

from launch.benchmark.records import Record

# Part of the name -> dense TFLOP/s by kind of product, and TB/s of memory; from the vendor's
# datasheets, for the SXM modules. The first match counts.
_PEAKS: dict[str, dict[str, float]] = {
    "H200": {"half": 989.4, "tf32": 494.7, "memory": 4.8},
    "H100 80GB HBM3": {"half": 989.4, "tf32": 494.7, "memory": 3.35},
    "A100-SXM4-80GB": {"half": 312.0, "tf32": 156.0, "memory": 2.039},
}


def share_of_roofline(record: Record) -> float | None:
    """Least time over measured time of forward + backward; None where a peak is not known."""
    name = record["hardware"]["name"]
    peaks = next((rates for part, rates in _PEAKS.items() if part in name), None)
    wide = record["dtype"] == "fp32"
    if peaks is None or not record["both"] or (wide and not record["tf32"]):
        return None
    tokens, hidden, rows = (record["shape"][each] for each in ("tokens", "hidden", "rows"))
    operations = 3 * 2 * tokens * hidden * rows
    moved = 2 * (4 if wide else 2) * hidden * (tokens + rows)
    rate = peaks["tf32" if wide else "half"]
    least_s = max(operations / (1e12 * rate), moved / (1e12 * peaks["memory"]))
    return 1000 * least_s / record["both"]["median_ms"]
