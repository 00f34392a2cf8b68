"""The pretraining loop: its settings, its data, and short runs under torchrun on the CPU."""

from __future__ import annotations

import json
import math
from pathlib import Path
from typing import Any

import pytest

import launch_runs
from cce_tp import GradFilter
from launch import pretrain as entry
from launch.training import checkpoint, settings, text
from launch.training.report import draw
from launch_runs import CONFIGS, ROOT, metrics, pretrain, torchrun
from megatron_integration import CceConfig

pytestmark = pytest.mark.no_poison
TINY = ROOT / "configs" / "tiny_cpu.yaml"
RUNS = launch_runs.__file__
# Small enough for a test, with all that a step has: dropout draws from the generators.
SMALL = (
    "megatron.vocab_size=600",
    "megatron.num_layers=2",
    "megatron.hidden_size=32",
    "megatron.seq_length=32",
    "megatron.hidden_dropout=0.1",
    "megatron.sequence_parallel=true",
    "megatron.global_batch_size=16",
    "megatron.train_iters=6",
    "megatron.lr_warmup_iters=2",
    "megatron.eval_interval=3",
    "megatron.eval_iters=2",
    "megatron.save_interval=3",
)


@pytest.mark.parametrize("path", CONFIGS, ids=lambda path: path.stem)
def test_configuration_is_accepted_and_names_its_hardware(path: Path) -> None:
    run = settings.load(path)
    assert run.loss.loss == "cce"
    assert path.read_text().startswith("# For: ")


def test_command_line_beats_file() -> None:
    file, overrides = entry.parse(["--config", str(TINY), "megatron.lr=0.5", "run_dir=elsewhere"])
    run = settings.load(file, overrides)
    assert run.loop.lr == 0.5
    assert run.loop.save == "elsewhere/checkpoints"


def test_flag_beats_file() -> None:
    file, overrides = entry.parse(["--config", str(TINY), "--cce", "cce.loss=stock"])
    assert settings.load(file, overrides).loss.loss == "cce"


@pytest.mark.parametrize(
    ("override", "message"),
    [
        ("megatron.hiden_size=3", r"megatron\.hiden_size: unknown key.*megatron\.hidden_size\?"),
        ("megatron.train-iters=3", r"megatron\.train-iters: unknown key.*megatron\.train_iters\?"),
        ("megatron.overlap_grad_reducce=true", r"overlap_grad_reduce\?"),
        ("cce.filter=exact", r"cce\.filter: unknown key.*cce\.grad_filter\?"),
        ("model.lr=1", r"model: unknown key; did you mean"),
        ("cce.grad_filter=near", r"^cce\.grad_filter: expected one of exact, .*got 'near'"),
        ("cce.far_field_budget=0.1", r"cce\.far_field_budget: expected only with cce\.grad_filter"),
        ("cce.workspace_mb=0.5", r"cce\.workspace_mb .*: expected at least 1 MiB, got 0\.5 MiB"),
        ("cce.keep_logits_in_grad=some", r"cce\.keep_logits_in_grad"),
        ("cce.loss=fast", r"cce\.loss: expected one of stock.*got 'fast'"),
        ("megatron.train_iters=many", r"megatron\.train_iters"),
        ("megatron.context_parallel_size=3", r"seq_length: expected a multiple of .* 6, got 128"),
        ("megatron.seq_length=0", r"megatron\.seq_length: expected a positive integer, got 0"),
        ("megatron.lr_warmup_iters=500", r"megatron\.lr_warmup_iters: .*120.*got 500"),
        ("megatron.distributed_backend=mpi", r"distributed_backend: expected nccl or gloo"),
        ("megatron.cross_entropy_loss_fusion=true", r"use cce\.loss=stock-native-fusion"),
        ("megatron.train_data_path=a", r"valid_data_path: expected together"),
        ("lr", r"overrides: expected section\.key=value, got 'lr'"),
    ],
)
def test_bad_setting_is_refused_by_name(override: str, message: str) -> None:
    with pytest.raises(ValueError, match=message):
        settings.load(TINY, [override])


def test_far_field_budget() -> None:
    run = settings.load(TINY, ["cce.grad_filter=far-field", "cce.far_field_budget=0.02"])
    assert settings.cce_config(run).grad_filter == GradFilter.far_field(0.02)
    with pytest.raises(ValueError, match=r"^cce\.far_field_budget: expected a number in \[0, 1\)"):
        settings.load(TINY, ["cce.grad_filter=far-field", "cce.far_field_budget=1"])


def test_kept_logits() -> None:
    run = settings.load(TINY, ["cce.keep_logits_in_grad=true"])
    assert settings.cce_config(run) == CceConfig(keep_logits_in_grad=True)
    both = ["cce.keep_logits_in_grad=true", "cce.keep_logits_mb=1"]
    with pytest.raises(ValueError, match=r"^cce\.keep_logits_in_grad .*cce\.keep_logits_mb, got b"):
        settings.load(TINY, both)


def test_missing_file_is_refused() -> None:
    with pytest.raises(ValueError, match=r"--config: expected a YAML file, got 'nowhere.yaml'"):
        settings.load("nowhere.yaml")


