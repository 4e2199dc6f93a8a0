"""Fine-tuning near a source without being hurt by it: regularizers, DTNH (arXiv 1911.07489), comparisons."""

from .backbones import Backbone
from .configuration import COEFFICIENTS, METHODS, FineTuneConfig
from .data import Target, from_tensors
from .regularizers import (
    DELTA,
    L2,
    L2SP,
    REGULARIZERS,
    AttentionTransfer,
    FeatureRegularizer,
    KnowledgeDistillation,
    Regularizer,
)
from .schedules import coefficient_at
from .trainer import Diverged, finetune

__all__ = [
    "COEFFICIENTS",
    "DELTA",
    "L2",
    "L2SP",
    "METHODS",
    "REGULARIZERS",
    "AttentionTransfer",
    "Backbone",
    "Diverged",
    "FeatureRegularizer",
    "FineTuneConfig",
    "KnowledgeDistillation",
    "Regularizer",
    "Target",
    "coefficient_at",
    "finetune",
    "from_tensors",
]
