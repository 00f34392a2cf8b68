"""launch.pretrain with a fault in it, and a series of damaged runs under one torchrun, on the CPU.

As a module it is an entry like launch.pretrain (`ENTRY=fault_runs bash launch/torchrun.sh ...`)
that kills the rank named by FAULT_KILL_RANK in the middle of iteration FAULT_KILL_ITERATION, unless
the launcher has started it again. `python fault_runs.py FOLDER` runs the series.
"""

from __future__ import annotations

import json
import os
import pickle
import resource
import shutil
import signal
import sys
from collections.abc import Callable
from contextlib import contextmanager
from pathlib import Path
from typing import Any
from unittest import mock

ROOT = Path(__file__).resolve().parents[1]
TINY = ROOT / "configs" / "tiny_cpu.yaml"
ITERATIONS = 6
# Dropout draws from the generators; the vocabulary needs no padding for one or two ranks.
SMALL = (
    "megatron.mock_data=true",
    "megatron.vocab_size=768",
    "megatron.num_layers=2",
    "megatron.hidden_size=32",
    "megatron.seq_length=32",
    "megatron.hidden_dropout=0.1",
    "megatron.sequence_parallel=true",
    "megatron.global_batch_size=16",
    f"megatron.train_iters={ITERATIONS}",
    "megatron.lr_warmup_iters=2",
    "megatron.eval_interval=null",
    "megatron.save_interval=2",
    "megatron.tensorboard_dir=null",
)

# Where only the metrics are looked at.
UNSAVED = ("megatron.save=null", "megatron.save_interval=null")


def losses(run_dir: str | os.PathLike[str]) -> list[tuple[int, Any]]:
    """(iteration, loss, or the list of ranks for which it was skipped)."""
    lines = (Path(run_dir) / "metrics.jsonl").read_text().splitlines()
    return [(r["iteration"], r.get("loss", r.get("skipped_ranks"))) for r in map(json.loads, lines)]


@contextmanager
def at(iteration: int, rank: int, act: Callable[[Any], Any]) -> Any:
    """Call `act(output)` on one rank after the forward pass of the second micro batch of a step."""
    import torch.distributed as dist

    from launch.training.loop import Trainer

    stock, seen = Trainer._forward, dict[int, int]()

    def forward(self: Any, *args: Any, **kwargs: Any) -> Any:
        output, reduce = stock(self, *args, **kwargs)
        seen[self.iteration] = seen.get(self.iteration, 0) + 1
        if (self.iteration, dist.get_rank(), seen[self.iteration]) == (iteration, rank, 2):
            output = act(output)
        return output, reduce

    with mock.patch.object(Trainer, "_forward", forward):
        yield


def kill(output: Any) -> None:
    """What the kernel does to a process when memory runs out."""
    del output
    os.kill(os.getpid(), signal.SIGKILL)


def terminate(output: Any) -> Any:
    """What a scheduler sends before the time is up."""
    os.kill(os.getpid(), signal.SIGTERM)
    return output


def main(arguments: list[str]) -> int:
    """launch.pretrain, with the fault of the environment."""
    from launch import pretrain, topology

    pretrain.prepare()
    if topology.resolve().restarts or "FAULT_KILL_RANK" not in os.environ:
        return pretrain.main(arguments)
    place = int(os.environ["FAULT_KILL_ITERATION"]), int(os.environ["FAULT_KILL_RANK"])
    with at(*place, kill):
        return pretrain.main(arguments)


class _Canary:
    """Unpickled, it makes a file: what a hostile checkpoint would do."""

    def __init__(self, path: Path) -> None:
        self._path = path

    def __reduce__(self) -> Any:
        return os.mkdir, (str(self._path),)


