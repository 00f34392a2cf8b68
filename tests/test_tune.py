"""The tuner, and the cache file that it writes: opt-in, and never a silent surprise."""

from __future__ import annotations

import json
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

from cce_tp.kernels import tuned, tuning
from cce_tp.kernels.tuning import TileConfig
from launch import tune
from launch.benchmark.catalogue import Shape

pytestmark = pytest.mark.once

SHIPPED = tuning.tile_config(90, 2)
OTHER = replace(SHIPPED, block_v=128, num_warps=4)
NAME = "NVIDIA H100, capability 90, 2 bytes, versions"


@pytest.fixture
def cache(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """A cache file in use, on a made-up device of capability 9.0."""
    file = tmp_path / "folder" / "tuning.json"
    monkeypatch.setenv("CCE_TP_TUNING_CACHE", str(file))
    monkeypatch.setenv("CCE_TP_TUNED", "1")
    monkeypatch.setattr(tuning, "_device_properties", lambda index: (90, 132))
    monkeypatch.setattr(torch.cuda, "get_device_name", lambda index: "NVIDIA H100")
    monkeypatch.setattr(tuned, "key", lambda *_: NAME)
    tuning._device_config.cache_clear()
    yield file
    tuning._device_config.cache_clear()


def test_what_was_stored_is_used(cache: Path) -> None:
    assert tuned.store(NAME, OTHER, {"forward_ms": 1.0}) == cache
    tuned.store("another device", SHIPPED, {})
    assert tuning._device_config(0, 2) == OTHER
    entries = json.loads(cache.read_text())["entries"]
    assert entries.keys() == {NAME, "another device"}
    assert entries[NAME]["measured"] == {"forward_ms": 1.0}
    assert list(cache.parent.iterdir()) == [cache]


@pytest.mark.parametrize("value", [None, "0", ""])
def test_nothing_is_read_unless_it_is_asked_for(
    cache: Path, value: str | None, monkeypatch: pytest.MonkeyPatch
) -> None:
    tuned.store(NAME, OTHER, {})
    monkeypatch.delenv("CCE_TP_TUNED")
    if value is not None:
        monkeypatch.setenv("CCE_TP_TUNED", value)
    assert tuning._device_config(0, 2) == SHIPPED


def _entry(**changes: Any) -> str:
    fields = {name: getattr(OTHER, name) for name in TileConfig.__slots__} | changes
    return json.dumps({"schema": 1, "entries": {NAME: {"config": fields}}})


@pytest.mark.parametrize(
    ("text", "message"),
    [
        (None, "No such file"),
        ("", "got no JSON"),
        ("\xff\x00", "got no JSON"),
        ('{"schema": 1, "entr', "got no JSON"),
        ("[]", "of schema 1"),
        ('{"schema": 2, "entries": {}}', "of schema 1"),
        ('{"schema": 1, "entries": {}}', "no entry for NVIDIA H100"),
        ('{"schema": 1, "entries": {"NAME": 3}}', "expected an entry with block_n"),
        (_entry(extra=1), "expected an entry with block_n"),
        (_entry(block_n=100), "block_n: expected a size from 16 to 512, got 100"),
        (_entry(block_d=1024), "block_d: expected a size from 16 to 256, got 1024"),
        (_entry(num_warps="8"), "num_warps: expected a size from 1 to 16, got '8'"),
        (_entry(num_stages=True), "num_stages: expected a size from 1 to 8, got True"),
    ],
)
def test_what_cannot_be_used_is_warned_of(cache: Path, text: str | None, message: str) -> None:
    if text is not None:
        cache.parent.mkdir()
        cache.write_bytes(text.replace("NAME", NAME).encode("latin-1"))
    with pytest.warns(UserWarning, match="the shipped tile configuration is used") as warned:
        assert tuning._device_config(0, 2) == SHIPPED
    assert message in str(warned[0].message)
    tuning._device_config(0, 2)
    assert len(warned) == 1


def test_a_file_that_is_no_cache_is_not_overwritten(cache: Path) -> None:
    cache.parent.mkdir()
    cache.write_text("precious")
    with pytest.raises(ValueError, match="expected a cache"):
        tuned.store(NAME, OTHER, {})
    assert cache.read_text() == "precious"


def test_where_the_file_is(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("CCE_TP_TUNING_CACHE", raising=False)
    monkeypatch.setenv("XDG_CACHE_HOME", "/somewhere")
    assert tuned.path() == Path("/somewhere/cce_tp/tuning.json")
    monkeypatch.delenv("XDG_CACHE_HOME")
    assert tuned.path() == Path.home() / ".cache" / "cce_tp" / "tuning.json"


def test_versions_and_device_are_in_the_key() -> None:
    key = tuned.key("NVIDIA H100", 90, 2)
    assert all(word in key for word in ("NVIDIA H100", "90", "2 bytes", torch.__version__))


CPU = torch.device("cpu")
SMALL = TileConfig(block_n=32, block_v=64, block_d=32, group_mib=0, least_group=2, num_warps=4)


def _tuner(times: dict[int, float]) -> tune.Tuner:
    """In the interpreter, with made-up times by block_n."""

    def time_ms(step: Any) -> float:
        step()
        assert tuning._forced is not None
        return times[tuning._forced.block_n]

    return tune.Tuner(Shape(40, 24, 100), torch.float32, CPU, time_ms)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_the_fastest_wins(capsys: pytest.CaptureFixture[str]) -> None:
    others = [replace(SMALL, block_n=16), replace(SMALL, block_n=64, block_v=32), SMALL]
    trials = _tuner({32: 3.0, 16: 4.0, 64: 2.0}).run(SMALL, others)
    assert [trial.problem for trial in trials] == [None] * len(trials)
    assert [trial.config.block_n for trial in trials] == [32, 64, 64]
    best = min(trials, key=lambda trial: trial.total_ms)
    assert best.config == others[1] and best.total_ms == 4.0
    rows = [line[:12].strip() for line in capsys.readouterr().out.splitlines()]
    shipped, second, winner = "32 x 64 x 32", "16 x 64 x 32", "64 x 32 x 32"
    before = [shipped, second, winner, winner, winner]
    assert rows == [*before, "in turn, 3 t", shipped, winner, winner]
    assert tuning._forced is None


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_times_taken_in_turn_decide() -> None:
    """A configuration that was lucky the first time does not win."""
    tuner, seen = _tuner({}), []

    def time_ms(step: Any) -> float:
        assert tuning._forced is not None
        seen.append(tuning._forced.block_n)
        lucky = tuning._forced.block_n == 16 and seen.count(16) <= 2
        return 1.0 if lucky else {32: 3.0, 16: 4.0}[tuning._forced.block_n]

    tuner._time_ms = time_ms
    trials = tuner.run(SMALL, [replace(SMALL, block_n=16)])
    assert trials[0].total_ms == 6.0 == min(trial.total_ms for trial in trials)


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_without_the_shipped_one_there_is_no_comparison(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner, calls = _tuner({32: 3.0, 16: 1.0}), []
    try_one = tuner.try_one

    def later_fails(config: TileConfig) -> tune.Trial:
        calls.append(config.block_n)
        failed = tune.Trial(config, problem="out of memory")
        return failed if calls.count(32) > 1 and config.block_n == 32 else try_one(config)

    monkeypatch.setattr(tuner, "try_one", later_fails)
    with pytest.raises(ValueError, match="ran at first, and then not: out of memory"):
        tuner.run(SMALL, [replace(SMALL, block_n=16)])


def test_a_difference_within_the_noise_changes_nothing() -> None:
    shipped, other = (tune.Trial(each, 10.0, 10.0) for each in (SHIPPED, OTHER))
    for forward_ms, best in ((9.9, shipped), (9.7, replace(other, forward_ms=9.7))):
        assert tune.choose([shipped, replace(other, forward_ms=forward_ms)]) == best
    failed = tune.Trial(OTHER, problem="spills")
    assert tune.choose([shipped, failed]) is shipped


@pytest.mark.skipif(torch.cuda.is_available(), reason="in the interpreter")
def test_what_differs_spills_or_fails_is_left_out(monkeypatch: pytest.MonkeyPatch) -> None:
    tuner = _tuner({32: 3.0, 16: 1.0})
    assert tuner.try_one(SMALL).problem is None
    packed, gradient = tuner._expected or (torch.empty(0), torch.empty(0))
    other = replace(SMALL, block_n=16)
    assert tuner._problem(other, packed, gradient * 1.001, [0, 0]).startswith("another gradient")
    assert tuner._problem(other, packed * 1.001, gradient, [0]).startswith("another statistics")
    assert tuner._problem(other, packed * torch.nan, gradient, [0]).startswith("another statistics")
    assert tuner._problem(other, packed, gradient, [0, 12]) == "spills 12 registers"
    assert tuner._problem(SMALL, packed, gradient, [0, 12]) is None  # as it is shipped

    def fails() -> Any:
        raise RuntimeError("out of resource: shared memory\nmore")

    monkeypatch.setattr(tuner, "_gradient", fails)
    found = tuner.try_one(other)
    assert found.problem == "RuntimeError: out of resource: shared memory"
    assert found.total_ms == float("inf")


def test_candidates_are_valid() -> None:
    for itemsize in (2, 4):
        found = tune.candidates(itemsize)
        assert len(set(found)) == len(found)
        assert any(tuning.tile_config(cc, itemsize) in found for cc in (80, 90))
        for config in found:
            entry = {"config": {name: getattr(config, name) for name in TileConfig.__slots__}}
            assert tuned._configuration(entry, TileConfig) == config


@pytest.mark.skipif(torch.cuda.is_available(), reason="says what is missing")
def test_without_a_gpu(capsys: pytest.CaptureFixture[str]) -> None:
    assert tune.main([]) == 2
    assert "expected a CUDA device" in capsys.readouterr().err
    assert tune.main(["--shape", "8,8"]) == 2
    assert "--shape: expected N,D,V" in capsys.readouterr().err


@pytest.mark.gpu
def test_on_a_gpu(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """The file is written, and a process that asks for it finds its configuration."""
    monkeypatch.setenv("CCE_TP_TUNING_CACHE", str(tmp_path / "tuning.json"))
    some = tune.candidates(2)[1:4]
    monkeypatch.setattr(tune, "candidates", lambda itemsize: some)
    assert tune.main(["--shape", "1024,512,20000"]) == 0
    (entry,) = json.loads((tmp_path / "tuning.json").read_text())["entries"].values()
    monkeypatch.setenv("CCE_TP_TUNED", "1")
    tuning._device_config.cache_clear()
    try:
        found = tuning._device_config(0, 2)
    finally:
        tuning._device_config.cache_clear()
    assert {name: getattr(found, name) for name in TileConfig.__slots__} == entry["config"]


@pytest.mark.parametrize(("setting", "precision"), [(False, "tf32x3"), (True, "tf32")])
def test_precision_of_products(setting: bool, precision: str) -> None:
    """fp32 follows torch's setting; without TF32 it is made of three products in TF32."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision("high" if setting else "highest")
    try:
        assert tuning.input_precision(torch.float32) == precision
        assert tuning.input_precision(torch.bfloat16) == "ieee"
    finally:
        torch.set_float32_matmul_precision(before)
