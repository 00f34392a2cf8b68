"""What the output layer hands out in place of logits while training.

The heads of Megatron's models call the output layer first and the loss later, with labels that
are not known in between (multi-token prediction rolls them). This object carries the call from
one to the other. Whoever wants numbers in between gets real logits, equal to stock.
"""

from __future__ import annotations

import logging
import operator
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.utils._pytree import tree_map

from cce_tp import LossStats
from megatron_integration.capture import Capture
from megatron_integration.config import CceConfig
from megatron_integration.far_field import FarFieldMeter
from megatron_integration.fused_head import HeadCall, fused_loss

_logger = logging.getLogger("megatron_integration")


class HeadState:
    """Options and counters of one output layer.

    Attributes:
        config: options.
        fused, materialized: number of fused losses, and of logits made for somebody in training.
        capture: saves one micro batch, if the options ask for it.
        far_field: statistics of the far field, if the options have one.
    """

    def __init__(self, config: CceConfig) -> None:
        self.config = config
        self.capture = Capture()
        self.far_field = FarFieldMeter()
        self.fused = 0
        self.materialized = 0
        self.warned = False

    def note_materialized(self, why: str) -> None:
        """Count, and warn once or raise, before logits are made in training mode."""
        if self.config.strict:
            raise RuntimeError(
                f"--cce-strict: the logits of the output layer would be materialised by {why}; "
                "remove what reads them, or drop --cce-strict"
            )
        self.materialized += 1
        if not self.warned:
            self.warned = True
            _logger.warning(
                "cce: the logits of the output layer are materialised by %s: correct, but without "
                "the memory saved (said once; --cce-strict makes it an error)",
                why,
            )


