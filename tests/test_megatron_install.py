"""Installing: what is refused, what stays as it was, and the command line."""

from __future__ import annotations

import argparse
import copy
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.tensor import Shard, distribute_tensor

from megatron_harness import (
    assert_nothing,
    differences,
    forward,
    install_cce,
    masked_mean,
    model_parallel,
    one_step,
    relative,
    run_ranks,
)
from megatron_models import Case, batch_of, build


def _frozen(rank: Any) -> list[str]:
    wrong = []
    with model_parallel(tp=2):
        for sp in (False, True):
            case = Case(sequence_parallel=sp)
            batch = batch_of(case)
            for what in ("head", "body"):
                steps = []
                for fused in (False, True):
                    model = build(case)
                    for name, parameter in model.named_parameters():
                        parameter.requires_grad_(
                            (name == "output_layer.weight") == (what == "body")
                        )
                    if what == "head":
                        model.output_layer.weight.main_grad = torch.full_like(
                            model.output_layer.weight, 3.0
                        )
                    if fused:
                        install_cce(model)
                    loss = masked_mean(forward(model, batch, case), batch.mask)
                    loss.backward()
                    steps.append({n: p.grad for n, p in model.named_parameters()})
                    weight = model.output_layer.weight
                    if what == "head" and not bool((weight.main_grad == 3.0).all()):
                        wrong.append(f"rank {rank.rank}: main_grad of a frozen head has changed")
                for name, want in steps[0].items():
                    got = steps[1][name]
                    if (want is None) != (got is None) or (
                        want is not None and not relative(got, want) <= 5e-6
                    ):
                        wrong.append(f"rank {rank.rank}: {what} frozen: gradient of {name}")
            model = install_cce(build(case).requires_grad_(False))
            if forward(model, batch, case).requires_grad:
                wrong.append(f"rank {rank.rank}: all is frozen, yet the loss requires grad")
    return wrong


def test_frozen_parts() -> None:
    """Check 13: a frozen head, a frozen body, both."""
    assert_nothing(run_ranks(_frozen))


def _spoilers() -> dict[str, Callable[[Any], None]]:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear

    class TELMHeadColumnParallelLinear(ColumnParallelLinear):
        pass

    def other_layer(model: Any) -> None:
        model.output_layer.__class__ = TELMHeadColumnParallelLinear

    def defer(model: Any) -> None:
        model.config.defer_embedding_wgrad_compute = True

    def remat(model: Any) -> None:
        model.output_layer.gtp_remat_size = 2

    def fsdp(model: Any) -> None:
        model.output_layer.weight.__fsdp_param__ = True

    def fsdp2(model: Any) -> None:
        mesh = init_device_mesh("cpu", (4,))
        head = model.output_layer
        head.weight = torch.nn.Parameter(distribute_tensor(head.weight.detach(), mesh, [Shard(0)]))

    def distillation(model: Any) -> None:
        model.config.logits_save_dir = "somewhere"

    def another_fusion(model: Any) -> None:
        model.config.cross_entropy_loss_fusion = True

    def logit_dtype(model: Any) -> None:
        model.config.logit_dtype = torch.float64

    return {
        "defer_embedding_wgrad_compute": defer,
        "gtp_remat": remat,
        "FSDP": fsdp,
        "FSDP ": fsdp2,
        "logits_save_dir": distillation,
        "cross_entropy_loss_fusion": another_fusion,
        "TELMHead": other_layer,
        "logit_dtype": logit_dtype,
    }


def _refusals(rank: Any) -> list[str]:
    from megatron_integration import install

    wrong = []
    with model_parallel(tp=2):
        for option, spoil in _spoilers().items():
            # The second chunk is refused: the first must not have been touched.
            chunks = [build(Case()), build(Case())]
            spoil(chunks[1])
            try:
                install(chunks)
                wrong.append(f"rank {rank.rank}: {option} is not refused")
            except ValueError as error:
                if option.strip().lower() not in str(error).lower():
                    wrong.append(f"rank {rank.rank}: {option} is not named: {error}")
            if "forward" in chunks[0].output_layer.__dict__:
                wrong.append(f"rank {rank.rank}: {option}: half installed")
        for model in (None, 3, "model", [build(Case()), None]):
            try:
                install(model)
                wrong.append(f"rank {rank.rank}: {type(model)} is not refused")
            except ValueError as error:
                if "model" not in str(error):
                    wrong.append(f"rank {rank.rank}: {error}")
    return wrong


def test_what_cannot_work_is_refused() -> None:
    """Check 23: a ValueError that names the option, before anything is changed."""
    assert_nothing(run_ranks(_refusals))


