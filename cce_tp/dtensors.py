"""DTensor arguments of a call, as the local tensors and the shard that they stand for.

Imported where an argument may be one: torch.distributed.tensor is slow to import.
"""

from __future__ import annotations

from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from cce_tp.options import fail
from cce_tp.sharding import VocabShard


def unwrap(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    shard: VocabShard | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], VocabShard | None]:
    """Local tensors of DTensor arguments; a weight sharded on dim 0 brings its own VocabShard."""
    input, weight, bias, target, grad_weight_out = tensors
    if isinstance(weight, DTensor):
        if shard is not None:
            fail(
                "vocab_shard",
                "None with a DTensor linear_weight, which says it itself",
                repr(shard),
            )
        shard = _shard_of(weight)
        sharded = shard.group is not None
        bias = _local_like(bias, "linear_bias", sharded)
        grad_weight_out = _local_like(grad_weight_out, "grad_weight_out", sharded)
        weight = _local_weight(weight, grad_weight_out)
    for name, tensor in (("linear_bias", bias), ("grad_weight_out", grad_weight_out)):
        if isinstance(tensor, DTensor):
            fail(name, "a plain tensor beside a plain linear_weight", f"{tensor.placements}")
    return (
        _local_replicated(input, "input"),
        weight,
        bias,
        _local_replicated(target, "target"),
        grad_weight_out,
    ), shard


def _shard_of(weight: DTensor) -> VocabShard:
    placements, mesh = weight.placements, weight.device_mesh
    if all(type(placement) is Replicate for placement in placements):
        return VocabShard(0, weight.shape[0], weight.shape[0])
    if mesh.ndim != 1 or type(placements[0]) is not Shard or placements[0].dim != 0:
        fail(
            "linear_weight",
            "DTensor placements Shard(0) on a 1-D mesh, or Replicate",
            f"{placements}",
        )
    # Shard(0) cuts like torch.chunk: ranks get ceil(V / W) rows each until none are left.
    vocab_size, world, rank = weight.shape[0], mesh.size(), mesh.get_local_rank()
    rows = -(-vocab_size // world)
    start, stop = min(rank * rows, vocab_size), min((rank + 1) * rows, vocab_size)
    return VocabShard(start, stop, vocab_size, mesh.get_group())


def _local_weight(weight: DTensor, grad_weight_out: Tensor | None) -> Tensor:
    if grad_weight_out is None:
        return weight.to_local()
    # dC goes to grad_weight_out, and through to_local() autograd would give the weight zeros.
    return weight.to_local().detach().requires_grad_(weight.requires_grad)


def _local_like(tensor: Tensor | None, name: str, sharded: bool) -> Tensor | None:
    if tensor is None:
        return None
    if not isinstance(tensor, DTensor):
        fail(name, "a DTensor placed like linear_weight", "a plain tensor")
    placements = tensor.placements
    right = all(type(p) is Replicate for p in placements)
    if sharded:
        right = tensor.device_mesh.ndim == 1 and placements[0] == Shard(0)
    if not right:
        fail(name, "the placements of linear_weight", f"{placements}")
    return tensor.to_local()


def _local_replicated(tensor: Tensor, name: str) -> Tensor:
    if isinstance(tensor, DTensor):
        if not all(type(placement) is Replicate for placement in tensor.placements):
            fail(name, "DTensor placement Replicate, or a plain tensor", f"{tensor.placements}")
        return tensor.to_local()
    return tensor
