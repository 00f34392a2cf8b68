"""Fused against stock: loss per token and every parameter's gradient, one step.

fp32 unless a test says otherwise: losses to 1e-5, gradients to 5e-6 of their norm.
"""

from __future__ import annotations

import functools
from dataclasses import replace
from typing import Any
from unittest import mock

import pytest
import torch

from megatron_harness import (
    assert_nothing,
    compare_cases,
    compare_half_precision,
    differences,
    forward,
    install_cce,
    masked_mean,
    model_parallel,
    needs_0_19,
    one_step,
    relative,
    run_ranks,
    share,
)
from megatron_models import MCORE, Case, batch_of, build, grid, transformer_config

HYBRID_MTP = [0, 2] if MCORE >= (0, 19) else [0]
# No size of it, on one rank or two, is a multiple of a tile.
ODD = Case(vocab=262, hidden=72, seq=37, batch=3)


@pytest.mark.parametrize("tp", [1, 2, 4])
def test_gpt_and_hybrid(tp: int) -> None:
    """Checks 1, 2, 3, 7, 9: tied or not, sequence parallel or not, with and without MTP."""
    sp = [False, True] if tp > 1 else [False]
    cases = grid(Case(), tied=[False, True], sequence_parallel=sp, mtp=[0, 2])
    cases += grid(Case(model="hybrid"), tied=[False, True], sequence_parallel=sp, mtp=HYBRID_MTP)
    assert_nothing(run_ranks(compare_cases, cases, {"tp": tp}))


def test_labels_and_shapes() -> None:
    """Checks 16, 17, 18, 19, 20: padded rows, labels outside, shapes off every tile."""
    padded = Case(vocab=512, labels_below=511, targets="edges")
    cases = grid(padded, tied=[False, True], sequence_parallel=[False, True])
    for targets in ("one-shard", "outside"):
        cases += grid(Case(targets=targets), sequence_parallel=[False, True], mtp=[0, 2])
    # With nothing counted, the MTP loss of 0.16 is itself NaN.
    empty_mtp = [0, 2] if MCORE >= (0, 19) else [0]
    cases += grid(Case(targets="masked"), sequence_parallel=[False, True], mtp=empty_mtp)
    cases += [ODD, replace(ODD, batch=1), replace(ODD, seq=38, sequence_parallel=True)]
    cases += [replace(ODD, seq=1, batch=1), replace(ODD, cce={"workspace_bytes": 2**20})]
    thin = {"kv_channels": 8, "ffn_hidden_size": 64}
    wide = replace(ODD, hidden=2880, vocab=1066, layers=1, config=thin)
    cases += [wide, replace(wide, tied=True, seq=38, sequence_parallel=True)]
    assert_nothing(run_ranks(compare_cases, cases, {"tp": 2}))


@needs_0_19
def test_mup_and_detached_heads() -> None:
    """Checks 8, 10: a factor on the logits; MTP heads that do not train the output weight."""
    mup = {"use_mup": True, "mup_output_mult": 0.25}
    cases = grid(Case(config=mup), tied=[False, True], sequence_parallel=[False, True], mtp=[0, 2])
    cases += grid(Case(model="hybrid", config=mup), tied=[False, True])
    detached = Case(mtp=2, config={"mtp_detach_heads": True})
    cases += grid(detached, tied=[False, True], model=["gpt", "hybrid"])
    assert_nothing(run_ranks(compare_cases, cases, {"tp": 2}))


def _hits(rank: Any, cases: list[Case]) -> list[str]:
    """Labels such that the first MTP depth is right everywhere it counts."""
    wrong = []
    with model_parallel(tp=2):
        from megatron.core import parallel_state as state
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        for case in share(cases):
            batch, seen = batch_of(case), []
            model = build(case)
            hook = model.output_layer.register_forward_hook(
                lambda _module, _args, result, seen=seen: seen.append(result[0].detach())
            )
            forward(model, batch, case)
            hook.remove()
            whole = gather_from_tensor_model_parallel_region(
                seen[0], group=state.get_tensor_model_parallel_group()
            )
            batch.labels[:, 1:] = whole.argmax(dim=-1).transpose(0, 1)[:, :-1]
            want = one_step(model, batch, case)
            got = one_step(install_cce(build(case)), batch, case)
            found = differences(got, want, heads=3)
            if not want.metrics["correct_values"][0] > 0:
                found.append("no hits: this test shows nothing")
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


@needs_0_19
def test_acceptance_counts_with_hits() -> None:
    """Check 7: the counters of correct guesses equal stock's, without real logits."""
    cases = grid(Case(mtp=2), tied=[False, True], sequence_parallel=[False, True])
    assert_nothing(run_ranks(_hits, cases))


