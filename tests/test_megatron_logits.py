"""Who still gets real logits, and what stays in memory between the passes."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable
from dataclasses import replace
from typing import Any
from unittest import mock

import torch
from torch import Tensor

from megatron_harness import (
    assert_nothing,
    differences,
    forward,
    gradients,
    install_cce,
    masked_mean,
    model_parallel,
    needs_0_19,
    one_step,
    relative,
    run_ranks,
)
from megatron_models import MCORE, Case, batch_of, build, grid


class Messages(logging.Handler):
    """Keeps what the integration logs."""

    def __init__(self) -> None:
        super().__init__()
        self.texts: list[str] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep one message."""
        self.texts.append(record.getMessage())


def _inference(model: Any, batch: Any, kind: str) -> Tensor:
    arguments = (batch.tokens, batch.positions, None)
    model.eval()
    if kind == "inference mode":
        with torch.inference_mode():
            return model(*arguments, runtime_gather_output=True)
    from megatron.core.inference.contexts import StaticInferenceContext

    context = StaticInferenceContext(batch.tokens.shape[0], batch.tokens.shape[1])
    with torch.no_grad():
        if MCORE < (0, 19):
            return model(*arguments, inference_context=context, runtime_gather_output=True)
        from megatron.core.inference.utils import InferenceMode

        with InferenceMode.active():
            return model(*arguments, inference_context=context, runtime_gather_output=True)


