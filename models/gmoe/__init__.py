"""GMoE: mixture-of-experts vision transformers that generalize to unseen domains (arXiv 2206.04046)."""

from .checkpoints import from_official_state_dict, load_weights, to_official_state_dict
from .convert import convert
from .model import create, list_models

__all__ = [
    "convert",
    "create",
    "from_official_state_dict",
    "list_models",
    "load_weights",
    "to_official_state_dict",
]