def test_alias_of_the_loss() -> None:
    run = settings.load(TINY, ["megatron.cross_entropy_fusion_impl=cce"])
    assert run.loss.loss == "cce"
    assert "cross_entropy_fusion_impl" not in run.core
    both = ["megatron.cross_entropy_fusion_impl=cce", "cce.loss=stock"]
    with pytest.raises(ValueError, match=r"cross_entropy_fusion_impl: .*cce\.loss=stock"):
        settings.load(TINY, both)


def test_core_fields_of_the_installed_release_are_accepted() -> None:
    run = settings.load(TINY, ["megatron.adam_eps=1e-6", "megatron.bucket_size=1000"])
    assert run.core["adam_eps"] == 1e-6
    assert run.core["bucket_size"] == 1000


def test_environment_section_comes_first(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("CCE_LAUNCH_PROBE", "shell")
    found = settings.read(TINY, ["env.CCE_LAUNCH_PROBE=7", "env.OMP_NUM_THREADS=1"])
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    settings.apply_environment(found)
    import os

    assert os.environ["CCE_LAUNCH_PROBE"] == "7"


def test_half_made_text_is_not_taken_for_whole(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def interrupted(*_: Any) -> Any:
        raise KeyboardInterrupt

    monkeypatch.setattr(text, "_write", interrupted)
    monkeypatch.setattr(text, "_files", lambda limit: [(Path(text.__file__), limit)])
    with pytest.raises(KeyboardInterrupt):
        text.make(tmp_path, 300)
    assert text.find(tmp_path, 300) is None
    assert not list(tmp_path.iterdir())


def test_text_is_split_by_file_and_without_copies() -> None:
    files = [path for path, _ in text._files(3_000_000)]
    held_out = sum(map(text._held_out, files))
    assert 0 < held_out < len(files) / 10
    contents = [path.read_bytes() for path in files]
    assert len(set(contents)) == len(contents)


def test_only_a_whole_checkpoint_is_found(tmp_path: Path) -> None:
    checkpoint.folder_of(tmp_path, 3).mkdir()
    assert checkpoint.latest(tmp_path) is None


def test_figure(tmp_path: Path) -> None:
    records = [{"iteration": i, "loss": 9.0 - i} for i in range(4)]
    draw([*records, {"iteration": 3, "validation_loss": 6.5}], tmp_path / "loss.png", "a run")
    assert (tmp_path / "loss.png").read_bytes().startswith(b"\x89PNG")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("launch")


def _losses(records: list[dict[str, Any]]) -> list[tuple[int, float]]:
    """(iteration, training or validation loss)."""
    return [(r["iteration"], r.get("loss", r.get("validation_loss"))) for r in records]


@pytest.mark.once
@pytest.mark.timeout(600)
def test_fused_equals_stock_and_resume_equals_uninterrupted(folder: Path) -> None:
    options = (*SMALL, f"megatron.data_cache_path={folder / 'data'}")
    torchrun(2, RUNS, str(folder), *options)
    stock, fused = (_losses(metrics(folder / name)) for name in ("stock", "fused"))
    assert [step for step, _ in fused] == [1, 2, 3, 3, 4, 5, 6, 6]
    for got, want in zip(fused, stock, strict=True):
        assert got == pytest.approx(want, abs=1e-5)

    checkpoints = folder / "again" / "checkpoints"
    assert checkpoint.latest(checkpoints) == 3
    checkpoint.folder_of(checkpoints, 5).mkdir()  # as a save that was cut off leaves it
    resumed = pretrain(folder / "again", *options, f"megatron.load={checkpoints}")
    assert _losses(resumed) == fused

    summary = json.loads((folder / "again" / "summary.json").read_text())
    assert summary["iterations"] == 6
    assert summary["logits_made"] == 0
    assert summary["fused_losses"] > 0
    assert (folder / "again" / "loss.png").stat().st_size > 1000
    assert list((folder / "again" / "tensorboard").glob("events.*"))
    assert {"loss", "lr", "grad_norm", "tokens_per_s", "peak_mib"} <= resumed[0].keys()


@pytest.mark.once
@pytest.mark.timeout(600)
def test_every_configuration_trains_at_reduced_size(folder: Path) -> None:
    out = folder / "reduced"
    out.mkdir()
    torchrun(4, RUNS, str(out), timeout_s=400)
    answers = json.loads((out / "answers.json").read_text())
    assert "expected a finite number" in answers["nan"]
    assert "at iteration 1 on rank" in answers.pop("nan")
    assert answers.keys() >= {path.stem for path in CONFIGS}
    # Distributed optimizer, both overlaps, two replicas of two tensor-parallel ranks.
    whole, first, resumed = (
        answers.pop(name) for name in ("uninterrupted", "interrupted", "resumed")
    )
    assert len(whole) == 4
    assert first == whole[:2]
    assert resumed == whole
    lines = (out / "far field" / "metrics.jsonl").read_text().splitlines()
    for record in map(json.loads, lines):
        if "loss" in record:
            assert 0 < record["far-field/tiles_kept"] <= 1
            assert 0 <= record["far-field/mass"] < 0.5
    for name, losses in answers.items():
        assert len(losses) == 2, name
        assert all(math.isfinite(loss) and 5 < loss < 8 for loss in losses), name
    assert answers["fused attention"] == pytest.approx(answers["unfused attention"], abs=1e-5)
    assert answers["context parallel"] == pytest.approx(answers["fused attention"], abs=1e-5)
    # bf16
    assert answers["experts"] == pytest.approx(answers["experts, stock"], abs=2e-3)
