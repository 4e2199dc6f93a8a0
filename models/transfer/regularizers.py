"""The regularizers that there are, by the names that tables and the command line have for them."""

from __future__ import annotations

from .feature_space import DELTA, AttentionTransfer, FeatureRegularizer, KnowledgeDistillation
from .regularizer import Regularizer
from .weight_space import L2, L2SP

__all__ = [
    "DELTA",
    "L2",
    "L2SP",
    "REGULARIZERS",
    "AttentionTransfer",
    "FeatureRegularizer",
    "KnowledgeDistillation",
    "Regularizer",
]

REGULARIZERS: dict[str, type[Regularizer]] = {
    kind.name: kind for kind in (L2, L2SP, KnowledgeDistillation, DELTA, AttentionTransfer)
}
