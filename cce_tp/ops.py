"""torch.library operators, opaque to torch.compile, with their fake implementations.

Two: the loss of one call, and its gradients; the collectives of a group are inside. Operators
exchange tensors and plain numbers only, so each one rebuilds the objects of `cce_tp.problem` from
its arguments, which come in the order of its schema. They know nothing of autograd;
`cce_tp.autograd` puts them together.

Legend: N tokens (N_local of this rank under sequence parallelism), V vocabulary rows of this rank,
D hidden size.
"""

from __future__ import annotations

from contextlib import ExitStack
from typing import Any, NamedTuple

import torch
from torch import Tensor

from cce_tp import far_field, replay, sharding
from cce_tp.backend import Backend, backend
from cce_tp.backward import GradientSinks, gradients
from cce_tp.far_field import FarField, LateRows
from cce_tp.problem import (
    KeptLogits,
    LocalLogits,
    LogitGradient,
    LossTerms,
    TokenLoss,
    statistics_dtype,
)
from cce_tp.products import FullPrecisionSums, copies_operands
from cce_tp.stats import StatRows
from cce_tp.workspace import columns_in_grad, default_workspace_bytes

_LIBRARY = torch.library.Library("cce_tp", "DEF")

# LocalLogits' fields, in their order.
_LOGITS_SCHEMA = (
    "Tensor input, Tensor weight, Tensor? bias, Tensor target, "
    "int first_id, float logit_scale, float? logit_softcap"
)
# LossTerms' fields, likewise.
_TERMS_SCHEMA = (
    "str reduction, int ignore_index, float label_smoothing, float z_loss, int vocab_size"
)
_ROWS_SCHEMA = "bool logit_sum, bool entropy, bool argmax"


# input, weight, bias and target come first.
_OPERANDS = 4
_TERMS_AT = len(LocalLogits._fields)
_REST_AT = _TERMS_AT + len(LossTerms._fields)


def _split(arguments: tuple[Any, ...]) -> tuple[LocalLogits, LossTerms, tuple[Any, ...]]:
    logits, terms = arguments[:_TERMS_AT], arguments[_TERMS_AT:_REST_AT]
    return LocalLogits(*logits), LossTerms(*terms), arguments[_REST_AT:]


# How many torch-dispatch modes are active; where torch no longer tells, as if there was one.
_modes_above: Any = getattr(torch._C, "_len_torch_dispatch_stack", lambda: 1)


def _define(name: str, schema: str, function: Any, fake: Any) -> Any:
    """Register one operator for every device, and return its callable."""

    def implementation(*arguments: Any) -> Any:
        return _filled(_run(function, arguments, None), arguments[0])

    _LIBRARY.define(f"{name}{schema}")
    _LIBRARY.impl(name, implementation, "CompositeExplicitAutograd")
    torch.library.register_fake(
        f"cce_tp::{name}", lambda *each: _filled(fake(*each), each[0]), lib=_LIBRARY
    )
    operator = getattr(torch.ops.cce_tp, name).default

    def call(*arguments: Any, name: tuple[Any, ...] | None) -> Any:
        """The operator, where a compiler or another observer of operators may look on; else the
        function itself, since the dispatcher takes as long as a launch to pass its arguments on;
        or, of a call that has a `name` for `replay`, perhaps what it was seen to do.
        """
        if torch.compiler.is_compiling() or _modes_above() or type(arguments[0]) is not Tensor:
            return operator(*arguments)
        return _run(function, arguments, name)

    return call


def _filled(outputs: tuple[Any, ...], like: Tensor) -> tuple[Any, ...]:
    """What an operator returns, which must be a tensor also where there is nothing to return."""
    return tuple(like.new_empty(0) if each is None else each for each in outputs)


def _budget(
    workspace_bytes: int | None, logits: LocalLogits, vocab_size: int, *, filtered: bool
) -> int:
    # Here and not in the caller, where the number of tokens may be symbolic.
    if workspace_bytes is not None:
        return workspace_bytes
    num_tokens, hidden = logits.target.shape[0], logits.input.shape[1]
    return default_workspace_bytes(num_tokens, hidden, vocab_size, filtered=filtered)


