"""Triton's interpreter made strict: on the CPU it catches what a GPU would answer with foreign memory or a race.

Within :func:`strict` every launch fails on
- an access outside the tensor that the pointer was made from, by so much as one element;
- a location that one program writes and another one reads or writes (programs have no order);
and a masked lane that was loaded without ``other=`` holds NaN (an integer: a large number) and not zero.

A tensor on the meta device is memory of any size that holds one value, its attribute ``ghost`` (or zero): loads give
it, stores are only checked. So offsets beyond 2³¹ elements are tested without the memory.

It replaces private names of Triton, and fails on entry where one of them is gone.
"""

import os
from collections.abc import Iterator
from contextlib import contextmanager
from unittest import mock

import numpy as np
import pytest
import torch

triton = pytest.importorskip("triton")  # who imports this file is skipped
from triton.runtime import interpreter  # noqa: E402

INTERPRETING = os.environ.get("TRITON_INTERPRET") == "1"
ORDERS = ("forward", "reversed", "ends")
_SHIFT = 44  # tensor number i of a launch has the addresses from (i + 1) << 44
_BUILDER = (
    "create_masked_load",
    "create_masked_store",
    "create_atomic_rmw",
    "create_atomic_cas",
    "set_grid_idx",
    "set_grid_dim",
)
_EXECUTOR = ("__init__", "__call__", "_init_args_hst", "_restore_args_dev")


class Memory:
    """The tensors of one launch, each at addresses of its own, far from the others."""

    def __init__(self) -> None:
        self.tensors: list[torch.Tensor] = []
        self.owners: list[dict[str, np.ndarray]] = []
        self.program: tuple[int, ...] = ()

    def place(self, tensor: torch.Tensor) -> int:
        """The address of the first element."""
        self.tensors.append(tensor)
        elements = 0 if tensor.device.type == "meta" else _extent(tensor)
        self.owners.append({kind: np.full(elements, -1) for kind in ("read", "written")})
        return len(self.tensors) << _SHIFT

    def check(self, pointers: np.ndarray, mask: np.ndarray, program: int, store: bool) -> tuple[np.ndarray, object]:
        """Real addresses of the active lanes, and the ghost value where this is a tensor without memory."""
        real, ghost = np.zeros_like(pointers), None
        mask = np.broadcast_to(mask, pointers.shape)
        numbers = (pointers >> _SHIFT).astype(np.int64) - 1
        for number in np.unique(numbers[mask]):
            active = mask & (numbers == number)
            offset = (pointers[active] & ((1 << _SHIFT) - 1)).astype(np.int64)
            if not 0 <= number < len(self.tensors):
                raise IndexError(f"address {pointers[active][0]:#x} is far from every tensor of the launch")
            tensor = self.tensors[number]
            element, extent = offset // tensor.element_size(), _extent(tensor)
            if element.max() >= extent:
                raise IndexError(
                    f"tensor {number} of the launch, shape {tuple(tensor.shape)}: element {element.max()} of {extent}"
                )
            if tensor.device.type == "meta":
                ghost = getattr(tensor, "ghost", 0)
                continue
            self._claim(number, element, program, store)
            real[active] = tensor.data_ptr() + offset
        return real, ghost

    def _claim(self, number: int, element: np.ndarray, program: int, store: bool) -> None:
        owners = self.owners[number]
        for kind in ("read", "written") if store else ("written",):
            other = owners[kind][element]
            if ((other != -1) & (other != program)).any():
                raise RuntimeError(f"race: tensor {number} of the launch is {kind} by another program of the grid")
        # Of several readers only the last is remembered; what that misses is found in the reversed order.
        kind = "written" if store else "read"
        owners[kind][element] = program


def _extent(tensor: torch.Tensor) -> int:
    """Elements from the first to behind the last."""
    if tensor.numel() == 0:
        return 0
    return 1 + sum((size - 1) * stride for size, stride in zip(tensor.shape, tensor.stride(), strict=True))


def _garbage(dtype: np.dtype) -> object:
    if np.issubdtype(dtype, np.floating):
        return np.nan
    return np.iinfo(dtype).max // 2 if np.issubdtype(dtype, np.integer) else True


