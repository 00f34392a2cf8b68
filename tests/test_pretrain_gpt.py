"""launch.pretrain_gpt: Megatron's own training loop, fused loss or not, on the CPU."""

from __future__ import annotations

import argparse
import importlib.util
import re
import subprocess
import sys
from pathlib import Path

import pytest

from launch import pretrain_gpt
from launch_runs import ROOT, torchrun
from megatron_integration import add_cce_arguments, cce_requested, take_alias

SCRIPT = str(Path(__file__).with_name("pretrain_gpt_cpu.py"))
_TEXT = """
    --num-layers 2 --hidden-size 32 --num-attention-heads 4 --seq-length 32
    --max-position-embeddings 32 --micro-batch-size 2 --global-batch-size 4 --train-iters 3
    --lr 1e-3 --min-lr 1e-4 --mock-data --tokenizer-type NullTokenizer --vocab-size 511
    --transformer-impl local --tensor-model-parallel-size 2 --distributed-backend gloo
    --use-cpu-initialization --no-gradient-accumulation-fusion --no-masked-softmax-fusion
    --no-bias-gelu-fusion --no-bias-swiglu-fusion --no-bias-dropout-fusion --no-persist-layer-norm
    --hidden-dropout 0 --attention-dropout 0 --log-interval 1 --eval-iters 0 --num-workers 0
    --attention-backend unfused
"""
ARGUMENTS = _TEXT.split()
_EXPERTS = """
    --num-experts 4 --expert-model-parallel-size 2 --expert-tensor-parallel-size 1
    --moe-token-dispatcher-type alltoall --overlap-moe-expert-parallel-comm --bf16
    --disable-bias-linear
"""

pytestmark = pytest.mark.no_poison


def _has_training() -> bool:
    return importlib.util.find_spec("megatron.training") is not None


needs_training = pytest.mark.skipif(
    not _has_training(), reason="the wheel of this megatron-core has no megatron.training"
)


def _printed(*more: str) -> tuple[list[str], str]:
    """What Megatron prints of loss and gradient norm at each iteration, and the whole output."""
    output = torchrun(2, SCRIPT, *ARGUMENTS, *more, CUDA_DEVICE_MAX_CONNECTIONS="1")
    lines = re.findall(r"(lm loss: \S+) .*?(grad norm: \S+)", output)
    return [" ".join(line) for line in lines], output


@pytest.fixture(scope="module")
def stock(tmp_path_factory: pytest.TempPathFactory) -> tuple[list[str], Path]:
    """What three iterations without fusion print, and their checkpoint."""
    path = tmp_path_factory.mktemp("stock")
    printed, _ = _printed(
        "--ckpt-format", "torch_dist", "--save", str(path), "--save-interval", "3"
    )
    return printed, path


@needs_training
@pytest.mark.timeout(500)
def test_printed_losses_are_the_same_with_and_without_cce(
    tmp_path: Path, stock: tuple[list[str], Path]
) -> None:
    """Checks 26, 33, 34, 35: three iterations of Megatron's loop; the alias becomes --cce before
    Megatron sees it. Deterministic mode refuses Megatron's own fusions, and this one not."""
    save = ["--save", str(tmp_path), "--save-interval", "3", "--ckpt-format", "torch_dist"]
    alias = ["--cross-entropy-fusion-impl", "cce", "--deterministic-mode"]
    fused, output = _printed(*alias, "--cce-strict", *save)
    assert len(stock[0]) == 3
    assert fused == stock[0]
    assert "6 fused losses, logits materialised 0 times" in output
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == "3"


@needs_training
@pytest.mark.timeout(500)
def test_context_parallel_and_schedule_plan(stock: tuple[list[str], Path]) -> None:
    """Sequences cut over two ranks; then the experts' communication overlapped, too, and the far
    field's metrics in Megatron's log."""
    # The same weights for both.
    start = ["--cce", "--cce-strict", "--load", str(stock[1]), "--finetune"]
    cut = ["--tensor-model-parallel-size", "1", "--context-parallel-size", "2"]
    whole, _ = _printed(*start)
    parts, output = _printed(*start, *cut)
    assert len(whole) == 3
    for got, want in zip(map(_numbers, parts), map(_numbers, whole), strict=True):
        assert got == pytest.approx(want, rel=1e-5)
    assert "6 fused losses, logits materialised 0 times" in output
    far = ("--cce-grad-filter", "far-field", "--cce-far-field-budget", "0.1")
    overlapped, output = _printed("--cce", "--cce-strict", *far, *cut, *_EXPERTS.split())
    assert len(overlapped) == 3
    assert all(6 < _numbers(line)[0] < 6.5 for line in overlapped)
    # So small a vocabulary is two tiles, of which none is light enough to be left.
    assert output.count("far-field/tiles_kept: 1.000000E+00 | far-field/mass: 0.000000E+00") == 3
    assert "6 fused losses, logits materialised 0 times" in output


def _numbers(line: str) -> list[float]:
    """Loss and gradient norm of a printed line."""
    return [float(word) for word in re.findall(r": (\S+)", line)]


@pytest.mark.skipif(_has_training(), reason="megatron.training is installed")
def test_missing_megatron_training_is_explained() -> None:
    command = [sys.executable, "-m", "launch.pretrain_gpt", *ARGUMENTS]
    found = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, timeout=120)
    assert found.returncode != 0
    assert "needs megatron.training" in found.stderr
    assert "launch.pretrain" in found.stderr


@pytest.mark.parametrize(
    "words", [["--cross-entropy-fusion-impl", "cce"], ["--cross-entropy-fusion-impl=cce"]]
)
def test_alias_never_reaches_megatron(words: list[str]) -> None:
    argv = ["pretrain_gpt", "--lr", "1", *words, "--bf16"]
    assert pretrain_gpt._resolve_alias(argv)
    assert argv == ["pretrain_gpt", "--lr", "1", "--cce", "--bf16"]
    assert not pretrain_gpt._resolve_alias(argv)


def test_alias_after_parsing() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cross-entropy-fusion-impl", choices=["native", "te"], default="native")
    parser.add_argument("--cross-entropy-loss-fusion", action="store_true")
    add_cce_arguments(parser)
    args = parser.parse_args(["--cross-entropy-fusion-impl", "cce"])
    assert cce_requested(args)
    take_alias(args)
    assert (args.cce, args.cross_entropy_fusion_impl) == (True, "native")
    assert not args.cross_entropy_loss_fusion


def test_compiled_helpers_are_not_built_again(monkeypatch: pytest.MonkeyPatch) -> None:
    from megatron.core.datasets import utils

    def build() -> None:
        raise AssertionError("built again")

    monkeypatch.setattr(utils, "compile_helpers", build)
    pretrain_gpt.skip_building_helpers()
    utils.compile_helpers()
    assert importlib.import_module("megatron.core.datasets.helpers_cpp").__file__


@needs_training
@pytest.mark.timeout(300)
def test_one_rank_without_cce_is_an_error_on_every_rank() -> None:
    options = {"CUDA_DEVICE_MAX_CONNECTIONS": "1", "RANK_WITHOUT_CCE": "1"}
    with pytest.raises(AssertionError) as failure:  # torchrun fails, and nothing hangs
        torchrun(2, SCRIPT, *ARGUMENTS, "--cce", timeout_s=120, **options)
    text = str(failure.value)
    assert "ValueError: --cce: expected the same on every rank" in text, text
    assert "got no --cce" not in text and "no --cce on rank 1" in text
