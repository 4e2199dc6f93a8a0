"""Work of many small kernels, as a GPU runs it fastest."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

WARM_UP = 3
"""Calls before the capture: what libraries and optimizers set up at first must not be part of it."""


class Replayed:
    """``function`` as a CUDA graph: from call ``WARM_UP`` + 1 on one launch, however many kernels it has.

    Args:
        function: changes tensors in place, always the same ones, and does not wait for the device; called with tensors
            on ``device``, always of the same shapes and dtypes. Other threads must leave CUDA alone meanwhile.
        cuda: ``torch.cuda`` or something that behaves like it.
    """

    def __init__(self, function: Callable[..., None], device: torch.device, cuda: Any = torch.cuda) -> None:
        self._function, self._device, self._cuda = function, device, cuda
        self._arguments: list[Tensor] = []
        self._calls, self._graph = 0, None

    def __call__(self, *arguments: Tensor) -> None:
        """Call it with what stands in ``arguments``, on any device."""
        with self._cuda.device(self._device):
            if not self._arguments:
                self._arguments = [torch.empty_like(argument, device=self._device) for argument in arguments]
            for own, argument in zip(self._arguments, arguments, strict=True):
                own.copy_(argument, non_blocking=True)
            if self._calls == WARM_UP:
                self._graph = self._cuda.CUDAGraph()
                with self._cuda.graph(self._graph):  # which runs nothing
                    self._function(*self._arguments)
            self._calls += 1
            if self._graph is not None:
                self._graph.replay()
                return
            side = self._cuda.Stream()
            side.wait_stream(self._cuda.current_stream())
            with self._cuda.stream(side):  # autograd keeps to the stream that it saw first
                self._function(*self._arguments)
            self._cuda.current_stream().wait_stream(side)
