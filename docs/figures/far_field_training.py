"""Draws far_field_training.png from far_field_training.json, both beside this file.

Prints, for each run of the far field, its validation loss less that of the exact run that it is
paired with, averaged over the validations after step 500, and the share of tiles that it kept.
"""

from __future__ import annotations

import json
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_HERE = Path(__file__).parent
# Okabe and Ito's colours, told apart by colour-blind readers.
_EXACT, _FAR, _PAPER = "#000000", "#E69F00", "#0072B2"


def print_pairs(every: dict[str, Any]) -> None:
    """Runs by name."""
    for name, run in every.items():
        if "paired_with" in run:
            exact = dict(every[run["paired_with"]]["validation"])
            apart = mean(loss - exact[step] for step, loss in run["validation"] if step > 500)
            kept = mean(entry[1] for entry in run["kept"])
            print(f"{apart:+.4f} {kept:.3f} {name}, less {run['paired_with']}")


def main() -> None:
    """Draw it."""
    found = json.loads((_HERE / "far_field_training.json").read_text())
    print_pairs({**found["runs"], **found["more_runs"]})
    runs = {name: dict(run["validation"]) for name, run in found["runs"].items()}
    exact = [run for name, run in runs.items() if name.startswith("exact")]
    far = [run for name, run in runs.items() if name.startswith("far")]
    steps = sorted(exact[0])
    middle = [mean(run[step] for run in exact) for step in steps]
    figure, (curves, apart, kept) = plt.subplots(1, 3, figsize=(12, 3.4))
    for run in exact:
        curves.plot(steps, [run[step] for step in steps], "-", color=_EXACT, linewidth=1)
    for run in far:
        curves.plot(steps, [run[step] for step in steps], "--", color=_FAR, linewidth=1)
    for name, run in runs.items():
        if name.startswith("paper"):
            curves.plot(steps, [run[step] for step in steps], ":", color=_PAPER)
    lines = [(_EXACT, "-", "exact"), (_FAR, "--", "far field"), (_PAPER, ":", "paper")]
    for colour, style, label in lines:
        curves.plot([], [], style, color=colour, label=label)
    curves.set(xlabel="step", ylabel="validation loss (nats)", title="each seed")
    curves.legend(fontsize=8)
    bounds = [[pick(run[step] for run in exact) for step in steps] for pick in (min, max)]
    low, high = ([b - m for b, m in zip(bound, middle, strict=True)] for bound in bounds)
    apart.fill_between(steps, low, high, color="#DDDDDD", label="spread of exact, 3 seeds")
    difference = [mean(run[s] for run in far) - m for s, m in zip(steps, middle, strict=True)]
    apart.plot(steps, difference, "--", color=_FAR, label="far field, mean of 3 seeds")
    apart.axhline(0, color=_EXACT, linewidth=0.8)
    apart.set(xlabel="step", title="difference to the mean of exact (nats)")
    apart.legend(fontsize=8)
    for run in found["runs"].values():
        if "kept" in run:
            at = [entry[0] for entry in run["kept"]]
            kept.plot(at, [entry[1] for entry in run["kept"]], "-", color=_FAR, linewidth=0.8)
            kept.plot(at, [entry[2] for entry in run["kept"]], ":", color=_PAPER, linewidth=0.8)
    kept.plot([], [], "-", color=_FAR, label="share of tiles kept")
    kept.plot([], [], ":", color=_PAPER, label="mass left to the far field")
    kept.set(xlabel="step", ylim=(0, 1), title="far field, each seed")
    kept.legend(fontsize=8)
    figure.suptitle(f"GPT 4 x 512, vocabulary 131,072, 2048 tokens a step, {found['hardware']}")
    figure.tight_layout()
    figure.savefig(_HERE / "far_field_training.png", dpi=110)


if __name__ == "__main__":
    main()
