"""Small Megatron models and batches, for the process groups as they are.

Weights are those of the whole model cut up: the same for every parallel layout.
"""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field, replace
from importlib.metadata import version
from typing import Any
from unittest import mock

import torch
from torch import Tensor

MCORE = tuple(int(part) for part in version("megatron-core").split(".")[:2])


@dataclass(frozen=True)
class Case:
    """One model and batch.

    Attributes:
        model: "gpt", or "hybrid" (HybridModel; MambaModel in 0.16).
        tied, sequence_parallel, mtp: as Megatron names them; mtp is the number of depths.
        vocab, hidden, layers, seq, batch: sizes; vocab is the padded one.
        labels_below: labels and inputs are below this; 0: vocab.
        targets: "random"; "one-shard" (all in rank 0's half); "edges" (first and last real row of
            each half among them); "outside" (masked positions carry -100, V, V + 5 and -1);
            "masked" (no position counts).
        pattern: of a hybrid model's layers; "": as `layers` says.
        dtype: of the parameters.
        config: further TransformerConfig fields.
        cce: fields of CceConfig.
    """

    model: str = "gpt"
    tied: bool = False
    sequence_parallel: bool = False
    mtp: int = 0
    vocab: int = 256
    hidden: int = 32
    layers: int = 2
    seq: int = 16
    batch: int = 2
    labels_below: int = 0
    targets: str = "random"
    pattern: str = ""
    dtype: torch.dtype = torch.float32
    config: dict[str, Any] = field(default_factory=dict)
    cce: dict[str, Any] = field(default_factory=dict)

    @property
    def name(self) -> str:
        """What distinguishes this case, for messages."""
        plain = Case()
        return ", ".join(
            f"{key}={value}"
            for key, value in vars(self).items()
            if value != getattr(plain, key) or key == "model"
        )


def grid(base: Case, **options: Sequence[Any]) -> list[Case]:
    """All combinations of the options, on top of `base`."""
    cases = [base]
    for key, values in options.items():
        cases = [replace(case, **{key: value}) for case in cases for value in values]
    return cases


def transformer_config(case: Case) -> Any:
    """The TransformerConfig of a case, for the groups as they are."""
    from megatron.core import parallel_state as state
    from megatron.core.transformer.transformer_config import TransformerConfig

    half = {torch.bfloat16: {"bf16": True}, torch.float16: {"fp16": True}}.get(case.dtype, {})
    options: dict[str, Any] = {
        "num_layers": case.layers,
        "hidden_size": case.hidden,
        "num_attention_heads": 4,
        "tensor_model_parallel_size": state.get_tensor_model_parallel_world_size(),
        "pipeline_model_parallel_size": state.get_pipeline_model_parallel_world_size(),
        "virtual_pipeline_model_parallel_size": (
            state.get_virtual_pipeline_model_parallel_world_size()
        ),
        "context_parallel_size": state.get_context_parallel_world_size(),
        "expert_model_parallel_size": state.get_expert_model_parallel_world_size(),
        "expert_tensor_parallel_size": state.get_expert_tensor_parallel_world_size(),
        "sequence_parallel": case.sequence_parallel,
        "mtp_num_layers": case.mtp or None,
        "use_cpu_initialization": True,
        "params_dtype": case.dtype,
        "pipeline_dtype": case.dtype,
        "hidden_dropout": 0.0,
        "attention_dropout": 0.0,
        "bias_dropout_fusion": False,
        "masked_softmax_fusion": False,
        "apply_rope_fusion": False,
        "gradient_accumulation_fusion": False,
        "cross_entropy_loss_fusion": False,
        **half,
    }
    return TransformerConfig(**{**options, **case.config})


def build(case: Case, seed: int = 11, vp_stage: int | None = None) -> Any:
    """A model with the same weights for every layout; this rank's pipeline stage of it."""
    from megatron.core import parallel_state as state

    torch.manual_seed(seed)
    config = transformer_config(case)
    ends: dict[str, Any] = {
        "pre_process": state.is_pipeline_first_stage(ignore_virtual=False, vp_stage=vp_stage),
        "post_process": state.is_pipeline_last_stage(ignore_virtual=False, vp_stage=vp_stage),
    }
    common: dict[str, Any] = {
        "vocab_size": case.vocab,
        "max_sequence_length": max(case.seq, 16),
        "share_embeddings_and_output_weights": case.tied,
        "position_embedding_type": "rope",
        **ends,
    }
    make = _gpt if case.model == "gpt" else _hybrid
    model = make(case, config, vp_stage, common)
    return model.to(case.dtype).train()


def _gpt(case: Case, config: Any, vp_stage: int | None, common: dict[str, Any]) -> Any:
    from megatron.core.models.gpt import gpt_layer_specs as specs
    from megatron.core.models.gpt.gpt_model import GPTModel

    spec = specs.get_gpt_layer_local_spec(num_experts=config.num_moe_experts)
    if config.context_parallel_size > 1:
        from launch.training.attention import use_fused_attention

        use_fused_attention(spec)  # Megatron's local attention refuses it
    if case.mtp and common["post_process"]:
        common["mtp_block_spec"] = specs.get_gpt_mtp_block_spec(
            config, spec, use_transformer_engine=False, vp_stage=vp_stage
        )
    return GPTModel(config, spec, vp_stage=vp_stage, **common)


