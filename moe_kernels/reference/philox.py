"""The counter-based generator behind noise and dropout: Philox 4x32-10 (Salmon et al., SC 2011).

A draw is a pure function of a seed and a counter, so a recomputation under activation checkpointing, and every
backend, replays it.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

_MASK = 0xFFFFFFFF
_MULTIPLIERS = (0xD2511F53, 0xCD9E8D57)
_WEYL = (0x9E3779B9, 0xBB67AE85)
_ROUNDS = 10


def _multiply(a: Tensor, constant: int) -> tuple[Tensor, Tensor]:
    """High and low words of a 32 × 32 bit product; the halves keep every partial product below 2⁶³."""
    high, low = constant >> 16, constant & 0xFFFF
    return (a * high + ((a * low) >> 16)) >> 16, (a * constant) & _MASK


def words(seed: Tensor, counter: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Four 32-bit words for each 64-bit counter, as int64 tensors shaped like ``counter``; ``seed`` int64 (1,)."""
    key0, key1 = seed & _MASK, (seed >> 32) & _MASK
    c0, c1 = counter & _MASK, counter >> 32
    c2, c3 = torch.zeros_like(counter), torch.zeros_like(counter)
    for _ in range(_ROUNDS):
        high0, low0 = _multiply(c0, _MULTIPLIERS[0])
        high1, low1 = _multiply(c2, _MULTIPLIERS[1])
        c0, c1, c2, c3 = high1 ^ c1 ^ key0, low1, high0 ^ c3 ^ key1, low0
        key0, key1 = (key0 + _WEYL[0]) & _MASK, (key1 + _WEYL[1]) & _MASK
    return c0, c1, c2, c3


def _uniform(word: Tensor) -> Tensor:
    """The middle of one of 2²³ equal intervals of (0, 1), exact in float32."""
    return ((word >> 9).float() + 0.5) * 2.0**-23


def normal(seed: Tensor, rows: int, columns: int) -> Tensor:
    """Standard normal float32 (rows, columns) by Box–Muller; element (t, e) is drawn at counter t·columns + e."""
    counter = torch.arange(rows * columns, device=seed.device)
    w0, w1, _, _ = words(seed, counter)
    draw = torch.sqrt(-2 * torch.log(_uniform(w0))) * torch.cos(2 * math.pi * _uniform(w1))
    return draw.view(rows, columns)


def keep(seed: Tensor, rows: Tensor, columns: int, dropout_p: float) -> Tensor:
    """Bool (len(rows), columns), true with probability 1 − p: four consecutive columns share one counter."""
    groups = -(-columns // 4)
    counter = rows[:, None] * groups + torch.arange(groups, device=seed.device)
    mask = torch.stack([_uniform(word) >= dropout_p for word in words(seed, counter)], dim=-1)
    return mask.flatten(1)[:, :columns]
