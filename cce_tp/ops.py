"""torch.library operators, opaque to torch.compile, with their fake implementations.

Operators exchange tensors and plain numbers only, so each one rebuilds the objects of
`cce_tp.problem` from its arguments, which come in the order of its schema. They know nothing of
autograd; `cce_tp.autograd` puts them together.

Legend: N tokens, V vocabulary rows of this rank, D hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any

import torch
from torch import Tensor

from cce_tp import sharding
from cce_tp.backend import backend
from cce_tp.backward import GradientSinks, gradients
from cce_tp.problem import LocalLogits, LogitGradient, statistics_dtype
from cce_tp.stats import StatRows
from cce_tp.workspace import default_workspace_bytes

_LIBRARY = torch.library.Library("cce_tp", "DEF")

# LocalLogits' fields, in the order of every schema that takes them.
_LOGITS_FIELDS = (
    "input",
    "weight",
    "bias",
    "target",
    "first_id",
    "logit_scale",
    "logit_softcap",
)
_LOGITS_SCHEMA = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    "int first_id, float logit_scale, float? logit_softcap"
)
# LogitGradient's fields, likewise.
_UPSTREAM_FIELDS = ("grad", "max_logit", "log_sum", "z_loss", "label_smoothing", "vocab_size")
_UPSTREAM_SCHEMA = (
    "Tensor grad, Tensor max_logit, Tensor log_sum, "
    "float z_loss, float label_smoothing, int vocab_size"
)
_ROWS_SCHEMA = "bool logit_sum, bool entropy, bool argmax"


def _split_logits(arguments: tuple[Any, ...]) -> tuple[LocalLogits, tuple[Any, ...]]:
    count = len(_LOGITS_FIELDS)
    fields = dict(zip(_LOGITS_FIELDS, arguments[:count], strict=True))
    return LocalLogits(**fields), arguments[count:]


def _define(name: str, schema: str, implementation: Any, fake: Any) -> Any:
    """Register one operator for every device, and return its callable."""
    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(f"cce_tp::{name}", fake, lib=_LIBRARY)
    return getattr(torch.ops.cce_tp, name).default


def _budget(workspace_bytes: int | None, logits: LocalLogits, vocab_size: int) -> int:
    # Here and not in the caller, where the number of tokens may be symbolic.
    if workspace_bytes is not None:
        return workspace_bytes
    return default_workspace_bytes(logits.input.shape[0], vocab_size)


def _execution_context(tensor: Tensor) -> ExitStack:
    """Run on the tensor's device and without autocast, which would redo casts."""
    stack = ExitStack()
    if torch.is_autocast_enabled(tensor.device.type):
        stack.enter_context(torch.autocast(tensor.device.type, enabled=False))
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        stack.enter_context(torch.cuda.device(tensor.device))
    return stack


def _statistics(*arguments: Any) -> Tensor:
    logits, (*flags, vocab_size, workspace_bytes, impl) = _split_logits(arguments)
    budget = _budget(workspace_bytes, logits, vocab_size)
    with _execution_context(logits.input):
        return backend(impl).statistics(logits, StatRows(*flags), budget)


def _statistics_fake(*arguments: Any) -> Tensor:
    logits, (*flags, _, _, _) = _split_logits(arguments)
    rows, dtype = StatRows(*flags), statistics_dtype(logits.input.dtype)
    return logits.input.new_empty((rows.count, logits.input.shape[0]), dtype=dtype)


def _merge_over_group(
    packed: Tensor,
    logit_sum: bool,
    entropy: bool,
    argmax: bool,
    group: str,
    shard: list[int],
    terms: str,
    numbers: list[float],
) -> Tensor:
    start, stop, vocab_size = shard
    offer = sharding.Agreement(
        shard=(start, stop, vocab_size),
        terms=sharding.agreement_terms(vocab_size, terms, numbers),
        num_tokens=packed.shape[1],
    )
    sharding.agree(group, offer)
    with _execution_context(packed):
        return sharding.merge_over_group(packed, StatRows(logit_sum, entropy, argmax), group)


