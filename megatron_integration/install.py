"""Put the fused loss into a built Megatron model, and take it out again.

Only two attributes of *instances* change: `forward` of each output layer and
`compute_language_model_loss` of the model that owns it. Classes, parameters and state dicts stay
as they are, so checkpoints, parameter groups and tools that look at class names see no change.
"""

from __future__ import annotations

import functools
import logging
import types
from collections.abc import Callable, Iterator
from typing import Any

import torch
from megatron.core.models.common.language_module.language_module import LanguageModule
from megatron.core.tensor_parallel.layers import ColumnParallelLinear
from torch import Tensor, nn
from torch.distributed.tensor import DTensor

from megatron_integration.config import CceConfig
from megatron_integration.deferred_logits import DeferredLogits, HeadState
from megatron_integration.far_field import METRICS
from megatron_integration.fused_head import HeadCall

try:  # 0.19 and newer
    from megatron.core.inference.utils import InferenceMode  # type: ignore[attr-defined]
except ImportError:
    InferenceMode = None

_logger = logging.getLogger("megatron_integration")
_STATE = "_cce_state"
_PREVIOUS = "_cce_previous_loss"
_DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def install(model: Any, config: CceConfig | None = None) -> Any:
    """Fuse output layer and loss of every language model found in `model`.

    Idempotent: a second call only replaces the options. Nothing is changed if anything is refused.

    Args:
        model: a module, wrapped (Float16Module, DistributedDataParallel) or not, before or after
            wrapping, or a list of pipeline chunks. Chunks without an output layer are passed over.
        config: options; None: the defaults.

    Returns:
        `model`.

    Raises:
        ValueError: an option of the model that excludes this loss or one of its options, by name.
    """
    config = CceConfig() if config is None else config
    if not isinstance(config, CceConfig):
        raise ValueError(f"config: expected a CceConfig or None, got {config!r}")
    owners = list(_owners(model))
    for owner in owners:
        _refuse(owner, config)
    for owner in owners:
        _install_one(owner, config)
    return model


def uninstall(model: Any) -> Any:
    """Undo `install`; a model without it is left alone. Returns `model`."""
    for owner in _owners(model):
        layer = owner.output_layer
        if getattr(layer.__dict__.get("forward"), "__func__", None) is _forward:
            del layer.forward
        layer.__dict__.pop(_STATE, None)
        # A function that was put in after ours chains to ours, which then finds no state.
        if _is_ours(owner.__dict__.get("compute_language_model_loss")):
            del owner.compute_language_model_loss
            previous = owner.__dict__.pop(_PREVIOUS, None)
            if previous is not None:
                owner.compute_language_model_loss = previous
    return model


def fused_count(model: Any) -> int:
    """Number of fused losses computed since `install`, on this rank, over all heads."""
    return sum(state.fused for state in _states(model))


def materialized_count(model: Any) -> int:
    """Number of times logits were made in training since `install`: 0 is as it should be."""
    return sum(state.materialized for state in _states(model))


def far_field_metrics(model: Any) -> dict[str, Tensor]:
    """What GradFilter.far_field did in training, for the log; waits for nothing.

    Every eighth loss of an output layer, from the first one on, and all of them with multi-token
    prediction, take statistics (`megatron_integration.far_field` says why).

    Returns:
        "far-field/tiles_kept": () fp32 share of the vocabulary's tiles that were kept, and
        "far-field/mass": () fp32 probability left to the far field per token that counts; both
        over the global vocabulary, of this rank's tokens, on the device, averaged over what was
        taken since the last call, or as that call returned them if there is nothing new. {} where
        nothing was taken yet: another filter, or a pipeline stage without an output layer.
    """
    means = [
        mean for mean in (state.far_field.read() for state in _states(model)) if mean is not None
    ]
    if not means:
        return {}
    return dict(zip(METRICS, torch.stack(means).mean(dim=0).unbind(), strict=True))


def cce_model_provider(
    provider: Callable[..., Any], config: CceConfig | None = None
) -> Callable[..., Any]:
    """Wrap a Megatron model provider (any release): what it builds has `install` applied."""

    @functools.wraps(provider)
    def provide(*args: Any, **kwargs: Any) -> Any:
        return install(provider(*args, **kwargs), config)

    return provide


def pre_wrap_hook(config: CceConfig | None = None) -> Callable[[list[Any]], list[Any]]:
    """A hook for Megatron 0.19's `ModelConfig.pre_wrap_hooks`: list of chunks in, same list out."""

    def hook(chunks: list[Any]) -> list[Any]:
        return install(chunks, config)

    return hook


def _owners(model: Any) -> Iterator[Any]:
    """Every language model with an output layer inside `model`, wrappers and vision parts too."""
    chunks = model if isinstance(model, (list, tuple)) else [model]
    for chunk in chunks:
        if not isinstance(chunk, nn.Module):
            raise ValueError(f"model: expected modules, got {type(chunk).__name__}")
        for module in chunk.modules():
            if isinstance(module, LanguageModule) and _output_layer(module) is not None:
                yield module


def _output_layer(owner: Any) -> Any:
    return getattr(owner, "output_layer", None)


def _states(model: Any) -> list[HeadState]:
    found = (_output_layer(owner).__dict__.get(_STATE) for owner in _owners(model))
    return [state for state in found if state is not None]


