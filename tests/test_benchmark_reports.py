"""The benchmark's command line, suites, records, tables and figures."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from matplotlib.figure import Figure

from benchmark_runs import run, snapshot
from launch.benchmark import __main__ as command
from launch.benchmark import figures, records, roofline, suites, tables
from launch.benchmark.catalogue import IMPLEMENTATIONS, MODELS, Case, Shape

pytestmark = [pytest.mark.no_poison, pytest.mark.once]

_FIGURES = Path(__file__).parents[1] / "docs" / "figures"


def _line(capsys: pytest.CaptureFixture[str], *arguments: str) -> str:
    assert command.main(list(arguments)) == 2
    printed = capsys.readouterr()
    assert printed.out == ""
    (line,) = printed.err.splitlines()
    return line


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ("run", "--model, --shape, --snapshot or --suite: expected one of them, got none"),
        ("run --shape 8,8", "--shape: expected N,D,V"),
        ("run --shape 8,8,0", "--shape: expected N,D,V"),
        ("run --model gpt5", "--model: expected one of gemma2-2b"),
        ("run --suite all", "--suite: expected one of standard"),
        ("run --shape 8,8,8 --tokens 0", "--tokens: expected a positive integer, got 0"),
        ("run --shape 8,8,8 --dtype fp8", "argument --dtype: invalid choice: 'fp8'"),
        ("run --shape 8,8,8 --resume", "--resume: expected together with --out"),
        ("run --shape 8,8,8 --tf32", "--tf32: expected together with --dtype fp32, got bf16"),
        ("run --shape 8,8,8 --implementations ours", "--implementations: expected names among"),
        ("run --shape 8,8,8 --shard 8/8", "--shard: expected r/W with 0 <= r < W <= V=8, got 8/8"),
        ("run --shape 8,8,8 --shard one", "--shard: expected r/W such as 0/8, got 'one'"),
        ("run --shape 8,8,8 --shards-of 9", "--shards-of: expected 1 <= W <= V=8, got 9"),
        ("run --shape 8,8,8 --shards-of 2 --shard 0/2", "--shards-of: expected without --shard"),
        ("run --shape 8,8,8 --ids interleaved", "--ids: expected together with --shards-of"),
        (
            "run --shape 8,8,8 --shards-of 2 --ids natural,odd",
            "--ids: expected orders among natural, interleaved, got 'odd'",
        ),
        ("run --suite shards --shards-of 2", "--shards-of: expected without --suite"),
        (
            "run --shape 8,8,8 --tensor-parallel 1,x",
            "--tensor-parallel: expected sizes such as 1,2,4, got '1,x'",
        ),
        (
            "run --shape 8,8,8 --tensor-parallel 2",
            "--tensor-parallel: expected sizes that divide the 1 ranks, got 2",
        ),
        (
            "run --shape 8,8,8 --sequence-parallel",
            "--sequence-parallel: expected several ranks to a vocabulary, got 1",
        ),
        ("run --suite models --sequence-parallel", "--sequence-parallel: expected without --suite"),
        ("run --shape 8,8,8 --softcap 0", "--softcap: expected a number > 0, got 0.0"),
        ("run --shape 8,8,8 --softcap high", "argument --softcap: invalid float value: 'high'"),
        ("run --shape 8,8,8 --z-loss -1", "--z-loss: expected a number >= 0, got -1.0"),
        ("run --shape 8,8,8 --label-smoothing 1", "--label-smoothing: expected a number in [0, 1)"),
        ("run --shape 8,8,8 --workspace-mib 0.5", "--workspace-mib: expected a number of at least"),
        ("run --shape 8,8,8 --seconds-per-case 0", "--seconds-per-case: expected a number > 0"),
        ("run --snapshot nowhere.pt", "--snapshot: expected a file or a folder of .pt files"),
        ("profile", "--model, --shape, --snapshot or --suite: expected one of them, got none"),
        ("profile --shape 8,8,8 --runs 0", "--runs: expected a positive integer, got 0"),
        ("profile --shape 8,8,8 --host-time", "unrecognized arguments: --host-time"),
        ("run --suite models --shape 8,8,8", "--shape: expected without --suite"),
        ("run --suite models --bias", "--bias: expected without --suite"),
        ("run --suite tokens --implementations te", "--implementations: expected one that the"),
        ("table nowhere.jsonl", "FILE: expected a file of records, got 'nowhere.jsonl'"),
        ("plot", "the following arguments are required: FILE, --out-dir"),
        ("measure", "argument command: invalid choice: 'measure'"),
    ],
)
def test_bad_arguments_are_one_line(
    arguments: str, message: str, capsys: pytest.CaptureFixture[str]
) -> None:
    assert message in _line(capsys, *arguments.split())


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"e": None}, "expected tensors e, c and t"),
        ({"c": torch.ones(96, 8)}, "expected e (N, D), c (V, D) and t (N,)"),
        ({"t": torch.zeros(40, 1)}, "expected e (N, D), c (V, D) and t (N,)"),
        ({"t": torch.full((40,), -100)}, "expected tokens with a target"),
        ({"vocab_start": 0, "vocab_size": 200}, "expected all 200 rows of the vocabulary, got 96"),
        ({"vocab_start": 96, "vocab_size": 192}, "expected rows [0, ...) of 192 next"),
    ],
)
def test_bad_snapshots_are_one_line(
    changes: dict[str, Any],
    message: str,
    tmp_path: Path,
    capsys: pytest.CaptureFixture[str],
) -> None:
    snapshot(tmp_path / "snap", 1, **changes)
    line = _line(capsys, "run", "--snapshot", str(tmp_path / "snap"))
    assert line.startswith("launch.benchmark: --snapshot: ") and message in line


def test_snapshot_that_is_no_file_of_torch(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "x.pt").write_bytes(b"nothing that torch wrote")
    assert "--snapshot: cannot read" in _line(capsys, "run", "--snapshot", str(tmp_path / "x.pt"))


def test_snapshot_and_shape_exclude_each_other(
    tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    snapshot(tmp_path / "snap", 1)
    line = _line(capsys, "run", "--snapshot", str(tmp_path / "snap"), "--shape", "8,8,8")
    assert "--snapshot: expected without --model, --shape and --inputs" in line


@pytest.mark.parametrize("text", ["not json", "[1]", '{"schema": 0}', ""])
def test_bad_records_are_one_line(
    text: str, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "rows.jsonl").write_text(text)
    assert "FILE: expected" in _line(capsys, "table", str(tmp_path / "rows.jsonl"))


def test_standard_suite_is_what_was_promised() -> None:
    cases = suites.suite("standard")
    shapes = {name: [c.shape for c in cases if c.suite == name] for name in suites.SUITES}
    assert {case.name for case in cases if case.suite == "models"} == set(MODELS)
    tokens = [shape.tokens for shape in shapes["tokens"]]
    assert (tokens[0], tokens[-1]) == (256, 65536)
    vocabulary = [shape.vocab for shape in shapes["vocabulary"]]
    assert (vocabulary[0], vocabulary[-1]) == (4000, 1048576)
    hidden = [shape.hidden for shape in shapes["hidden"]]
    assert (hidden[0], hidden[-1]) == (512, 16384)
    assert any(s.hidden % 8 for s in shapes["ragged"]) and any(
        s.vocab % 8 for s in shapes["ragged"]
    )
    kinds = {(case.dtype, case.tf32) for case in cases if case.suite == "precision"}
    assert kinds == {("fp16", False), ("fp32", False), ("fp32", True)}
    asked = [case.options.changed() for case in cases if case.suite == "options"]
    assert any({"bias", "softcap", "z_loss", "label_smoothing"} <= set(each) for each in asked)
    for name in ("forward_only", "grad_weight_out", "statistics", "workspace_mib"):
        assert any(list(each) == [name] for each in asked)
    assert {case.shard for case in cases if case.suite == "shards"} >= {(0, 2), (0, 4), (0, 8)}
    for case in cases:
        assert set(case.implementations or IMPLEMENTATIONS) <= set(IMPLEMENTATIONS)


@pytest.mark.parametrize(
    ("processes", "sizes"),
    [(1, [(1, False)]), (2, [(1, False), (2, False), (2, True)]), (6, [(1, False), (2, False)])],
)
def test_suite_of_several_ranks(processes: int, sizes: list[tuple[int, bool]]) -> None:
    """The sizes that divide the processes; without sequence parallelism where there is one."""
    args = command.parser().parse_args(["run", "--suite", "parallel"])
    cases = command.cases(args, None, processes)
    assert len({case.shape for case in cases}) == 3
    for shape in {case.shape for case in cases}:
        here = [case for case in cases if case.shape == shape]
        found = [(c.ranks, c.sequence_parallel) for c in here if not c.options.changed()]
        bare = [c for c in here if c.options.keep_logits_in_grad is False]
        assert [(c.ranks, c.sequence_parallel) for c in bare] == found
        assert found[: len(sizes)] == sizes and len(found) == (3 if processes == 6 else len(sizes))


def test_suite_at_reduced_size(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every kind of case in the suites passes, tiny; sweeps make their table and figure."""

    def small(name: str) -> list[Case]:
        found = {}
        for case in suites.suite(name):
            tokens, hidden, vocab = case.shape.tokens, case.shape.hidden, case.shape.vocab
            shape = Shape(max(8, tokens // 512), max(8, hidden // 256), max(16, vocab // 1024))
            found[str(replace(case, shape=shape))] = replace(case, shape=shape)
        return list(found.values())

    monkeypatch.setattr(command, "suite", small)
    out = tmp_path / "rows.jsonl"
    names = ("--implementations", "cce-tp-exact,torch-eager-fp32")
    found = run(out, "--suite", "standard", *names)
    wrong = [record for record in found if record["status"] not in ("ok", "not available")]
    assert not wrong
    extra = {"standard", "bars", "parallel"}
    assert {record["suite"] for record in found} == set(suites.SUITES) - extra
    markdown = tables.markdown([found])
    assert markdown.count("## tokens") == 1
    assert "of 1/8 of the whole" in markdown
    figures.draw([found], tmp_path, "svg")
    assert list(tmp_path.glob("tokens*.svg"))


def _made_up(implementation: str, vocab: int, extra_mib: int) -> dict[str, Any]:
    timing = {"median_ms": 60.0, "low_ms": 59.0, "high_ms": 61.0, "runs": 9, "ranks_ms": [60.0]}
    timing |= {"gemm": {**timing, "median_ms": 15.0}, "extra_bytes": extra_mib * 2**20}
    timing |= {"gemms": 4.0, "gemms_low": 3.95, "gemms_high": 4.05}
    return {
        "schema": records.SCHEMA,
        "kind": "timing",
        "date": "2026-01-02T03:04:05+00:00",
        "commit": "0123456789abcdef0123",
        "hardware": {"name": "NVIDIA H200", "count": 1, "driver": "580", "cuda": "13.0"},
        "versions": {"python": "3.12", "torch": "2.11.0", "triton": "3.6.0", "cce_tp": "0.1.0"},
        "suite": "models",
        "model": "",
        "implementation": implementation,
        "status": "ok",
        "reason": None,
        "shape": {"tokens": 8192, "hidden": 2304, "vocab": vocab, "rows": vocab},
        "dtype": "bf16",
        "tf32": False,
        "inputs": {"kind": "random", "seed": 0},
        "options": {},
        "shard": None,
        "gate": {"errors": {"loss": 1e-6, "input_grad": 1.5e-3, "weight_grad": 1e-3}, "limits": {}},
        "forward": timing,
        "both": timing,
        "host": {
            "forward_us": 99.6,
            "backward_us": 101.2,
            "empty_forward_us": 19.9,
            "empty_backward_us": 50.4,
        },
        "ranks": None,
    }


def test_table_of_made_up_records() -> None:
    first, second = _made_up("cce-tp-exact", 256000, 100), _made_up("cce-tp-exact", 256000, 101)
    text = tables.markdown([[first], [second]])
    assert "## models" in text
    assert "NVIDIA H200, torch 2.11.0, Triton 3.6.0; 2026-01-02; 0123456789abcdef" in text
    row = next(line for line in text.splitlines() if line.startswith("| cce-tp-exact"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:5] == ["15.00", "4.00 (3.95-4.05)", "4.00 (3.95-4.05)", "100 / 101"]
    host = "host 100 + 101 us, an empty function 20 + 50"
    assert cells[5:] == ["1.0e-06", "1.5e-03", "1.0e-03", host]


def test_table_of_records_of_the_first_schema(tmp_path: Path) -> None:
    """There one product, measured before and after, was the unit of both timings."""
    first = _made_up("cce-tp-exact", 256000, 100)
    del first["kind"]
    for name in ("gemm", "gemms_low", "gemms_high"):
        del first["both"][name]  # the same object as "forward"
    first |= {"schema": 1, "host": None}
    first["gemm"] = {"before": {"median_ms": 14.7}, "after": {"median_ms": 15.3}, "ms": 15.0}
    unmeasured = first | dict.fromkeys(("gemm", "forward", "both"))
    for record in (first, unmeasured | {"status": "failed", "reason": "wrong"}):
        records.append(tmp_path / "rows.jsonl", record)
    text = tables.markdown(records.read([str(tmp_path / "rows.jsonl")]))
    row = next(line for line in text.splitlines() if line.startswith("| cce-tp-exact"))
    cells = [cell.strip() for cell in row.strip("|").split("|")]
    assert cells[1:4] == ["15.00 / -", *["4.00 (3.93-4.07) / -"] * 2]
    assert cells[-1] == "gemm measured apart, drift +4% / failed: wrong"


# Kinds of figures that have been written by this process.
_SAVED: set[str] = set()


@pytest.mark.once
@pytest.mark.parametrize("path", sorted(_FIGURES.glob("*.jsonl")), ids=lambda path: path.stem)
def test_kept_records_make_tables_and_figures(path: Path, tmp_path: Path) -> None:
    """Figures are of whole problems on one rank, and of the device's time."""
    found = records.read([str(path)])
    text = tables.markdown(found)
    assert found[0]
    for record in found[0]:
        name = record["implementation"]
        if record["status"] == "not available":  # below the table
            assert f"{name} ({record['reason']})" in text
        else:
            cell = "kernels of {}" if record["kind"] == "profile" else "{}"
            assert f"| {cell.format(name)} " in text
    whole = any(
        record["kind"] == "timing" and not (record["shard"] or record["ranks"] or record["host"])
        for record in found[0]
    )
    drawn: list[str] = []
    stock = Figure.savefig

    def save(figure: Figure, path: Path, **options: Any) -> None:
        kind = path.stem.rstrip("-0123456789")
        if kind not in _SAVED:  # it takes long, and what differs between them is there before
            stock(figure, path, **options)
            _SAVED.add(kind)
        drawn.append(str(path))

    with mock.patch.object(Figure, "savefig", save):
        lines = figures.draw(found, tmp_path, "svg")
    assert sorted(line for line in lines if line.endswith(".svg")) == sorted(drawn)
    assert bool(drawn) == whole


def test_figures_of_made_up_records(tmp_path: Path) -> None:
    names = ("cce-tp-exact", "torch-eager", "a-new-one")
    made = [_made_up(name, size, size // 9) for name in names for size in (32000, 256000)]
    lines = figures.draw([made], tmp_path, "svg")
    assert {Path(line).name for line in lines if line.endswith(".svg")} == {
        *("error-1.svg", "error-2.svg", "memory.svg", "roofline-1.svg", "roofline-2.svg")
    }
    text = (tmp_path / "memory.svg").read_text()
    assert "NVIDIA H200" in text and "8192 tokens, D 2304, bf16" in text
    styles = [tuple(figures._style(name).values()) for name in IMPLEMENTATIONS]
    assert len(set(styles)) == len(styles)


def test_options_about_memory_stand_beside_others_in_a_figure(tmp_path: Path) -> None:
    """They are of this library alone, and the problem is the same."""
    kept = _made_up("cce-tp-exact", 32000, 3500)
    kept["options"] = {"keep_logits_in_grad": True}
    capped = _made_up("cce-tp-exact", 32000, 3500)
    capped["options"] = {"softcap": 30.0, "workspace_mib": 16.0}
    lines = figures.draw([[_made_up("torch-eager", 32000, 3500), kept, capped]], tmp_path, "svg")
    texts = [Path(line).read_text() for line in lines if "error" in line]
    assert len(texts) == 2  # with and without the cap of the logits
    assert "torch-eager" in texts[0] and "cce-tp-exact, keep_logits_in_grad" in texts[0]
    assert "softcap=30" in texts[1] and "cce-tp-exact, workspace_mib=16" in texts[1]
    assert kept["implementation"] == "cce-tp-exact"
    assert figures._style("cce-tp-exact, keep_logits_in_grad")["fillstyle"] == "none"
    kept["options"] = {"keep_logits_in_grad": False}
    assert records.option_words(kept) == ["no keep_logits_in_grad"]


def test_roofline() -> None:
    record = _made_up("cce-tp-exact", 256000, 0)
    share = 6 * 8192 * 2304 * 256000 / 989.4e12 / 60e-3
    assert roofline.share_of_roofline(record) == pytest.approx(share)
    record["hardware"]["name"] = "a card that nobody knows"
    assert roofline.share_of_roofline(record) is None
    small = _made_up("cce-tp-exact", 256000, 0)
    small["shape"]["tokens"] = 8
    bytes_moved = 2 * 2 * 2304 * (8 + 256000)
    assert roofline.share_of_roofline(small) == pytest.approx(bytes_moved / 4.8e12 / 60e-3)


def test_json_has_no_nan(tmp_path: Path) -> None:
    records.append(tmp_path / "x", {"a": [float("nan"), 1.5], "b": (float("inf"), 2)})
    assert json.loads((tmp_path / "x").read_text()) == {"a": [None, 1.5], "b": [None, 2]}
