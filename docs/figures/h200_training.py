"""Draws h200_training.png from h200_training.json, both beside this file."""

from __future__ import annotations

import json
from pathlib import Path
from statistics import median

import matplotlib

matplotlib.use("Agg")
import matplotlib.pyplot as plt

_HERE = Path(__file__).parent
# Okabe and Ito's colours, told apart by colour-blind readers.
_COLOURS = ("#000000", "#999999", "#E69F00", "#0072B2")


def main() -> None:
    """Draw it."""
    found = json.loads((_HERE / "h200_training.json").read_text())
    runs = found["runs"]
    figure, (curves, memory, speed) = plt.subplots(1, 3, figsize=(11, 3.2))
    for (name, run), colour in zip(runs.items(), _COLOURS, strict=True):
        style = "--" if name.startswith("cce") else "-"
        curves.plot(run["loss"], style, color=colour, label=name, linewidth=1)
    curves.set(xlabel="step", ylabel="loss (nats)", title="training loss")
    curves.legend(fontsize=7)
    kept = [name for name in runs if "seed" not in name]
    colours = [_COLOURS[list(runs).index(name)] for name in kept]
    labels = [name.replace(", ", "\n") for name in kept]
    memory.bar(labels, [runs[name]["peak_mib"] / 1024 for name in kept], color=colours)
    memory.set(title="peak memory (GiB)")
    speed.bar(labels, [median(runs[name]["tokens_per_s"]) / 1000 for name in kept], color=colours)
    speed.set(title="thousand tokens per second")
    figure.suptitle(f"GPT 4 x 1024, vocabulary 131,072, 8192 tokens a step, {found['hardware']}")
    figure.tight_layout()
    figure.savefig(_HERE / "h200_training.png", dpi=110)


if __name__ == "__main__":
    main()
