"""Layers: routers, the mixture-of-experts layer, balancing losses, telemetry. They know operators, not kernels."""

from moe_kernels.nn.checkpoint import save_routing
from moe_kernels.nn.moe import MoE, Telemetry, auxiliary_loss
from moe_kernels.nn.routers import CosineRouter, LinearRouter

__all__ = ["CosineRouter", "LinearRouter", "MoE", "Telemetry", "auxiliary_loss", "save_routing"]