@contextmanager
def strict(order: str = "forward") -> Iterator[None]:
    """Launches in the context are checked; nothing is changed where kernels run on a GPU.

    Args:
        order: of the programs of a grid: ``"forward"``, ``"reversed"``, or only the first and the last program of each
            axis (``"ends"``), for grids of tensors without memory.
    """
    if order not in ORDERS:
        raise ValueError(f"order: expected one of {', '.join(ORDERS)}, got {order!r}")
    if not INTERPRETING:
        yield
        return
    builder, executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
    missing = [name for name in _BUILDER if not hasattr(builder, name)]
    missing += [name for name in _EXECUTOR if name not in vars(executor)]
    missing += [name for name in ("_implicit_cvt", "_interpreter", "TensorHandle") if not hasattr(interpreter, name)]
    if missing:
        raise RuntimeError(f"triton {triton.__version__} has renamed what the strict interpreter replaces: {missing}")

    memory = Memory()
    grid: tuple[int, ...] = ()
    program = 0
    implicit, set_index, set_size = interpreter._implicit_cvt, builder.set_grid_idx, builder.set_grid_dim
    originals = {name: getattr(builder, name) for name in _BUILDER}
    initialize, call = executor.__init__, executor.__call__

    def convert(argument):
        converted = implicit(argument)
        if isinstance(argument, torch.Tensor):
            converted.handle.data = np.array([memory.place(argument)], dtype=np.uint64)
        return converted

    def lanes(mask):  # a scalar & a block is a block of integers to the interpreter, by which numpy would index
        return interpreter.TensorHandle(mask.data.astype(bool), mask.dtype)

    def load(self, pointers, mask, other, *rest):
        mask = lanes(mask)
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        real, ghost = memory.check(pointers.data, mask.data, program, store=False)
        if other is None:
            other = interpreter.TensorHandle(np.full(pointers.data.shape, _garbage(dtype), dtype), element)
        if ghost is not None:
            return interpreter.TensorHandle(np.where(mask.data, np.asarray(ghost, dtype), other.data), element)
        moved = interpreter.TensorHandle(real, pointers.dtype)
        return originals["create_masked_load"](self, moved, mask, other, *rest)

    def store(self, pointers, value, mask, *rest):
        mask = lanes(mask)
        real, ghost = memory.check(pointers.data, mask.data, program, store=True)
        if ghost is None:
            moved = interpreter.TensorHandle(real, pointers.dtype)
            originals["create_masked_store"](self, moved, value, mask, *rest)

    def atomic(self, *arguments):
        raise NotImplementedError("atomics have no order: the kernels here do without")

    def place_program(self, x, y, z):
        nonlocal program
        index = (x, y, z)
        if order == "reversed":
            index = tuple(size - 1 - i for i, size in zip(index, grid, strict=True))
        elif order == "ends":
            index = tuple(size - 1 if i else 0 for i, size in zip(index, grid, strict=True))
        program = (index[0] * grid[1] + index[1]) * grid[2] + index[2]
        set_index(self, *index)

    def shorten(self, function, names, size, *rest):
        nonlocal grid
        assert not callable(size), "the strict interpreter knows grids that are tuples"
        grid = (*size, 1, 1)[:3]
        initialize(self, function, names, tuple(min(s, 2) for s in size) if order == "ends" else size, *rest)

    def launch(self, *arguments, **options):
        nonlocal memory
        memory = Memory()
        return call(self, *arguments, **options)

    with (
        mock.patch.object(interpreter, "_implicit_cvt", convert),
        mock.patch.multiple(
            builder,
            create_masked_load=load,
            create_masked_store=store,
            create_atomic_rmw=atomic,
            create_atomic_cas=atomic,
            set_grid_idx=place_program,
            set_grid_dim=lambda self, *shortened: set_size(self, *grid),
        ),
        mock.patch.multiple(
            executor,
            __init__=shorten,
            __call__=launch,
            _init_args_hst=lambda self, arguments, options: (list(arguments), options),
            _restore_args_dev=lambda self, *arguments: None,
        ),
    ):
        yield


def in_any_order(function):
    """What ``function()`` gives, a sequence of tensors: the same bits whatever the order of the programs."""
    with strict():
        results = function()
    if INTERPRETING:
        with strict("reversed"):
            for forward, backward in zip(results, function(), strict=True):
                torch.testing.assert_close(forward, backward, rtol=0, atol=0, equal_nan=True)
    return results