def _no_gradient_for_logits(rank: Any) -> list[str]:
    from megatron_integration import CceConfig, install

    wrong = []
    with model_parallel(tp=2):
        chunks = [build(Case()), build(Case(config={"gradient_accumulation_fusion": True}))]
        options = CceConfig(keep_logits_in_grad=True)
        try:
            install(chunks, options)
            wrong.append(f"rank {rank.rank}: not refused")
        except ValueError as error:
            for flag in (
                "gradient_accumulation_fusion: ",
                "--cce-keep-logits-in-grad, got True",
                "--no-gradient-accumulation-fusion",
                "--cce-keep-logits-mb",
            ):
                if flag not in str(error):
                    wrong.append(f"rank {rank.rank}: {flag} is not named: {error}")
        if "forward" in chunks[0].output_layer.__dict__:
            wrong.append(f"rank {rank.rank}: half installed")
        install(chunks[0], options)
        install(chunks, CceConfig(keep_logits_bytes=1))
    return wrong


def test_logits_in_a_gradient_that_there_is_not_are_refused() -> None:
    """Check 23: with gradient_accumulation_fusion the option would do nothing."""
    assert_nothing(run_ranks(_no_gradient_for_logits))


def _life_cycle(rank: Any) -> list[str]:
    from megatron_integration import fused_count, install, uninstall

    wrong: list[str] = []

    def expect(condition: bool, text: str) -> None:
        if not condition:
            wrong.append(f"rank {rank.rank}: {text}")

    with model_parallel(tp=2):
        case = Case(mtp=2)
        batch = batch_of(case)
        stock = one_step(build(case), batch, case)
        model = build(case)
        layer, attributes = model.output_layer, set(model.output_layer.__dict__)
        identities = {name: id(p) for name, p in model.named_parameters()}
        expect(install(model) is model and install([model]) == [model], "returns its argument")
        install(model)
        expect(type(layer).__name__ == "ColumnParallelLinear", "class name")
        expect(model.output_layer is layer, "the layer is another one")
        expect({n: id(p) for n, p in model.named_parameters()} == identities, "parameters")
        step = one_step(model, batch, case)
        expect(not differences(step, stock, heads=3), "after two calls of install")
        # Process groups cannot be copied, with or without the fused loss.
        group = type(layer.tp_group)
        for each in (build(case), model):
            with pytest.raises(TypeError, match="ProcessGroup"):
                copy.deepcopy(each)
        with mock.patch.dict(copy._deepcopy_dispatch, {group: lambda each, _: each}):  # type: ignore[attr-defined]
            twin = copy.deepcopy(model)
        with torch.no_grad():
            twin.output_layer.weight.mul_(0.5)
        model.zero_grad()
        counted = fused_count(model)
        other = forward(twin, batch, case)
        expect(fused_count(model) == counted, "the copy counts in the original")
        expect(not torch.allclose(other, step.loss), "the copy uses the original's weight")
        masked_mean(other, batch.mask).backward()
        expect(model.output_layer.weight.grad is None, "the copy's gradient is the original's")
        expect(uninstall(model) is model, "uninstall returns its argument")
        uninstall(model)
        expect(set(layer.__dict__) == attributes, f"left: {set(layer.__dict__) - attributes}")
        expect("compute_language_model_loss" not in model.__dict__, "the loss is still ours")
        again = one_step(model, batch, case)
        expect(torch.equal(again.loss, stock.loss), "uninstall does not bring stock back")
        expect(forward(twin, batch, case).shape == other.shape, "the copy lost its loss")
        install(model)
        reinstalled = one_step(install(model), batch, case)
        expect(reinstalled.fused == 3, "install after uninstall")
    return wrong


def test_install_uninstall_deepcopy() -> None:
    """Checks 24, 25: idempotent, reversible, independent copies; class and parameters stay."""
    assert_nothing(run_ranks(_life_cycle))


def _entry_points(rank: Any) -> list[str]:
    from megatron_integration import CceConfig, cce_model_provider, fused_count, pre_wrap_hook

    wrong = []
    with model_parallel(tp=2):
        case = Case()
        batch = batch_of(case)
        want = one_step(build(case), batch, case)

        def provider(pre_process: bool = True, post_process: bool = True) -> Any:
            return build(case)

        provided = cce_model_provider(provider, CceConfig())(pre_process=True)
        chunks = [build(case)]
        hooked = pre_wrap_hook(CceConfig())(chunks)
        if hooked is not chunks and hooked != chunks:
            wrong.append(f"rank {rank.rank}: the hook returns {hooked}")
        for model in (provided, hooked[0]):
            wrong += [
                f"rank {rank.rank}: {each}"
                for each in differences(one_step(model, batch, case), want)
            ]
        if fused_count(build(case)):
            wrong.append(f"rank {rank.rank}: a model without it counts")
    return wrong


