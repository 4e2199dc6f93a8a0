"""Adam's first moments of units that have no gradient any more, which decay by a tenth a step and never reach 0.

After 830 steps they are denormal numbers, which a CPU multiplies so slowly that a step of the pixel classifier takes
twice as long. Long before, they move no weight: a moment of 1e-30 changes it by 1e-26 at the paper's rate.
"""

from __future__ import annotations

import torch

EVERY = 100
"""Steps between two calls of :func:`flush_`; from NOTHING to a denormal number it is 174."""
NOTHING = 1e-30


@torch.no_grad()
def flush_(optimizer: torch.optim.Adam) -> None:
    """Set the first moments smaller than NOTHING to 0."""
    for state in optimizer.state.values():
        state["exp_avg"].copy_(torch.hardshrink(state["exp_avg"], NOTHING))
