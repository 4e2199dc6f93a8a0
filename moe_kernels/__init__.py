"""Sparse mixture-of-experts layers for vision transformers: one meaning, several kernels.

Operators live in :mod:`moe_kernels.ops`, layers in :mod:`moe_kernels.nn`, models in :mod:`moe_kernels.models`.
"""

from moe_kernels import backend
from moe_kernels._version import __version__

__all__ = ["__version__", "backend"]
