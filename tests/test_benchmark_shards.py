"""The benchmark's groups that one process plays, rank by rank; and interleaved ids."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

from benchmark_runs import ALL_OPTIONS, CPU, QUICK, run
from cce_tp import GradFilter, VocabShard, linear_cross_entropy
from launch.benchmark import __main__ as command
from launch.benchmark import inputs, records, shards, tables
from launch.benchmark.catalogue import Case, Options, Shape
from launch.benchmark.implementations import TABLE
from launch.benchmark.parallel import World
from launch.benchmark.peers import Problem
from launch.benchmark.played import PlayedGroup
from launch.interleaving import Interleaving
from ranks import Rank, RankPool

pytestmark = [pytest.mark.no_poison, pytest.mark.once]

RANKS = 3
SHAPE = Shape(64, 16, 2303)  # uneven, with several tiles to a rank
FILTERS = {
    "cce-tp-exact": GradFilter.exact(),
    "cce-tp-paper": GradFilter.paper(),
    "cce-tp-far-field": GradFilter.far_field(),
}


def _whole(shape: Shape = SHAPE) -> inputs.Inputs:
    return inputs.make("peaked", shape, (0, shape.vocab), "fp32", CPU, 0)


def _play(world: World, rank: int, ids: str, options: Options | None = None) -> PlayedGroup:
    case = Case(shape=SHAPE, dtype="fp32", shard=(rank, RANKS), played=ids)
    case = replace(case, options=options or Options())
    problem = Problem(SHAPE.vocab, case.options, CPU, None, world.alone)
    return PlayedGroup(_whole(), case, problem)


def in_a_group(rank: Rank) -> dict[str, tuple[Tensor, Tensor, Tensor, float | None]]:
    """Per filter: (loss, dE, dC of this rank, the group's share of tiles kept)."""
    made, shard = _whole(), VocabShard.even(SHAPE.vocab, rank.group)
    found = {}
    for name, grad_filter in FILTERS.items():
        hidden = made.input.clone().requires_grad_()
        weight = made.weight[shard.start : shard.stop].clone().requires_grad_()
        how: dict[str, Any] = {"vocab_shard": shard, "grad_filter": grad_filter}
        loss, statistics = linear_cross_entropy(
            hidden, weight, made.target, return_stats=True, **how
        )
        loss.backward()
        kept = statistics.tiles_kept
        assert hidden.grad is not None and weight.grad is not None
        share = None if kept is None else kept.item()
        found[name] = (loss.detach(), hidden.grad, weight.grad, share)
    return found


def test_a_played_rank_computes_what_it_does_in_a_group(pool: RankPool) -> None:
    """The same bits of loss and dC; dE but for the order of its sum; the same tiles."""
    group = pool.run(in_a_group, ranks=RANKS)
    tiles = [-(-(stop - start) // 256) for start, stop in ((0, 768), (768, 1536), (1536, 2303))]
    with World(device=CPU, backend="gloo") as world:
        for name in FILTERS:
            kept = []
            for rank, found in enumerate(group):
                loss, hidden_grad, weight_grad, share = found[name]
                part, got = _play(world, rank, "natural").play(TABLE[name])
                assert torch.equal(got.loss, loss)
                assert got.weight_grad is not None and torch.equal(got.weight_grad, weight_grad)
                torch.testing.assert_close(got.input_grad, hidden_grad)
                kept.append(part.about["tiles_kept"])
            if name != "cce-tp-far-field":
                assert kept == [None] * RANKS
                continue
            assert share is not None
            counted = sum(part * count for part, count in zip(kept, tiles, strict=True))
            assert counted == pytest.approx(share * sum(tiles))
            assert min(kept) < max(kept)  # ranks differ, and some tile is left


@pytest.mark.parametrize("options", [Options(), replace(ALL_OPTIONS, statistics=True)])
def test_interleaved_ids_are_the_same_problem(options: Options) -> None:
    with World(device=CPU, backend="gloo") as world:
        made, losses = _whole(), []
        for ids in ("natural", "interleaved"):
            group = _play(world, 1, ids, options)
            losses.append(group.reference().loss)
            errors = group.play(TABLE["cce-tp-exact"])[1]
            torch.testing.assert_close(errors.loss, losses[-1])
        torch.testing.assert_close(*losses)
        for rank in range(RANKS):
            rows, own = group.inputs(rank), slice(rank, None, RANKS)
            assert torch.equal(rows.weight, made.weight[own])
            assert torch.equal(rows.bias, made.bias[own])


@pytest.mark.parametrize(("vocab", "ranks"), [(12, 4), (14, 4), (7, 7), (5, 1), (2303, 3)])
def test_places_of_interleaved_ids(vocab: int, ranks: int) -> None:
    """Rank r has the ids r, r + W, ... in its rows of an even cut."""
    interleaving, ids = Interleaving(vocab, ranks), torch.arange(vocab)
    assert torch.equal(interleaving.places(ids).sort().values, ids)
    natural = interleaving.natural_ids()
    assert torch.equal(interleaving.places(natural), ids)
    base, extra = divmod(vocab, ranks)
    sizes = [base + (rank < extra) for rank in range(ranks)]
    for rank, rows in enumerate(natural.split(sizes)):
        assert torch.equal(rows, ids[rank::ranks])
    outside = torch.tensor([-100, -1, vocab, vocab + 3])
    assert torch.equal(interleaving.places(outside), outside)


def test_interleaving_evens_out_what_the_far_field_keeps(tmp_path: Path) -> None:
    """Ids by frequency, as a tokenizer numbers them: natural order leaves the heavy to rank 0."""
    # Many tiles for each rank; those of a GPU are larger.
    shape = "128,64,65536" if torch.cuda.is_available() else "128,64,8192"
    flags = ("--shape", shape, "--inputs", "peaked", "--dtype", "fp32")
    names = ("--implementations", "cce-tp-far-field")
    orders = ("--shards-of", "4", "--ids", "natural,interleaved")
    found = run(tmp_path / "rows.jsonl", *flags, *names, *orders)
    kept = {
        ids: [r["played"]["tiles_kept"] for r in found if r["played"]["ids"] == ids]
        for ids in ("natural", "interleaved")
    }
    assert [len(each) for each in kept.values()] == [4, 4]
    spread = {ids: max(each) - min(each) for ids, each in kept.items()}
    assert spread["interleaved"] < spread["natural"]
    assert max(kept["interleaved"]) < max(kept["natural"])


def test_rank_by_rank_then_table(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "rows.jsonl"
    flags = ("--shape", "48,16,98", "--dtype", "fp32")
    names = ("--implementations", "cce-tp-exact,cce-tp-paper,cce-tp-far-field,torch-eager")
    run(out, *flags, *names)
    found = run(out, *flags, *names, "--shards-of", "4")[4:]
    assert [record["shard"] for record in found] == [[r, 4] for r in range(4) for _ in range(4)]
    for record in found:
        if record["implementation"] == "torch-eager":
            assert record["status"] == "not available"
            assert record["reason"] == "has collectives that one process cannot play"
            continue
        assert record["status"] == "ok", record
        assert record["ranks"] is None and record["shape"]["rows"] == 25
        far = record["implementation"] == "cce-tp-far-field"
        assert (record["played"]["tiles_kept"] is not None) == far
        assert max(record["gate"]["errors"].values()) < 1e-5
        assert record["both"]["median_ms"] > 0
    capsys.readouterr()
    assert command.main(["table", str(out)]) == 0
    printed = capsys.readouterr().out
    assert "keeps 100.0% of its tiles" in printed
    head, path = printed.split("Critical paths:")
    assert "### Rank by rank" in head and head.count("rows of rank 3 of 4, natural ids") == 3
    (line,) = [each for each in path.splitlines() if "cce-tp-exact" in each]
    cells = [cell.strip() for cell in line.strip("|").split("|")]
    ours = [record for record in found if record["implementation"] == "cce-tp-exact"]
    slowest = max(ours, key=lambda record: record["both"]["median_ms"])
    whole = records.read([str(out)])[0][0]
    share = 4 * slowest["both"]["median_ms"] / whole["both"]["median_ms"]
    assert cells[:4] == ["48 x 16 x 98, fp32, random", "cce-tp-exact", "natural", "4"]
    assert cells[6] == f"{slowest['both']['median_ms']:.3f} (rank {slowest['shard'][0]})"
    assert cells[8:] == [f"{share:.2f}", "-"]
    assert shards.share_of_whole(slowest, [whole]) == share
    # A rank is missing, and so is the whole: said, not made up.
    (line,) = [e for e in tables.markdown([ours[:3]]).splitlines() if "3 of 4" in e]
    assert [cell.strip() for cell in line.strip("|").split("|")][8] == "-"


def test_options_of_the_measurement(tmp_path: Path) -> None:
    names = ("--implementations", "cce-tp-exact", "--shape", "48,16,96", "--shards-of", "2")
    (first, _) = run(tmp_path / "forward.jsonl", *names, "--forward-only", "--host-time")
    assert (first["status"], first["both"]) == ("ok", None)
    assert first["host"]["forward_us"] > 0
    (_, last) = run(tmp_path / "out.jsonl", *names, "--grad-weight-out", "--dtype", "fp32")
    assert last["status"] == "ok" and last["gate"]["errors"]["weight_grad"] < 1e-5


@pytest.mark.gpu
def test_rank_by_rank_on_a_gpu(tmp_path: Path) -> None:
    flags = ("--shape", "1024,256,32768", "--inputs", "peaked", *QUICK)
    names = ("--implementations", ",".join(FILTERS))
    orders = ("--shards-of", "4", "--ids", "natural,interleaved")
    for record in run(tmp_path / "rows.jsonl", *flags, *names, *orders):
        assert record["status"] == "ok", record
        assert record["shape"]["rows"] == 8192 and record["both"]["extra_bytes"] >= 0
