"""Interleaved ids in launch.pretrain, and the converter of its checkpoints, on the CPU."""

from __future__ import annotations

import io
import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from torch.distributed.checkpoint.filesystem import FileSystemReader

import interleave_runs
from fault_runs import TINY
from interleave_runs import BEGUN, END, HALF, VARIANTS, values
from launch import interleave_ids
from launch.interleaving import Interleaving
from launch.training import files, settings
from launch.training.data import Interleaved
from launch_runs import torchrun

pytestmark = [pytest.mark.no_poison, pytest.mark.once, pytest.mark.timeout(600)]
IDS = Interleaving(768, 2)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Where tests/interleave_runs.py has left its runs."""
    where = tmp_path_factory.mktemp("interleave")
    torchrun(2, interleave_runs.__file__, str(where), timeout_s=300)
    return where


@pytest.fixture
def answers(folder: Path) -> list[dict[str, Any]]:
    """Of each rank."""
    return json.loads((folder / "answers.json").read_text())


@pytest.mark.parametrize("name", VARIANTS)
def test_losses_are_those_of_natural_ids(folder: Path, name: str) -> None:
    """Training and validation, from the same weights and moments, there and back again."""
    want = values(folder / f"{name}, natural")
    assert [step for step, _ in want] == [1, 2, 2, 3, 4, 4, 5, 6, 6, 7, 8, 8]
    assert want[-1][1] < want[2][1] - 0.1  # it learns, so that wrong rows would show
    for part, first, last in (("interleaved", BEGUN, HALF), ("natural again", HALF, END)):
        got = values(folder / f"{name}, {part}")
        between = [(step, loss) for step, loss in want if first < step <= last]
        assert len(got) == len(between)
        for one, other in zip(got, between, strict=True):
            assert one == pytest.approx(other, abs=1e-5)


def _contents(folder: Path, iteration: int = BEGUN) -> dict[Any, Tensor | bytes]:
    """Every tensor of a checkpoint by its name, every other object as its bytes."""
    where = files.folder_of(folder / "checkpoints", iteration)
    index: Any = FileSystemReader(where).read_metadata()
    found: dict[Any, Any] = {}
    for key, place in index.storage_data.items():
        data = (where / place.relative_path).read_bytes()[place.offset :][: place.length]
        entry = index.state_dict_metadata[key.fqn]
        if not hasattr(entry, "size"):
            found[key] = data
            continue
        chunk = torch.load(io.BytesIO(data), weights_only=True)
        whole = found.setdefault(key.fqn, torch.zeros(entry.size, dtype=chunk.dtype))
        whole[tuple(slice(at, at + n) for at, n in zip(key.offset, chunk.shape, strict=True))] = (
            chunk
        )
    return found


def test_the_converter_moves_rows_and_nothing_else(folder: Path) -> None:
    before, after, back = (
        _contents(folder / f"tied, {name}") for name in ("begun", "converted", "back")
    )
    assert before.keys() == after.keys() == back.keys()
    moved = set()
    for key, value in before.items():
        if isinstance(value, bytes):
            assert after[key] == back[key] == value
            continue
        assert torch.equal(back[key], value)
        if not torch.equal(after[key], value):
            assert torch.equal(after[key], value[IDS.natural_ids()])
            moved.add(key)
    weight = "embedding.word_embeddings.weight"
    moments = {f"optimizer.state.{name}.{weight}" for name in ("exp_avg", "exp_avg_sq")}
    assert moved == {weight, *moments}


def test_everything_with_a_row_per_id_is_moved(answers: list[dict[str, Any]]) -> None:
    """Untied, with the distributed optimizer and its master weights."""
    states = ("", *(f"optimizer.state.{name}." for name in ("param", "exp_avg", "exp_avg_sq")))
    weights = ("embedding.word_embeddings.weight", "output_layer.weight")
    wanted = {f"{state}{weight}" for state in states for weight in weights}
    assert set(answers[0]["converted apart, converted"]) == wanted


@pytest.mark.parametrize(
    ("name", "expected", "got"),
    [
        ("natural", f"expected {IDS}", "got ids in natural order"),
        ("interleaved", "expected ids in natural order", f"got {IDS}"),
        ("size", f"expected {IDS}", "got ids in natural order"),
        ("padding", f"expected {IDS}", f"got {Interleaving(1024, 2)}"),
    ],
)
def test_ids_in_another_order_are_refused_on_every_rank(
    answers: list[dict[str, Any]], name: str, expected: str, got: str
) -> None:
    for each in answers:
        text = each[f"refused {name}"]
        assert text.startswith(f"ValueError: cce.interleave_ids: {expected}, as in the checkpoint")
        assert got in text and "python -m launch.interleave_ids" in text


def _flip(folder: Path) -> None:
    path = max(folder.rglob("*.distcp"), key=lambda each: each.stat().st_size)
    data = bytearray(path.read_bytes())
    data[len(data) // 2] ^= 1
    path.write_bytes(data)


@pytest.mark.parametrize(
    ("source", "flags", "message"),
    [
        ("begun", "--ranks 5", "--ranks: expected a number above 1 that divides the 768 rows"),
        ("begun", "--ranks 1", "--ranks: expected a number above 1"),
        ("begun", "--ranks 2 --undo", f"CHECKPOINT: expected {IDS}, got ids in natural order"),
        ("converted", "--ranks 2", f"CHECKPOINT: expected ids in natural order, got {IDS}"),
        ("converted", "--ranks 4 --undo", f"CHECKPOINT: expected {Interleaving(768, 4)}, got"),
        ("nowhere", "--ranks 2", "CHECKPOINT: expected a folder of megatron.save, got"),
        ("damaged", "--ranks 2", "is not what was written (SHA-256)"),
        ("unsigned", "--ranks 2", "no manifest.json, which launch.pretrain writes"),
        ("outside", "--ranks 2", "CHECKPOINT: expected data in its own files, got ../x"),
    ],
)
def test_what_cannot_be_converted_is_one_line(
    folder: Path,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
    source: str,
    flags: str,
    message: str,
) -> None:
    where = folder / f"tied, {source}" / "checkpoints"
    if source in ("damaged", "unsigned", "outside"):
        where = tmp_path / source
        shutil.copytree(folder / "tied, begun" / "checkpoints", where)
        if source == "damaged":
            _flip(where)
        elif source == "unsigned":
            (files.folder_of(where, BEGUN) / files.MANIFEST).unlink()
        else:
            _point_outside(files.folder_of(where, BEGUN))
    arguments = [str(where), str(tmp_path / "out"), *flags.split()]
    assert interleave_ids.main(arguments) == 2
    (line,) = capsys.readouterr().err.splitlines()
    assert line.startswith("launch.interleave_ids: ") and message in line
    assert not (tmp_path / "out").exists()


def _point_outside(folder: Path) -> None:
    """An index that names a file elsewhere, with a manifest that fits."""
    import pickle
    from dataclasses import replace

    index: Any = FileSystemReader(folder).read_metadata()
    for key, where in index.storage_data.items():
        if key.fqn == "embedding.word_embeddings.weight":
            index.storage_data[key] = replace(where, relative_path="../x")
    (folder / ".metadata").write_bytes(pickle.dumps(index))
    manifest = files.Manifest.read(folder)
    assert manifest is not None
    manifest.files[".metadata"] = files.facts(folder / ".metadata")
    manifest.write(folder)


def test_a_folder_that_is_not_empty_is_refused(
    folder: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x").write_text("mine")
    source = str(folder / "tied, begun" / "checkpoints")
    assert interleave_ids.main([source, str(tmp_path), "--ranks", "2"]) == 2
    assert "OUT: expected a new or empty folder" in capsys.readouterr().err
    assert [each.name for each in tmp_path.iterdir()] == ["x"]


def test_only_tokens_and_labels_are_renumbered() -> None:
    ids = Interleaving(6, 2)
    item = {
        "tokens": torch.tensor([0, 1, 2, 5]),
        "labels": torch.tensor([1, 2, 5, 0]),
        "loss_mask": torch.tensor([1.0, 1.0, 0.0, 1.0]),
        "position_ids": torch.arange(4),
    }
    data = Interleaved([item], ids)
    assert len(data) == 1
    found = data[0]
    assert found["tokens"].tolist() == [0, 3, 1, 5]
    assert found["labels"].tolist() == [3, 1, 5, 0]
    assert found["loss_mask"] is item["loss_mask"]
    assert found["position_ids"] is item["position_ids"]
    assert item["tokens"].tolist() == [0, 1, 2, 5]  # Megatron keeps some of its tensors


def test_off_by_default() -> None:
    assert settings.load(TINY).loss.interleave_ids is False
    assert settings.load(TINY, ["cce.interleave_ids=true"]).loss.interleave_ids is True
    with pytest.raises(ValueError, match=r"cce\.interleave_ids"):
        settings.load(TINY, ["cce.interleave_ids=often"])
