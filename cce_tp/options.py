"""The arguments of a call that are not tensors: checked, and resolved into `LossOptions`.

Legend: N tokens, V global vocabulary, V_local rows of this rank, D hidden size.
"""

from __future__ import annotations

import functools
import math
from dataclasses import dataclass, field
from typing import Any, Literal, NoReturn

import torch

from cce_tp.filtering import GradFilter
from cce_tp.sharding import VocabShard
from cce_tp.stats import StatRows
from cce_tp.workspace import MIN_WORKSPACE_BYTES

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
    keep_logits_bytes: int = 0
    keep_logits_in_grad: bool | None = None

    def __post_init__(self) -> None:
        if self.reduction not in ("none", "mean", "sum"):
            fail("reduction", "'none', 'mean' or 'sum'", repr(self.reduction))
        if self.impl not in ("auto", "triton", "torch"):
            fail("impl", "'auto', 'triton' or 'torch'", repr(self.impl))
        if isinstance(self.ignore_index, bool) or not isinstance(self.ignore_index, int):
            fail("ignore_index", "an int", repr(self.ignore_index))
        if not (_is_number(self.label_smoothing) and 0 <= self.label_smoothing < 1):
            fail("label_smoothing", "a number in [0, 1)", repr(self.label_smoothing))
        if not (_is_number(self.z_loss) and self.z_loss >= 0):
            fail("z_loss", "a finite number >= 0", repr(self.z_loss))
        if not _is_number(self.logit_scale):
            fail("logit_scale", "a finite number", repr(self.logit_scale))
        if self.logit_softcap is not None and not (
            _is_number(self.logit_softcap) and self.logit_softcap > 0
        ):
            fail("logit_softcap", "a finite number > 0 or None", repr(self.logit_softcap))
        if not isinstance(self.grad_filter, GradFilter):
            fail("grad_filter", "a cce_tp.GradFilter", repr(self.grad_filter))
        if not isinstance(self.return_stats, bool) and self.return_stats != "entropy":
            fail("return_stats", "False, True or 'entropy'", repr(self.return_stats))
        if self.workspace_bytes is not None and (
            isinstance(self.workspace_bytes, bool)
            or not isinstance(self.workspace_bytes, int)
            or self.workspace_bytes < MIN_WORKSPACE_BYTES
        ):
            fail(
                "workspace_bytes",
                f"None or an int >= {MIN_WORKSPACE_BYTES}",
                repr(self.workspace_bytes),
            )
        if (
            isinstance(self.keep_logits_bytes, bool)
            or not isinstance(self.keep_logits_bytes, int)
            or self.keep_logits_bytes < 0
        ):
            fail("keep_logits_bytes", "an int >= 0", repr(self.keep_logits_bytes))
        if not isinstance(self.keep_logits_in_grad, bool | None):
            fail("keep_logits_in_grad", "True, False or None", repr(self.keep_logits_in_grad))
        if self.keep_logits_in_grad and self.keep_logits_bytes > 0:
            fail(
                "keep_logits_bytes",
                "0 with keep_logits_in_grad, which is another place for them",
                repr(self.keep_logits_bytes),
            )
        kind = self.grad_filter.kind
        if self.keep_logits_bytes > 0 and kind != "exact":
            fail(
                "keep_logits_bytes",
                f"0 with grad_filter {kind!r}, which has its own order of rows",
                repr(self.keep_logits_bytes),
            )
        if self.keep_logits_in_grad and kind == "paper":
            fail(
                "keep_logits_in_grad",
                f"False with grad_filter {kind!r}, which chooses its tiles in the backward pass",
                "True",
            )


def fail(argument: str, expected: str, got: str) -> NoReturn:
    raise ValueError(f"{argument}: expected {expected}, got {got}")


def _is_number(value: object) -> bool:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        return False
    return -math.inf < value < math.inf  # a comparison: torch.compile traces it, not isfinite


@functools.lru_cache(maxsize=256, typed=True)
def _known(**settings: Any) -> Settings:
    return Settings(**settings)


def check_settings(settings: dict[str, Any]) -> Settings:
    """The settings, checked once for each combination; numbers may be symbolic while compiling."""
    if torch.compiler.is_compiling():
        return Settings(**settings)
    try:
        return _known(**settings)
    except TypeError:  # something that cannot be hashed, and so is no valid setting either
        return Settings(**settings)


