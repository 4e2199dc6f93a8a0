"""The error budget: how far a kernel may be from float64, measured by how far plain PyTorch is.

On a handful of elements plain PyTorch is sometimes right by luck. So the budget also knows how much the exact result
moves when the inputs move by the rounding of float32 (:func:`nudged`), which no float32 arithmetic can be better than.
One such move may be luck too: ill-conditioned tests give several, of which the worst counts.
"""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def nudged(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    """float64 copies, every element up or down by two units in the last place of float32: a product and its sum."""
    step = 2 * torch.finfo(torch.float32).eps
    return {name: t.double() * (1 + step * (torch.randint(2, t.shape) * 2 - 1)) for name, t in tensors.items()}


def assert_within_budget(kernel: Tensor, plain: Tensor, exact: Tensor, *nudged: Tensor, name: str = "") -> None:
    """``kernel`` and ``plain`` have the dtype under test, ``exact`` is float64, all from the same rounded inputs.

    Relative Frobenius error ≤ 1.5 × that of plain + 2 eps; maximum error, relative to the largest exact element,
    ≤ 4 × plain + 2 eps. Where one of ``nudged``, exact results of nudged inputs, is further off than plain, it counts.
    Of fewer than 64 elements that are not 0, or where fewer than 8 rows carry the norm (all of a row may share one
    error, as a gradient through two normalized features does), it is as much luck as the maximum: only that is bounded.
    """
    assert kernel.dtype == plain.dtype, f"{name}: dtype {kernel.dtype}, expected {plain.dtype}"
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert kernel.isfinite().all(), f"{name}: not finite"
    band = 2 * torch.finfo(kernel.dtype).eps
    bounds = [(lambda x: x.abs().max(), 4.0)]
    squares = exact.reshape(-1, exact.shape[-1] if exact.dim() > 1 else 1).square().sum(1)
    if exact.count_nonzero() >= 64 and squares.sum() ** 2 >= 8 * squares.square().sum():
        bounds.append((torch.linalg.vector_norm, 1.5))
    for norm, factor in bounds:
        scale = norm(exact).clamp(min=torch.finfo(torch.float32).tiny)
        error, budget = norm(kernel.double() - exact) / scale, norm(plain.double() - exact) / scale
        for moved in nudged:
            budget = torch.maximum(budget, norm(moved - exact) / scale)
        assert error <= factor * budget + band, f"{name}: error {error:.3g}, plain PyTorch {budget:.3g}"
