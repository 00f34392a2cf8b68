"""Megatron's head on a GPU: memory, CUDA graphs, and `megatron.training.pretrain`."""

from __future__ import annotations

import functools
import json
import os
import re
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import torch
from torch import Tensor

import ranks
from launch_runs import ROOT, torchrun
from megatron_harness import (
    assert_nothing,
    compare_cases,
    compare_half_precision,
    forward,
    gradients,
    install_cce,
    masked_mean,
    model_parallel,
    needs_0_19,
)
from megatron_models import Case, batch_of, build, grid

pytestmark = [pytest.mark.gpu, pytest.mark.no_poison]


@pytest.fixture(scope="module")
def gpu_pool() -> Iterator[ranks.RankPool]:
    """Four ranks on one GPU over gloo; what Megatron compiles stays uncompiled."""
    pool = ranks.RankPool(device="cuda")
    with mock.patch.dict(os.environ, {"TORCHDYNAMO_DISABLE": "1"}):
        pool.run(_nothing, ranks=4, group="world", poison=False)
    yield pool
    pool.close()


def _nothing(rank: Any) -> None:
    del rank


@pytest.mark.parametrize("tp", [1, 2])
def test_values(gpu_pool: ranks.RankPool, tp: int) -> None:
    """Checks 1, 2: the compiled kernels, fp32 without TF32, then bf16 and fp16."""
    base = Case(vocab=4096, hidden=256, seq=128, labels_below=4000)
    exact = grid(base, tied=[False, True], mtp=[0, 2])
    exact += [replace(base, vocab=2062, hidden=360, seq=37, batch=3, labels_below=0)]
    half = grid(exact[0], dtype=[torch.bfloat16, torch.float16], tied=[False, True])
    run: Any = functools.partial(gpu_pool.run, ranks=4, group="world", poison=False, timeout_s=240)
    assert_nothing(run(compare_cases, exact, {"tp": tp}, "cuda", 1e-4))
    assert_nothing(run(compare_half_precision, half, {"tp": tp}, "cuda"))


def _head_memory(rank: Any, tp: int, case: Case) -> dict[str, Any] | None:
    """Peak of the head's forward and backward pass, beyond what was there before, in bytes."""
    with model_parallel(tp=tp):
        from megatron.core import parallel_state as state

        if state.get_data_parallel_rank() != 0:
            return None
        batch = batch_of(case).to("cuda")
        found: dict[str, Any] = {"rank": rank.rank}
        for fused in (False, True):
            model = build(case).cuda()
            weight = model.output_layer.weight
            weight.main_grad = torch.zeros_like(weight, dtype=torch.float32)
            if fused:
                install_cce(model)
            shape = (case.seq, case.batch, case.hidden)
            hidden = torch.randn(shape, device="cuda", dtype=case.dtype, requires_grad=True)

            def head(model: Any = model, hidden: Tensor = hidden) -> None:
                loss = model._postprocess(
                    hidden_states=hidden,
                    input_ids=batch.tokens,
                    position_ids=batch.positions,
                    labels=batch.labels,
                    rotary_pos_emb=None,
                    rotary_pos_cos=None,
                    rotary_pos_sin=None,
                )
                masked_mean(loss, batch.mask).backward()

            peak, largest = _peak(head, hidden)
            found["fused" if fused else "stock"] = peak
            if fused:
                found["largest"] = largest
            del model, weight, hidden, head
        return found


def _peak(head: Callable[[], None], hidden: Tensor) -> tuple[int, int]:
    """(peak bytes beyond what is there before, largest single allocation in bytes)."""
    head()  # first call: compilation, and the gradients that stay
    hidden.grad = torch.zeros_like(hidden)
    torch.cuda.synchronize()
    torch.cuda.empty_cache()
    torch.cuda.reset_peak_memory_stats()
    before = torch.cuda.memory_allocated()
    torch.cuda.memory._record_memory_history(max_entries=100_000)
    head()
    torch.cuda.synchronize()
    peak = torch.cuda.max_memory_allocated() - before
    traces = torch.cuda.memory._snapshot()["device_traces"]
    torch.cuda.memory._record_memory_history(enabled=None)
    sizes = [event["size"] for trace in traces for event in trace if event["action"] == "alloc"]
    return peak, max(sizes)


@pytest.mark.parametrize("tp", [1, 2])
def test_memory_of_the_head(gpu_pool: ranks.RankPool, tp: int) -> None:
    """Check 27: 131,072 entries, 8,192 tokens: less than 5% of stock's logits and fp32 copies."""
    case = Case(
        vocab=131072,
        hidden=4096,
        seq=4096,
        batch=2,
        layers=1,
        dtype=torch.bfloat16,
        config={"use_cpu_initialization": False},
    )
    answers = gpu_pool.run(
        _head_memory, tp, case, ranks=4, group="world", poison=False, timeout_s=280
    )
    measured = [answer for answer in answers if answer is not None]
    assert len(measured) == tp
    elements = case.seq * case.batch * case.vocab // tp
    for found in measured:
        assert found["stock"] >= 6 * elements, f"stock is not what it was taken for: {found}"
        # The gradient of the hidden states is made by either.
        input_grad = 2 * case.seq * case.batch * case.hidden
        assert found["fused"] - input_grad <= 0.05 * 6 * elements, found
        assert found["largest"] < elements, found


