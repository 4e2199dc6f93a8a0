"""The error budget of DTYPE arithmetic: what a kernel may be off from float64, measured by what plain PyTorch is."""

import torch
from torch import Tensor

DTYPES = (torch.float32, torch.bfloat16, torch.float16)


def assert_within_budget(kernel: Tensor, plain: Tensor, exact: Tensor, *, name: str = "") -> None:
    """``kernel`` and ``plain`` have the dtype under test, ``exact`` is float64, all from the same rounded inputs.

    Relative Frobenius error ≤ 1.5 × that of plain + 2 eps; maximum error, relative to the largest exact element,
    ≤ 4 × plain + 2 eps.
    """
    assert kernel.dtype == plain.dtype, f"{name}: dtype {kernel.dtype}, expected {plain.dtype}"
    assert kernel.shape == exact.shape, f"{name}: shape {tuple(kernel.shape)}, expected {tuple(exact.shape)}"
    if exact.numel() == 0:
        return
    assert kernel.isfinite().all(), f"{name}: not finite"
    band = 2 * torch.finfo(kernel.dtype).eps
    for norm, factor in ((torch.linalg.vector_norm, 1.5), (lambda x: x.abs().max(), 4.0)):
        scale = norm(exact).clamp(min=torch.finfo(torch.float32).tiny)
        error, budget = norm(kernel.double() - exact) / scale, norm(plain.double() - exact) / scale
        assert error <= factor * budget + band, f"{name}: error {error:.3g}, plain PyTorch {budget:.3g}"
