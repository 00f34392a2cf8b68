"""Checks of the public arguments, and their resolution into operands and `LossOptions`.

Every error is a ValueError of one line: the argument, what was expected, what came. Where the
vocabulary is sharded, an error on one rank reaches the others through the handshake
(`cce_tp.sharding.agree`).

Legend: N tokens, V global vocabulary, V_local rows of this rank, D hidden size.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from typing import Literal, NoReturn

import torch
from torch import Tensor
from torch.distributed.tensor import DTensor, Replicate, Shard

from cce_tp import sharding
from cce_tp.autograd import LossOptions
from cce_tp.filtering import GradFilter
from cce_tp.sharding import VocabShard
from cce_tp.stats import StatRows
from cce_tp.workspace import MIN_WORKSPACE_BYTES

_FLOATS = (torch.float32, torch.float16, torch.bfloat16, torch.float64)

ReturnStats = bool | Literal["entropy"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Settings:
    """The arguments of `linear_cross_entropy` that are not tensors, checked on construction.

    Raises:
        ValueError: an argument outside its range, by name.
    """

    ignore_index: int = -100
    reduction: str = "mean"
    label_smoothing: float = 0.0
    z_loss: float = 0.0
    logit_scale: float = 1.0
    logit_softcap: float | None = None
    grad_filter: GradFilter = field(default_factory=GradFilter.exact)
    return_stats: ReturnStats = False
    impl: str = "auto"
    workspace_bytes: int | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("none", "mean", "sum"):
            _fail("reduction", "'none', 'mean' or 'sum'", repr(self.reduction))
        if self.impl not in ("auto", "triton", "torch"):
            _fail("impl", "'auto', 'triton' or 'torch'", repr(self.impl))
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            _fail("ignore_index", "an int", repr(self.ignore_index))
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            _fail("label_smoothing", "a number in [0, 1)", repr(self.label_smoothing))
        if not (_is_number(self.z_loss) and self.z_loss >= 0):
            _fail("z_loss", "a finite number >= 0", repr(self.z_loss))
        if not _is_number(self.logit_scale):
            _fail("logit_scale", "a finite number", repr(self.logit_scale))
        if self.logit_softcap is not None and not (
            _is_number(self.logit_softcap) and self.logit_softcap > 0
        ):
            _fail("logit_softcap", "a finite number > 0 or None", repr(self.logit_softcap))
        if not isinstance(self.grad_filter, GradFilter):
            _fail("grad_filter", "a cce_tp.GradFilter", repr(self.grad_filter))
        self.grad_filter.require_supported()
        if not isinstance(self.return_stats, bool) and self.return_stats != "entropy":
            _fail("return_stats", "False, True or 'entropy'", repr(self.return_stats))
        if self.workspace_bytes is not None and (
            isinstance(self.workspace_bytes, bool)
            or not isinstance(self.workspace_bytes, int)
            or self.workspace_bytes < MIN_WORKSPACE_BYTES
        ):
            _fail(
                "workspace_bytes",
                f"None or an int >= {MIN_WORKSPACE_BYTES}",
                repr(self.workspace_bytes),
            )


@dataclass(frozen=True, slots=True)
class Operands:
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


def _fail(argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -math.inf < value < math.inf  # a comparison: torch.compile traces it, not isfinite


def _shape(tensor: Tensor) -> str:
    return str(tuple(tensor.shape))


def prepare(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    vocab_shard: VocabShard | None,
    grad_weight_out: Tensor | None,
    settings: dict[str, object],
) -> tuple[Operands, LossOptions, Settings]:
    """Check everything and resolve defaults.

    Raises:
        ValueError: on this rank and, if the group has not been used before, on all of its ranks.
    """
    if vocab_shard is not None and not isinstance(vocab_shard, VocabShard):
        _fail("vocab_shard", "a cce_tp.VocabShard or None", repr(vocab_shard))
    group_name = "" if vocab_shard is None else vocab_shard.group_name
    try:
        checked = Settings(**settings)  # pyright: ignore[reportArgumentType]
        tensors = (input, linear_weight, linear_bias, target, grad_weight_out)
        tensors, vocab_shard = _unwrap_dtensors(tensors, vocab_shard)
        group_name = "" if vocab_shard is None else vocab_shard.group_name
        operands, shard = _check_tensors(*tensors, vocab_shard)
        options = _resolve(operands, shard, checked)
        if sharding.debug_enabled() and not torch.compiler.is_compiling():
            _check_targets(operands.target, checked.ignore_index, shard.vocab_size)
    except (ValueError, NotImplementedError) as error:
        if group_name and not torch.compiler.is_compiling():
            sharding.agree(group_name, sharding.Agreement(None, "", 0, problem=str(error)))
        raise
    return operands, options, checked


def _unwrap_dtensors(
    tensors: tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None],
    shard: VocabShard | None,
) -> tuple[tuple[Tensor, Tensor, Tensor | None, Tensor, Tensor | None], VocabShard | None]:
    """Local tensors of DTensor arguments; a weight sharded on dim 0 brings its own VocabShard."""
    input, weight, bias, target, grad_weight_out = tensors
    if isinstance(weight, DTensor):
        if shard is not None:
            _fail(
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
            _fail(name, "a plain tensor beside a plain linear_weight", f"{tensor.placements}")
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
        _fail(
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
        _fail(name, "a DTensor placed like linear_weight", "a plain tensor")
    placements = tensor.placements
    right = all(type(p) is Replicate for p in placements)
    if sharded:
        right = tensor.device_mesh.ndim == 1 and placements[0] == Shard(0)
    if not right:
        _fail(name, "the placements of linear_weight", f"{placements}")
    return tensor.to_local()


def _local_replicated(tensor: Tensor, name: str) -> Tensor:
    if isinstance(tensor, DTensor):
        if not all(type(placement) is Replicate for placement in tensor.placements):
            _fail(name, "DTensor placement Replicate, or a plain tensor", f"{tensor.placements}")
        return tensor.to_local()
    return tensor


def _check_tensors(
    input: Tensor,
    weight: Tensor,
    bias: Tensor | None,
    target: Tensor,
    grad_weight_out: Tensor | None,
    shard: VocabShard | None,
) -> tuple[Operands, VocabShard]:
    required = {"input": input, "linear_weight": weight, "target": target}
    optional = {"linear_bias": bias, "grad_weight_out": grad_weight_out}
    for name, tensor in (required | optional).items():
        if not isinstance(tensor, Tensor) and (name in required or tensor is not None):
            _fail(name, "a tensor", type(tensor).__name__)
    if input.dim() < 1 or input.shape[-1] == 0:
        _fail("input", "shape (..., D) with D >= 1", _shape(input))
    hidden = input.shape[-1]
    if weight.dim() != 2 or weight.shape[1] != hidden:
        _fail("linear_weight", f"shape (V_local, D={hidden}), D from input", _shape(weight))
    if input.dtype not in _FLOATS:
        _fail("input", "dtype fp32, fp16, bf16 or fp64", str(input.dtype))
    if target.shape != input.shape[:-1]:
        _fail("target", f"input's leading shape {tuple(input.shape[:-1])}", _shape(target))
    if target.dtype not in (torch.int64, torch.int32):
        _fail("target", "dtype int64 or int32", str(target.dtype))
    if shard is None:
        if weight.shape[0] == 0:
            _fail("linear_weight", "at least one row without a vocab_shard", _shape(weight))
        shard = VocabShard(0, weight.shape[0], weight.shape[0])
    elif shard.num_rows != weight.shape[0]:
        _fail(
            "linear_weight",
            f"the {shard.num_rows} rows [{shard.start}, {shard.stop}) of vocab_shard",
            _shape(weight),
        )
    if bias is not None and bias.shape != weight.shape[:1]:
        _fail(
            "linear_bias", f"shape ({weight.shape[0]},), one per row of linear_weight", _shape(bias)
        )
    for name, tensor in (("linear_weight", weight), ("linear_bias", bias)):
        if tensor is not None and tensor.dtype not in _FLOATS:
            _fail(name, "dtype fp32, fp16, bf16 or fp64", str(tensor.dtype))
    for name, tensor in (required | optional).items():
        if tensor is not None and tensor.device != input.device:
            _fail(name, f"input's device {input.device}", str(tensor.device))
    if grad_weight_out is not None:
        _check_grad_weight_out(grad_weight_out, weight)
    flat = input.reshape(-1, hidden)
    return Operands(flat, weight, bias, target.reshape(-1).long(), grad_weight_out), shard


def _check_grad_weight_out(out: Tensor, weight: Tensor) -> None:
    name = "grad_weight_out"
    if out.shape != weight.shape:
        _fail(name, f"linear_weight's shape {_shape(weight)}", _shape(out))
    if out.dtype not in (torch.float32, torch.bfloat16, weight.dtype):
        _fail(name, f"dtype fp32, bf16 or linear_weight's {weight.dtype}", str(out.dtype))
    if not out.is_contiguous():
        _fail(name, "a contiguous tensor", f"strides {out.stride()}")
    if out.requires_grad:
        _fail(name, "a tensor that does not require grad", "requires_grad=True")


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
            _fail(name, f"input's dtype {dtype} (or autocast)", str(tensor.dtype))
    return torch.get_autocast_dtype(device_type) if cast else dtype


def _resolve_impl(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    if impl == "torch":
        return impl
    why_not = _why_not_triton(dtype, device)
    if why_not is None and (impl == "triton" or device.type == "cuda"):
        return "triton"
    if impl == "triton":
        _fail("impl", "'torch' here", f"'triton', but {why_not}")
    return "torch"


def _why_not_triton(dtype: torch.dtype, device: torch.device) -> str | None:
    """Why the Triton kernels cannot run on these inputs, or None."""
    if dtype == torch.float64:
        return "the Triton kernels take fp32, fp16 and bf16, not fp64"
    if device.type == "cuda" and not _interpreted():
        if torch.cuda.get_device_capability(device)[0] < 8:
            return "the Triton kernels need compute capability 8.0 or newer"
        return None
    if not _interpreted():
        return f"the inputs are on {device} (TRITON_INTERPRET=1 runs the kernels on the CPU)"
    if dtype == torch.bfloat16:
        return "Triton's interpreter multiplies bf16 wrongly"
    return None


def _interpreted() -> bool:
    from cce_tp.kernels.tuning import is_interpreted

    return is_interpreted()


def _resolve(operands: Operands, shard: VocabShard, settings: Settings) -> LossOptions:
    dtype = _compute_dtype(operands)
    wants_stats = settings.return_stats is not False
    rows = StatRows(
        logit_sum=settings.label_smoothing > 0,
        entropy=settings.return_stats == "entropy",
        argmax=wants_stats,
    )
    terms = ""
    if shard.group_name:
        terms = _terms(operands, shard, settings, dtype)
    return LossOptions(
        ignore_index=settings.ignore_index,
        label_smoothing=float(settings.label_smoothing),
        z_loss=float(settings.z_loss),
        logit_scale=float(settings.logit_scale),
        logit_softcap=None if settings.logit_softcap is None else float(settings.logit_softcap),
        grad_filter=settings.grad_filter,
        start=shard.start,
        stop=shard.stop,
        vocab_size=shard.vocab_size,
        group_name=shard.group_name,
        reduce_input_grad=shard.reduce_input_grad,
        rows=rows,
        compute_dtype=dtype,
        workspace_bytes=settings.workspace_bytes,
        impl=_resolve_impl(settings.impl, dtype, operands.input.device),
        terms=terms,
    )


def _terms(operands: Operands, shard: VocabShard, settings: Settings, dtype: torch.dtype) -> str:
    """What must be the same on every rank beside numbers, as "name=value; name=value".

    Numbers may be symbolic under torch.compile; they go to the handshake on their own.
    """
    needs_grad = operands.input.requires_grad and torch.is_grad_enabled()
    return "; ".join(
        (
            f"vocab_shard.reduce_input_grad={shard.reduce_input_grad}",
            f"input.dtype={operands.input.dtype} computed in {dtype}",
            f"input.requires_grad={needs_grad}",
            f"linear_bias={'given' if operands.bias is not None else None}",
            f"reduction={settings.reduction}",
            f"grad_filter={settings.grad_filter.kind}",
            f"return_stats={settings.return_stats}",
            f"impl={settings.impl}",
        )
    )


def _check_targets(target_N: Tensor, ignore_index: int, vocab_size: int) -> None:
    """Debug check; waits for the device."""
    outside_N = ((target_N < 0) | (target_N >= vocab_size)) & (target_N != ignore_index)
    if bool(outside_N.any()):
        position = int(outside_N.nonzero()[0])
        _fail(
            "target",
            f"ids in [0, {vocab_size}) or ignore_index={ignore_index}",
            f"{int(target_N[position])} at token {position} ({int(outside_N.sum())} in all)",
        )
