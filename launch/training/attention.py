"""PyTorch's fused attention as the core attention of Megatron's local layer specification.

Megatron's own local implementation stores the (b, heads, s, s) scores, which would hide what the
output layer costs, and it refuses context parallelism. This one is for causal self-attention
without packing.

Context parallelism cuts every sequence into 2 cp chunks of equal length, of which rank r holds
chunks r and 2 cp - 1 - r, so that all ranks have as much to do under a causal mask. Here keys and
values are gathered over the ranks; queries and results stay where they are.

Legend: s tokens of a sequence on this rank, cp context-parallel ranks, d head size.
"""

from __future__ import annotations

import contextlib
from typing import Any

import torch
import torch.nn.functional as F
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from megatron.core.tensor_parallel.random import get_cuda_rng_tracker
from megatron.core.transformer.enums import AttnMaskType
from torch import Tensor, nn


class FusedAttention(nn.Module):
    """In the place of Megatron's DotProductAttention.

    Args:
        config: TransformerConfig; read: attention_dropout, context_parallel_size.
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
        self.group: Any = None
        if config.context_parallel_size > 1:
            self.group = parallel_state.get_context_parallel_group()
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
        starts = [0]
        if self.group is not None:
            length, ranks, rank = query.shape[0] // 2, self.group.size(), self.group.rank()
            starts = [rank * length, (2 * ranks - 1 - rank) * length]
            key, value = (_in_order(part, self.group) for part in (key, value))
        query, key, value = (part.permute(1, 2, 0, 3) for part in (query, key, value))
        dropout = self.dropout if self.training else 0.0
        # The heads differ between tensor-parallel ranks, and so must what is dropped.
        tracker: Any = get_cuda_rng_tracker()
        fork = tracker.fork() if dropout else contextlib.nullcontext()
        with fork:
            parts = [
                self._attend(chunk, key, value, start, dropout)
                for chunk, start in zip(query.chunk(len(starts), dim=2), starts, strict=True)
            ]
        context = parts[0] if len(parts) == 1 else torch.cat(parts, dim=2)
        return context.permute(2, 0, 1, 3).flatten(2)

    def _attend(
        self, query: Tensor, key: Tensor, value: Tensor, start: int, dropout: float
    ) -> Tensor:
        """(b, heads, n, d) queries of the tokens from `start` on; the same shape."""
        tokens = query.shape[2]
        seen = start + tokens
        mask = None
        if start:
            mask = torch.ones(tokens, seen, dtype=torch.bool, device=query.device).tril(start)
        return F.scaled_dot_product_attention(
            query,
            key[:, :, :seen],
            value[:, :, :seen],
            attn_mask=mask,
            dropout_p=dropout,
            is_causal=mask is None,
            scale=self.scale,
            enable_gqa=query.shape[1] != key.shape[1],
        )


def _in_order(part: Tensor, group: Any) -> Tensor:
    """(s, b, groups, d) of this rank -> (cp * s, b, groups, d) in the order of the text."""
    chunks = gather_from_sequence_parallel_region(part, group=group).chunk(2 * group.size())
    # Rank by rank: chunks 0, 2 cp - 1, 1, 2 cp - 2, ...
    return torch.cat([*chunks[::2], *reversed(chunks[1::2])])


def use_fused_attention(spec: Any) -> Any:
    """Put it into a layer specification made by get_gpt_layer_local_spec; returns the spec."""
    spec.submodules.self_attention.submodules.core_attention = FusedAttention
    return spec
