"""Vocab-parallel Cut Cross-Entropy: linear + cross entropy that never stores the logits."""

from cce_tp.filtering import GradFilter
from cce_tp.loss import LinearCrossEntropyLoss, linear_cross_entropy
from cce_tp.sharding import VocabShard
from cce_tp.stats import LossStats

__all__ = [
    "GradFilter",
    "LinearCrossEntropyLoss",
    "LossStats",
    "VocabShard",
    "linear_cross_entropy",
]
