"""The fused output layer and loss of one head: Megatron's layer in terms of `cce_tp`.

Legend: s sequence length (global), b micro batch, h hidden size, tp tensor-parallel ranks,
V padded global vocabulary, V_local = V / tp rows of this rank.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from cce_tp import LossStats, VocabShard, linear_cross_entropy
from megatron_integration.config import CceConfig
from megatron_integration.main_grad import weight_and_sink

_IGNORED = -100


@dataclass(slots=True, kw_only=True)
class HeadCall:
    """One call of a ColumnParallelLinear that serves as output layer, and how it was meant.

    Attributes:
        layer: the ColumnParallelLinear.
        input: (s, b, h), or (s / tp, b, h) under sequence parallelism.
        weight: (V_local, h) the weight of this call (its own, or a tied embedding's).
        sequence_parallel: as the layer had it when it was called.
        scale: factor on the logits (MuP).
    """

    layer: Any
    input: Tensor
    weight: Tensor
    sequence_parallel: bool
    scale: float = 1.0

    @property
    def group(self) -> Any:
        """Tensor-parallel process group, or None for one rank."""
        group = self.layer.tp_group
        return group if group is not None and group.size() > 1 else None

    @property
    def shard(self) -> VocabShard:
        """This rank's rows, and what becomes of dE: summed, reduce-scattered, or left partial."""
        rows, vocab_size = self.layer.output_size_per_partition, self.layer.output_size
        if self.group is None:
            return VocabShard(0, rows, rows)
        start = self.group.rank() * rows
        return VocabShard(
            start,
            start + rows,
            vocab_size,
            self.group,
            # Megatron's disable_grad_reduce concerns the all-reduce alone.
            reduce_input_grad=self.sequence_parallel or not self.layer.disable_grad_reduce,
            sequence_parallel=self.sequence_parallel,
        )

    def shape(self) -> torch.Size:
        """(s, b, V_local) of the logits."""
        tokens, batch, _ = self.input.shape
        ranks = self.group.size() if self.sequence_parallel and self.group is not None else 1
        return torch.Size((tokens * ranks, batch, self.layer.output_size_per_partition))


def fused_loss(
    call: HeadCall, labels: Tensor, config: CceConfig, *, return_stats: bool
) -> tuple[Tensor, LossStats | None]:
    """Cross entropy per token of one head.

    Args:
        call: the head.
        labels: (b, s) int64 global ids; an id outside [0, V) gives zero loss and zero gradient.
        config: options.
        return_stats: also return LossStats, each (s, b).

    Returns:
        (b, s) fp32 contiguous, the same bits on every tensor-parallel rank; LossStats or None.
    """
    shard = call.shard
    labels_sb = labels.transpose(0, 1).contiguous()
    in_vocab = (labels_sb >= 0) & (labels_sb < shard.vocab_size)
    labels_sb = torch.where(in_vocab, labels_sb, _IGNORED)
    # Kept logits have 16 bits: a head in fp32 goes without.
    keeps = call.weight.dtype.itemsize == 2
    inside = config.keep_logits_in_grad and keeps
    inside = inside and call.input.requires_grad and call.weight.requires_grad
    if inside:
        # They lie in a dC that is not yet written, not in sums: autograd carries it, as in stock.
        weight, sink = call.weight, None
    else:
        weight, sink = weight_and_sink(call.weight, call.layer.gradient_accumulation_fusion)
    bias = None if call.layer.skip_bias_add else call.layer.bias
    options: dict[str, Any] = {
        "linear_bias": bias,
        "ignore_index": _IGNORED,
        "reduction": "none",
        "logit_scale": call.scale,
        "vocab_shard": shard,
        "grad_filter": config.grad_filter,
        "grad_weight_out": sink,
        "return_stats": return_stats,
        "workspace_bytes": config.workspace_bytes,
        "keep_logits_bytes": config.keep_logits_bytes if keeps else 0,
        "keep_logits_in_grad": inside,
    }
    result = linear_cross_entropy(call.input, weight, labels_sb, **options)
    loss, stats = result if return_stats else (result, None)
    return loss.transpose(0, 1).contiguous(), stats