def _real_logits(rank: Any, cases: list[Case]) -> list[str]:
    from megatron_integration import materialized_count

    wrong = []
    with model_parallel(tp=2):
        for case in cases:
            batch, found = batch_of(case), []
            stock, fused = build(case), install_cce(build(case))
            want, got = (forward(model, batch, case, labels=False) for model in (stock, fused))
            if not (isinstance(got, Tensor) and torch.equal(got, want)):
                found.append("logits in training differ")
            if got.shape != (case.batch, case.seq, case.vocab // 2):
                found.append(f"shape {tuple(got.shape)}")
            for logits in (want, got):
                logits.float().square().mean().backward()
            theirs, ours = gradients(stock), gradients(fused)
            found += [f"gradient of {n}" for n in theirs if not torch.equal(theirs[n], ours[n])]
            before = materialized_count(fused)
            kinds = ["inference mode"] if case.sequence_parallel else ["inference mode", "context"]
            for kind in kinds:
                want, got = (_inference(model, batch, kind) for model in (stock, fused))
                if not torch.equal(got, want) or want.shape[-1] != case.vocab:
                    found.append(f"logits with {kind} differ")
            with torch.no_grad():
                want, got = (forward(model, batch, case) for model in (stock, fused))
            if not (got - want).abs().max() <= 1e-5:
                found.append("validation loss differs")
            if materialized_count(fused) != before:
                found.append("evaluation counts as materialised in training")
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


def test_without_labels_and_in_evaluation() -> None:
    """Check 11: real logits, bit-equal and differentiable; gathered for inference."""
    assert_nothing(run_ranks(_real_logits, grid(Case(), tied=[False, True])))
    assert_nothing(run_ranks(_real_logits, [Case(sequence_parallel=True)]))


def _mixed(rank: Any) -> list[str]:
    from megatron_integration import fused_count, materialized_count

    wrong = []
    with model_parallel(tp=2):
        for case in grid(Case(mtp=2), tied=[False, True]):
            batch, steps = batch_of(case), []
            for fused in (False, True):
                model = build(case)
                if fused:
                    install_cce(model)
                logits = forward(model, batch, case, labels=False)
                logits.square().mean().backward()
                steps.append((logits.detach(), gradients(model)))
            (want, theirs), (got, ours) = steps
            found = [] if torch.equal(got, want) else ["logits differ"]
            found += [f"gradient of {n}" for n in theirs if relative(ours[n], theirs[n]) > 5e-6]
            counts = fused_count(model), materialized_count(model)
            if counts != (2, 1):
                found.append(f"{counts[0]} fused losses, logits made {counts[1]} times")
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


@needs_0_19
def test_main_logits_beside_fused_mtp() -> None:
    """Check 11: without labels 0.19's MTP heads make up their own, and the main head has none."""
    assert_nothing(run_ranks(_mixed))


READERS: dict[str, Callable[[Any], Any]] = {
    "float": lambda logits: logits.float(),
    "index": lambda logits: logits[0, 0],
    "sum": lambda logits: logits.sum(dim=-1),
    "torch.softmax": lambda logits: torch.softmax(logits, dim=-1),
    "torch.cat": lambda logits: torch.cat([logits, logits]),
    "add": lambda logits: logits + 1,
    "tensor factor": lambda logits: logits * torch.tensor(2.0),
    "compare": lambda logits: logits > 0,
    "detach": lambda logits: logits.detach(),
    "max": lambda logits: logits.max(),
    "transpose": lambda logits: logits.transpose(0, 1).contiguous(),
    "deepcopy": lambda logits: copy.deepcopy(logits.detach()),
}


def _readers(rank: Any) -> list[str]:
    from megatron_integration import materialized_count

    wrong: list[str] = []
    with model_parallel(tp=2):
        case = Case()
        batch = batch_of(case)
        handler = Messages()
        logging.getLogger("megatron_integration").addHandler(handler)
        for name, read in READERS.items():
            seen: list[Tensor] = []
            losses = []
            handler.texts.clear()
            for fused in (False, True):
                model = build(case)
                if fused:
                    install_cce(model)
                model.output_layer.register_forward_hook(
                    # A copy: stock's loss overwrites fp32 logits.
                    lambda _m, _a, out, read=read, seen=seen: seen.append(read(out[0]).clone())
                )
                for _ in range(2):
                    losses.append(masked_mean(forward(model, batch, case), batch.mask))
                losses[-1].backward()
            if not all(torch.equal(each, seen[0]) for each in seen[1:]):
                wrong.append(f"rank {rank.rank}: {name}: other numbers")
            if not abs(losses[0] - losses[2]) <= 1e-5:
                wrong.append(f"rank {rank.rank}: {name}: loss differs")
            if materialized_count(model) != 2 or len(handler.texts) > 1:
                wrong.append(
                    f"rank {rank.rank}: {name}: {materialized_count(model)} times, {handler.texts}"
                )
            strict = install_cce(model, strict=True)
            try:
                forward(strict, batch, case)
                wrong.append(f"rank {rank.rank}: {name}: strict mode does not raise")
            except RuntimeError as error:
                if "strict" not in str(error):
                    wrong.append(f"rank {rank.rank}: {name}: {error}")
        logging.getLogger("megatron_integration").removeHandler(handler)
    return wrong


def test_hooks_read_real_logits() -> None:
    """Check 12: numbers equal stock's; one warning; strict mode raises."""
    assert_nothing(run_ranks(_readers))


def _differentiable_hook(rank: Any) -> list[str]:
    """A loss of a hook's own, next to the fused one."""
    wrong = []
    with model_parallel(tp=2):
        case = Case(tied=True)
        batch = batch_of(case)
        steps = []
        for fused in (False, True):
            model, kept = build(case), []
            if fused:
                install_cce(model)
            model.output_layer.register_forward_hook(
                lambda _m, _a, out, kept=kept: kept.append((out[0] * 1.5).square().mean())
            )
            loss = masked_mean(forward(model, batch, case), batch.mask)
            (loss + kept[0]).backward()
            steps.append(gradients(model))
        for name, want in steps[0].items():
            error = relative(steps[1][name], want)
            if not error <= 5e-6:
                wrong.append(f"rank {rank.rank}: gradient of {name} differs by {error:.2e}")
    return wrong


def test_gradients_through_read_logits() -> None:
    """Check 12: what a hook reads is differentiable, as distillation needs."""
    assert_nothing(run_ranks(_differentiable_hook))


def _replaced_loss(rank: Any) -> list[str]:
    """As Megatron's own distillation does: another loss, put on the instance later."""
    wrong = []
    with model_parallel(tp=2):
        case = Case()
        batch = batch_of(case)
        for fused in (False, True):
            model = build(case)
            if fused:
                install_cce(model)
            model.compute_language_model_loss = lambda labels, logits: (
                (logits * 0).sum(-1).transpose(0, 1)
            )
            loss = forward(model, batch, case)
            loss.sum().backward()
            if not bool((loss == 0).all()) or loss.shape != (case.batch, case.seq):
                wrong.append(f"rank {rank.rank}: fused={fused}: {loss.shape}")
    return wrong


def test_another_loss_on_the_instance_wins() -> None:
    """A loss function that is set after install is the one that runs."""
    assert_nothing(run_ranks(_replaced_loss))


def _config_logger(rank: Any, folder: str) -> list[str]:
    del rank
    with model_parallel(tp=2):
        case = Case(config={"config_logger_dir": folder})
        batch = batch_of(case)
        want = one_step(build(replace(case, config={})), batch, case)
        got = one_step(install_cce(build(case)), batch, case)
        got.materialized = 0
        return differences(got, want)


def test_config_logger(tmp_path: Any) -> None:
    """Megatron's dump of everything that a model computes pickles real logits."""
    assert_nothing(run_ranks(_config_logger, str(tmp_path)))
    assert any(tmp_path.iterdir())


def _kept(rank: Any) -> list[str]:
    from torch.multiprocessing.reductions import StorageWeakRef

    from cce_tp import sharding

    gathered = []

    class Watched(sharding.TokenGather):
        def __init__(self, local: Tensor, group_name: str) -> None:
            super().__init__(local, group_name)
            reference = StorageWeakRef(self.whole.untyped_storage())
            gathered.append((tuple(self.whole.shape), reference))

    with model_parallel(tp=2), mock.patch.object(sharding, "TokenGather", Watched):
        case = Case(sequence_parallel=True, hidden=64, vocab=512)
        batch, model = batch_of(case), install_cce(build(case))
        loss = forward(model, batch, case)
        alive = [shape for shape, reference in gathered if not reference.expired()]
        shapes = [shape for shape, _ in gathered]
        loss.sum().backward()
    wrong = []
    if shapes != [(case.seq * case.batch, case.hidden)]:
        wrong.append(f"rank {rank.rank}: gathered {shapes} in the forward pass")
    if alive:
        wrong.append(f"rank {rank.rank}: {alive} stays between the passes")
    if len(gathered) != 2:
        wrong.append(f"rank {rank.rank}: gathered {len(gathered)} times in all, not twice")
    return wrong


def test_gathered_input_is_not_kept() -> None:
    """Sequence parallelism: between the passes only the rank's own part of the input stays."""
    assert_nothing(run_ranks(_kept))
