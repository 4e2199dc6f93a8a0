"""Tile shapes and launch options of the kernels of ``expert_ffn``: a table by device and size, and a default.

Chosen by arithmetic and by what the compiler makes of them (no registers spilled, shared memory and registers for the
stated number of programs on a multiprocessor), not yet by measurement:

- *up* and *dz* have as much to do in the epilogue (bias, erf, dropout, two stores of 128 columns) as in a product of
  6 steps, so two programs of 128 × 128 share a multiprocessor: at most 128 registers for 256 threads, three stages of
  32 KiB. 128 × 128 also divides every width of the ViTs (384, 768, 1024 and four times these).
- *down* and *dx* have little epilogue and long sums, so the larger tile counts, which reads less from the L2 cache:
  64 FLOP per byte for 128 × 128, 85 for 256 × 128, where the tensor cores of an H100 at 790 TFLOP/s and some 8 TB/s
  of L2 want 99. N = 384 is three tiles of 128, and for wide outputs 128 × 256 also spares shared memory bandwidth.
  Experts of fewer than 1024 rows waste less of a tile of 128 rows.
- *dw1* and *dw2* sum over rows: 128 of d by 256 of h. For d = 384, h = 1536 and 6 experts 108 tiles are one wave of the
  132 multiprocessors. Their gathered loads depend on a load of the row's number, which takes two of the stages.
- Few rows (one image): 64 × 64, for more programs and less waste; and so for rows that are not aligned to 16 bytes,
  whose elements are loaded one by one and need the registers.
- float32 takes three TF32 products, whose halves of the operands live in registers: 128 × 64.
- sm_80 has ``mma`` instead of ``wgmma``: steps of 32, and four warps where the accumulator needs the registers.
"""

from __future__ import annotations

import logging
from functools import cache
from typing import NamedTuple

from torch import Tensor

from moe_kernels.triton import capability


class Tile(NamedTuple):
    """How one kernel is cut and launched."""

    block_m: int
    block_n: int
    block_k: int
    num_warps: int
    num_stages: int
    width: int = 32
    """Columns that an epilogue takes at a time, a divisor of ``block_n``."""
    registers: int | None = None
    """At most so many a thread."""

    @property
    def blocks(self) -> dict[str, int]:
        return {"BLOCK_M": self.block_m, "BLOCK_N": self.block_n, "BLOCK_K": self.block_k}

    @property
    def launch(self) -> dict[str, int | None]:
        return {"num_warps": self.num_warps, "num_stages": self.num_stages, "maxnreg": self.registers}


Table = dict[str, Tile]
SIZES = ("small", "medium", "narrow", "wide")


def _all(tile: Tile, **others: Tile) -> Table:
    return dict.fromkeys(("up", "down", "dz", "dz_recompute", "dx", "dw1", "dw2"), tile) | others


_HOPPER = _all(
    Tile(128, 128, 64, 8, 3, registers=128),
    dz=Tile(128, 128, 64, 8, 3, width=16, registers=128),
    dz_recompute=Tile(128, 64, 64, 8, 3, width=16, registers=128),
    dw1=Tile(256, 128, 64, 8, 5),
    dw2=Tile(128, 256, 64, 8, 5),
)
_AMPERE = _all(
    Tile(128, 128, 32, 4, 4),
    up=Tile(128, 128, 32, 8, 5, registers=128),
    dz=Tile(128, 128, 32, 8, 4, width=16, registers=128),
    dz_recompute=Tile(64, 64, 32, 4, 4, width=16),
    dw1=Tile(128, 128, 32, 4, 7),
    dw2=Tile(128, 128, 32, 4, 7),
)
_FLOAT32 = {"small": _all(Tile(64, 64, 32, 4, 3), dz_recompute=Tile(64, 64, 32, 8, 3, width=16))} | dict.fromkeys(
    SIZES[1:], _all(Tile(128, 64, 32, 8, 3))
)
_TALL, _WIDE = Tile(256, 128, 64, 8, 4), Tile(128, 256, 64, 8, 4)
TABLE: dict[tuple[tuple[int, int], int], dict[str, Table]] = {
    ((9, 0), 2): {
        "small": _all(Tile(64, 64, 64, 4, 4, width=16), dw1=Tile(64, 64, 64, 4, 5), dw2=Tile(64, 64, 64, 4, 5)),
        "medium": _HOPPER,
        "narrow": _HOPPER | {"down": _TALL, "dx": _TALL},
        "wide": _HOPPER | {"down": _WIDE, "dx": _WIDE},
    },
    ((8, 0), 2): {
        "small": _all(
            Tile(64, 64, 32, 4, 4, width=16),
            dz=Tile(64, 64, 32, 4, 4, width=8),
            dw1=Tile(64, 64, 32, 4, 7),
            dw2=Tile(64, 64, 32, 4, 7),
        ),
        "medium": _AMPERE,
        "narrow": _AMPERE,
        "wide": _AMPERE,
    },
    ((9, 0), 4): _FLOAT32,
    ((8, 0), 4): _FLOAT32,
}
"""(Compute capability, bytes of an element) → size → kernel → tile."""

DEFAULT = _all(Tile(64, 64, 32, 4, 3))
"""Fits every device that Triton runs on: 48 KiB of shared memory in float32."""

GATES = Tile(32, 128, 0, 4, 1)
"""*gates* reads rows once and has no product, whatever the device."""


def size_class(rows: float, dim: int, hidden_dim: int, element_size: int) -> str:
    """One of ``SIZES``, of experts with ``rows`` rows on average, d and h features."""
    if rows <= 128 or (dim * element_size) % 16 or (hidden_dim * element_size) % 16:
        return "small"
    if rows < 1024:
        return "medium"
    return "narrow" if dim <= 512 else "wide"


@cache
def _tables(device: tuple[int, int], element_size: int) -> dict[str, Table]:
    tables = TABLE.get((device, element_size))
    if tables is None:
        logging.getLogger("moe_kernels").warning(
            "expert_ffn: no tuned tiles for compute capability %d.%d and elements of %d bytes, a default is used",
            *device,
            element_size,
        )
        return dict.fromkeys(SIZES, DEFAULT)
    return tables


def choose(kernel: str, x: Tensor, assignments: int, experts: int, dim: int, hidden_dim: int) -> Tile:
    """The tile of ``kernel`` for rows of the dtype and on the device of ``x``."""
    size = size_class(assignments / experts, dim, hidden_dim, x.element_size())
    return _tables(capability(x.device), x.element_size())[size][kernel]
