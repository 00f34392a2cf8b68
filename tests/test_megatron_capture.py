"""`--cce-capture`: what a run saves of one micro batch, and that the benchmark reads it."""

from __future__ import annotations

import argparse
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
import torch.nn.functional as F

from megatron_harness import forward, install_cce, masked_mean, model_parallel, run_ranks
from megatron_models import Case, batch_of, build

# Labels outside the vocabulary where the mask is 0: they are left out of the snapshot.
CASES = {
    "plain": Case(targets="outside"),
    "sequence-parallel": Case(targets="outside", sequence_parallel=True),
    "tied": Case(targets="outside", tied=True),
    "bf16": Case(targets="outside", dtype=torch.bfloat16),
}


def _train(rank: Any, folder: str) -> tuple[dict[str, float], int]:
    """Three steps of each case on two tensor-parallel ranks, two replicas with their own data.

    Returns:
        The sum of the second step's losses by case, and how many files this rank wrote.
    """
    del rank
    from megatron.core import parallel_state

    from megatron_integration import capture

    losses = {}
    with (
        model_parallel(tp=2),
        mock.patch.object(capture, "_save", wraps=capture._save) as saved,
    ):
        replica = parallel_state.get_data_parallel_rank()
        for name, case in CASES.items():
            options = {"capture_dir": f"{folder}/{name}", "capture_after": 1}
            model = install_cce(build(case), replace(case, cce=options))
            for step in range(3):
                batch = batch_of(case, seed=10 * replica + step)
                model.eval()
                with torch.no_grad():
                    forward(model, batch, case)  # validation does not count
                model.train()
                loss = forward(model, batch, case)
                masked_mean(loss, batch.mask).backward()
                if step == 1:
                    losses[name] = loss.detach().sum().item()
        return losses, saved.call_count


@pytest.mark.timeout(300)
def test_capture_is_what_the_loss_was_computed_from(tmp_path: Path) -> None:
    from launch.benchmark import inputs

    answers = run_ranks(_train, str(tmp_path))
    losses = answers[0][0]
    # Ranks 0 and 1 are the first replica, 2 and 3 the second.
    assert [written for _, written in answers] == [len(CASES), len(CASES), 0, 0]
    for name, case in CASES.items():
        files = sorted(path.name for path in (tmp_path / name).iterdir())
        assert files == ["tp00-of-02.pt", "tp01-of-02.pt"], name
        for rank, file in enumerate(files):
            part = torch.load(tmp_path / name / file, weights_only=True)
            assert (part["rank"], part["world_size"], part["step"]) == (rank, 2, 1)
            assert part["c"].dtype == case.dtype
            assert part["c"].untyped_storage().nbytes() == part["c"].nbytes
            assert part["e"].shape == (case.seq * case.batch, case.hidden)
        found = inputs.load(str(tmp_path / name))
        batch = batch_of(case, seed=1)
        counted = (batch.labels >= 0) & (batch.labels < case.vocab)
        assert found.shape.tokens == counted.sum().item() < case.seq * case.batch
        assert found.shape.vocab == case.vocab
        logits = found.input.double() @ found.weight.double().t()
        want = F.cross_entropy(logits, found.target, reduction="sum").item()
        tolerance = 1e-5 if case.dtype == torch.float32 else 1e-3
        assert losses[name] == pytest.approx(want, rel=tolerance), name


def test_flags() -> None:
    from megatron_integration import CceConfig, add_cce_arguments

    parser = add_cce_arguments(argparse.ArgumentParser())
    args = parser.parse_args(["--cce", "--cce-capture", "there", "--cce-capture-after", "7"])
    config = CceConfig.from_args(args)
    assert (config.capture_dir, config.capture_after) == ("there", 7)
    assert CceConfig.from_args(parser.parse_args(["--cce"])) == CceConfig()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"capture_dir": ""}, r"--cce-capture \(capture_dir\): expected a folder"),
        ({"capture_dir": 3}, r"--cce-capture \(capture_dir\): expected a folder"),
        ({"capture_after": -1}, r"--cce-capture-after \(capture_after\): .* got -1"),
        ({"capture_after": True}, r"--cce-capture-after \(capture_after\): .* got True"),
    ],
)
def test_config_refuses(options: dict[str, Any], message: str) -> None:
    from megatron_integration import CceConfig

    with pytest.raises(ValueError, match=message):
        CceConfig(**options)


def test_option_of_the_loop() -> None:
    from launch.training import settings

    tiny = Path(__file__).parents[1] / "configs" / "tiny_cpu.yaml"
    run = settings.load(tiny, ["cce.capture=there", "cce.capture_after=3"])
    config = settings.cce_config(run)
    assert (config.capture_dir, config.capture_after) == ("there", 3)
