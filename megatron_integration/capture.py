"""Saves what the loss of one micro batch is computed from, for the benchmark to read.

`--cce-capture DIR` writes DIR/tp00-of-02.pt and so on, one file per tensor-parallel rank of the
first data- and context-parallel rank:

| key | value |
|---|---|
| e | (N, h) hidden states, N = s * b, gathered under sequence parallelism |
| c | (V_local, h) this rank's rows of the output weight |
| t | (N,) int64 labels; -100 where the label is no id |
| vocab_start, vocab_size | global id of the first row, V |
| logit_scale | factor on the logits |
| rank, world_size | in the tensor-parallel group |
| step | losses that the output layer had computed in training before this one |
"""

from __future__ import annotations

import logging
import os
from pathlib import Path

import torch
import torch.distributed as dist
from megatron.core import parallel_state
from megatron.core.tensor_parallel.mappings import gather_from_sequence_parallel_region
from torch import Tensor

from megatron_integration.config import CceConfig
from megatron_integration.fused_head import HeadCall

_logger = logging.getLogger("megatron_integration")
_IGNORED = -100


class Capture:
    """Counts the losses of one output layer in training, and saves the one that is asked for."""

    def __init__(self) -> None:
        self._seen = 0
        self._done = False

    def __call__(self, call: HeadCall, labels: Tensor, config: CceConfig) -> None:
        """Look at a loss that is about to be computed.

        Args:
            call: of the output layer.
            labels: (b, s) int64.
            config: options.
        """
        if config.capture_dir is None or self._done:
            return
        if not (call.layer.training and torch.is_grad_enabled()):
            return
        if self._seen == config.capture_after:
            self._done = True
            # All ranks of a tensor-parallel group come here together, so they can gather.
            if _is_first_replica():
                _save(Path(config.capture_dir), call, labels, self._seen)
        self._seen += 1


def _is_first_replica() -> bool:
    if not parallel_state.model_parallel_is_initialized():
        return True
    return parallel_state.get_data_parallel_rank(with_context_parallel=True) == 0


@torch.no_grad()
def _save(folder: Path, call: HeadCall, labels: Tensor, step: int) -> None:
    hidden, group, shard = call.input.detach(), call.group, call.shard
    if call.sequence_parallel and group is not None:
        hidden = gather_from_sequence_parallel_region(hidden, group=group)
    target = labels.transpose(0, 1).reshape(-1)
    target = torch.where((target >= 0) & (target < shard.vocab_size), target, _IGNORED)
    rank, size = (0, 1) if group is None else (dist.get_rank(group), group.size())
    # Copies: of a view of a larger buffer torch.save would write the whole buffer.
    contents = {
        "e": hidden.reshape(-1, hidden.shape[-1]).to("cpu", copy=True),
        "c": call.weight.detach().to("cpu", copy=True),
        "t": target.to("cpu", copy=True),
        "vocab_start": shard.start,
        "vocab_size": shard.vocab_size,
        "logit_scale": float(call.scale),
        "rank": rank,
        "world_size": size,
        "step": step,
    }
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"tp{rank:02d}-of-{size:02d}.pt"
    # A reader never sees half a file: a rename replaces it at once.
    unfinished = path.with_name(f".{path.name}.{os.getpid()}")
    try:
        torch.save(contents, unfinished)
        os.replace(unfinished, path)
    finally:
        unfinished.unlink(missing_ok=True)
    _logger.info("cce: saved loss %d of the output layer in %s", step, path)
