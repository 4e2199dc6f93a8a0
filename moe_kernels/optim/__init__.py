"""Optimizers that hold a model near its anchor without hurting the loss, and the projection by itself."""

from moe_kernels.optim.adamw import AnchoredAdamW
from moe_kernels.optim.facts import Facts
from moe_kernels.optim.projection import project_gradients_
from moe_kernels.optim.sgd import AnchoredSGD

__all__ = ["AnchoredAdamW", "AnchoredSGD", "Facts", "project_gradients_"]
