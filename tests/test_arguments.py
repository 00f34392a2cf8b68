"""Bad input on one rank: a ValueError that names the argument, what was expected, and what came."""

from __future__ import annotations

import re
from collections.abc import Callable
from typing import Any
from unittest import mock

import pytest
import torch

import cce_tp
from cce_tp.arguments import _key as prepare_key
from variants import DEVICE, HAS_CUDA

N, V, D = 6, 10, 4


def arguments() -> dict[str, Any]:
    return {
        "input": torch.randn(N, D, device=DEVICE),
        "linear_weight": torch.randn(V, D, device=DEVICE),
        "target": torch.randint(0, V, (N,), device=DEVICE),
    }


def zeros(*shape: int, dtype: torch.dtype = torch.float32, device: str = DEVICE) -> torch.Tensor:
    return torch.zeros(shape, dtype=dtype, device=device)


# id -> (what to change, argument that the message names, further text in it)
BAD: dict[str, tuple[dict[str, Callable[[], Any]], str, list[str]]] = {
    "input-scalar": ({"input": lambda: zeros()}, "input", ["D", "()"]),
    "input-no-hidden": ({"input": lambda: zeros(N, 0)}, "input", ["D", "(6, 0)"]),
    "input-int": ({"input": lambda: zeros(N, D, dtype=torch.int64)}, "input", ["dtype", "int64"]),
    "input-complex": (
        {"input": lambda: zeros(N, D, dtype=torch.complex64)},
        "input",
        ["dtype", "complex64"],
    ),
    "input-list": ({"input": lambda: [[0.0] * D] * N}, "input", ["tensor", "list"]),
    "weight-1d": ({"linear_weight": lambda: zeros(V)}, "linear_weight", ["D", "(10,)"]),
    "weight-3d": ({"linear_weight": lambda: zeros(1, V, D)}, "linear_weight", ["(1, 10, 4)"]),
    "weight-hidden": ({"linear_weight": lambda: zeros(V, 5)}, "linear_weight", ["4", "(10, 5)"]),
    "weight-empty": ({"linear_weight": lambda: zeros(0, D)}, "linear_weight", ["(0, 4)"]),
    "weight-none": ({"linear_weight": lambda: None}, "linear_weight", ["tensor", "None"]),
    "weight-dtype": (
        {"linear_weight": lambda: zeros(V, D, dtype=torch.float64)},
        "linear_weight",
        ["float32", "float64"],
    ),
    "weight-int": (
        {"linear_weight": lambda: zeros(V, D, dtype=torch.int32)},
        "linear_weight",
        ["dtype", "int32"],
    ),
    "weight-device": (
        {"linear_weight": lambda: zeros(V, D, device="meta")},
        "linear_weight",
        ["device", DEVICE, "meta"],
    ),
    "target-shape": (
        {"target": lambda: zeros(5, dtype=torch.int64)},
        "target",
        ["(6,)", "(5,)"],
    ),
    "target-2d": (
        {"target": lambda: zeros(N, 1, dtype=torch.int64)},
        "target",
        ["(6,)", "(6, 1)"],
    ),
    "target-float": ({"target": lambda: zeros(N)}, "target", ["int64", "float32"]),
    "target-bool": ({"target": lambda: zeros(N, dtype=torch.bool)}, "target", ["int64", "bool"]),
    "target-int16": (
        {"target": lambda: zeros(N, dtype=torch.int16)},
        "target",
        ["int64", "int16"],
    ),
    "target-device": (
        {"target": lambda: zeros(N, dtype=torch.int64, device="meta")},
        "target",
        ["device", DEVICE, "meta"],
    ),
    "bias-shape": ({"linear_bias": lambda: zeros(V + 1)}, "linear_bias", ["10", "(11,)"]),
    "bias-2d": ({"linear_bias": lambda: zeros(V, 1)}, "linear_bias", ["10", "(10, 1)"]),
    "bias-dtype": (
        {"linear_bias": lambda: zeros(V, dtype=torch.float16)},
        "linear_bias",
        ["float32", "float16"],
    ),
    "bias-device": (
        {"linear_bias": lambda: zeros(V, device="meta")},
        "linear_bias",
        ["device", "meta"],
    ),
    "reduction": ({"reduction": lambda: "average"}, "reduction", ["'mean'", "average"]),
    "reduction-none-object": ({"reduction": lambda: None}, "reduction", ["'none'", "None"]),
    "smoothing-one": ({"label_smoothing": lambda: 1.0}, "label_smoothing", ["[0, 1)", "1.0"]),
    "smoothing-negative": (
        {"label_smoothing": lambda: -0.1},
        "label_smoothing",
        ["[0, 1)", "-0.1"],
    ),
    "smoothing-nan": (
        {"label_smoothing": lambda: float("nan")},
        "label_smoothing",
        ["[0, 1)", "nan"],
    ),
    "softcap-zero": ({"logit_softcap": lambda: 0.0}, "logit_softcap", ["> 0", "0.0"]),
    "softcap-negative": ({"logit_softcap": lambda: -30.0}, "logit_softcap", ["> 0", "-30.0"]),
    "softcap-infinite": ({"logit_softcap": lambda: float("inf")}, "logit_softcap", ["inf"]),
    "z-loss-negative": ({"z_loss": lambda: -1e-4}, "z_loss", [">= 0", "-0.0001"]),
    "z-loss-infinite": ({"z_loss": lambda: float("inf")}, "z_loss", ["inf"]),
    "scale-nan": ({"logit_scale": lambda: float("nan")}, "logit_scale", ["finite", "nan"]),
    "scale-text": ({"logit_scale": lambda: "2"}, "logit_scale", ["number", "'2'"]),
    "ignore-index": ({"ignore_index": lambda: 1.5}, "ignore_index", ["int", "1.5"]),
    "impl": ({"impl": lambda: "cuda"}, "impl", ["'triton'", "'cuda'"]),
    "grad-filter": ({"grad_filter": lambda: "paper"}, "grad_filter", ["GradFilter", "'paper'"]),
    "stats": ({"return_stats": lambda: "lse"}, "return_stats", ["'entropy'", "'lse'"]),
    "workspace-small": (
        {"workspace_bytes": lambda: (1 << 20) - 1},
        "workspace_bytes",
        ["1048576", "1048575"],
    ),
    "workspace-float": ({"workspace_bytes": lambda: 2.0**24}, "workspace_bytes", ["int"]),
    "out-shape": ({"grad_weight_out": lambda: zeros(V, 5)}, "grad_weight_out", ["(10, 4)"]),
    "out-dtype": (
        {"grad_weight_out": lambda: zeros(V, D, dtype=torch.float16)},
        "grad_weight_out",
        ["bf16", "float16"],
    ),
    "out-device": (
        {"grad_weight_out": lambda: zeros(V, D, device="meta")},
        "grad_weight_out",
        ["device", "meta"],
    ),
    "out-strides": (
        {"grad_weight_out": lambda: zeros(D, V).t()},
        "grad_weight_out",
        ["contiguous"],
    ),
    "out-requires-grad": (
        {"grad_weight_out": lambda: zeros(V, D).requires_grad_()},
        "grad_weight_out",
        ["require"],
    ),
    "shard-type": ({"vocab_shard": lambda: (0, V)}, "vocab_shard", ["VocabShard", "(0, 10)"]),
    "shard-rows": (
        {"vocab_shard": lambda: cce_tp.VocabShard(0, 12, 12)},
        "linear_weight",
        ["12", "(10, 4)"],
    ),
    "fp64-triton": (
        {
            "impl": lambda: "triton",
            "input": lambda: zeros(N, D, dtype=torch.float64),
            "linear_weight": lambda: zeros(V, D, dtype=torch.float64),
        },
        "impl",
        ["'torch'", "fp64"],
    ),
}