class _MemoryHint:
    """Lets an error about memory say which option lowers it."""

    def __init__(self, workspace_bytes: int | None, *, keeps: bool = False) -> None:
        self._workspace_bytes, self._keeps = workspace_bytes, keeps

    def __enter__(self) -> None:
        pass

    def __exit__(self, kind: Any, error: BaseException | None, traceback: Any) -> None:
        if not isinstance(error, torch.OutOfMemoryError):
            return
        given = self._workspace_bytes
        now = "its default" if given is None else f"{given} bytes"
        kept = " beside the logits that keep_logits_bytes or keep_logits_in_grad keeps"
        raise torch.OutOfMemoryError(
            "workspace_bytes: expected memory for the loss's workspace"
            f"{kept if self._keeps else ''}, got none at {now}; a "
            "lower workspace_bytes (Megatron: --cce-workspace-mb; launch.pretrain: "
            f"cce.workspace_mb) takes less, and longer; 16 MiB are enough for GradFilter.exact(). "
            f"{error}"
        ) from error


def _run(function: Any, arguments: tuple[Any, ...], name: tuple[Any, ...] | None) -> Any:
    """Call on the device of the first argument and without autocast, which would redo casts."""
    device = arguments[0].device
    autocast = torch.is_autocast_enabled(device.type)
    elsewhere = device.type == "cuda" and device.index != torch.cuda.current_device()
    if not autocast and not elsewhere:
        return function(arguments, name)
    with ExitStack() as stack:
        if autocast:
            stack.enter_context(torch.autocast(device.type, enabled=False))
        if elsewhere:
            stack.enter_context(torch.cuda.device(device))
        return function(arguments, name)


def _with_all_tokens(
    logits: LocalLogits, group: str, sequence_parallel: bool
) -> tuple[LocalLogits, sharding.TokenGather | None]:
    """The logits of all tokens, and what must be waited for before their hidden states are read."""
    if not sequence_parallel:
        return logits, None
    arriving = sharding.TokenGather(logits.input, group)
    return logits._replace(input=arriving.whole), arriving


def _statistics(
    chosen: Backend,
    logits: LocalLogits,
    arriving: sharding.TokenGather | None,
    rows: StatRows,
    workspace_bytes: int,
    kept: KeptLogits | None,
) -> Tensor:
    """Packed statistics of all tokens, those that are here first."""
    if arriving is None:
        return chosen.statistics(logits, rows, workspace_bytes, kept)
    parts: dict[int, Tensor] = {}
    for start, stop, input in arriving.pieces():
        piece = logits.tokens(start, stop)._replace(input=input)
        keep = None if kept is None else kept.tokens(start, stop)
        parts[start] = chosen.statistics(piece, rows, workspace_bytes, keep)
    if len(parts) == 1:
        return parts[0]
    return torch.cat([parts[start] for start in sorted(parts)], dim=1)


_LossOutputs = tuple[Tensor, Tensor, Tensor, Tensor | None, list[Tensor]]


def _loss(arguments: tuple[Any, ...], name: tuple[Any, ...] | None) -> _LossOutputs:
    logits, terms, rest = _split(arguments)
    rows, (far_budget, keep_logits_bytes, lent_dtype, group, sequence_parallel, *rest) = (
        StatRows(*rest[:3]),
        rest[3:],
    )
    shard, agreed, numbers, workspace_bytes, impl = rest
    chosen = backend(impl)

    def statistics() -> _Statistics:
        filtered = far_budget is not None
        budget = _budget(workspace_bytes, logits, terms.vocab_size, filtered=filtered)
        if far_budget is None or not _has_logits(logits):
            keep = lent_dtype, keep_logits_bytes
            return _exact_statistics(chosen, whole, arriving, rows, budget, keep)
        return _sorted_statistics(chosen, whole, rows, budget, lent_dtype)

    def finish(local: _Statistics, packed: Tensor) -> tuple[TokenLoss, FarField | None]:
        made = chosen.token_loss(packed, logits.target, rows, terms)
        if local.ordered is None:
            return made, None
        assert far_budget is not None
        choose, kept = local.ordered.choose, local.kept
        return made, choose(chosen, whole, packed, made.normaliser, terms, far_budget, kept)

    def both() -> tuple[Tensor, list[Tensor], tuple[TokenLoss, FarField | None]]:
        local = statistics()
        return local.packed, local.left, finish(local, local.packed)

    keeps = keep_logits_bytes > 0 or lent_dtype != NOT_WANTED
    with _MemoryHint(workspace_bytes, keeps=keeps):
        if group:
            offer = sharding.Agreement(
                shard=tuple(shard),
                terms=sharding.agreement_terms(terms.vocab_size, agreed, numbers),
                num_tokens=logits.target.shape[0],
            )
            sharding.agree(group, offer)
        whole, arriving = _with_all_tokens(logits, group, sequence_parallel)
        if arriving is not None:
            if far_budget is None:
                name = None  # what is there comes first
            else:
                arriving.wait()
        operands = whole[:_OPERANDS]
        kind = replay.kind_of(name, operands)
        if not group:
            packed, far, (made, far_field_left) = kind.call("all", operands, both)
        else:
            local = kind.call("statistics", operands, statistics)
            packed = sharding.merge_over_group(local.packed, rows, group)
            tensors = (*operands, packed, *local.tensors)
            made, far_field_left = kind.call("loss", tensors, lambda: finish(local, packed))
            far = local.left
        if far_field_left is not None:
            far += far_field_left
        if far_budget is not None and rows.argmax:
            totals = far_field.totals(far_field_left, packed)
            if group:
                totals = sharding.sum_over_group(totals, group)
            far = [*far, totals]
    return made.loss, made.normaliser, made.count, packed if rows.argmax else None, far