# Compared by identity, as a part of a replay's name: equal ones are one object.
@dataclass(frozen=True, slots=True, kw_only=True, eq=False)
class LossOptions:
    """Everything about a call that is not a tensor, checked and resolved.

    Attributes:
        reduction, ignore_index, label_smoothing, z_loss, logit_scale, logit_softcap, grad_filter:
            as in the public API.
        start, stop, vocab_size: this rank's rows of the global vocabulary.
        group_name: registered name of the process group, "" without one.
        reduce_input_grad: sum dE over the group.
        sequence_parallel: `input` holds this rank's part of the tokens.
        rows: statistics to compute.
        compute_dtype: dtype of the products' operands.
        workspace_bytes: cap on temporaries, or None for the default.
        keep_logits_bytes: bytes of logits to keep from the forward pass for the backward pass.
        keep_logits_in_grad: keep those that fit the memory of dC, or with the far field some.
        impl: "triton" or "torch".
        terms: what all ranks must agree on beside the numbers, as "name=value; name=value".
        replays: whether calls may be replayed (see `replay`).
    """

    reduction: str
    ignore_index: int
    label_smoothing: float
    z_loss: float
    logit_scale: float
    logit_softcap: float | None
    grad_filter: GradFilter
    start: int
    stop: int
    vocab_size: int
    group_name: str
    reduce_input_grad: bool
    sequence_parallel: bool
    rows: StatRows
    compute_dtype: torch.dtype
    workspace_bytes: int | None
    keep_logits_bytes: int
    keep_logits_in_grad: bool
    impl: str
    terms: str
    replays: bool

    @property
    def numbers(self) -> list[float]:
        """What ranks must share, beside D, in the order of `sharding.AGREED_NUMBERS`."""
        return [
            self.ignore_index,
            self.label_smoothing,
            self.z_loss,
            self.logit_scale,
            0.0 if self.logit_softcap is None else self.logit_softcap,
            -1.0 if self.grad_filter.eps is None else self.grad_filter.eps,
            -1.0 if self.grad_filter.budget is None else self.grad_filter.budget,
        ]


def _resolve_impl(impl: str, dtype: torch.dtype, device: torch.device) -> str:
    if impl == "torch":
        return impl
    why_not = _why_not_triton(dtype, device)
    if why_not is None and (impl == "triton" or device.type == "cuda"):
        return "triton"
    if impl == "triton":
        fail("impl", "'torch' here", f"'triton', but {why_not}")
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


def resolve(settings: Settings, shard: VocabShard, **call: Any) -> LossOptions:
    """Everything about a call that is not a tensor.

    Args:
        settings: checked.
        shard: this rank's rows.
        call: the other arguments of `_resolve`, which are facts about the tensors.
    """
    # The group itself would be kept alive by the cache.
    bounds = (shard.start, shard.stop, shard.vocab_size, shard.group_name)
    flags = (shard.reduce_input_grad, shard.sequence_parallel)
    # While compiling, sizes may be symbolic.
    function = _resolve.__wrapped__ if torch.compiler.is_compiling() else _resolve
    return function(settings, bounds, flags, **call)


@functools.lru_cache(maxsize=256)
def _resolve(
    settings: Settings,
    bounds: tuple[int, int, int, str],
    flags: tuple[bool, bool],
    *,
    compute_dtype: torch.dtype,
    input_dtype: torch.dtype,
    device: torch.device,
    needs_input_grad: bool,
    has_bias: bool,
    into_out: bool,
) -> LossOptions:
    start, stop, vocab_size, group_name = bounds
    reduce_input_grad, sequence_parallel = flags
    for name, none in (("keep_logits_bytes", 0), ("keep_logits_in_grad", False)):
        if getattr(settings, name) and compute_dtype.itemsize != 2:
            fail(
                name,
                f"{none} with products in {compute_dtype}, whose logits 16 bits do not hold",
                repr(getattr(settings, name)),
            )
    inside = settings.keep_logits_in_grad
    if inside is None:
        elsewhere = into_out or settings.keep_logits_bytes > 0
        inside = compute_dtype.itemsize == 2 and not elsewhere
        inside = inside and settings.grad_filter.kind != "paper"
    impl = _resolve_impl(settings.impl, compute_dtype, device)
    terms = ""
    if group_name:
        # What must be the same on every rank beside numbers: those may be symbolic under
        # torch.compile, and go to the handshake on their own.
        terms = "; ".join(
            (
                f"vocab_shard.reduce_input_grad={reduce_input_grad}",
                f"vocab_shard.sequence_parallel={sequence_parallel}",
                f"input.dtype={input_dtype} computed in {compute_dtype}",
                f"input.requires_grad={needs_input_grad}",
                f"linear_bias={'given' if has_bias else None}",
                f"reduction={settings.reduction}",
                f"grad_filter={settings.grad_filter.kind}",
                f"return_stats={settings.return_stats}",
                f"impl={settings.impl}",
            )
        )
    return LossOptions(
        reduction=settings.reduction,
        ignore_index=settings.ignore_index,
        label_smoothing=float(settings.label_smoothing),
        z_loss=float(settings.z_loss),
        logit_scale=float(settings.logit_scale),
        logit_softcap=None if settings.logit_softcap is None else float(settings.logit_softcap),
        grad_filter=settings.grad_filter,
        start=start,
        stop=stop,
        vocab_size=vocab_size,
        group_name=group_name,
        reduce_input_grad=reduce_input_grad,
        sequence_parallel=sequence_parallel,
        rows=StatRows(
            logit_sum=settings.label_smoothing > 0,
            entropy=settings.return_stats == "entropy",
            argmax=settings.return_stats is not False,
        ),
        compute_dtype=compute_dtype,
        workspace_bytes=settings.workspace_bytes,
        keep_logits_bytes=settings.keep_logits_bytes,
        keep_logits_in_grad=inside,
        impl=impl,
        terms=terms,
        replays=impl == "triton" and settings.grad_filter.kind != "paper",
    )
