"""What the far field did, for the log: the share of tiles kept and the mass left.

The statistics cost the forward kernel an argmax, and under tensor parallelism one more small
all-reduce. So only every eighth loss of an output layer takes them, from the first one on. Which
ones is a matter of counting, never of who reads them: the ranks of a tensor-parallel group take
them for the same losses without saying anything to each other, even if one of them alone logs.
"""

from __future__ import annotations

import torch
from torch import Tensor

from cce_tp import LossStats

# Names in the log, and the field of LossStats of each.
METRICS = {"far-field/tiles_kept": "tiles_kept", "far-field/mass": "far_mass"}
_EVERY = 8


class FarFieldMeter:
    """Sums the statistics of one output layer in training, on the device."""

    def __init__(self) -> None:
        self._seen = 0
        self._sum: Tensor | None = None
        self._count = 0
        self._mean: Tensor | None = None

    def due(self) -> bool:
        """Whether a loss that is about to be computed in training is to take statistics."""
        self._seen += 1
        return self._seen % _EVERY == 1

    def add(self, stats: LossStats) -> None:
        """Take over the statistics of a loss with GradFilter.far_field."""
        values = torch.stack([getattr(stats, field) for field in METRICS.values()]).float()
        self._sum = values if self._sum is None else self._sum + values
        self._count += 1

    def read(self) -> Tensor | None:
        """(METRICS,) fp32 mean since the last call, or what that returned if nothing is new; None
        if there never was anything. Waits for nothing."""
        if self._sum is not None:
            self._mean = self._sum / self._count
            self._sum, self._count = None, 0
        return self._mean