def _hybrid(case: Case, config: Any, vp_stage: int | None, common: dict[str, Any]) -> Any:
    """Attention and MLP layers only: state-space layers need CUDA extensions."""
    from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_spec
    from megatron.core.ssm.mlp_layer import MLPLayer
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm
    from megatron.core.transformer.transformer_layer import (
        TransformerLayer,
        TransformerLayerSubmodules,
    )

    gpt = get_gpt_layer_local_spec().submodules
    layers = {
        "attention_layer": ModuleSpec(
            module=TransformerLayer,
            submodules=TransformerLayerSubmodules(
                input_layernorm=gpt.input_layernorm,
                self_attention=gpt.self_attention,
                self_attn_bda=gpt.self_attn_bda,
            ),
        ),
        "mlp_layer": ModuleSpec(
            module=MLPLayer,
            submodules=TransformerLayerSubmodules(
                pre_mlp_layernorm=gpt.pre_mlp_layernorm, mlp=gpt.mlp, mlp_bda=gpt.mlp_bda
            ),
        ),
    }
    pattern = case.pattern or "*-" * (case.layers // 2)
    if MCORE < (0, 19):
        from megatron.core.models.mamba import MambaModel
        from megatron.core.ssm import mamba_block as block

        stack = ModuleSpec(module=block.MambaStack, submodules=block.MambaStackSubmodules(**layers))
        make: Any = MambaModel
        common["hybrid_override_pattern"] = pattern
    else:
        from megatron.core.models.hybrid import hybrid_block as block
        from megatron.core.models.hybrid.hybrid_model import HybridModel

        stack = ModuleSpec(
            module=block.HybridStack,
            submodules=block.HybridStackSubmodules(**layers, mtp_block_spec=_mtp_spec()),
        )
        make = HybridModel
        common["hybrid_layer_pattern"] = pattern + "/*-" * case.mtp
        common["vp_stage"] = vp_stage
    with mock.patch.object(block, "TENorm", WrappedTorchNorm):
        return make(config, stack, **common)


def _mtp_spec() -> Any:
    from megatron.core.tensor_parallel.layers import ColumnParallelLinear
    from megatron.core.transformer import multi_token_prediction as mtp
    from megatron.core.transformer.spec_utils import ModuleSpec
    from megatron.core.transformer.torch_norm import WrappedTorchNorm

    layer = ModuleSpec(
        module=mtp.MultiTokenPredictionLayer,
        submodules=mtp.MultiTokenPredictionLayerSubmodules(
            enorm=WrappedTorchNorm,
            hnorm=WrappedTorchNorm,
            eh_proj=ColumnParallelLinear,
            mtp_model_layer=None,
            layer_norm=WrappedTorchNorm,
        ),
    )
    return ModuleSpec(
        module=mtp.MultiTokenPredictionBlock,
        submodules=mtp.MultiTokenPredictionBlockSubmodules(layer_specs=[layer]),
    )


@contextlib.contextmanager
def experts_on_cpu() -> Iterator[None]:
    """What Megatron's experts ask of CUDA and of Transformer Engine, answered without them."""
    from megatron.core.transformer.moe import moe_utils, token_dispatcher

    def to_host(tensor: Any, as_numpy: bool = False, **_: Any) -> Any:
        return tensor.numpy() if as_numpy and isinstance(tensor, torch.Tensor) else tensor

    with (
        mock.patch.object(token_dispatcher, "maybe_move_tensor_to_cpu", to_host),
        mock.patch.object(moe_utils, "te_general_gemm", None, create=True),
    ):
        yield


@dataclass
class Batch:
    """(b, s) int64 tokens and labels, fp32 loss mask."""

    tokens: Tensor
    labels: Tensor
    mask: Tensor

    @property
    def positions(self) -> Tensor:
        """(b, s) int64."""
        positions = torch.arange(self.tokens.shape[1], device=self.tokens.device)
        return positions.expand_as(self.tokens).contiguous()

    def to(self, device: str) -> Batch:
        """The same batch elsewhere."""
        return Batch(self.tokens.to(device), self.labels.to(device), self.mask.to(device))

    def copy_(self, other: Batch) -> None:
        """Take over the numbers of another batch."""
        for name in ("tokens", "labels", "mask"):
            getattr(self, name).copy_(getattr(other, name))


def batch_of(case: Case, seed: int = 0) -> Batch:
    """The same on every rank; about a quarter of the positions is masked."""
    generator = torch.Generator().manual_seed(100 + seed)
    shape = (case.batch, case.seq + 1)
    ids = torch.randint(case.labels_below or case.vocab, shape, generator=generator)
    mask = (torch.rand((case.batch, case.seq), generator=generator) < 0.75).float()
    labels = ids[:, 1:].contiguous()
    if case.targets == "one-shard":
        labels %= case.vocab // 4
    elif case.targets == "edges":
        last = (case.labels_below or case.vocab) - 1
        half = case.vocab // 2
        labels[0, :4] = torch.tensor([0, half - 1, half, last])
        mask[0, :4] = 1.0
    elif case.targets == "outside":
        strange = torch.tensor([-100, case.vocab, case.vocab + 5, -1])
        chosen = strange[torch.randint(4, labels.shape, generator=generator)]
        labels = torch.where(mask == 0, chosen, labels)
    elif case.targets == "masked":
        mask.zero_()
    return Batch(ids[:, :-1].contiguous(), labels, mask)