@pytest.mark.parametrize("name", BAD)
def test_bad_arguments(name: str) -> None:
    changes, argument, texts = BAD[name]
    given = {**arguments(), **{key: make() for key, make in changes.items()}}
    with pytest.raises(ValueError, match=rf"^{argument}\b.*expected .*got ") as caught:
        cce_tp.linear_cross_entropy(**given)
    message = str(caught.value)
    assert "\n" not in message
    for text in texts:
        assert text in message, f"{text!r} is not in {message!r}"


def _out(**of: Any) -> dict[str, Any]:
    return {"grad_weight_out": zeros(V, D, **of)}


# What is valid, and what is not although it looks the same to a dictionary or has the same shapes.
ALIKE: dict[str, tuple[dict[str, Any], dict[str, Any]]] = {
    "bool-zero": ({"label_smoothing": 0}, {"label_smoothing": False}),
    "bool-one": ({"ignore_index": 1}, {"ignore_index": True}),
    "one-statistics": ({"return_stats": True}, {"return_stats": 1}),
    "float-one": ({"keep_logits_bytes": 0}, {"keep_logits_bytes": 0.0}),
    "out-strides": (_out(), {"grad_weight_out": zeros(D, V).t()}),
    "out-requires-grad": (_out(), {"grad_weight_out": zeros(V, D).requires_grad_()}),
    "out-device": (_out(), _out(device="meta")),
    "out-dtype": (_out(), _out(dtype=torch.float16)),
    "list": ({}, {"target": [0] * N}),
    "unhashable": ({}, {"reduction": ["mean"]}),
}


