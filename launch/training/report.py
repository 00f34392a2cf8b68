"""What a run shows and leaves behind: progress bar, TensorBoard, metrics, figure, summary."""

from __future__ import annotations

import contextlib
import json
import math
import time
from pathlib import Path
from typing import Any

import torch

from launch.training.settings import Settings

# From the Okabe-Ito palette, apart for every kind of colour vision.
_TRAIN, _VALID = "#0072B2", "#D55E00"


class Report:
    """Writes on rank 0, does nothing elsewhere.

    In `settings.run_dir`: metrics.jsonl (one record per logged iteration or validation),
    loss.png, summary.json.

    Args:
        active: whether this is rank 0.
        settings: of the run.
        start: iterations done before; later records of an earlier run are dropped.
    """

    def __init__(self, active: bool, settings: Settings, start: int) -> None:
        self._active = active
        if not active:
            return
        from tqdm import tqdm

        self._settings = settings
        self.folder = Path(settings.run_dir)
        self.folder.mkdir(parents=True, exist_ok=True)
        self._metrics = self.folder / "metrics.jsonl"
        self.records = [r for r in _read(self._metrics) if start and r["iteration"] <= start]
        self._metrics.write_text("".join(json.dumps(r) + "\n" for r in self.records))
        self._board = _board(settings.loop.tensorboard_dir, start)
        self._bar = tqdm(
            total=settings.loop.train_iters,
            initial=start,
            unit="step",
            desc=settings.loss.loss,
            dynamic_ncols=True,
            mininterval=0.5,
        )

    def train(self, iteration: int, values: dict[str, float]) -> None:
        """A logged training iteration."""
        if not self._active:
            return
        self._add(iteration, values)
        shown = {"loss": f"{values['loss']:.4f}", "tok_s": f"{values['tokens_per_s']:,.0f}"}
        if "far-field/tiles_kept" in values:
            shown["kept"] = f"{values['far-field/tiles_kept']:.1%}"
            shown["far"] = f"{values['far-field/mass']:.2%}"
        self._bar.set_postfix(shown, refresh=False)
        self._bar.update(iteration - self._bar.n)

    def skipped(self, iteration: int, ranks: list[int]) -> None:
        """A training iteration without an update, as these ranks' losses were not finite."""
        if not self._active:
            return
        self._add(iteration, {"skipped_ranks": ranks})
        self._bar.write(f"iteration {iteration}: skipped, not finite on rank(s) {ranks}")

    def validation(self, iteration: int, loss: float) -> None:
        """A validation loss."""
        if not self._active:
            return
        self._add(iteration, {"validation_loss": loss})
        self._bar.write(f"iteration {iteration}: validation loss {loss:.4f}")

    def note(self, line: str) -> None:
        """A line for people."""
        if self._active:
            self._bar.write(line)

    def close(self, facts: dict[str, Any]) -> dict[str, Any]:
        """End the run: figure and summary; returns the summary ({} on other ranks)."""
        if not self._active:
            return {}
        self._bar.close()
        if self._board is not None:
            self._board.close()
        summary = {"run": self._settings.name, **_ends(self.records), **facts}
        summary["figure"] = str(self.folder / "loss.png")
        draw(self.records, self.folder / "loss.png", f"{self._settings.name} ({facts['loss']})")
        (self.folder / "summary.json").write_text(json.dumps(summary, indent=1) + "\n")
        width = max(len(key) for key in summary)
        print("\n".join(f"  {key:<{width}}  {_text(value)}" for key, value in summary.items()))
        return summary

    def _add(self, iteration: int, values: dict[str, Any]) -> None:
        record = {"iteration": iteration, **values}
        self.records.append(record)
        with open(self._metrics, "a") as file:
            file.write(json.dumps(record) + "\n")
        if self._board is not None:
            for key, value in values.items():
                if isinstance(value, float):
                    self._board.add_scalar(key, value, iteration)


def _board(folder: str | None, start: int) -> Any:
    if folder is None:
        return None
    from torch.utils.tensorboard import SummaryWriter

    return SummaryWriter(folder, purge_step=start + 1 if start else None)


def _read(path: Path) -> list[dict[str, Any]]:
    if not path.exists():
        return []
    found = []
    for line in path.read_text(errors="replace").splitlines():
        # A run that was killed may have left half a line.
        with contextlib.suppress(ValueError, TypeError, KeyError):
            record = json.loads(line)
            record["iteration"] = int(record["iteration"])
            found.append(record)
    return found


def _ends(records: list[dict[str, Any]]) -> dict[str, Any]:
    train = [r for r in records if "loss" in r]
    valid = [r for r in records if "validation_loss" in r]
    found: dict[str, Any] = {}
    if train:
        speeds = sorted(r["tokens_per_s"] for r in train[1:] or train)
        found = {
            "iterations": train[-1]["iteration"],
            "first_loss": train[0]["loss"],
            "last_loss": train[-1]["loss"],
            "median_tokens_per_s": speeds[len(speeds) // 2],
            "peak_mib": max(r["peak_mib"] for r in train),
        }
    if valid:
        found["validation_loss"] = valid[-1]["validation_loss"]
    return found


def _text(value: Any) -> str:
    return f"{value:,.4f}" if isinstance(value, float) else str(value)


def draw(records: list[dict[str, Any]], path: Path, title: str) -> None:
    """Loss over iterations as a PNG."""
    import matplotlib

    matplotlib.use("Agg")
    from matplotlib import pyplot

    figure, axes = pyplot.subplots(figsize=(7, 4.2), layout="constrained")
    series: Any = (
        ("loss", _TRAIN, {"linewidth": 1.4}, "training"),
        ("validation_loss", _VALID, {"marker": "o", "linestyle": "--"}, "validation"),
    )
    for key, colour, style, label in series:
        points = [(r["iteration"], r[key]) for r in records if key in r]
        if points:
            axes.plot(*zip(*points, strict=True), color=colour, label=label, **style)
    axes.set(xlabel="iteration", ylabel="cross entropy [nats per token]", title=title)
    axes.grid(alpha=0.3)
    if axes.lines:
        axes.legend(frameon=False)
    figure.savefig(path, dpi=150)
    pyplot.close(figure)


def peak_mib() -> float:
    """Most memory used so far: of the CUDA allocator, or of the process where there is none."""
    if torch.cuda.is_available():
        return torch.cuda.max_memory_allocated() / 2**20
    import resource

    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


class Clock:
    """Wall time of training alone: stops while something else is done."""

    def __init__(self) -> None:
        self._seconds, self._since = 0.0, time.perf_counter()

    def pause(self) -> None:
        """Stop counting."""
        self._seconds += time.perf_counter() - self._since
        self._since = math.inf

    def resume(self) -> None:
        """Count again."""
        self._since = time.perf_counter()

    def lap(self) -> float:
        """Seconds counted since the last lap."""
        self.pause()
        seconds, self._seconds = self._seconds, 0.0
        self.resume()
        return seconds