class Series:
    """All ranks call the same methods; `answers` are collected from every rank."""

    def __init__(self, folder: Path) -> None:
        self.folder, self.answers = folder, dict[str, Any]()

    def settings(self, name: str, *overrides: str, load: str | None = None) -> Any:
        """Settings of one run, in a folder of its name."""
        from launch.training import settings

        more = (f"run_dir={self.folder / name}", f"megatron.data_cache_path={self.folder}/cache")
        if load is not None:
            more = (*more, f"megatron.load={self.folder / load / 'checkpoints'}")
        return settings.load(TINY, [*SMALL, *more, *overrides])

    def train(self, name: str, *overrides: str, load: str | None = None) -> None:
        """Train; answers[name] is what the metrics say, or the error."""
        import torch
        from megatron.core import parallel_state

        from launch.pretrain import train

        run = self.settings(name, *overrides, load=load)
        try:
            train(run, keep_group=True)
            self.answers[name] = losses(run.run_dir) if self.rank == 0 else None
        except (RuntimeError, ValueError) as error:
            self.answers[name] = f"{type(error).__name__}: {error}"
            if parallel_state.model_parallel_is_initialized():
                parallel_state.destroy_model_parallel()
        torch.distributed.barrier()

    @property
    def rank(self) -> int:
        return int(os.environ["RANK"])

    def copy(self, name: str, damage: Callable[[Path], None]) -> Path:
        """The checkpoints of "whole" under another name, damaged; returns their folder."""
        import torch.distributed as dist

        target = self.folder / name / "checkpoints"
        if self.rank == 0:
            shutil.copytree(self.folder / "whole" / "checkpoints", target)
            damage(target)
        dist.barrier()
        return target

    def find(self, name: str, damage: Callable[[Path], None]) -> None:
        """answers[name]: which iteration would be loaded, or the error."""
        from launch.training import checkpoint

        folder = self.copy(name, damage)
        try:
            self.answers[name] = checkpoint.find(folder)
        except ValueError as error:
            self.answers[name] = str(error)

    def run(self) -> None:
        """Everything, in order."""
        import torch.distributed as dist

        from launch.pretrain import prepare

        prepare()
        from launch.training import model  # imports megatron.core, which `prepare` precedes

        model.start_distributed(self.settings("start"))
        self.steps()
        everyone: list[Any] = [None] * dist.get_world_size()
        dist.all_gather_object(everyone, self.answers)
        if self.rank == 0:
            (self.folder / "answers.json").write_text(json.dumps(everyone))
        dist.destroy_process_group()

    def steps(self) -> None:
        """The runs, and what is done to what they leave."""
        self.train("whole")
        self._damaged_checkpoints()
        self._hostile_checkpoints()
        self._other_layouts()
        self._interruptions()
        self._nonfinite()
        self._disagreement()

    def _damaged_checkpoints(self) -> None:
        last = f"iter_{ITERATIONS:07d}"
        self.find("undamaged", lambda folder: None)
        self.find("cut short", lambda folder: _cut(_data(folder / last)))
        self.find("one byte", lambda folder: _flip(_data(folder / last)))
        self.find("metadata cut", lambda folder: _cut(folder / last / ".metadata"))
        self.find("file missing", lambda folder: _data(folder / last).unlink())
        self.find("folder missing", lambda folder: shutil.rmtree(folder / last))
        self.find("manifest cut", lambda folder: _cut(folder / last / "manifest.json"))
        tracker = "latest_checkpointed_iteration.txt"
        self.find("tracker empty", lambda folder: (folder / tracker).write_text(""))
        self.find("tracker odd", lambda folder: (folder / tracker).write_text("../../etc"))

        def all_of_them(folder: Path) -> None:
            for path in folder.glob("iter_*"):
                _cut(_data(path))

        self.find("all damaged", all_of_them)
        self.copy("resumed", lambda folder: _cut(_data(folder / last)))
        self.train("resumed", load="resumed")

    def _hostile_checkpoints(self) -> None:
        last = f"iter_{ITERATIONS:07d}"
        canary = self.folder / "canary"

        def metadata(folder: Path) -> None:
            (folder / last / ".metadata").write_bytes(pickle.dumps(_Canary(canary)))
            _sign(folder / last)

        def common(folder: Path) -> None:
            import torch

            torch.save({"iteration": 1, "object": _Canary(canary)}, folder / last / "common.pt")
            _sign(folder / last)

        def embedded(folder: Path) -> None:
            _replace_object(folder / last, _Canary(canary))
            _sign(folder / last)

        for name, damage in (("metadata", metadata), ("common", common), ("embedded", embedded)):
            self.find(f"hostile {name}", damage)
        self.answers["canary"] = canary.exists()

    def _other_layouts(self) -> None:
        still = ("megatron.hidden_dropout=0.0", "megatron.train_iters=9", *UNSAVED)
        self.train("two parts", *still, load="whole")
        one = ("megatron.tensor_model_parallel_size=1", "megatron.sequence_parallel=false")
        self.train("one part", *still, *one, load="whole")
        self.train("other model", *still, "megatron.hidden_size=64", load="whole")

    def _interruptions(self) -> None:
        with at(3, 1, terminate):
            self.train("terminated")
        self.train("terminated again", *UNSAVED, load="terminated")
        if self.rank == 0:
            shutil.copytree(self.folder / "whole", self.folder / "full disk")
        with at(ITERATIONS + 2, 1, _limit_files):
            self.train("full disk", "megatron.train_iters=9", load="full disk")
        resource.setrlimit(resource.RLIMIT_FSIZE, (resource.RLIM_INFINITY, resource.RLIM_INFINITY))
        folder = self.folder / "full disk" / "checkpoints"
        from launch.training import checkpoint

        self.answers["after full disk"] = checkpoint.find(folder)
        self.answers["left by full disk"] = sorted(path.name for path in folder.iterdir())
        self.train("afresh")
        folder = self.folder / "afresh" / "checkpoints"
        if self.rank == 0:
            (folder / "job.txt").write_text("another job")
        self.train("afresh", "megatron.exit_interval=2")
        self.answers["set aside"] = [checkpoint.find(f) for f in (folder, folder / "earlier-1")]

    def _nonfinite(self) -> None:
        skip = "megatron.nonfinite_loss=skip"
        faults: dict[str, Callable[[Any], Any]] = {
            "nan": lambda output: output * float("nan"),
            "inf": lambda output: output * float("inf"),
            "gradient": _poison_gradient,
        }
        for name, fault in faults.items():
            with at(3, 1, fault):
                self.train(f"{name}, stop", *UNSAVED)
        with at(3, 1, faults["nan"]):
            self.train("nan, skip", skip, *UNSAVED)
        never = "megatron.layernorm_epsilon=.nan"
        self.train("always", never, skip, "megatron.train_iters=20", *UNSAVED)

    def _disagreement(self) -> None:
        for name, override in (
            ("without the fused loss", "cce.loss=stock"),
            ("another vocabulary", "megatron.vocab_size=1024"),
            ("another dtype", "megatron.bf16=true"),
        ):
            self.train(name, *([override] if self.rank == 1 else []))