@pytest.mark.parametrize("name", ALIKE)
def test_a_valid_call_before_hides_no_error(name: str) -> None:
    """Arguments are checked once for each combination of what the check depends on."""
    valid, bad = ALIKE[name]
    for _ in range(2):
        cce_tp.linear_cross_entropy(**{**arguments(), **valid}, impl="torch")
    with pytest.raises(ValueError, match=rf"^{next(iter(bad))}\b"):
        cce_tp.linear_cross_entropy(**{**arguments(), **bad}, impl="torch")


def test_targets_are_checked_at_every_call_in_debug_mode(monkeypatch: pytest.MonkeyPatch) -> None:
    given = arguments()
    for _ in range(2):
        cce_tp.linear_cross_entropy(**given, impl="torch")
    given["target"] = torch.full_like(given["target"], V)
    monkeypatch.setenv("CCE_TP_DEBUG", "1")
    with pytest.raises(ValueError, match=r"^target\b"):
        cce_tp.linear_cross_entropy(**given, impl="torch")


def test_what_a_check_depends_on() -> None:
    """Also where it is no error, or one that takes a group to show."""
    given, settings = arguments(), {"reduction": "mean"}
    shard = cce_tp.VocabShard.even(V)

    def key(**others: Any) -> Any:
        tensors = {**given, **{name: it for name, it in others.items() if name in given}}
        rows = others.get("shard", shard)
        bias = others.get("bias")
        ordered = tensors["input"], tensors["linear_weight"], bias, tensors["target"], None
        return prepare_key(ordered, rows, settings)

    with mock.patch.object(cce_tp.VocabShard, "token_parts", 2):
        parts = key()
    assert key() == key() != parts
    keys = [key(), parts, key(shard=None), key(bias=zeros(V))]
    keys += [key(shard=cce_tp.VocabShard(0, V, V, reduce_input_grad=False))]
    keys += [key(input=torch.randn(N, D, device=DEVICE).requires_grad_())]
    with torch.no_grad():
        keys.append(key())
    for dtype in (torch.bfloat16, torch.float16):
        with torch.autocast(DEVICE, dtype):
            keys.append(key())
    assert len({*keys}) == len(keys)
    assert prepare_key((None,) * 5, shard, settings) is None