class _Statistics(NamedTuple):
    """What the forward pass makes before it knows of other ranks.

    Attributes:
        packed: statistics of this rank.
        lent: dC's memory, where logits are kept there.
        kept: kept logits.
        ordered: with the far field.
    """

    packed: Tensor
    lent: Tensor | None = None
    kept: KeptLogits | None = None
    ordered: far_field.Ordered | None = None

    @property
    def tensors(self) -> tuple[Tensor, ...]:
        """Those that the loss is still made of."""
        if self.ordered is None:
            return ()
        kept = () if self.kept is None else (self.kept.tile_max,)
        return (*self.ordered.statistics, self.ordered.order, self.ordered.place, *kept)

    @property
    def left(self) -> list[Tensor]:
        """Of kept logits, what the backward pass needs."""
        if self.kept is None:
            return []
        return [self.kept.below_max if self.lent is None else self.lent, self.kept.tile_max]


def _exact_statistics(
    chosen: Backend,
    logits: LocalLogits,
    arriving: sharding.TokenGather | None,
    rows: StatRows,
    workspace_bytes: int,
    keep: tuple[int, int],
) -> _Statistics:
    """keep: the dtype of dC, or NOT_WANTED; and how many bytes elsewhere."""
    (lent_dtype, keep_logits_bytes), tile = keep, chosen.tile_rows(logits.input)
    lent = kept = None
    if lent_dtype != NOT_WANTED:
        lent, kept = _kept_inside(logits, lent_dtype, tile, workspace_bytes)
    elif keep_logits_bytes > 0:
        kept = KeptLogits.empty(logits, tile, keep_logits_bytes)
    if lent is not None and kept is not None:
        workspace_bytes -= kept.tile_max.nbytes
    packed = _statistics(chosen, logits, arriving, rows, workspace_bytes, kept)
    return _Statistics(packed, lent, kept)


def _sorted_statistics(
    chosen: Backend, logits: LocalLogits, rows: StatRows, workspace_bytes: int, lent_dtype: int
) -> _Statistics:
    lent = kept = None
    if lent_dtype != NOT_WANTED and not copies_operands(logits.input):
        dtype, tile = _DTYPES[lent_dtype], chosen.tile_rows(logits.input)
        lent, kept = far_field.lend(logits, dtype, tile, workspace_bytes)
    ordered = far_field.sorted_statistics(chosen, logits, rows, workspace_bytes, lent, kept)
    return _Statistics(ordered.statistics.packed, lent, kept, ordered)