def _data(folder: Path) -> Path:
    return max(folder.glob("*.distcp"), key=lambda path: path.stat().st_size)


def _cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[: path.stat().st_size // 2])


def _flip(path: Path) -> None:
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


def _sign(folder: Path) -> None:
    """Make the manifest fit what is there, as an attacker would."""
    from launch.training import files

    manifest = json.loads((folder / "manifest.json").read_text())
    names = [str(path.relative_to(folder)) for path in folder.iterdir()]
    names = [name for name in names if name != "manifest.json"]
    manifest["files"] = {name: files.facts(folder / name) for name in names}
    (folder / "manifest.json").write_text(json.dumps(manifest))


def _replace_object(folder: Path, found: Any) -> None:
    """Put another object where Megatron keeps the state of the generators."""
    import io
    from dataclasses import replace

    import torch

    data = io.BytesIO()
    torch.save(found, data)
    (folder / "extra.distcp").write_bytes(data.getvalue())
    path = folder / ".metadata"
    with open(path, "rb") as file:
        index = pickle.load(file)
    for key, where in index.storage_data.items():
        if key.fqn.startswith("generators"):
            more = {"relative_path": "extra.distcp", "offset": 0, "length": len(data.getvalue())}
            index.storage_data[key] = replace(where, **more)
    path.write_bytes(pickle.dumps(index))


def _limit_files(output: Any) -> Any:
    """From now on no file of this process may be larger than 64 KiB: a write that fails."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 16, resource.RLIM_INFINITY))
    return output


def _poison_gradient(output: Any) -> Any:
    """The loss stays finite; its gradient does not."""
    output.register_hook(lambda grad: grad * float("nan"))
    return output


if __name__ == "__main__":
    if len(sys.argv) == 2:
        Series(Path(sys.argv[1])).run()
    else:
        sys.exit(main(sys.argv[1:]))