def _refuse(owner: Any, options: CceConfig) -> None:
    layer, config = owner.output_layer, owner.config

    def refuse(option: str, got: Any, why: str, *, beside: str = "--cce") -> None:
        raise ValueError(f"{option}: expected not to be used with {beside}, got {got!r}: {why}")

    if type(layer) is not ColumnParallelLinear:
        refuse(
            "fp8_output_proj (output_layer)",
            type(layer).__name__,
            "only Megatron's own ColumnParallelLinear is replaced, not TransformerEngine's or "
            "ModelOpt's; switch off what puts another output layer in",
        )
    if getattr(config, "defer_embedding_wgrad_compute", False):
        refuse("defer_embedding_wgrad_compute", True, "it keeps the logits' gradient")
    if getattr(config, "cross_entropy_loss_fusion", False):
        refuse("cross_entropy_loss_fusion", True, "each replaces the loss of the output layer")
    remat = max(getattr(layer, "gtp_remat_size", 1) or 1, getattr(config, "gtp_remat_size", 1) or 1)
    if remat > 1:
        refuse("gtp_remat_size", remat, "the output weight is not whole on its rank")
    for weight in _weights(owner):
        if hasattr(weight, "__fsdp_param__") or isinstance(weight, DTensor):
            refuse("FSDP", type(weight).__name__, "the output weight is sharded over data ranks")
    for option in ("logits_save_dir", "logits_load_dir"):
        if getattr(config, option, None):
            refuse(option, getattr(config, option), "distillation needs the logits")
    logit_dtype = getattr(config, "logit_dtype", None)
    if logit_dtype is not None and logit_dtype != config.params_dtype:
        refuse("logit_dtype", logit_dtype, "there are no logits to have a dtype")
    if options.keep_logits_in_grad and layer.gradient_accumulation_fusion:
        refuse(
            "gradient_accumulation_fusion",
            True,
            "it adds the output weight's gradient to main_grad, so that there is none to hold "
            "logits; set --no-gradient-accumulation-fusion, or keep them beside it with "
            "--cce-keep-logits-mb",
            beside="--cce-keep-logits-in-grad",
        )


def _weights(owner: Any) -> list[Any]:
    found = [owner.output_layer.weight]
    if getattr(owner, "share_embeddings_and_output_weights", False):
        embedding = getattr(getattr(owner, "embedding", None), "word_embeddings", None)
        found.append(getattr(embedding, "weight", None))
    return [weight for weight in found if weight is not None]


def _install_one(owner: Any, config: CceConfig) -> None:
    layer = owner.output_layer
    state: HeadState | None = layer.__dict__.get(_STATE)
    if state is None:
        setattr(layer, _STATE, HeadState(config))
    else:
        state.config = config
    if getattr(layer.__dict__.get("forward"), "__func__", None) is not _forward:
        layer.forward = types.MethodType(_forward, layer)
    if not _is_ours(owner.__dict__.get("compute_language_model_loss")) and _PREVIOUS not in (
        owner.__dict__
    ):
        # Kept only where somebody had put one on the instance; otherwise the class has it.
        setattr(owner, _PREVIOUS, owner.__dict__.get("compute_language_model_loss"))
        owner.compute_language_model_loss = types.MethodType(_compute_language_model_loss, owner)
    if layer.gather_output and layer.tp_group.size() > 1:
        _logger.warning("cce: gather_output (parallel_output=False) keeps the stock loss")


def _is_ours(function: Any) -> bool:
    return getattr(function, "__func__", None) is _compute_language_model_loss


def _forward(
    self: Any,
    input_: Tensor,
    weight: Tensor | None = None,
    runtime_gather_output: bool | None = None,
) -> tuple[Any, Tensor | None]:
    """ColumnParallelLinear.forward of an instance: deferred logits, or stock."""
    state: HeadState | None = self.__dict__.get(_STATE)
    used = self.weight if weight is None else weight
    if state is None or not _can_defer(self, input_, used, runtime_gather_output):
        return ColumnParallelLinear.forward(self, input_, weight, runtime_gather_output)
    call = HeadCall(layer=self, input=input_, weight=used, sequence_parallel=self.sequence_parallel)

    def stock() -> Tensor:
        return ColumnParallelLinear.forward(self, input_, weight, runtime_gather_output)[0]

    return DeferredLogits(call, state, stock), self.bias if self.skip_bias_add else None


def _can_defer(layer: Any, input_: Tensor, weight: Tensor | None, gather: bool | None) -> bool:
    if weight is None or weight.shape != (layer.output_size_per_partition, layer.input_size):
        return False  # stock's own errors
    wants_whole = layer.gather_output if gather is None else gather
    if wants_whole and layer.tp_group.size() > 1:
        return False
    if torch.is_inference_mode_enabled() or (InferenceMode and InferenceMode.is_active()):
        return False
    return input_.dim() == 3 and input_.dtype == weight.dtype and input_.dtype in _DTYPES


def _compute_language_model_loss(self: Any, labels: Tensor, logits: Any) -> Tensor:
    """(b, s) labels and the output layer's result -> (b, s) fp32 loss per token."""
    if isinstance(logits, DeferredLogits):
        if not logits.modified:
            return logits.loss(labels)
        logits = logits.materialize()
    previous = self.__dict__.get(_PREVIOUS)
    if previous is not None:
        return previous(labels, logits)
    return type(self).compute_language_model_loss(self, labels, logits)