def _merge_over_group_fake(packed: Tensor, *_: Any) -> Tensor:
    return torch.empty_like(packed)


def _split_upstream(rest: tuple[Any, ...]) -> tuple[LogitGradient, tuple[Any, ...]]:
    count = len(_UPSTREAM_FIELDS)
    fields = dict(zip(_UPSTREAM_FIELDS, rest[:count], strict=True))
    return LogitGradient(**fields), rest[count:]


def _gradients(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, rest = _split_logits(arguments)
    upstream, (eps, grad_weight_out, dtypes, workspace_bytes, impl) = _split_upstream(rest)
    made = _empty_gradients(logits, dtypes)
    wants_input, wants_weight, wants_bias = (code != NOT_WANTED for code in dtypes)
    grad_bias = None
    if wants_bias:
        grad_bias = torch.zeros_like(made[2], dtype=statistics_dtype(logits.input.dtype))
    sinks = GradientSinks(
        input=made[0] if wants_input else None,
        weight=made[1] if wants_weight else grad_weight_out,
        bias=grad_bias,
        accumulate_weight=grad_weight_out is not None,
    )
    budget = _budget(workspace_bytes, logits, upstream.vocab_size)
    with _execution_context(logits.input):
        gradients(backend(impl), logits, upstream, sinks, eps=eps, workspace_bytes=budget)
        if grad_bias is not None:
            made[2].copy_(grad_bias)
    return made


def _gradients_fake(*arguments: Any) -> tuple[Tensor, Tensor, Tensor]:
    logits, rest = _split_logits(arguments)
    _, (_, _, dtypes, _, _) = _split_upstream(rest)
    return _empty_gradients(logits, dtypes)


# A gradient's dtype crosses the operator's schema as a number; -1 means that it is not wanted.
_GRADIENT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NOT_WANTED = -1


def dtype_code(dtype: torch.dtype) -> int:
    """Number of a gradient's dtype in the `dtypes` argument of `gradients`."""
    return _GRADIENT_DTYPES.index(dtype)


def _empty_gradients(logits: LocalLogits, dtypes: list[int]) -> tuple[Tensor, Tensor, Tensor]:
    """Unfilled outputs of `gradients`; one that is not wanted has no elements."""

    def empty(like: Tensor | None, code: int) -> Tensor:
        if like is None or code == NOT_WANTED:
            return logits.input.new_empty(0)
        return logits.input.new_empty(like.shape, dtype=_GRADIENT_DTYPES[code])

    return (
        empty(logits.input, dtypes[0]),
        empty(logits.weight, dtypes[1]),
        empty(logits.bias, dtypes[2]),
    )


def _sum_over_group(tensor: Tensor, group: str) -> None:
    sharding.sum_over_group(tensor, group)


def _sum_over_group_fake(tensor: Tensor, group: str) -> None:
    return None


# (input, weight, ...) -> packed statistics (rows, N) of this rank's rows.
statistics = _define(
    "statistics",
    f"({_LOGITS_SCHEMA}, {_ROWS_SCHEMA}, int vocab_size, int? workspace_bytes, str impl) -> Tensor",
    _statistics,
    _statistics_fake,
)
# Packed statistics of this rank -> of the group; the first call with new terms is a handshake.
merge_over_group = _define(
    "merge_over_group",
    f"(Tensor packed, {_ROWS_SCHEMA}, str group, int[] shard, str terms, "
    "float[] numbers) -> Tensor",
    _merge_over_group,
    _merge_over_group_fake,
)
# -> this rank's (dE, dC, dbias); dtypes: three numbers of `dtype_code`, or NOT_WANTED.
local_gradients = _define(
    "gradients",
    f"({_LOGITS_SCHEMA}, {_UPSTREAM_SCHEMA}, float? eps, Tensor(a!)? grad_weight_out, "
    "int[] dtypes, int? workspace_bytes, str impl) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
# All-reduce in place.
sum_over_group = _define(
    "sum_over_group", "(Tensor(a!) tensor, str group) -> ()", _sum_over_group, _sum_over_group_fake
)
