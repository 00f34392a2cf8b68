"""Starts launch.pretrain and this file's own jobs under torchrun, on the CPU."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
CONFIGS = sorted((ROOT / "configs").glob("*.yaml"))


def python_path(*more: Path) -> str:
    """PYTHONPATH of a child: the checkout, `more`, and what this process was given."""
    given = os.environ.get("PYTHONPATH")
    return os.pathsep.join([str(path) for path in (ROOT, *more)] + ([given] if given else []))


def torchrun(ranks: int, *command: str, timeout_s: float = 150.0, **env: str) -> str:
    """Run `python -m torch.distributed.run ... command`; returns stdout and stderr together.

    Raises:
        AssertionError: with the end of the output, if it fails or takes too long.
    """
    launcher = [sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", str(ranks)]
    more = {"OMP_NUM_THREADS": "1", "CUDA_VISIBLE_DEVICES": "", "PYTHONPATH": python_path(), **env}
    return run_to_end(
        [*launcher, "--standalone", *command], {**os.environ, **more}, timeout_s=timeout_s
    )


def run_to_end(command: list[str], environment: dict[str, str], *, timeout_s: float) -> str:
    """Run a launcher in the checkout; returns stdout and stderr together.

    Raises:
        AssertionError: with the end of the output, if it fails or takes too long.
    """
    with subprocess.Popen(
        command,
        cwd=ROOT,
        env=environment,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        errors="replace",
    ) as process:
        try:
            output, _ = process.communicate(timeout=timeout_s)
        except subprocess.TimeoutExpired:
            process.terminate()  # the launcher ends its workers
            output, _ = process.communicate()
            raise AssertionError(f"took more than {timeout_s} s:\n{output[-4000:]}") from None
    assert process.returncode == 0, output[-4000:]
    return output


def pretrain(run_dir: Path, *overrides: str, ranks: int = 2) -> list[dict[str, Any]]:
    """launch.pretrain with the tiny configuration; returns the records of metrics.jsonl."""
    config = str(ROOT / "configs" / "tiny_cpu.yaml")
    torchrun(ranks, "-m", "launch.pretrain", "--config", config, f"run_dir={run_dir}", *overrides)
    return metrics(run_dir)


def metrics(run_dir: Path) -> list[dict[str, Any]]:
    """The records of a run's metrics.jsonl."""
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


def main(folder: str, *overrides: str) -> None:
    """Under torchrun: train every configuration at reduced size, or with overrides the tiny one
    with Megatron's loss and with the fused one; writes {name: answer} as JSON.

    Answers are lists of losses, or the text of an error.
    """
    import torch.distributed as dist

    from launch.pretrain import prepare, train

    prepare()
    from megatron.core import parallel_state

    from launch.training import model
    from megatron_models import experts_on_cpu

    answers: dict[str, Any] = {}
    runs = _tiny_runs(Path(folder), overrides) if overrides else _runs(Path(folder))
    for name, run in runs.items():
        model.start_distributed(run)
        for variable in [name for name in os.environ if name.startswith("NVTE_")]:
            del os.environ[variable]  # set by the model before, from its attention backend
        try:
            with experts_on_cpu():
                train(run, keep_group=True)
        except RuntimeError as error:
            parallel_state.destroy_model_parallel()
            answers[name] = str(error)
            continue
        if dist.get_rank() == 0:
            answers[name] = [r["loss"] for r in metrics(Path(run.run_dir)) if "loss" in r]
    if dist.get_rank() == 0:
        (Path(folder) / "answers.json").write_text(json.dumps(answers))
    dist.destroy_process_group()


def _tiny_runs(folder: Path, overrides: Sequence[str]) -> dict[str, Any]:
    """Settings by name; the last one is cut off after three steps."""
    from launch.training import settings

    more = {
        "stock": "cce.loss=stock",
        "fused": "cce.strict=true",
        "again": "megatron.exit_interval=3",
    }
    return {
        name: settings.load(
            ROOT / "configs" / "tiny_cpu.yaml", [*overrides, f"run_dir={folder / name}", each]
        )
        for name, each in more.items()
    }


def _runs(folder: Path) -> dict[str, Any]:
    """Settings by name, in the order in which they are to run, for this world."""
    from launch.training import settings

    vocab256k, llama = (
        ROOT / "configs" / f"{name}.yaml" for name in ("vocab256k", "llama3_8b_tp8")
    )
    tp2, experts = "megatron.tensor_model_parallel_size=2", "megatron.num_moe_experts=4"
    more = {
        "unfused attention": (vocab256k, "megatron.attention_backend=unfused"),
        "fused attention": (vocab256k, "megatron.attention_backend=auto"),
        "context parallel": (vocab256k, "megatron.context_parallel_size=2"),
        "far field": (vocab256k, "cce.grad_filter=far-field", "cce.far_field_budget=0.5"),
        "nan": (vocab256k, "megatron.layernorm_epsilon=.nan"),
        "uninterrupted": (llama, tp2),
        "interrupted": (llama, tp2),
        "resumed": (llama, tp2),
        "experts, stock": (llama, tp2, experts, "cce.loss=stock"),
        "experts": (llama, tp2, experts),
    }
    found = {path.stem: settings.load(path) for path in CONFIGS}
    found |= {name: settings.load(path, overrides) for name, (path, *overrides) in more.items()}
    for name, full in found.items():
        found[name] = run = settings.reduced(full, int(os.environ["WORLD_SIZE"]))
        run.run_dir = str(folder / name)
        run.loop.data_cache_path = str(folder / "cache")
    for name in ("uninterrupted", "interrupted", "resumed"):
        found[name].loop.train_iters = 4
        found[name].core["hidden_dropout"] = 0.1
    found["interrupted"].loop.exit_interval = 2
    found["interrupted"].loop.save = found["resumed"].loop.load = str(folder / "checkpoints")
    found["resumed"].run_dir = found["interrupted"].run_dir
    for name in ("experts, stock", "experts"):
        found[name].core |= {
            "expert_model_parallel_size": 2,
            "expert_tensor_parallel_size": 1,
            "moe_token_dispatcher_type": "alltoall",
            "overlap_moe_expert_parallel_comm": True,
            "bf16": True,
        }
    return found


if __name__ == "__main__":
    main(*sys.argv[1:])