def test_provider_and_hook() -> None:
    """The wrapper of a model provider, and the hook for ModelConfig.pre_wrap_hooks."""
    assert_nothing(run_ranks(_entry_points))


def _parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser()
    parser.add_argument("--cross-entropy-fusion-impl", choices=["native", "te"], default="native")
    parser.add_argument("--cross-entropy-loss-fusion", action="store_true")
    return parser


def test_arguments() -> None:
    """The flags, their other name, and what they refuse."""
    from megatron_integration import CceConfig, add_cce_arguments, cce_requested

    parser = add_cce_arguments(_parser())
    assert not cce_requested(parser.parse_args([]))
    assert cce_requested(parser.parse_args(["--cce"]))
    assert cce_requested(parser.parse_args(["--cross-entropy-fusion-impl", "cce"]))
    args = parser.parse_args(
        ["--cce", "--cce-grad-filter", "paper", "--cce-workspace-mb", "64", "--cce-strict"]
    )
    config = CceConfig.from_args(args)
    assert config.strict and config.workspace_bytes == 64 * 2**20
    assert config.grad_filter.kind == "paper"
    assert CceConfig.from_args(parser.parse_args(["--cce"])) == CceConfig()
    with pytest.raises(SystemExit):
        parser.parse_args(["--cce-grad-filter", "none"])
    for name in ("logits_save_dir", "logits_load_dir"):
        args = argparse.Namespace(cce=True, **{name: "somewhere"})
        with pytest.raises(ValueError, match=name.replace("_", "[-_]")):
            CceConfig.from_args(args)


def test_far_field_arguments() -> None:
    """The filter by name, its budget, and budgets that cannot be."""
    from cce_tp import GradFilter
    from megatron_integration import CceConfig, add_cce_arguments

    parser = add_cce_arguments(_parser())

    def config(*words: str) -> CceConfig:
        return CceConfig.from_args(parser.parse_args(["--cce", *words]))

    far = ("--cce-grad-filter", "far-field")
    assert config(*far).grad_filter == GradFilter.far_field(0.005)
    assert config(*far, "--cce-far-field-budget", "0").grad_filter == GradFilter.far_field(0.0)
    assert config(*far, "--cce-far-field-budget", "2e-2").grad_filter == GradFilter.far_field(0.02)
    for value in ("1", "-0.1", "nan"):
        with pytest.raises(ValueError, match=r"^--cce-far-field-budget: expected a number in \[0"):
            config(*far, f"--cce-far-field-budget={value}")
    for name in ("exact", "paper"):
        with pytest.raises(ValueError, match=r"^--cce-far-field-budget: .*field, got 0\.1 with"):
            config("--cce-grad-filter", name, "--cce-far-field-budget", "0.1")


def test_keep_logits_arguments() -> None:
    """Where logits are kept, in one place, and with which filters."""
    from cce_tp import GradFilter
    from megatron_integration import CceConfig, add_cce_arguments

    parser = add_cce_arguments(_parser())

    def config(*words: str) -> CceConfig:
        return CceConfig.from_args(parser.parse_args(["--cce", *words]))

    inside, beside = "--cce-keep-logits-in-grad", ("--cce-keep-logits-mb", "0.5")
    assert config(*beside) == CceConfig(keep_logits_bytes=2**19)
    assert config(inside) == CceConfig(keep_logits_in_grad=True)
    with pytest.raises(ValueError, match=rf"^{inside} .*--cce-keep-logits-mb, got both"):
        config(inside, *beside)
    far = CceConfig(keep_logits_in_grad=True, grad_filter=GradFilter.far_field())
    assert config(inside, "--cce-grad-filter", "far-field") == far
    with pytest.raises(ValueError, match=rf"^{inside} .*--cce-grad-filter paper, got True"):
        config(inside, "--cce-grad-filter", "paper")
    for name in ("paper", "far-field"):
        with pytest.raises(ValueError, match=rf"^{beside[0]} .*--cce-grad-filter {name}, got 5"):
            config(*beside, "--cce-grad-filter", name)
    with pytest.raises(ValueError, match=rf"^{inside} .*: expected True or False, got 1"):
        CceConfig(keep_logits_in_grad=1)  # type: ignore[arg-type]
    assert not CceConfig(grad_filter=GradFilter.paper()).keep_logits_in_grad


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("grad_filter", "exact"),
        ("workspace_bytes", 1.5),
        ("workspace_bytes", 0),
        ("keep_logits_bytes", -1),
        ("keep_logits_bytes", True),
    ],
)
def test_config_refuses(field: str, value: Any) -> None:
    """A ValueError that names the field."""
    from megatron_integration import CceConfig

    with pytest.raises(ValueError, match=field):
        CceConfig(**{field: value})
