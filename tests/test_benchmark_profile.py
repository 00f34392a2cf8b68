"""The benchmark's account of a step by kernels: from made-up timelines, and on the CPU."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest
import torch

from benchmark_runs import written
from launch.benchmark import __main__ as command
from launch.benchmark import profiling, tables
from launch.benchmark.profiling import Gap, Span, Window
from launch_runs import torchrun

pytestmark = [pytest.mark.no_poison, pytest.mark.once]

_MARK = "at::cuda::(anonymous namespace)::spin_kernel(long)"


def _event(name: str, start: float, stop: float, cat: str = "kernel", tid: int = 7) -> Any:
    return {"ph": "X", "cat": cat, "name": name, "ts": start, "dur": stop - start, "tid": tid}


def _run(at: float, *kernels: tuple[str, float, float], length: float) -> list[Any]:
    """Events of a run that starts at `at`, between two marks of a microsecond."""
    return [
        _event(_MARK, at - 1, at),
        *(_event(name, at + start, at + stop) for name, start, stop in kernels),
        _event(_MARK, at + length, at + length + 1),
    ]


def test_account_of_a_made_up_timeline() -> None:
    """Two runs of a step, each followed by the unit; the second run is slower by its start."""
    step = (("a", 2, 10), ("b", 10, 14), ("a", 19, 25), ("side", 20, 27))
    late = (("a", 4, 12), ("b", 12, 16), ("a", 21, 27), ("side", 22, 29))
    events = [
        *_run(100, *step, length=30),
        _event("flush", 132, 140),
        *_run(150, ("gemm", 1, 11), length=12),
        *_run(200, *late, length=32),
        *_run(250, ("gemm", 1, 21), length=22),
        # What else is in a trace.
        _event("step", 90, 300, cat="gpu_user_annotation"),
        _event("cudaLaunchKernel", 101, 103, cat="cuda_runtime"),
        {"ph": "M", "name": "process_name"},
        {"ph": "s", "cat": "ac2g", "name": "ac2g", "ts": 101},
        _event("warm up", 10, 50),
    ]
    found = profiling.windows(profiling.read(reversed(events), cuda=True), 4)
    assert [len(window.spans) for window in found] == [4, 1, 4, 1]
    assert [window.total_us() for window in found[1::2]] == [10, 20]
    account = profiling.account(found[::2], 15.0)
    assert account["kernels"] == [
        {"name": "a", "calls": 2, "us": 14, "gemms": pytest.approx(14 / 15)},
        {"name": "side", "calls": 1, "us": 7, "gemms": pytest.approx(7 / 15)},
        {"name": "b", "calls": 1, "us": 4, "gemms": pytest.approx(4 / 15)},
    ]
    assert (account["runs"], account["gemm_us"]) == (2, 15)
    # Overlapping kernels count both; while one of them runs the device is not idle.
    assert (account["kernels_us"], account["span_us"]) == (25, 25)
    assert account["idle_us"] == (10 + 12) / 2
    assert account["gaps"] == [
        {"at_us": 14, "us": 5, "before": "b", "after": "a"},
        {"at_us": 27, "us": 3, "before": "side", "after": "end of the step"},
        {"at_us": 0, "us": 2, "before": "start of the step", "after": "a"},
    ]


def test_the_largest_gaps_are_those_of_the_median_run() -> None:
    def window(start: float, pauses: list[int]) -> Window:
        spans, now = [], start
        for number, pause in enumerate(pauses):
            spans.append(Span(f"k{number}", now + pause, now + pause + 10))
            now = spans[-1].end_us
        return Window(start, now, tuple(spans))

    runs = [window(0, [900]), window(1000, [1, 7, 3, 8, 2, 9, 6]), window(2000, [])]
    account = profiling.account(runs, None)
    assert [(gap["us"], gap["after"]) for gap in account["gaps"]] == [
        *((9, "k5"), (8, "k3"), (7, "k1"), (6, "k6"), (3, "k2"))
    ]
    assert account["idle_us"] == 36
    # k0 ran in two runs of three, the others in one: the median run has none of them.
    assert {kernel["name"]: kernel["calls"] for kernel in account["kernels"]} == {
        "k0": 1,
        **{f"k{number}": 0 for number in range(1, 7)},
    }
    assert list(profiling.gaps(Window(5, 9, ()))) == [
        Gap(0, 4, "start of the step", "end of the step")
    ]


def test_a_timeline_without_all_marks_is_refused() -> None:
    spans = profiling.read(_run(100, ("a", 2, 10), length=30)[:-1], cuda=True)
    with pytest.raises(RuntimeError, match="expected 2 marks, got 1"):
        profiling.windows(spans, 1)


def test_operators_stand_for_kernels_without_a_gpu() -> None:
    """Outermost operators of each thread; autograd's own frames are none."""
    events = [
        _event("spin_kernel", 0, 1, cat="user_annotation"),
        _event("autograd::engine::evaluate_function: MmBackward0", 2, 30, cat="cpu_op"),
        _event("MmBackward0", 3, 29, cat="cpu_op"),
        _event("aten::mm", 4, 20, cat="cpu_op"),
        _event("aten::resolve_conj", 5, 6, cat="cpu_op"),
        _event("aten::t", 20, 21, cat="cpu_op"),
        _event("aten::add", 10, 15, cat="cpu_op", tid=8),
        _event("gemm", 5, 6),
        _event("spin_kernel", 31, 32, cat="user_annotation"),
    ]
    (window,) = profiling.windows(profiling.read(events, cuda=False), 1)
    assert [span.name for span in window.spans] == ["aten::mm", "aten::add", "aten::t"]


