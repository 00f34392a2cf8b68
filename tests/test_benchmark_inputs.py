"""The benchmark's inputs, snapshots and fp32 reference."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
import torch.nn.functional as F

from benchmark_runs import ALL_OPTIONS, CPU, TINY, run, snapshot
from launch.benchmark import inputs, reference
from launch.benchmark.catalogue import Options, Shape
from launch.benchmark.steps import alone

pytestmark = pytest.mark.no_poison


@pytest.mark.parametrize("options", [Options(), ALL_OPTIONS], ids=["plain", "options"])
def test_reference_equals_autograd(options: Options, monkeypatch: pytest.MonkeyPatch) -> None:
    """In chunks of tokens and rows, against fp64."""
    monkeypatch.setattr(reference, "_TOKENS", 20)
    monkeypatch.setattr(reference, "_ROWS", 40)
    made = inputs.make("peaked", TINY, (0, 96), "fp32", CPU, 0)
    found = reference.compute(made, options, 0, 96, None)
    e, c, b = (t.double().requires_grad_() for t in (made.input, made.weight, made.bias))
    logits = e @ c.t()
    if options.bias:
        logits = 3 * torch.tanh((logits + b) / 3)
    loss = F.cross_entropy(logits, made.target, label_smoothing=options.label_smoothing)
    loss = loss + options.z_loss * logits.logsumexp(1).square().mean()
    loss.backward()
    want = reference.Results(loss, e.grad, c.grad, b.grad if options.bias else None)
    errors = reference.errors(found, want)
    assert len(errors) == (4 if options.bias else 3)
    assert max(errors.values()) < 1e-5


def test_errors_of_what_is_missing_or_not_finite() -> None:
    want = reference.Results(torch.tensor(2.0), torch.ones(3, 2))
    got = reference.errors(reference.Results(torch.tensor(2.2)), want)
    assert got["loss"] == pytest.approx(0.1)
    assert got["input_grad"] != got["input_grad"]
    assert reference.errors(want, want) == {"loss": 0.0, "input_grad": 0.0}


@pytest.mark.parametrize("kind", ["random", "peaked"])
def test_inputs_do_not_depend_on_the_cut(kind: str) -> None:
    shape = Shape(150, 24, 9000)  # more rows than two blocks, more tokens than a passage
    whole = inputs.make(kind, shape, (0, 9000), "bf16", CPU, 7)
    part = inputs.make(kind, shape, (3000, 8500), "bf16", CPU, 7)
    assert torch.equal(part.weight, whole.weight[3000:8500])
    assert torch.equal(part.bias, whole.bias[3000:8500])
    assert torch.equal(part.input, whole.input) and torch.equal(part.target, whole.target)
    other = inputs.make(kind, shape, (0, 9000), "bf16", CPU, 8)
    assert not torch.equal(other.input, whole.input)
    local = alone(part, 3000).target
    here = (whole.target >= 3000) & (whole.target < 8500)
    assert torch.equal(local[here], whole.target[here] - 3000)
    assert local.min() >= 0 and local.max() < 5500


def test_peaked_inputs_are_peaked() -> None:
    """As its text says of a larger size: few large probabilities, in few tiles once sorted."""
    shape = Shape(256, 1024, 16384)
    kept = {}
    for kind in ("random", "peaked"):
        made = inputs.make(kind, shape, (0, shape.vocab), "fp32", CPU, 0)
        logits = made.input @ made.weight.t()
        probability = logits.softmax(1)
        loss = F.cross_entropy(logits, made.target).item()
        order = (made.weight @ made.input.mean(0)).argsort(descending=True)
        tiles = probability[:, order].view(2, 128, -1, 256) > 2**-12
        count = (probability > 2**-12).sum(1).float().mean().item()
        kept[kind] = (loss, count, tiles.any(3).any(1).float().mean().item())
    loss, count, share = kept["peaked"]
    assert 2 < loss < 4.5
    assert 10 < count < 60
    assert share < 0.4
    assert kept["random"][0] > 9
    assert kept["random"][2] == 1.0


@pytest.mark.parametrize("ranks", [1, 3])
def test_snapshot(tmp_path: Path, ranks: int) -> None:
    want = snapshot(tmp_path / "snap", ranks, logit_scale=0.5)
    found = inputs.load(str(tmp_path / "snap" if ranks > 1 else tmp_path / "snap" / "tp00.pt"))
    assert torch.equal(found.input, 0.5 * want["e"])
    assert torch.equal(found.weight, want["c"]) and torch.equal(found.target, want["t"])
    flags = ("--dtype", "fp32", "--implementations", "cce-tp-exact")
    out = tmp_path / "rows.jsonl"
    snap = ("--snapshot", str(tmp_path / "snap"))
    run(out, *snap, *flags)
    every, some = run(out, *snap, *flags, "--tokens", "20")
    assert every["shape"] == {"tokens": 35, "hidden": 16, "vocab": 96, "rows": 96}
    assert (some["shape"]["tokens"], some["inputs"]) == (
        20,
        {"kind": "snapshot", "snapshot": "snap"},
    )
    assert every["status"] == some["status"] == "ok"