def _kept_inside(
    logits: LocalLogits, lent_dtype: int, tile: int, workspace_bytes: int
) -> tuple[Tensor, KeptLogits] | tuple[None, None]:
    """dC's memory, and room for logits in it, if there is to be any."""
    num_tokens, dtype = logits.target.shape[0], _DTYPES[lent_dtype]
    rows, hidden = logits.weight.shape
    if not _has_logits(logits) or copies_operands(logits.input):
        return None, None
    columns = columns_in_grad(num_tokens, (rows, hidden), dtype, tile, workspace_bytes)
    if columns == 0:
        return None, None
    lent = logits.input.new_empty(logits.weight.shape, dtype=dtype)
    shape = (-(-columns // tile), num_tokens)
    tile_max = logits.input.new_empty(shape, dtype=torch.float32)
    return lent, KeptLogits.inside(lent, tile_max, tile)


def _has_logits(logits: LocalLogits) -> bool:
    return logits.target.shape[0] > 0 and logits.weight.shape[0] > 0


def _loss_fake(*arguments: Any) -> _LossOutputs:
    logits, terms, rest = _split(arguments)
    flags, (far_budget, keep_logits_bytes, lent_dtype, *_, cap, impl) = rest[:3], rest[3:]
    rows, num_tokens = StatRows(*flags), logits.target.shape[0]
    far: list[Tensor] = []
    if keep_logits_bytes > 0 or lent_dtype != NOT_WANTED:
        tile, lent = backend(impl).tile_rows(logits.input), None
        budget = _budget(cap, logits, terms.vocab_size, filtered=far_budget is not None)
        if lent_dtype == NOT_WANTED:
            kept = KeptLogits.empty(logits, tile, keep_logits_bytes)
        elif far_budget is None:
            lent, kept = _kept_inside(logits, lent_dtype, tile, budget)
        elif _has_logits(logits) and not copies_operands(logits.input):
            lent, kept = far_field.lend(logits, _DTYPES[lent_dtype], tile, budget)
        else:
            kept = None
        if kept is not None:
            far = [kept.below_max if lent is None else lent, kept.tile_max]
    if far_budget is not None:
        if _has_logits(logits):
            tile = backend(impl).tile_rows(logits.input)
            far += far_field.empty(logits, tile, slopes=terms.label_smoothing > 0)
        if rows.argmax:
            far += [logits.input.new_empty(4, dtype=statistics_dtype(logits.input.dtype))]
    made, reduced = logits.input.new_empty, terms.reduction != "none"
    dtype = statistics_dtype(logits.input.dtype)
    return (
        made(() if reduced else (num_tokens,), dtype=dtype),
        made((2, num_tokens), dtype=dtype),
        made(() if reduced else (0,), dtype=torch.int32),
        made((rows.count, num_tokens), dtype=dtype) if rows.argmax else None,
        far,
    )


# dE, dC, dbias; None for one that is not wanted.
_Gradients = tuple[Tensor | None, Tensor | None, Tensor | None]


def _gradients(arguments: tuple[Any, ...], name: tuple[Any, ...] | None) -> _Gradients:
    logits, terms, rest = _split(arguments)
    upstream, normaliser, count, eps, far, grad_weight_out, lent, dtypes, *rest = rest
    group, sequence_parallel, workspace_bytes, impl = rest
    made = grad_input, grad_weight, grad_bias = _empty_gradients(logits, dtypes)
    into = grad_weight_out if grad_weight is None else grad_weight
    has_far = len(far) >= len(FarField._fields)
    filtered = eps is not None or has_far
    budget = _budget(workspace_bytes, logits, terms.vocab_size, filtered=filtered)

    def local(kind: replay.Kind) -> None:
        chosen, bias_sum = backend(impl), None
        if grad_bias is not None:
            bias_sum = torch.zeros_like(grad_bias, dtype=statistics_dtype(logits.input.dtype))
        sinks = GradientSinks(
            input=partial,
            weight=into,
            bias=bias_sum,
            accumulate_weight=grad_weight_out is not None and not lent,
            input_done=lambda: replay.outside(reduction.start),
        )
        max_logit, log_sum = normaliser.unbind()
        per_token = LogitGradient(
            grad=chosen.token_gradient(upstream, logits.target, count, terms),
            max_logit=max_logit,
            log_sum=log_sum,
            z_loss=terms.z_loss,
            label_smoothing=terms.label_smoothing,
            vocab_size=terms.vocab_size,
        )
        logits_kept, left = split_far(far)
        ordered = FarField(*left) if left else None
        kept = None
        if lent:
            assert into is not None
            kept = _lent_logits(chosen, whole, into, *logits_kept, far=ordered is not None)
        elif logits_kept:
            kept = KeptLogits(*logits_kept, tile=chosen.tile_rows(whole.input))
        gradients(
            chosen,
            whole,
            per_token,
            sinks,
            eps=eps,
            far=ordered,
            kept=kept,
            arriving=arriving,
            workspace_bytes=budget,
            kind=kind,
        )
        if grad_bias is not None and bias_sum is not None:
            grad_bias.copy_(bias_sum)

    with _MemoryHint(workspace_bytes), FullPrecisionSums(logits.input.dtype):
        whole, arriving = _with_all_tokens(logits, group, sequence_parallel)
        partial, scattered = grad_input, None
        if sequence_parallel and grad_input is not None:
            partial, scattered = grad_input.new_empty(whole.input.shape), grad_input
        reduction = sharding.InputGradReduction(partial, scattered, group)
        operands = whole[:_OPERANDS]
        if arriving is not None and not has_far:
            name = None  # what is there comes first
        # What `_loss` made, too: hooks on saved tensors may give back other strides.
        given = (*operands, upstream, grad_weight_out, normaliser, count, *far)
        kind = replay.kind_of(name, given)
        if has_far:
            local(kind)
        else:
            kind.call("gradients", (*given, *made), lambda: local(replay.NEVER), reduction.start)
        if arriving is not None:
            arriving.wait()  # also where there was nothing to do
        reduction.wait()
    return made


def _lent_logits(
    chosen: Backend, logits: LocalLogits, grad_weight: Tensor, tile_max: Tensor, *, far: bool
) -> KeptLogits:
    """Logits that `_loss` kept in dC's memory."""
    tile = chosen.tile_rows(logits.input)
    if not far:
        return KeptLogits.inside(grad_weight, tile_max, tile)
    size = (logits.target.shape[0], logits.weight, grad_weight.itemsize, tile)
    late = LateRows.with_logits(*size)
    assert late is not None
    return late.kept(grad_weight, tile_max, tile)


def _gradients_fake(*arguments: Any) -> _Gradients:
    logits, _, (_, _, _, _, _, _, _, dtypes, *_) = _split(arguments)
    return _empty_gradients(logits, dtypes)


def split_far(far: list[Tensor]) -> tuple[list[Tensor], list[Tensor]]:
    """What a loss keeps for its backward pass: of kept logits, if any; of a FarField, if any."""
    count = len(FarField._fields)
    at = len(far) - count if len(far) >= count else len(far)
    return far[:at], far[at:]


# A gradient's dtype crosses the operator's schema as a number; -1 means that it is not wanted.
_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
NOT_WANTED = -1


def dtype_code(dtype: torch.dtype) -> int:
    """Number of a gradient's dtype in the `dtypes` argument of `gradients`."""
    return _DTYPES.index(dtype)


def _empty_gradients(logits: LocalLogits, dtypes: list[int]) -> _Gradients:
    """Unfilled outputs of `gradients`; None for one that is not wanted."""
    made = logits.input.new_empty
    input, weight, bias = [
        None if like is None or code == NOT_WANTED else made(like.shape, dtype=_DTYPES[code])
        for like, code in zip(logits[:3], dtypes, strict=True)
    ]
    return input, weight, bias


# -> loss, (2, N) normaliser, number of tokens that count, packed statistics (if argmax is asked),
# and what is kept for the backward pass: with keep_logits_bytes the tensors of a KeptLogits (none
# if no tile fits); with `lent_dtype` those too, but dC, of that dtype and as yet unwritten, for the
# tensor in whose memory they lie; then, with a far_budget, the fields of a FarField (none if this
# rank has no logits), and its totals (if argmax is asked). In a group the first call with new terms
# is a handshake.
loss = _define(
    "loss",
    f"({_LOGITS_SCHEMA}, {_TERMS_SCHEMA}, {_ROWS_SCHEMA}, float? far_budget, "
    "int keep_logits_bytes, int lent_dtype, str group, bool sequence_parallel, int[] shard, "
    "str agreed, float[] numbers, int? workspace_bytes, str impl) "
    "-> (Tensor, Tensor, Tensor, Tensor, Tensor[])",
    _loss,
    _loss_fake,
)
# -> (dE, dC, dbias); dtypes: three numbers of `dtype_code`, or NOT_WANTED. dE is summed over the
# group, if one is named. far: the tensors of a KeptLogits or none, then the fields of a FarField or
# none. grad_weight_out is added to; or, if it is `lent`, overwritten: its memory holds the kept
# logits, whose other tensor alone is in `far`.
input_weight_gradients = _define(
    "gradients",
    f"({_LOGITS_SCHEMA}, {_TERMS_SCHEMA}, Tensor upstream, Tensor normaliser, Tensor count, "
    "float? eps, Tensor[] far, Tensor(a!)? grad_weight_out, bool lent, int[] dtypes, str group, "
    "bool sequence_parallel, int? workspace_bytes, str impl) -> (Tensor, Tensor, Tensor)",
    _gradients,
    _gradients_fake,
)