@pytest.mark.skipif(HAS_CUDA, reason="the interpreter only runs where there is no CUDA device")
def test_bf16_in_the_interpreter_is_refused() -> None:
    given = {name: each for name, each in arguments().items()}
    for name in ("input", "linear_weight"):
        given[name] = given[name].bfloat16()
    with pytest.raises(ValueError, match=r"^impl\b.*bf16"):
        cce_tp.linear_cross_entropy(**given, impl="triton")


@pytest.mark.gpu
def test_triton_on_cpu_tensors_is_refused_beside_a_gpu() -> None:
    given = {name: each.cpu() for name, each in arguments().items()}
    with pytest.raises(ValueError, match=r"^impl\b.*cpu"):
        cce_tp.linear_cross_entropy(**given, impl="triton")


def test_mixed_dtypes_are_fine_under_autocast() -> None:
    given = arguments()
    given["input"] = given["input"].bfloat16()
    with pytest.raises(ValueError, match=r"^linear_weight\b.*autocast"):
        cce_tp.linear_cross_entropy(**given, impl="torch")
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        assert cce_tp.linear_cross_entropy(**given, impl="torch").isfinite()


@pytest.mark.parametrize(
    ("make", "name"),
    [
        pytest.param(lambda: cce_tp.GradFilter.paper(eps=-1.0), "eps", id="eps-negative"),
        pytest.param(lambda: cce_tp.GradFilter.paper(eps=float("nan")), "eps", id="eps-nan"),
        pytest.param(lambda: cce_tp.GradFilter.far_field(budget=1.0), "budget", id="budget-one"),
        pytest.param(lambda: cce_tp.GradFilter("exact", budget=0.1), "budget", id="budget-exact"),
        pytest.param(lambda: cce_tp.GradFilter("exact", eps=0.1), "eps", id="eps-exact"),
        pytest.param(lambda: cce_tp.VocabShard(5, 4, 10), "start", id="start-after-stop"),
        pytest.param(lambda: cce_tp.VocabShard(-1, 4, 10), "start", id="start-negative"),
        pytest.param(lambda: cce_tp.VocabShard(0, 11, 10), "stop", id="stop-too-large"),
        pytest.param(lambda: cce_tp.VocabShard(0, 0, 0), "vocab_size", id="no-vocabulary"),
        pytest.param(lambda: cce_tp.VocabShard(0, 1.5, 10), "stop", id="stop-float"),
        pytest.param(lambda: cce_tp.VocabShard(0, 4, 10), "group", id="part-without-group"),
        pytest.param(lambda: cce_tp.VocabShard(0, 4, 10, "tp"), "group", id="group-text"),
        pytest.param(lambda: cce_tp.VocabShard.even(0), "vocab_size", id="even-of-nothing"),
        pytest.param(lambda: cce_tp.VocabShard.from_rows(-3), "local_rows", id="negative-rows"),
        pytest.param(
            lambda: cce_tp.LinearCrossEntropyLoss(reduction="avg"), "reduction", id="module-option"
        ),
        pytest.param(
            lambda: cce_tp.LinearCrossEntropyLoss(smoothing=0.1), "smoothing", id="module-unknown"
        ),
    ],
)
def test_bad_configuration_objects(make: Callable[[], Any], name: str) -> None:
    with pytest.raises(ValueError, match=rf"\b{re.escape(name)}\b.*expected|\b{name}\b.*needs"):
        make()


def test_configuration_objects_are_frozen() -> None:
    shard = cce_tp.VocabShard.even(10)
    assert (shard.start, shard.stop, shard.vocab_size, shard.group) == (0, 10, 10, None)
    assert shard.reduce_input_grad
    for each, name in ((shard, "start"), (cce_tp.GradFilter.exact(), "eps")):
        with pytest.raises(AttributeError):
            setattr(each, name, 3)


def test_options_are_keywords_only() -> None:
    given = arguments()
    with pytest.raises(TypeError):
        cce_tp.linear_cross_entropy(*given.values(), torch.zeros(V))
    with pytest.raises(TypeError):
        cce_tp.VocabShard(0, 10, 10, None, False)
