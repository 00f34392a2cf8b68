"""The seam between the Triton kernels and the PyTorch reference: a few functions each."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from cce_tp.problem import LocalLogits, LogitGradient, LossTerms, TokenLoss
from cce_tp.stats import StatRows


class Backend(Protocol):
    """Functions over a rectangle of logits; `kept` is the backend's own record of tiles."""

    def statistics(self, logits: LocalLogits, rows: StatRows, workspace_bytes: int) -> Tensor: ...

    def token_loss(
        self, packed_RN: Tensor, target_N: Tensor, rows: StatRows, terms: LossTerms
    ) -> TokenLoss: ...

    def token_gradient(
        self, upstream: Tensor, target_N: Tensor, count: Tensor, terms: LossTerms
    ) -> Tensor: ...

    def tile_bytes(self, logits: LocalLogits) -> int:
        """Bytes of temporaries that grad_logits takes beside its output."""
        ...

    def grad_logits(
        self, logits: LocalLogits, upstream: LogitGradient, out_VN: Tensor, eps: float | None
    ) -> Any: ...

    def sparse_product(
        self,
        out: Tensor,
        grad_VN: Tensor,
        other: Tensor,
        kept: Any,
        *,
        of_input: bool,
        accumulate: bool,
    ) -> None: ...


class _TritonBackend:
    """Binds the kernels' launchers; Triton is imported when the first one is built."""

    def __init__(self) -> None:
        from cce_tp.kernels import backward, forward, loss

        self.statistics = forward.statistics
        self.token_loss = loss.token_loss
        self.token_gradient = loss.token_gradient
        self.tile_bytes = lambda logits: 0
        self.grad_logits = backward.grad_logits
        self.sparse_product = backward.sparse_product


class _TorchBackend:
    def __init__(self) -> None:
        from cce_tp import reference

        self.statistics = reference.statistics
        self.token_loss = reference.token_loss
        self.token_gradient = reference.token_gradient
        self.tile_bytes = reference.tile_bytes
        self.grad_logits = reference.grad_logits

    def sparse_product(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference keeps no list of tiles")


_built: dict[str, Backend] = {}


def backend(impl: str) -> Backend:
    """The backend of a resolved `impl`, "triton" or "torch"."""
    if impl not in _built:
        _built[impl] = _TritonBackend() if impl == "triton" else _TorchBackend()
    return _built[impl]