@pytest.mark.parametrize(
    ("name", "short"),
    [
        ("_tile_stats_kernel", "_tile_stats_kernel"),
        ("nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT", "nvjet_tst_256x128_64x4_2x1_v_bz_coopA_TNT"),
        (
            "void at::native::vectorized_elementwise_kernel<4, at::native::FillFunctor<float>, "
            "std::array<char*, 1ul> >(int, at::native::FillFunctor<float>)",
            "vectorized_elementwise_kernel<4, FillFunctor<float>, array<char*, 1ul> >",
        ),
        (
            "void at::native::(anonymous namespace)::cunn_SoftMaxForward<(int)8, float>(float*)",
            "cunn_SoftMaxForward<(int)8, float>",
        ),
        ("Memset (Device)", "Memset (Device)"),
        ("Memcpy DtoD (Device -> Device)", "Memcpy DtoD (Device -> Device)"),
        ("aten::mm", "aten::mm"),
    ],
)
def test_names_are_shortened(name: str, short: str) -> None:
    assert profiling.plain_name(name) == short


def _cells(line: str) -> list[str]:
    return [cell.strip() for cell in line.strip("|").split("|")]


@pytest.mark.skipif(torch.cuda.is_available(), reason="looks at operators, which a GPU has none of")
def test_profile_then_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "48,16,96", "--dtype", "fp32", "--runs", "3", "--out", str(out))
    names = "cce-tp-exact,torch-eager,te"
    assert command.main(["profile", *flags, "--implementations", names]) == 0
    assert command.main(["profile", *flags, "--implementations", names, "--forward-only"]) == 0
    shown = capsys.readouterr().out
    assert "kernels of torch-eager" in shown
    whole, forward = (written(out)[first::3] for first in (1, 4))
    both, alone = whole[0], forward[0]
    for record in (*written(out)[:2], *written(out)[3:5]):
        found = record["profile"]
        assert (record["kind"], record["status"], found["runs"]) == ("profile", "ok", 3), record
        assert record["gate"]["errors"]["loss"] < 1e-5
        assert found["kernels_us"] > 0 and found["gemm_us"] > 0
        assert found["span_us"] <= found["step_us"]
        assert 1 <= len(found["gaps"]) <= 5
        for kernel in found["kernels"]:
            assert kernel["gemms"] == pytest.approx(kernel["us"] / found["gemm_us"])
    calls = [
        {kernel["name"]: kernel["calls"] for kernel in record["profile"]["kernels"]}
        for record in (both, alone)
    ]
    # Of the logits' product, and in the backward pass dE and dC.
    assert calls[0]["aten::mm"] == 2 and calls[0]["aten::linear"] == 1
    assert "aten::mm" not in calls[1] and calls[1]["aten::linear"] == 1
    assert alone["options"] == {"forward_only": True}
    missing = written(out)[2]
    assert (missing["status"], missing["profile"]) == ("not available", None)

    # Beside timings in one file: neither is taken for the other.
    timed = ("--implementations", "torch-eager", "--seconds-per-case", "0.002")
    assert command.main(["run", *flags[:4], "--out", str(out), *timed]) == 0
    capsys.readouterr()
    assert command.main(["table", str(out)]) == 0
    text = capsys.readouterr().out
    cases, profiles = text.split("## profiles")
    assert "cce-tp-exact" not in cases and "| torch-eager " in cases
    assert profiles.count("kernels of torch-eager") == 2
    assert "te: not available: " in profiles
    line = next(each for each in profiles.splitlines() if each.startswith("| aten::linear"))
    (linear,) = [k for k in both["profile"]["kernels"] if k["name"] == "aten::linear"]
    assert _cells(line)[:3] == ["aten::linear", "1", f"{linear['us']:,.1f}"]


def test_profile_of_a_long_name_and_without_a_unit() -> None:
    account = profiling.account([Window(0, 9, (Span("x" * 50 + "y" * 50, 2, 7),))], None)
    record = {"implementation": "liger", "kind": "profile", "profile": {**account, "step_us": 9.5}}
    lines = tables.terminal([record]).splitlines()
    assert lines[0] == "liger: 1 runs, no gemm"
    (row,) = [line for line in lines if line.startswith("xxx")]
    assert row.split() == ["x" * 40 + "..." + "y" * 21, "1", "5.0", "-"]
    assert any(line.split() == ["of", "it", "idle", "4.0", "-"] for line in lines)


def test_profile_over_two_ranks(tmp_path: Path) -> None:
    """All ranks run as many steps; rank 0 alone writes."""
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "48,16,96", "--runs", "2", "--out", str(out))
    names = "cce-tp-exact,torch-eager"
    torchrun(2, "-m", "launch.benchmark", "profile", *flags, "--implementations", names)
    ours, eager = written(out)
    assert ours["status"] == "ok", ours
    assert ours["ranks"]["world_size"] == 2
    names = [kernel["name"] for kernel in ours["profile"]["kernels"]]
    assert any(name.startswith("c10d::") for name in names), names
    assert eager["status"] == "not available"


@pytest.mark.gpu
def test_profile_on_a_gpu(tmp_path: Path) -> None:
    """Eager PyTorch computes three products; the device's clock and the host's agree."""
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "4096,1024,32768", "--implementations", "torch-eager,cce-tp-exact")
    assert command.main(["profile", *flags, "--out", str(out)]) == 0
    for record in written(out):
        assert record["status"] == "ok", record
        found = record["profile"]
        assert found["span_us"] <= 1.02 * found["step_us"]
        busy = found["step_us"] - found["idle_us"]
        assert busy == pytest.approx(found["kernels_us"], rel=0.1)
        assert 3 <= found["kernels_us"] / found["gemm_us"] < 20
        assert all(profiling.MARK not in kernel["name"] for kernel in found["kernels"])
