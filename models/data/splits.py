"""DomainBed's seeds and splits (Gulrajani and Lopez-Paz, In Search of Lost Domain Generalization, ICLR 2021).

The same trial seed gives the same split as DomainBed, so that numbers can be compared image for image.
"""

from __future__ import annotations

import hashlib

import numpy as np


def seed_hash(*args: object) -> int:
    """A seed in [0, 2³¹) from any values: the MD5 of the tuple's text, modulo 2³¹.

    NumPy scalars count as the Python values that they stand for; their text would depend on NumPy's version.
    """
    plain = tuple(value.item() if isinstance(value, np.generic) else value for value in args)
    return int(hashlib.md5(str(plain).encode(), usedforsecurity=False).hexdigest(), 16) % 2**31


def split(length: int, trial_seed: int, domain_index: int, holdout: float = 0.2) -> tuple[list[int], list[int]]:
    """The two parts of a domain of ``length`` items: for training or test ("in") and to select on ("out").

    The items are shuffled by NumPy's RandomState with seed_hash(trial_seed, domain_index); "out" is the first
    ⌊length · holdout⌋ of them. Not stratified, as in DomainBed.

    Returns:
        (in_indices, out_indices): disjoint, together every index below ``length``.

    Raises:
        ValueError: ``length`` is negative or ``holdout`` is outside [0, 1).
    """
    if length < 0:
        raise ValueError(f"length must not be negative, got {length}")
    if not 0 <= holdout < 1:
        raise ValueError(f"holdout must be in [0, 1), got {holdout}")
    indices = list(range(length))
    np.random.RandomState(seed_hash(trial_seed, domain_index)).shuffle(indices)
    held_out = int(length * holdout)
    return indices[held_out:], indices[:held_out]
