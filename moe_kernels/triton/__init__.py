"""Triton kernels: for each operator of :mod:`moe_kernels.ops` a function of the same arguments and results.

Importing this package does not import triton; an operator's module is imported at the operator's first call.
"""

from __future__ import annotations

import importlib
from functools import cache
from typing import Any

import torch

NAMESPACE = "moe_kernels"

MODULES = {
    "routing_cosine": "routing",
    "routing_cosine_backward": "routing_backward",
    "routing_linear": "routing",
    "routing_linear_backward": "routing_backward",
    "dispatch": "dispatch",
    "gather": "dispatch",
    "gather_backward": "dispatch",
    "combine": "dispatch",
    "combine_backward": "dispatch",
    "expert_ffn": "expert_ffn",
    "expert_ffn_backward": "expert_ffn_backward",
    "hypercolumn_gather": "hypercolumn",
    "hypercolumn_gather_backward": "hypercolumn",
    "hypercolumn_resize_sum": "hypercolumn",
    "hypercolumn_resize_sum_backward": "hypercolumn",
    "hypercolumn_norm": "hypercolumn",
}
"""Operator → the module here that has the function of its name."""


@cache  # every launch asks
def capability(device: torch.device) -> tuple[int, int]:
    """Compute capability of ``device``, by which launches choose their configuration; (9, 0) where there is no GPU."""
    return torch.cuda.get_device_capability(device) if device.type == "cuda" else (9, 0)


def register(dispatch_key: str) -> torch.library.Library:
    """Register every operator for ``dispatch_key``, over what stands there, for as long as the result lives."""
    library = torch.library.Library(NAMESPACE, "IMPL")
    for operator, module in MODULES.items():

        def run(*arguments: Any, operator: str = operator, module: str = module) -> Any:
            function = getattr(importlib.import_module(f"{__name__}.{module}"), operator)
            first = arguments[0] if isinstance(arguments[0], torch.Tensor) else arguments[0][0]
            with torch.cuda.device_of(first):  # a launch goes to the current device
                return function(*arguments)

        library.impl(operator, run, dispatch_key, allow_override=True)
    return library