def _outside(rank: Any) -> list[str]:
    del rank
    wrong = []
    with model_parallel(tp=2):
        case = Case(targets="outside")
        batch = batch_of(case)
        inside = batch.mask > 0
        model = install_cce(build(case))
        loss = forward(model, batch, case)
        if not bool((loss[~inside] == 0).all()) or not bool((loss[inside] > 0).all()):
            wrong.append("loss is not zero exactly at the labels outside")
        loss.sum().backward()
        counted = {n: p.grad.clone() for n, p in model.named_parameters()}
        model.zero_grad()
        (forward(model, batch, case) * batch.mask).sum().backward()
        for name, parameter in model.named_parameters():
            if not relative(counted[name], parameter.grad) <= 5e-6:
                wrong.append(f"{name}: labels outside contribute")
    return wrong


def test_labels_outside_count_nothing() -> None:
    """Check 17: without a mask, too, a label outside [0, V) has no loss and no gradient."""
    assert_nothing(run_ranks(_outside))


def _extreme(rank: Any) -> list[str]:
    del rank
    with model_parallel(tp=2):
        from megatron.core import parallel_state as state
        from megatron.core.tensor_parallel import gather_from_tensor_model_parallel_region

        case = Case(labels_below=250)
        batch, model = batch_of(case), build(case)
        with torch.no_grad():
            model.output_layer.weight.mul_(100)
            model.decoder.final_layernorm.weight.mul_(100)
        hidden: list[torch.Tensor] = []
        hook = model.output_layer.register_forward_pre_hook(lambda _, args: hidden.append(args[0]))
        got = forward(install_cce(model), batch, case)
        masked_mean(got, batch.mask).backward()
        hook.remove()
        logits = hidden[0].detach().double() @ model.output_layer.weight.detach().double().t()
        logits = gather_from_tensor_model_parallel_region(
            logits, group=state.get_tensor_model_parallel_group()
        )
        want = torch.nn.functional.cross_entropy(
            logits.flatten(0, 1), batch.labels.t().flatten(), reduction="none"
        )
        want = want.view(case.seq, case.batch).t()
        wrong = []
        error = ((got.double() - want).abs() / want.abs().clamp(min=1)).max().item()
        if not (want.max() > 100 and error <= 1e-5):
            wrong.append(f"losses up to {want.max():.0f} differ from fp64 by {error:.2e}")
        for name, parameter in model.named_parameters():
            if not bool(parameter.grad.isfinite().all()):
                wrong.append(f"gradient of {name} is not finite")
    return wrong


def test_extreme_logits() -> None:
    """Check 21: finite, and equal to fp64 within 1e-5."""
    assert_nothing(run_ranks(_extreme))


def _with_kernels(rank: Any, cases: list[Case], layout: dict[str, int]) -> list[str]:
    from megatron_integration import fused_head

    kernels = functools.partial(fused_head.linear_cross_entropy, impl="triton")
    with mock.patch.object(fused_head, "linear_cross_entropy", kernels):
        return compare_cases(rank, cases, layout)


@pytest.mark.skipif(torch.cuda.is_available(), reason="test_megatron_gpu.py has the real kernels")
def test_kernels() -> None:
    """Checks 1, 2, 7, 20: the Triton kernels, which the CPU does not choose, in the interpreter."""
    cases = grid(Case(vocab=512, tied=True), sequence_parallel=[False, True], mtp=[0, 2])
    cases += [replace(ODD, targets="outside"), replace(ODD, seq=38, sequence_parallel=True)]
    assert_nothing(run_ranks(_with_kernels, cases, {"tp": 2}))


def _options(rank: Any) -> list[str]:
    from cce_tp import GradFilter

    wrong = []
    with model_parallel(tp=2):
        case = Case()
        batch = batch_of(case)
        want = one_step(build(case), batch, case)
        for eps, kept in ((1e-30, True), (0.999, False)):
            paper = replace(case, cce={"grad_filter": GradFilter.paper(eps)})
            got = one_step(install_cce(build(paper), paper), batch, case)
            error = relative(got.grads["output_layer.weight"], want.grads["output_layer.weight"])
            if (error <= 5e-6) != kept or not torch.allclose(got.loss, want.loss, atol=1e-5):
                wrong.append(f"rank {rank.rank}: eps {eps}: the gradient differs by {error:.2e}")
    return wrong


def test_filter_reaches_the_loss() -> None:
    """A threshold under every gradient changes nothing; one above nearly all of them does."""
    assert_nothing(run_ranks(_options))


def test_half_precision() -> None:
    """Check 2: bf16 and fp16 are as close to fp32 as stock is, bf16 within 2e-2."""
    half = [torch.bfloat16, torch.float16]
    cases = grid(Case(), dtype=half, tied=[False, True], mtp=[0, 2])
    cases += grid(Case(tied=True, sequence_parallel=True), dtype=half)
    assert_nothing(run_ranks(compare_half_precision, cases, {"tp": 2}))


