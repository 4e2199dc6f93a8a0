"""A selective activation-checkpointing policy that keeps the routing."""

from __future__ import annotations

from typing import Any

from torch.utils.checkpoint import CheckpointPolicy

from moe_kernels.ops import dispatch, routing

_ROUTING = (*routing.OPERATORS, *dispatch.OPERATORS)


def save_routing(ctx: Any, operator: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    """Keep what ``routing`` and ``dispatch`` give, recompute the rest.

    The routing is small beside the activations, and kept it need not be replayed at all: pass
    ``context_fn=partial(create_selective_checkpoint_contexts, save_routing)`` to ``torch.utils.checkpoint.checkpoint``.
    """
    return CheckpointPolicy.MUST_SAVE if operator in _ROUTING else CheckpointPolicy.PREFER_RECOMPUTE