def _graph(rank: Any, tied: bool) -> list[str] | None:
    """Capture one iteration, replay it on another batch, and do the same without a graph."""
    with model_parallel(tp=1, graphs=True):
        if rank.rank != 0:
            return None
        case = Case(
            vocab=4096, hidden=256, seq=128, batch=4, dtype=torch.bfloat16, tied=tied, mtp=2
        )
        batches = [batch_of(case, seed).to("cuda") for seed in (0, 1)]
        model = install_cce(build(case).cuda())
        static = batch_of(case, 0).to("cuda")

        def iteration() -> Tensor:
            loss = masked_mean(forward(model, static, case), static.mask)
            loss.backward()
            return loss.detach()

        stream = torch.cuda.Stream()
        stream.wait_stream(torch.cuda.current_stream())
        with torch.cuda.stream(stream):
            for _ in range(3):
                model.zero_grad(set_to_none=True)
                iteration()
        torch.cuda.current_stream().wait_stream(stream)
        model.zero_grad(set_to_none=True)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.graph(graph):
            captured = iteration()
        wrong = []
        for number, batch in enumerate(batches):
            static.copy_(batch)
            graph.replay()
            torch.cuda.synchronize()
            loss, grads = captured.clone(), gradients(model)
            model_of_eager = install_cce(build(case).cuda())
            eager = masked_mean(forward(model_of_eager, batch, case), batch.mask)
            eager.backward()
            if not torch.equal(loss, eager.detach()):
                wrong.append(f"batch {number}: loss {loss.item()}, eager {eager.item()}")
            wrong += [
                f"batch {number}: gradient of {name}"
                for name, grad in gradients(model_of_eager).items()
                if not torch.allclose(grads[name], grad, rtol=2e-2, atol=1e-4)
            ]
        return wrong


@pytest.mark.parametrize("tied", [False, True])
def test_full_iteration_in_a_cuda_graph(gpu_pool: ranks.RankPool, tied: bool) -> None:
    """Check 28: no synchronisation while capturing; a replay gives the eager loss."""
    answers = gpu_pool.run(_graph, tied, ranks=4, group="world", poison=False, timeout_s=240)
    assert [answer for answer in answers if answer is not None] == [[]]


# Of configs/h200_comparison.yaml, with a vocabulary whose tokenizer is trained in seconds, and that
# is padded for neither layout.
SMALLER = (
    "megatron.vocab_size=16384",
    "megatron.num_layers=2",
    "megatron.hidden_size=512",
    "megatron.num_attention_heads=8",
    "megatron.seq_length=256",
    "megatron.train_iters=20",
    "megatron.lr_warmup_iters=5",
    "megatron.eval_interval=20",
    "megatron.eval_iters=1",
    "megatron.use_cpu_initialization=true",  # the same weights for every layout
    "megatron.distributed_backend=gloo",
    "cce.strict=true",
)


def _losses(folder: Path, tp: int, *more: str, **environment: str) -> list[float]:
    run_dir = folder / f"tp{tp}"
    overrides = [
        *SMALLER,
        *more,
        f"run_dir={run_dir}",
        f"megatron.data_cache_path={folder / 'data'}",
    ]
    config = str(ROOT / "configs" / "h200_comparison.yaml")
    layout = f"megatron.tensor_model_parallel_size={tp}"
    command = ("-m", "launch.pretrain", "--config", config, layout, *overrides)
    torchrun(tp, *command, timeout_s=240, **environment)
    records = map(json.loads, (run_dir / "metrics.jsonl").read_text().splitlines())
    return [record["loss"] for record in records if "loss" in record]


@pytest.mark.timeout(600)
def test_two_ranks_on_one_gpu_train_as_one(tmp_path: Path) -> None:
    """Twenty steps at TP 2 over gloo equal TP 1 within the rounding of bf16."""
    devices = {"CUDA_VISIBLE_DEVICES": os.environ.get("CUDA_VISIBLE_DEVICES", "0")}
    one, two = (_losses(tmp_path, tp, **devices) for tp in (1, 2))
    assert len(one) == len(two) == 20
    apart = [abs(a - b) for a, b in zip(one, two, strict=True)]
    assert sum(apart) / len(apart) <= 1e-2 and max(apart) <= 5e-2, apart
    assert one[-1] < one[0] - 0.3, "it does not train: this test shows nothing"


ARGUMENTS = """
--num-layers 4 --hidden-size 512 --num-attention-heads 8 --seq-length 512
--max-position-embeddings 512 --micro-batch-size 4 --global-batch-size 8 --train-iters 50
--lr 1e-4 --min-lr 1e-5 --clip-grad 1.0 --mock-data --tokenizer-type NullTokenizer
--vocab-size 32767
--transformer-impl local --bf16 --attention-backend unfused --no-gradient-accumulation-fusion
--no-masked-softmax-fusion --no-persist-layer-norm --no-rope-fusion --hidden-dropout 0
--attention-dropout 0 --log-interval 1 --eval-iters 0 --num-workers 0 --split 1,0,0
--untie-embeddings-and-output-weights --position-embedding-type rope --seed 5
"""


def _printed_losses(extra: list[str]) -> list[float]:
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "1"),
        *("-m", "launch.pretrain_gpt", *ARGUMENTS.split(), *extra),
    ]
    environment = {**os.environ, "CUDA_DEVICE_MAX_CONNECTIONS": "1"}
    done = subprocess.run(
        command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=140
    )
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    return [float(loss) for loss in re.findall(r"lm loss: (\S+)", done.stdout)]


@needs_0_19
def test_pretrain_prints_the_same_losses() -> None:
    """Check 33: 50 iterations through megatron.training.pretrain, within 1e-3."""
    stock, fused = _printed_losses([]), _printed_losses(["--cce"])
    assert len(stock) == len(fused) == 50
    assert max(abs(ours - theirs) for ours, theirs in zip(fused, stock, strict=True)) <= 1e-3