class DeferredLogits:
    """(s, b, V_local) logits that do not exist unless somebody reads them.

    Not a Tensor, so that hooks which test for one leave it alone. Served without logits: shape,
    dtype, device, a factor (`* number`), and after the loss `max(dim=-1)` and `argmax(dim=-1)`,
    where the model asks for them. Everything else makes the real logits once, through the stock
    layer, differentiable if the call was.
    """

    def __init__(self, call: HeadCall, state: HeadState, stock: Callable[[], Tensor]) -> None:
        """`stock`: makes the unscaled logits through the layer's own forward."""
        self._call, self._state, self._stock = call, state, stock
        self._grad_enabled = torch.is_grad_enabled()
        self._stats: LossStats | None = None
        self._logits: Tensor | None = None
        self._version = 0

    # What is known without logits.

    @property
    def shape(self) -> torch.Size:
        """(s, b, V_local)."""
        return self._call.shape()

    @property
    def dtype(self) -> torch.dtype:
        """That of the stock logits."""
        return self._call.input.dtype

    @property
    def device(self) -> torch.device:
        """That of the hidden states."""
        return self._call.input.device

    @property
    def ndim(self) -> int:
        """3."""
        return 3

    def dim(self) -> int:
        """3."""
        return 3

    def size(self, dim: int | None = None) -> Any:
        """As Tensor.size."""
        return self.shape if dim is None else self.shape[dim]

    def numel(self) -> int:
        """As Tensor.numel."""
        return self.shape.numel()

    def __mul__(self, factor: Any) -> Any:
        if isinstance(factor, (int, float)) and not isinstance(factor, bool):
            call = self._call
            scaled = HeadCall(
                layer=call.layer,
                input=call.input,
                weight=call.weight,
                sequence_parallel=call.sequence_parallel,
                scale=call.scale * factor,
            )
            return DeferredLogits(scaled, self._state, self._stock)
        return self.materialize("a product") * factor

    __rmul__ = __mul__

    # The loss, and what it leaves behind.

    def loss(self, labels: Tensor) -> Tensor:
        """(b, s) int64 -> (b, s) fp32 loss per token, fused."""
        state, layer = self._state, self._call.layer
        state.capture(self._call, labels, state.config)
        # Only multi-token prediction asks for the largest logit (its acceptance counts).
        wants_argmax = bool(getattr(layer.config, "mtp_num_layers", None))
        far_field = state.config.grad_filter.kind == "far-field"
        trains = layer.training and torch.is_grad_enabled()
        measures = far_field and trains and (state.far_field.due() or wants_argmax)
        loss, stats = fused_loss(
            self._call, labels, state.config, return_stats=wants_argmax or measures
        )
        if measures and stats is not None:
            state.far_field.add(stats)
        self._stats = stats if wants_argmax else None
        state.fused += 1
        return loss

    def max(self, *args: Any, **kwargs: Any) -> Any:
        """As Tensor.max; of dim=-1 after the loss, (values, local indices) from its statistics.

        Ranks other than the one that holds the largest logit report -inf, index 0: enough for a
        comparison over ranks, which is what this shape of question is for.
        """
        if self._stats is None or not _last_dim(args, kwargs):
            return self.materialize("max()").max(*args, **kwargs)
        shard = self._call.shard
        ids = self._stats.argmax
        here = (ids >= shard.start) & (ids < shard.stop)
        values = torch.where(here, self._stats.max_logit.to(self.dtype), float("-inf"))
        indices = torch.where(here, ids - shard.start, 0)
        return torch.return_types.max((values, indices))  # type: ignore[attr-defined]

    def argmax(self, *args: Any, **kwargs: Any) -> Tensor:
        """As Tensor.argmax; of dim=-1 after the loss and without tensor parallelism, for free."""
        if self._stats is None or self._call.group is not None or not _last_dim(args, kwargs):
            return self.materialize("argmax()").argmax(*args, **kwargs)
        return self._stats.argmax

    # Real logits.

    @property
    def modified(self) -> bool:
        """Whether somebody made the logits and changed them in place: the loss is then theirs."""
        return self._logits is not None and self._logits._version != self._version

    def materialize(self, why: str = "their values being read") -> Tensor:
        """The stock logits (s, b, V_local), made once."""
        if self._logits is None:
            if self._call.layer.training:
                self._state.note_materialized(why)
            with torch.set_grad_enabled(self._grad_enabled):
                logits = self._stock()
                self._logits = logits if self._call.scale == 1.0 else logits * self._call.scale
            self._version = self._logits._version
        return self._logits

    def __getattr__(self, name: str) -> Any:
        # Protocols probe for dunder names; what is not defined here is not offered.
        if name.startswith("__"):
            raise AttributeError(name)
        return getattr(self.materialize(f"{name}"), name)

    def __reduce_ex__(self, protocol: Any) -> Any:
        return self.materialize("pickling").__reduce_ex__(protocol)

    def __repr__(self) -> str:
        return f"DeferredLogits(shape={tuple(self.shape)}, dtype={self.dtype})"

    def __len__(self) -> int:
        return self.shape[0]

    def __getitem__(self, index: Any) -> Tensor:
        return self.materialize("indexing")[index]

    def __setitem__(self, index: Any, value: Any) -> None:
        self.materialize("indexing")[index] = value

    @classmethod
    def __torch_function__(
        cls, func: Any, types: Any, args: tuple = (), kwargs: dict | None = None
    ) -> Any:
        kwargs = kwargs or {}
        if args and isinstance(args[0], cls):
            if func is torch.argmax:
                return args[0].argmax(*args[1:], **kwargs)
            if func is torch.max:
                return args[0].max(*args[1:], **kwargs)
        name = getattr(func, "__name__", str(func))

        def real(each: Any) -> Any:
            return each.materialize(f"torch.{name}") if isinstance(each, cls) else each

        return func(*tree_map(real, args), **tree_map(real, kwargs))


def _last_dim(args: tuple[Any, ...], kwargs: dict[str, Any]) -> bool:
    if kwargs.get("keepdim", False) or len(args) + len(kwargs) != 1:
        return False
    return (args[0] if args else kwargs.get("dim")) in (-1, 2)


def _binary(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: DeferredLogits, other: Any) -> Any:
        return function(self.materialize(name), other)

    return method


def _reflected(name: str) -> Callable[..., Any]:
    function = getattr(operator, name)

    def method(self: DeferredLogits, other: Any) -> Any:
        return function(other, self.materialize(name))

    return method


for _name in ("add", "sub", "truediv", "matmul", "pow"):
    setattr(DeferredLogits, f"__{_name}__", _binary(_name))
    setattr(DeferredLogits, f"__r{_name}__", _reflected(_name))
for _name in ("lt", "le", "gt", "ge"):
    setattr(DeferredLogits, f"__{_name}__", _binary(_name))
DeferredLogits.__neg__ = lambda self: -self.materialize("neg")  # type: ignore[attr-defined]
