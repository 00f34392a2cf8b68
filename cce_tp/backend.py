"""The seam between the Triton kernels and the PyTorch reference: a few functions each."""

from __future__ import annotations

from typing import Any, Protocol

from torch import Tensor

from cce_tp.far_field import (
    FarField,
    FarGradient,
    KeptRows,
    RankBudget,
    SortedStatistics,
    TargetPlan,
    TileMasses,
)
from cce_tp.problem import KeptLogits, LocalLogits, LogitGradient, LossTerms, TokenLoss
from cce_tp.stats import StatRows


class Backend(Protocol):
    """Functions over a rectangle of logits; `kept` is the backend's own record of tiles."""

    def statistics(
        self, logits: LocalLogits, rows: StatRows, workspace_bytes: int, kept: KeptLogits | None
    ) -> Tensor: ...

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

    def grad_kept(
        self,
        kept: KeptLogits,
        start: int,
        logits: LocalLogits,
        upstream: LogitGradient,
        out: Tensor,
        tiles: Tensor | None,
    ) -> None: ...

    def weight_product(
        self,
        out: Tensor,
        grad_VN: Tensor,
        input: Tensor,
        *,
        accumulate: bool,
        sums: Tensor | None,
    ) -> None: ...

    def filter_tokens(self, input: Tensor) -> int:
        """Tokens of a tile of the paper's filter, for operands like this one; 0 where there is no
        record of tiles and `sparse_product` is not called."""
        ...

    def sparse_product(
        self,
        out: Tensor,
        grad_VN: Tensor,
        other: Tensor,
        kept: Any,
        *,
        of_input: bool,
        accumulate: bool,
        rows: Tensor | None = None,
        factor: Tensor | None = None,
    ) -> None: ...

    # The sorted far field.

    def tile_rows(self, like: Tensor) -> int:
        """Vocabulary rows of a tile, for operands like this one."""
        ...

    def probes(self, input: Tensor, step: int) -> Tensor: ...

    def mass_key(
        self,
        weight: Tensor,
        probes: Tensor,
        bias: Tensor | None,
        logit_scale: float,
        out: Tensor,
    ) -> None: ...

    def target_places(
        self, order: Tensor, target: Tensor, first_id: int
    ) -> tuple[Tensor, Tensor]: ...

    def kept_rows(self, kept: Tensor, order: Tensor, tile: int, first_late: int) -> KeptRows: ...

    def plan_targets(
        self, far: FarField, slot: Tensor, upstream: LogitGradient, logits: LocalLogits
    ) -> TargetPlan: ...

    def sorted_statistics(
        self,
        logits: LocalLogits,
        order: Tensor,
        target: Tensor,
        rows: StatRows,
        workspace_bytes: int,
        free: Tensor | None,
        kept: KeptLogits | None,
    ) -> SortedStatistics: ...

    def tile_masses(
        self,
        tiles: Tensor,
        normaliser_2N: Tensor,
        target_N: Tensor,
        logits: LocalLogits,
        *,
        ignore_index: int,
        budget: RankBudget,
        slopes: bool,
        leading: int,
    ) -> TileMasses: ...

    def far_gradient(
        self,
        masses: TileMasses,
        upstream: LogitGradient,
        logits: LocalLogits,
        out: Tensor | None,
    ) -> Tensor: ...

    def gather_rows(self, weight: Tensor, rows: Tensor, *, out: Tensor | None = None) -> Tensor: ...

    def scatter_rows(
        self, out: Tensor, rows: Tensor, value: Tensor, *, accumulate: bool
    ) -> None: ...

    def subtract_stored(
        self, remainder: Tensor, column: Tensor, start: int, grad_KN: Tensor
    ) -> None: ...

    def add_target_rows(
        self, out: Tensor, weight: Tensor, target: Tensor, first_id: int, factors: Tensor
    ) -> None: ...

    def write_far_rows(
        self,
        far: FarGradient,
        input: Tensor,
        out: Tensor | None,
        bias: Tensor | None,
        rows: tuple[int, int],
        *,
        targets: bool,
        accumulate: bool,
    ) -> None: ...


class _TritonBackend:
    """Binds the kernels' launchers; Triton is imported when the first one is built."""

    def __init__(self) -> None:
        from cce_tp.kernels import backward, far_field, forward, loss

        self.statistics = forward.statistics
        self.token_loss = loss.token_loss
        self.token_gradient = loss.token_gradient
        self.tile_bytes = lambda logits: 0
        self.grad_logits = backward.grad_logits
        self.grad_kept = backward.grad_kept
        self.weight_product = backward.weight_product
        self.filter_tokens = backward.filter_tokens
        self.sparse_product = backward.sparse_product
        self.tile_rows = far_field.tile_rows
        self.probes = far_field.probes
        self.mass_key = far_field.mass_key
        self.target_places = far_field.target_places
        self.kept_rows = far_field.kept_rows
        self.plan_targets = far_field.plan_targets
        self.sorted_statistics = far_field.sorted_statistics
        self.tile_masses = far_field.tile_masses
        self.far_gradient = far_field.far_gradient
        self.gather_rows = far_field.gather_rows
        self.scatter_rows = far_field.scatter_rows
        self.subtract_stored = far_field.subtract_stored
        self.add_target_rows = far_field.add_target_rows
        self.write_far_rows = far_field.write_far_rows


class _TorchBackend:
    def __init__(self) -> None:
        from cce_tp import products, reference

        self.statistics = reference.statistics
        self.token_loss = reference.token_loss
        self.token_gradient = reference.token_gradient
        self.tile_bytes = reference.tile_bytes
        self.grad_logits = reference.grad_logits
        self.grad_kept = reference.grad_kept
        self.weight_product = products.weight_product
        self.filter_tokens = lambda input: 0
        self.tile_rows = reference.tile_rows
        self.probes = reference.probes
        self.mass_key = reference.mass_key
        self.target_places = reference.target_places
        self.kept_rows = reference.kept_rows
        self.plan_targets = reference.plan_targets
        self.sorted_statistics = reference.sorted_statistics
        self.tile_masses = reference.tile_masses
        self.far_gradient = reference.far_gradient
        self.gather_rows = reference.gather_rows
        self.scatter_rows = reference.scatter_rows
        self.subtract_stored = reference.subtract_stored
        self.add_target_rows = reference.add_target_rows
        self.write_far_rows = reference.write_far_rows

    def sparse_product(self, *args: Any, **kwargs: Any) -> None:
        raise AssertionError("the reference keeps no list of tiles")


_built: dict[str, Backend] = {}


def backend(impl: str) -> Backend:
    """The backend of a resolved `impl`, "triton" or "torch"."""
    if impl not in _built:
        _built[impl] = _TritonBackend() if impl == "triton" else _TorchBackend()
    return _built[impl]
