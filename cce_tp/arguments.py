"""Checks of the tensors of a call, and their resolution into flat operands and `LossOptions`.

Every error is a ValueError of one line: the argument, what was expected, what came. Where the
vocabulary is sharded, an error on one rank reaches the others through the handshake
(`cce_tp.sharding.agree`).

Legend: N tokens, V global vocabulary, V_local rows of this rank, D hidden size.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_tp import sharding
from cce_tp.options import LossOptions, Settings, check_settings, fail, resolve
from cce_tp.sharding import VocabShard

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)
# What is no DTensor: to look at others takes a module that is slow to import.
_PLAIN = frozenset((Tensor, torch.nn.Parameter, type(None)))
# What came of arguments that were checked, by all that their check depends on.
_MOST_KNOWN = 256
_known: dict[tuple[Any, ...], tuple[LossOptions, Settings]] = {}


class Operands(NamedTuple):
    """Tensors of one call, plain and flat.

    Attributes:
        input: (N, D).
        weight: (V_local, D).
        bias: (V_local,) or None.
        target: (N,) int64.
        grad_weight_out: (V_local, D) or None.
    """

    input: Tensor
    weight: Tensor
    bias: Tensor | None
    target: Tensor
    grad_weight_out: Tensor | None


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def prepare(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    vocab_shard: VocabShard | None,
    grad_weight_out: Tensor | None,
    settings: dict[str, Any],
) -> tuple[Operands, LossOptions, Settings]:
    """Check everything and resolve defaults.

    Raises:
        ValueError: on this rank and, if the group has not been used before, on all of its ranks.
    """
    tensors = (input, linear_weight, linear_bias, target, grad_weight_out)
    key = _key(tensors, vocab_shard, settings)
    if key is not None:
        known = _known.get(key)
        if known is not None:
            return _flat(*tensors), *known
    if vocab_shard is not None and not isinstance(vocab_shard, VocabShard):
        fail("vocab_shard", "a cce_tp.VocabShard or None", repr(vocab_shard))
    group_name = "" if vocab_shard is None else vocab_shard.group_name
    try:
        checked = check_settings(settings)
        if not _PLAIN.issuperset(map(type, tensors)):
            from cce_tp import dtensors

            tensors, vocab_shard = dtensors.unwrap(tensors, vocab_shard)
        group_name = "" if vocab_shard is None else vocab_shard.group_name
        operands, shard = _check_tensors(*tensors, vocab_shard)
        if checked.keep_logits_in_grad and operands.grad_weight_out is not None:
            fail(
                "keep_logits_in_grad",
                "False with grad_weight_out, whose memory holds sums already",
                "True",
            )
        options = resolve(
            checked,
            shard,
            compute_dtype=_compute_dtype(operands),
            input_dtype=operands.input.dtype,
            device=operands.input.device,
            needs_input_grad=operands.input.requires_grad and torch.is_grad_enabled(),
            has_bias=operands.bias is not None,
            into_out=operands.grad_weight_out is not None,
        )
        if sharding.debug_enabled() and not torch.compiler.is_compiling():
            _check_targets(operands.target, checked.ignore_index, shard.vocab_size)
    except (ValueError, NotImplementedError) as error:
        if group_name and not torch.compiler.is_compiling():
            sharding.agree(group_name, sharding.Agreement(None, "", 0, problem=str(error)))
        raise
    if key is not None:
        if len(_known) >= _MOST_KNOWN:
            _known.clear()
        _known[key] = options, checked
    return operands, options, checked


def _key(
    tensors: tuple[Tensor | None, ...], shard: VocabShard | None, settings: dict[str, Any]
) -> tuple[Any, ...] | None:
    """All that the check of a call depends on; None where that is more than can be said, as the
    values of the targets."""
    if torch.compiler.is_compiling() or sharding.debug_enabled():
        return None
    if not _PLAIN.issuperset(map(type, tensors)):
        return None
    if shard is None:
        rows = None
    elif type(shard) is VocabShard:
        # Not the shard itself, whose group would be kept alive.
        rows = shard.start, shard.stop, shard.vocab_size, shard.group_name
        rows = *rows, shard.reduce_input_grad, shard.sequence_parallel, shard.token_parts
    else:
        return None
    input, _, _, _, out = tensors
    if input is None:
        return None
    values, device_type = settings.values(), input.device.type
    key = (
        *values,
        *map(type, values),  # 1, 1.0 and True are one key, and not all of them are valid
        rows,
        torch.is_grad_enabled(),
        torch.is_autocast_enabled(device_type) and torch.get_autocast_dtype(device_type),
        out is not None and out.is_contiguous(),
        *[
            None if each is None else (each.shape, each.dtype, each.device, each.requires_grad)
            for each in tensors
        ],
    )
    try:
        hash(key)
    except TypeError:  # a setting that cannot be hashed, and so is no valid one either
        return None
    return key


def _flat(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_weight_out: Tensor | None,
) -> Operands:
    # A view of what is flat already would be one more node of the graph for autograd to walk.
    flat = input if input.dim() == 2 else input.reshape(-1, input.shape[-1])
    ids = target if target.dim() == 1 else target.reshape(-1)
    return Operands(flat, weight, bias, ids.long(), grad_weight_out)


def _check_tensors(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_weight_out: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Operands, VocabShard]:
    given = {"input": input, "linear_weight": weight, "target": target}
    if bias is not None:
        given["linear_bias"] = bias
    if grad_weight_out is not None:
        given["grad_weight_out"] = grad_weight_out
    for name, tensor in given.items():
        if not isinstance(tensor, Tensor):
            fail(name, "a tensor", type(tensor).__name__)
    if input.dim() < 1 or input.shape[-1] == 0:
        fail("input", "shape (..., D) with D >= 1", _shape(input))
    hidden = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        fail("linear_weight", f"shape (V_local, D={hidden}), D from input", _shape(weight))
    if input.dtype not in _FLOATS:
        fail("input", "dtype fp32, fp16, bf16 or fp64", str(input.dtype))
    parts = 1 if shard is None else shard.token_parts
    leading = tuple(input.shape[:-1]) if parts == 1 else _gathered(input, parts)
    if tuple(target.shape) != leading:
        fail("target", f"input's leading shape {leading}", _shape(target))
    if target.dtype not in (torch.int64, torch.int32):
        fail("target", "dtype int64 or int32", str(target.dtype))
    if shard is None:
        if weight.shape[0] == 0:
            fail("linear_weight", "at least one row without a vocab_shard", _shape(weight))
        shard = VocabShard(0, weight.shape[0], weight.shape[0])
    elif shard.num_rows != weight.shape[0]:
        fail(
            "linear_weight",
            f"the {shard.num_rows} rows [{shard.start}, {shard.stop}) of vocab_shard",
            _shape(weight),
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        fail(
            "linear_bias", f"shape ({weight.shape[0]},), one per row of linear_weight", _shape(bias)
        )
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            fail(name, "dtype fp32, fp16, bf16 or fp64", str(tensor.dtype))
    device = input.device
    for name, tensor in given.items():
        if tensor.device != device:
            fail(name, f"input's device {device}", str(tensor.device))
    if grad_weight_out is not None:
        _check_grad_weight_out(grad_weight_out, weight)
    return _flat(input, weight, bias, target, grad_weight_out), shard


def _gathered(input: Tensor, parts: int) -> tuple[int, ...]:
    """Leading dims of all tokens, of which `input` holds one of `parts` equal parts."""
    if input.dim() < 2:
        fail("input", "shape (tokens, ..., D) with a sequence_parallel vocab_shard", _shape(input))
    return (input.shape[0] * parts, *input.shape[1:-1])


def _check_grad_weight_out(out: Tensor, weight: Tensor) -> None:
    name = "grad_weight_out"
    if out.shape != weight.shape:
        fail(name, f"linear_weight's shape {_shape(weight)}", _shape(out))
    if out.dtype not in (torch.float32, torch.bfloat16, weight.dtype):
        fail(name, f"dtype fp32, bf16 or linear_weight's {weight.dtype}", str(out.dtype))
    if not out.is_contiguous():
        fail(name, "a contiguous tensor", f"strides {out.stride()}")
    if out.requires_grad:
        fail(name, "a tensor that does not require grad", "requires_grad=True")


def _compute_dtype(operands: Operands) -> torch.dtype:
    """Dtype of the products: autocast's where it applies, else the one that all operands share."""
    device_type, dtype = operands.input.device.type, operands.input.dtype
    cast = torch.is_autocast_enabled(device_type) and dtype != torch.float64
    for name, tensor in (("linear_weight", operands.weight), ("linear_bias", operands.bias)):
        # Autocast casts among fp32, bf16 and fp16; fp64 it leaves alone.
        if (
            tensor is not None
            and tensor.dtype != dtype
            and not (cast and tensor.dtype.itemsize < 8)
        ):
            fail(name, f"input's dtype {dtype} (or autocast)", str(tensor.dtype))
    return torch.get_autocast_dtype(device_type) if cast else dtype


def _check_targets(target_N: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Debug check; waits for the device."""
    outside_N = ((target_N < 0) | (target_N >= vocab_size)) & (target_N != ignore_index)
    if bool(outside_N.any()):
        position = int(outside_N.nonzero()[0])
        fail(
            "target",
            f"ids in [0, {vocab_size}) or ignore_index={ignore_index}",
            f"{int(target_N[position])} at token {position} ({int(outside_N.sum())} in all)",
        )