def _deterministic(rank: Any, cases: list[Case]) -> list[str]:
    wrong = []
    with model_parallel(tp=2):
        for case in share(cases):
            batch = batch_of(case)
            first, second = (one_step(install_cce(build(case)), batch, case) for _ in range(2))
            same = torch.equal(first.loss, second.loss) and all(
                torch.equal(grad, second.grads[name]) for name, grad in first.grads.items()
            )
            if not same:
                wrong.append(f"rank {rank.rank}: {case.name}: two runs differ in bits")
    return wrong


def test_deterministic_mode() -> None:
    """Check 26: two runs give the same bits."""
    base = Case(config={"deterministic_mode": True})
    assert_nothing(run_ranks(_deterministic, grid(base, tied=[False, True], mtp=[0, 2])))


def _unreduced(rank: Any) -> list[str]:
    wrong = []
    with model_parallel(tp=2):
        for case in (Case(), Case(tied=True)):
            batch, steps = batch_of(case), []
            for fused in (False, True):
                model = build(case)
                model.output_layer.disable_grad_reduce = True
                model.output_layer.allreduce_dgrad = False
                if fused:
                    install_cce(model)
                steps.append(one_step(model, batch, case))
            found = differences(steps[1], steps[0])
            wrong += [f"rank {rank.rank}: {case.name}: {each}" for each in found]
    return wrong


def test_disable_grad_reduce() -> None:
    """A head whose input gradient nobody is to sum over the ranks."""
    assert_nothing(run_ranks(_unreduced))


def _bert(case: Case) -> Any:
    from megatron.core.models.bert.bert_layer_specs import bert_layer_local_spec
    from megatron.core.models.bert.bert_model import BertModel

    torch.manual_seed(3)
    return BertModel(
        config=transformer_config(case),
        num_tokentypes=0,
        transformer_layer_spec=bert_layer_local_spec,
        vocab_size=case.vocab,
        max_sequence_length=case.seq,
        share_embeddings_and_output_weights=True,
        add_binary_head=False,
    )


def _t5(case: Case) -> Any:
    from megatron.core.models.T5 import t5_spec
    from megatron.core.models.T5.t5_model import T5Model

    torch.manual_seed(3)
    config = transformer_config(case)
    return T5Model(
        config=config,
        encoder_config=config,
        transformer_encoder_layer_spec=t5_spec.get_t5_encoder_with_local_block_spec(case.layers),
        transformer_decoder_layer_spec=t5_spec.get_t5_decoder_with_local_block_spec(case.layers),
        vocab_size=case.vocab,
        max_sequence_length=case.seq,
        share_embeddings_and_output_weights=case.tied,
    )


def _biased_step(make: Any, case: Case, batch: Any, fused: bool) -> Any:
    model = make(case)
    for name, parameter in model.named_parameters():
        if name.endswith("output_layer.bias"):
            # Zero when it is made, which would hide its being left out.
            torch.nn.init.normal_(parameter)
    if fused:
        install_cce(model)
    open_mask = torch.zeros(case.batch, 1, case.seq, case.seq, dtype=torch.bool)
    if make is _bert:
        loss, _ = model(batch.tokens, torch.ones_like(batch.tokens), lm_labels=batch.labels)
    else:
        masks = [open_mask] * 3
        loss = model(batch.tokens, batch.tokens, *masks, lm_labels=batch.labels)
    masked_mean(loss, batch.mask).backward()
    return loss.detach(), {n: p.grad for n, p in model.named_parameters() if p.grad is not None}


def _biased(rank: Any) -> list[str]:
    wrong = []
    with model_parallel(tp=2):
        for make, case in ((_bert, Case()), (_t5, Case()), (_t5, Case(tied=True))):
            batch = batch_of(case)
            want, want_grads = _biased_step(make, case, batch, fused=False)
            got, got_grads = _biased_step(make, case, batch, fused=True)
            found = [
                f"gradient of {name} differs by {relative(got_grads[name], want_grads[name]):.2e}"
                for name in want_grads
                if not relative(got_grads[name], want_grads[name]) <= 5e-6
            ]
            if not (got - want).abs().max() <= 1e-5:
                found.append(f"loss differs by {(got - want).abs().max():.2e}")
            if make is _bert and "output_layer.bias" not in want_grads:
                found.append("no bias: this test shows nothing")
            if got_grads.keys() != want_grads.keys():
                found.append("other parameters have gradients")
            wrong += [f"rank {rank.rank}: {make.__name__}: {case.name}: {e}" for e in found]
    return wrong


def test_t5_and_bert() -> None:
    """Check 32: heads with a bias are never computed without it."""
    assert_nothing(run_ranks(_biased))
