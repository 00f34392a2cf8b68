"""The benchmark's measurements, on the CPU at tiny sizes: every implementation, the gate, ranks."""

from __future__ import annotations

import sys
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch
import torch.distributed as dist
import torch.nn.functional as F
from torch import Tensor

from benchmark_runs import ALL_OPTIONS, CPU, QUICK, TINY, run
from cce_tp import VocabShard, linear_cross_entropy, sharding
from cce_tp.workspace import default_workspace_bytes
from launch.benchmark import __main__ as command
from launch.benchmark import collectives, machine, measure, outcome, records, scaling, tables
from launch.benchmark.catalogue import IMPLEMENTATIONS, Case, Options, Shape
from launch.benchmark.implementations import TABLE, Implementation
from launch.benchmark.measure import Meter, Timing
from launch.benchmark.parallel import World
from launch.benchmark.peers import NotAvailable, Operands, Problem
from launch.benchmark.session import Session
from launch.benchmark.steps import even_rows
from launch_runs import torchrun
from problems import same_bits
from ranks import Rank, RankPool

pytestmark = pytest.mark.no_poison


def _measure(case: Case, table: dict[str, Implementation] | None = None) -> list[dict[str, Any]]:
    table = TABLE if table is None else table
    names = [name for name in table if case.implementations is None or name in case.implementations]
    with World(device=CPU, backend="gloo") as world:
        return list(Session(world, seconds=0.002, table=table).measure(case, names))


