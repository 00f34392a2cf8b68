"""PyTorch's fused attention as the core attention of Megatron's local layer specification.

Megatron's own local implementation stores the (b, heads, s, s) scores, which would hide what the
output layer costs. This one is for causal self-attention without packing.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch.nn.functional as F
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """In the place of Megatron's DotProductAttention.

    Args:
        config: TransformerConfig; read: attention_dropout, num_attention_heads.
        attn_mask_type: must be causal.
        attention_dropout: overrides that of `config`.
        softmax_scale: default: 1 / sqrt(head size).
        more: what else Megatron's releases pass; it has no bearing here.
    """

    def __init__(
        self,
        config: Any,
        layer_number: int,
        attn_mask_type: AttnMaskType,
        attention_type: str,
        attention_dropout: float | None = None,
        softmax_scale: float | None = None,
        **more: Any,
    ) -> None:
        super().__init__()
        del layer_number, more
        if attn_mask_type is not AttnMaskType.causal or attention_type != "self":
            raise ValueError(
                "attention_backend: expected unfused for attention other than causal "
                f"self-attention, got {attn_mask_type}, {attention_type}"
            )
        if config.context_parallel_size > 1:
            raise ValueError(
                "context_parallel_size: expected 1 without Transformer Engine, got "
                f"{config.context_parallel_size}"
            )
        self.dropout = config.attention_dropout if attention_dropout is None else attention_dropout
        self.scale = softmax_scale

    def forward(
        self,
        query: Tensor,
        key: Tensor,
        value: Tensor,
        attention_mask: Tensor | None = None,
        attn_mask_type: AttnMaskType | None = None,
        attention_bias: Tensor | None = None,
        packed_seq_params: Any = None,
    ) -> Tensor:
        """(s, b, heads, d) query, (s, b, groups, d) key and value -> (s, b, heads * d)."""
        del attention_mask, attn_mask_type
        if attention_bias is not None or packed_seq_params is not None:
            raise ValueError("attention_backend: expected unfused for a bias or packed sequences")
        dropout = self.dropout if self.training else 0.0
        # The heads differ between tensor-parallel ranks, and so must what is dropped.
        tracker: Any = get_cuda_rng_tracker()
        fork = tracker.fork() if dropout else contextlib.nullcontext()
        with fork:
            context = F.scaled_dot_product_attention(
                *(part.permute(1, 2, 0, 3) for part in (query, key, value)),
                dropout_p=dropout,
                is_causal=True,
                scale=self.scale,
                enable_gqa=query.shape[2] != key.shape[2],
            )
        return context.permute(2, 0, 1, 3).reshape(*query.shape[:2], -1)


def use_fused_attention(spec: Any) -> Any:
    """Put it into a layer specification made by get_gpt_layer_local_spec; returns the spec."""
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    return spec