def test_run_then_table_then_plot(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Every implementation gives a row; the rows make the table and the figures."""
    wanted = [name for name in IMPLEMENTATIONS if name not in ("torch-compiled", "megatron-native")]
    flags = ("--dtype", "fp32", "--implementations", ",".join(wanted))
    found = run(tmp_path / "rows.jsonl", *flags, "--shape", "48,16,96", "--shape", "33,16,96")
    shown = capsys.readouterr().out
    assert not dist.is_initialized()
    assert [record["implementation"] for record in found] == 2 * wanted
    for record in found:
        name, status = record["implementation"], record["status"]
        assert name in shown
        if name.startswith(("liger", "te", "apple-cce")) or name == "cce-tp-far-field":
            assert status in ("not available", "ok"), record
            assert status == "ok" or record["reason"]
            continue
        assert status == "ok", record
        assert record["reason"] is None
        assert record["gate"]["errors"].keys() == {"loss", "input_grad", "weight_grad"}
        assert all(error < 1e-5 for error in record["gate"]["errors"].values())
        for key in ("forward", "both"):
            timing = record[key]
            assert 0 < timing["low_ms"] <= timing["median_ms"] <= timing["high_ms"]
            unit = timing["gemm"]
            assert 0 < unit["low_ms"] <= unit["median_ms"] <= unit["high_ms"]
            assert 0 < timing["gemms_low"] <= timing["gemms"] <= timing["gemms_high"]
            assert timing["runs"] == unit["runs"] >= 5
        assert record["versions"]["torch"] == torch.__version__
        assert record["hardware"]["name"].startswith("CPU")
        assert record["shape"] == {"tokens": record["shape"]["tokens"], "hidden": 16} | {
            "vocab": 96,
            "rows": 96,
        }

    file = str(tmp_path / "rows.jsonl")
    assert command.main(["table", file, file]) == 0
    markdown = capsys.readouterr().out
    assert "### 48 x 16 x 96, fp32, random" in markdown
    assert "| torch-eager-fp32 " in markdown
    assert "Not available: " in markdown

    assert command.main(["plot", file, "--out-dir", str(tmp_path / "figures")]) == 0
    lines = capsys.readouterr().out.splitlines()
    made = sorted(path.name for path in (tmp_path / "figures").iterdir())
    assert made == ["error-1.png", "error-2.png", "tokens.png"]
    assert any(line.startswith("no figure 'memory'") for line in lines)
    for path in (tmp_path / "figures").iterdir():
        assert path.read_bytes().startswith(b"\x89PNG") and path.stat().st_size > 5000


def test_run_needs_no_plotting_packages(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    for package in ("matplotlib", "pandas", "megatron"):
        monkeypatch.setitem(sys.modules, package, None)
        for name in [name for name in sys.modules if name.startswith(f"{package}.")]:
            monkeypatch.delitem(sys.modules, name)
    names = "cce-tp-exact,megatron-unfused"
    found = run(tmp_path / "rows.jsonl", "--shape", "48,16,96", "--implementations", names)
    assert [record["status"] for record in found] == ["ok", "not available"]
    assert "megatron-core is not installed" in found[1]["reason"]


def test_what_is_missing_is_said_before_measuring(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setattr(command.importlib.util, "find_spec", lambda name: None)
    assert command.main(["run", "--shape", "8,8,8"]) == 2
    assert "tqdm: expected to be installed" in capsys.readouterr().err


@pytest.mark.parametrize("dtype", ["bf16", "fp16", "fp32"])
@pytest.mark.parametrize(
    "options",
    [
        Options(),
        ALL_OPTIONS,
        replace(ALL_OPTIONS, statistics=True, grad_weight_out=True, workspace_mib=2),
        Options(forward_only=True),
    ],
    ids=lambda options: "+".join(options.changed()) or "plain",
)
def test_options_pass_the_gate(dtype: str, options: Options) -> None:
    names = ("cce-tp-exact", "torch-eager-fp32", "megatron-unfused")
    case = Case(shape=TINY, dtype=dtype, options=options, implementations=names, inputs="peaked")
    ours, eager, megatron = _measure(case)
    assert ours["status"] == "ok", ours
    errors = {"loss", "input_grad", "weight_grad"} | ({"bias_grad"} if options.bias else set())
    assert ours["gate"]["errors"].keys() == ({"loss"} if options.forward_only else errors)
    assert (ours["both"] is None) == options.forward_only
    if options.statistics:
        assert (eager["status"], eager["reason"]) == ("not available", "has no option statistics")
    else:
        assert eager["status"] == "ok", eager
    if options.bias:
        assert (megatron["status"], megatron["reason"]) == (
            "not available",
            "has no option softcap",
        )


def _entry(call: Callable[[Operands], Tensor]) -> Implementation:
    def build(problem: Problem) -> Callable[[Operands], Tensor]:
        del problem
        return call

    return Implementation(build, "torch")


def _loss(operands: Operands) -> Tensor:
    return F.cross_entropy(operands.input @ operands.weight.t(), operands.target)


def test_wrong_implementations_fail_the_gate_and_are_not_timed() -> None:
    calls = dict.fromkeys(("loss", "dE", "dC", "nan"), 0)

    def wrong(name: str, change: Callable[[Operands], Tensor]) -> Implementation:
        def call(operands: Operands) -> Tensor:
            calls[name] += 1
            return change(operands)

        return _entry(call)

    def scale(tensor: Tensor, by: float) -> Tensor:
        """The same numbers, another gradient."""
        return tensor * by - tensor.detach() * (by - 1)

    table = {
        "loss": wrong("loss", lambda o: _loss(o) + 0.01),
        "dE": wrong("dE", lambda o: _loss(replace(o, input=scale(o.input, 1.001)))),
        "dC": wrong("dC", lambda o: _loss(replace(o, weight=scale(o.weight, 1.001)))),
        "nan": wrong("nan", lambda o: _loss(o) * torch.nan),
        "right": _entry(_loss),
        "filtered": replace(
            _entry(lambda o: _loss(replace(o, input=scale(o.input, 1.01)))), exact=False
        ),
    }
    found = {r["implementation"]: r for r in _measure(Case(shape=TINY, dtype="fp32"), table)}
    for name, what in (("loss", "loss"), ("dE", "input_grad"), ("dC", "weight_grad")):
        record = found[name]
        assert record["status"] == "failed", record
        assert f"{what} " in record["reason"] and ">" in record["reason"]
        assert record["gate"]["errors"][what] > record["gate"]["limits"][what]
        assert record["forward"] is record["both"] is None
    assert found["nan"]["status"] == "failed"
    assert records.clean(found["nan"])["gate"]["errors"]["loss"] is None
    assert set(calls.values()) == {1}
    assert found["right"]["status"] == found["filtered"]["status"] == "ok"


def test_what_raises_is_a_row_and_the_rest_is_measured() -> None:
    def raises(error: Exception) -> Implementation:
        def call(operands: Operands) -> Tensor:
            raise error

        return _entry(call)

    later: list[int] = []

    def out_of_memory_later(operands: Operands) -> Tensor:
        later.append(0)
        if len(later) > 1:
            raise torch.OutOfMemoryError("CUDA out of memory. GPU 0 has\nmany bytes")
        return _loss(operands)

    table = {
        "memory": raises(torch.OutOfMemoryError("CUDA out of memory. Tried 9 GiB. GPU 0 has\nx")),
        "memory later": _entry(out_of_memory_later),
        "other": raises(AssertionError("strides\ndo not fit")),
        "missing": raises(NotAvailable("not for this size")),
        "right": _entry(_loss),
    }
    found = _measure(Case(shape=TINY), table)
    assert [(record["status"], record["reason"]) for record in found] == [
        ("out of memory", "CUDA out of memory. Tried 9 GiB."),
        ("out of memory", "CUDA out of memory."),
        ("error", "AssertionError: strides"),
        ("not available", "not for this size"),
        ("ok", None),
    ]


class _Breaks:
    """An entry of the table that breaks the GPU when it is called for the n-th time."""

    def __init__(self, calls: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.left, self.prepared = calls, 0
        monkeypatch.setattr(outcome, "_is_lost", lambda device: True)

    def entry(self) -> Implementation:
        plain = _entry(_loss)

        def prepare(problem: Problem) -> Any:
            self.prepared += 1
            call = plain.prepare(problem)

            def loss(operands: Operands) -> Tensor:
                self.left -= 1
                if self.left == 0:
                    raise RuntimeError("CUDA error: an illegal memory access was\nmore")
                return call(operands)

            return loss

        return Implementation(prepare, "torch")


@pytest.mark.parametrize("what", ["run", "profile"])
@pytest.mark.parametrize("calls", [1, 2, 5], ids=["in-the-gate", "first-step", "later"])
def test_a_lost_gpu_ends_the_run_and_resume_goes_on(
    what: str,
    calls: int,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    capsys: pytest.CaptureFixture[str],
) -> None:
    """The row of who lost it is there; the next run leaves out what has a row."""
    broken = _Breaks(calls, monkeypatch)
    monkeypatch.setitem(TABLE, "torch-eager", _entry(_loss))
    monkeypatch.setitem(TABLE, "liger", broken.entry())
    monkeypatch.setitem(TABLE, "apple-cce", _entry(_loss))
    out = tmp_path / "rows.jsonl"
    flags = [what, "--shape", "48,16,96", "--shape", "48,16,97", "--out", str(out), "--resume"]
    flags += ["--implementations", "torch-eager,liger,apple-cce", "--commit"]
    flags += ["abc", *(QUICK if what == "run" else ("--runs", "5"))]
    assert command.main(flags) == 1
    captured = capsys.readouterr()
    assert "lost to liger: RuntimeError: CUDA error: an illegal memory" in captured.err
    assert "--resume" in captured.err
    rows = records.read([str(out)])[0]
    assert (rows[-1]["implementation"], rows[-1]["status"]) == ("liger", "error")
    assert rows[-1]["reason"].startswith("RuntimeError: CUDA error")
    assert len(rows) == (1 if calls == 1 else 2)
    out.write_bytes(out.read_bytes() + b'{"schema": 3, "ki')  # as if it had been killed
    broken.left = -1
    assert command.main(flags) == 0
    rows = records.read([str(out)])[0]
    measured = {(each["shape"]["vocab"], each["implementation"]) for each in rows}
    assert len(measured) == len(rows) == 6
    assert broken.prepared == 2
    assert command.main(flags) == 0 and len(records.read([str(out)])[0]) == 6
    flags[flags.index("abc")] = "def"  # another revision
    assert command.main(flags) == 0 and len(records.read([str(out)])[0]) == 12


@pytest.mark.parametrize(
    ("flags", "recorded"),
    [
        ([], {}),
        (["--keep-logits-in-grad"], {"keep_logits_in_grad": True}),
        (["--no-keep-logits-in-grad"], {"keep_logits_in_grad": False}),
    ],
)
def test_where_logits_are_kept_is_asked_for_or_left_to_the_library(
    tmp_path: Path, flags: list[str], recorded: dict[str, Any]
) -> None:
    out = tmp_path / "rows.jsonl"
    run = ["run", "--shape", "48,16,96", "--implementations", "cce-tp-far-field", *QUICK]
    assert command.main([*run, "--out", str(out), *flags]) == 0
    (record,) = records.read([str(out)])[0]
    assert (record["status"], record["options"]) == ("ok", recorded)


def test_what_resume_does_not_take_for_done(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    out = tmp_path / "rows.jsonl"
    out.write_text("")
    flags = ["run", "--shape", "48,16,96", "--implementations", "torch-eager", *QUICK]
    flags += ["--out", str(out), "--resume", "--commit", "abc"]

    def missing(problem: Problem) -> Any:
        raise NotAvailable("not installed")

    monkeypatch.setitem(TABLE, "torch-eager", Implementation(missing, "torch"))
    assert command.main(flags) == 0
    monkeypatch.setitem(TABLE, "torch-eager", _entry(_loss))
    for more in ([], [], ["--host-time"], ["--host-time"]):
        assert command.main([*flags, *more]) == 0
    rows = records.read([str(out)])[0]
    assert [(row["status"], row["host"] is not None) for row in rows] == [
        ("not available", False),
        ("ok", False),
        ("ok", True),
    ]
    out.write_text("[1]\n")
    assert command.main(flags) == 2
    assert "expected a record of schema" in capsys.readouterr().err
    monkeypatch.setattr(machine, "commit", lambda: "abc-dirty")
    assert command.main(flags[:-2]) == 2
    assert "--resume: expected a revision without changes" in capsys.readouterr().err


def test_records_are_written_one_by_one(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """What was measured before an interruption is there."""

    def interrupted(problem: Problem) -> Any:
        raise KeyboardInterrupt

    broken = Implementation(interrupted, "torch")
    monkeypatch.setitem(TABLE, "torch-eager", broken)
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "48,16,96", "--shape", "48,16,97", "--out", str(out), *QUICK)
    assert command.main(["run", *flags, "--implementations", "torch-eager-fp32"]) == 0
    with pytest.raises(KeyboardInterrupt):
        command.main(["run", *flags, "--implementations", "torch-eager-fp32,torch-eager"])
    assert len(out.read_text().splitlines()) == 2


def test_timing_and_host_time() -> None:
    timing = Timing.of([float(each) for each in range(1, 12)], World())
    assert (timing.median_ms, timing.low_ms, timing.high_ms, timing.runs) == (6, 2, 10, 11)
    meter = Meter(World(), seconds=0.01)
    assert meter.peak_bytes(lambda: None, lambda: 0) is None
    case = Case(shape=TINY, host_time=True, implementations=("cce-tp-exact",))
    (record,) = _measure(case)
    assert 1 < record["host"]["forward_us"] < 1e7
    assert 1 < record["host"]["backward_us"] < 1e7
    for name in ("forward_us", "backward_us"):
        assert 1 < record["host"][f"empty_{name}"] < record["host"][name]


def test_the_unit_is_run_between_the_runs(monkeypatch: pytest.MonkeyPatch) -> None:
    """On a clock that slows down all the time the step is four units in every pair of runs."""
    order: list[str] = []
    now, pace = 0.0, 1.0

    def take(name: str, seconds: float) -> Callable[[], None]:
        def call() -> None:
            nonlocal now, pace
            order.append(name)
            now += pace * seconds
            pace *= 1.1 if name == "unit" else 1.0

        return call

    monkeypatch.setattr(measure, "time", SimpleNamespace(perf_counter=lambda: now))
    found = Meter(World(), seconds=1e3).compare(take("step", 4.0), take("unit", 1.0))
    assert order == ["step", "unit"] * (len(order) // 2)
    assert found.unit is not None and found.unit.runs == found.step.runs > 5
    assert found.step.high_ms > 2 * found.step.low_ms
    assert (found.ratio, found.low, found.high) == pytest.approx((4.0, 4.0, 4.0))
    alone = Meter(World(), seconds=1e3).compare(take("step", 4.0), None)
    assert (alone.unit, alone.ratio, alone.low, alone.high) == (None, None, None, None)


@pytest.mark.parametrize("short", ["of the product's output", "of the step beside it"])
def test_a_step_is_timed_without_a_unit_that_has_no_room(
    short: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    outputs: list[weakref.ref[Tensor]] = []
    make = Tensor.new_empty

    def new_empty(tensor: Tensor, size: tuple[int, int]) -> Tensor:
        if short == "of the product's output":
            raise torch.OutOfMemoryError("no room")
        made = make(tensor, size)
        outputs.append(weakref.ref(made))
        return made

    def loss(operands: Operands) -> Tensor:
        if any(output() is not None for output in outputs):
            raise torch.OutOfMemoryError("no room")
        return _loss(operands)

    monkeypatch.setattr(Tensor, "new_empty", new_empty)
    (found,) = _measure(Case(shape=TINY, dtype="fp32"), {"torch-eager": _entry(loss)})
    assert found["status"] == "ok", found
    assert len(outputs) == (0 if short == "of the product's output" else 2)
    for key in ("forward", "both"):
        timing = found[key]
        assert timing["median_ms"] > 0
        names = ("gemm", "gemms", "gemms_low", "gemms_high")
        assert [timing[name] for name in names] == [None] * 4
    assert f"{found['both']['median_ms']:.3g} ms" in tables.terminal([found])


def _two_ranks(out: Path, names: str, *flags: str) -> tuple[str, list[dict[str, Any]]]:
    command_line = ["-m", "launch.benchmark", "run", "--shape", "48,16,96", *QUICK, *flags]
    command_line += ["--implementations", names, "--out", str(out)]
    printed = torchrun(2, *command_line, TORCHDYNAMO_DISABLE="1")
    (found,) = records.read([str(out)])
    return printed, found


@pytest.mark.once
def test_two_ranks(tmp_path: Path) -> None:
    """One vocabulary on each rank, then one split over both; rank 0 alone writes."""
    names = "cce-tp-exact,torch-eager,megatron-unfused,megatron-native"
    printed, found = _two_ranks(tmp_path / "rows.jsonl", names, "--tensor-parallel", "1,2")
    assert printed.count("torch-eager ") == 2
    whole, found = found[:4], found[4:]
    for record in whole:
        assert record["status"] == "ok", record
        assert record["shape"]["rows"] == 96
        assert (record["ranks"]["world_size"], record["ranks"]["processes"]) == (1, 2)
        assert "exposed_both_ms" not in record["ranks"]
    ours, eager, unfused, native = found
    assert (eager["status"], eager["ranks"]["world_size"]) == ("not available", 2)
    for record in (ours, unfused, native):
        assert record["status"] == "ok", record
        assert record["shape"]["rows"] == 48
        ranks = record["ranks"]
        assert (ranks["world_size"], ranks["backend"]) == (2, "gloo")
        for key in ("forward", "both"):
            medians = record[key]["ranks_ms"]
            assert len(medians) == 2 and record[key]["median_ms"] == max(medians)
            unit = record[key]["gemm"]
            assert len(unit["ranks_ms"]) == 2 and unit["runs"] == record[key]["runs"]
            exposed = record[key]["median_ms"] - ranks[f"alone_{key}"]["median_ms"]
            assert ranks[f"exposed_{key}_ms"] == pytest.approx(exposed)
    assert ours["ranks"]["collectives_ms"].keys() == {
        "all-gather of statistics",
        "all-reduce of dE",
    }
    assert "the group adds" in tables.terminal(found)
    share = scaling.share_of_one(ours, whole, "both")
    assert share == 2 * ours["both"]["median_ms"] / whole[0]["both"]["median_ms"]
    table = tables.markdown([whole + found]).partition("Over several ranks:")[2]
    (line,) = [each for each in table.splitlines() if "cce-tp-exact" in each and "2 ranks" in each]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    exposed = ours["ranks"]["exposed_both_ms"]
    assert cells[:3] == ["48 x 16 x 96", "cce-tp-exact", "2 ranks, gloo"]
    assert cells[6:9] == [
        f"{share:.3f}",
        f"{exposed:.3f}",
        f"{100 * exposed / ours['both']['median_ms']:.1f}%",
    ]


@pytest.mark.once
def test_two_ranks_with_half_of_the_tokens_each(tmp_path: Path) -> None:
    names = "cce-tp-exact,cce-tp-paper,megatron-unfused,liger-tp"
    _, found = _two_ranks(tmp_path / "rows.jsonl", names, "--sequence-parallel")
    *measured, megatron, liger = found
    assert megatron["reason"] == "gathers the tokens on a CUDA device"
    assert liger["reason"] == "takes no tokens that are split over ranks"
    for record in measured:
        assert record["status"] == "ok", record
        assert record["ranks"]["sequence_parallel"]
        assert record["ranks"]["alone_both"]["median_ms"] > 0
    assert measured[0]["ranks"]["collectives_ms"].keys() == {
        "all-gather of statistics",
        "all-gather of E",
        "reduce-scatter of dE",
    }
    assert "2 ranks, gloo, sequence parallel" in tables.markdown([found])


def teams(rank: Rank, sizes: tuple[int, ...]) -> list[tuple[int, int, int]]:
    """(rank, size, sum of the world ranks) of this rank's team of each size; asked twice."""
    world = World(dist.get_rank(), dist.get_world_size(), CPU, "gloo", dist.group.WORLD)
    found = []
    for size in (*sizes, *sizes):
        team, total = world.team(size), torch.tensor([world.rank])
        if team.group is not None:
            dist.all_reduce(total, group=team.group)
        found.append((team.rank, team.size, int(total)))
    return found


@pytest.mark.once
def test_teams_are_blocks_of_ranks(pool: RankPool) -> None:
    for rank, found in enumerate(pool.run(teams, (1, 2, 4), group="world")):
        wanted = [(0, 1, rank), (rank % 2, 2, 1 if rank < 2 else 5), (rank, 4, 6)]
        assert found == wanted + wanted


def loss_without_communication(rank: Rank, few: int) -> tuple[bool, list[str]]:
    """(whether loss and dC of steps with their collectives' results at hand are those of a step
    with collectives, collectives called).

    From `few` own tokens on, a rank begins with them."""
    shard = replace(VocabShard.even(96, rank.group), sequence_parallel=True)
    generator = torch.Generator().manual_seed(0)
    hidden = torch.randn(48, 16, generator=generator)[24 * rank.rank :][:24].requires_grad_()
    weight = torch.randn(96, 16, generator=generator)[shard.start : shard.stop].requires_grad_()
    target = torch.arange(48)

    def step() -> list[torch.Tensor]:
        weight.grad = None
        loss = linear_cross_entropy(hidden, weight, target, vocab_shard=shard)
        loss.backward()
        assert weight.grad is not None
        return [loss.detach(), weight.grad]

    called: list[str] = []
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(sharding, "_FEW_TOKENS", few)
        with collectives.at_hand(step), pytest.MonkeyPatch.context() as silent:
            for name in [name for name in dir(dist) if name.startswith(("all_", "reduce_"))]:
                silent.setattr(dist, name, lambda *_, name=name, **__: called.append(name))
            for name in ("_all_gather_whole", "_reduce_scatter_whole"):
                silent.setattr(sharding, name, lambda *_, name=name, **__: called.append(name))
            again = [*step(), *step()]
        wanted = step() * 2
    return all(map(same_bits, again, wanted)), called


@pytest.mark.parametrize("few", [1, 25], ids=["own-first", "all-at-once"])
def test_results_at_hand_are_those_of_the_collectives(pool: RankPool, few: int) -> None:
    assert pool.run(loss_without_communication, few, ranks=2) == [(True, [])] * 2


def test_a_shard_alone_has_the_workspace_of_the_whole() -> None:
    """As in a group, and not what its own small part would give."""
    caps: list[float | None] = []

    def build(problem: Problem) -> Any:
        caps.append(problem.options.workspace_mib)
        raise NotAvailable("it only looks")

    for name, filtered in (("cce-tp-exact", False), ("cce-tp-far-field", True)):
        caps.clear()
        table = {"looks": replace(TABLE[name], build=build)}
        for shard, options in (
            ((0, 4), Options()),
            ((0, 4), Options(workspace_mib=3)),
            (None, Options()),
        ):
            _measure(Case(shape=Shape(48, 16, 98), shard=shard, options=options), table)
        cap = default_workspace_bytes(48, 16, 98, filtered=filtered)
        assert caps == [cap / 2**20, 3, None]


def test_a_shard_beside_the_whole(tmp_path: Path) -> None:
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "48,16,98", "--implementations", "cce-tp-exact")
    run(out, *flags)
    whole, shard = run(out, *flags, "--shard", "3/4")
    assert (whole["shard"], whole["shape"]["rows"]) == (None, 98)
    assert (shard["shard"], shard["shape"]["rows"]) == ([3, 4], 25)
    assert shard["status"] == "ok", shard
    share = tables.share_of_whole(shard, [whole, shard])
    assert share == 4 * shard["both"]["median_ms"] / whole["both"]["median_ms"]
    assert f"{share:.2f} of 1/4 of the whole" in tables.markdown([[whole, shard]])
    assert [even_rows(98, rank, 4) for rank in range(4)] == [(0, 25), (25, 50), (50, 74), (74, 98)]


@pytest.mark.gpu
def test_on_a_gpu(tmp_path: Path) -> None:
    """Memory: of the logits in one, far below them in the other; and CUDA's clock."""
    names = ("torch-eager", "cce-tp-exact", "apple-cce", "liger")
    out = tmp_path / "rows.jsonl"
    shape = ("--shape", "4096,512,65536", "--seconds-per-case", "0.1", "--host-time")
    found = run(out, *shape, "--implementations", ",".join(names))
    eager, ours = found[1], found[0]
    logits = 2 * 4096 * 65536
    for record in (eager, ours):
        assert record["status"] == "ok", record
        assert record["hardware"]["driver"]
    assert logits <= eager["forward"]["extra_bytes"] <= 4 * logits
    assert 0 <= ours["both"]["extra_bytes"] <= 0.06 * logits
    rate = 2 * 4096 * 512 * 65536 / (ours["both"]["gemm"]["median_ms"] / 1000)
    assert 1e13 < rate < 2.5e15
