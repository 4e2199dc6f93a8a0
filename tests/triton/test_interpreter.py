"""The strict interpreter catches each class of defects that it is there for, and lets right kernels pass."""

from unittest import mock

import interpreter
import pytest
import torch
import triton
import triton.language as tl
from triton.runtime.errors import InterpreterError

pytestmark = pytest.mark.skipif(not interpreter.INTERPRETING, reason="a GPU is here, kernels run on it")


@triton.jit
def add_one_kernel(x, out, n, BLOCK: tl.constexpr, MASKED: tl.constexpr):
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    value = tl.load(x + i, mask=i < n, other=0) if MASKED else tl.load(x + i)
    tl.store(out + i, value + 1, mask=i < n)


@triton.jit
def sum_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    tl.store(out, tl.sum(tl.load(x + i, mask=i < n), axis=0))


@triton.jit
def last_writer_kernel(out):
    tl.store(out, tl.program_id(0))


@triton.jit
def accumulate_kernel(x, out):
    tl.store(out + tl.program_id(0) + 1, tl.load(out + tl.program_id(0)) + tl.load(x))


@triton.jit
def atomic_kernel(out):
    tl.atomic_add(out, 1.0)


@triton.jit
def row_kernel(x, out, rows, dim, WIDE: tl.constexpr):
    row = tl.program_id(0)
    if WIDE:
        row = row.to(tl.int64)
    column = tl.arange(0, 16)
    value = tl.load(x + row * dim + column, mask=column < dim, other=0.0)
    tl.store(out + row * dim + column, value, mask=column < dim)


def test_right_kernel_passes_and_is_right_in_any_order():
    x = torch.randn(100)

    def run():
        out = torch.empty_like(x)
        add_one_kernel[(4,)](x, out, 100, BLOCK=32, MASKED=True)
        return [out]

    assert torch.equal(interpreter.in_any_order(run)[0], x + 1)


def test_access_outside_a_tensor_is_an_error_even_where_another_one_lies():
    x, out = torch.randn(200).split(100)
    with interpreter.strict(), pytest.raises(InterpreterError, match=r"shape \(100,\): element 127 of 100"):
        add_one_kernel[(4,)](x, out, 100, BLOCK=32, MASKED=False)


def test_store_outside_a_tensor_is_an_error():
    with interpreter.strict(), pytest.raises(InterpreterError, match="element 9 of 9"):
        add_one_kernel[(1,)](torch.randn(10), torch.empty(9), 10, BLOCK=16, MASKED=True)


@pytest.mark.parametrize("dtype", [torch.float32, torch.int32])
def test_masked_lane_without_other_is_garbage(dtype):
    x, out = torch.ones(7, dtype=dtype), torch.zeros(1, dtype=dtype)
    sum_kernel[(1,)](x, out, 7, BLOCK=8)
    assert out == 7, "Triton's own interpreter hides it"
    with interpreter.strict():
        sum_kernel[(1,)](x, out, 7, BLOCK=8)
    assert out.isnan() or out > 2**29


@triton.jit
def copy_if_kernel(x, out, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    mask = (tl.program_id(0) == 0) & (i < n)
    tl.store(out + i, tl.load(x + i, mask=mask, other=0.0), mask=mask)


def test_mask_of_a_scalar_and_a_block():
    x, out = torch.randn(9), torch.zeros(9)
    with interpreter.strict():
        copy_if_kernel[(2,)](x, out, 9, BLOCK=16)
    assert torch.equal(out, x)


def test_two_programs_that_write_one_location_are_a_race():
    with interpreter.strict(), pytest.raises(InterpreterError, match="race"):
        last_writer_kernel[(2,)](torch.zeros(1, dtype=torch.int32))


@pytest.mark.parametrize("order", ["forward", "reversed"])
def test_program_that_reads_what_another_wrote_is_a_race(order):
    with interpreter.strict(order), pytest.raises(InterpreterError, match="race"):
        accumulate_kernel[(3,)](torch.ones(1), torch.zeros(4))


def test_order_is_reversed():
    with interpreter.strict("reversed"), mock.patch.object(interpreter.Memory, "_claim") as claim:
        last_writer_kernel[(3,)](torch.zeros(1, dtype=torch.int32))
        order = [call.args[2] for call in claim.call_args_list]
    assert order == [2, 1, 0]


def test_atomics_are_refused():
    with interpreter.strict(), pytest.raises(InterpreterError, match="atomics"):
        atomic_kernel[(1,)](torch.zeros(1))


def test_offsets_beyond_31_bits_are_checked_without_the_memory():
    x, out = (torch.empty(2**28, 10, device="meta") for _ in range(2))
    with interpreter.strict("ends"):
        row_kernel[(2**28,)](x, out, 2**28, 10, WIDE=True)
        with pytest.raises(InterpreterError, match="IndexError"):
            row_kernel[(2**28,)](x, out, 2**28, 10, WIDE=False)


def test_renamed_private_name_is_said():
    with (
        mock.patch.object(interpreter, "_BUILDER", ("create_no_such_thing",)),
        pytest.raises(RuntimeError, match="has renamed what the strict interpreter replaces"),
        interpreter.strict(),
    ):
        pass


def test_nothing_is_left_patched():
    before = vars(interpreter.interpreter.GridExecutor).copy()
    with interpreter.strict():
        pass
    assert vars(interpreter.interpreter.GridExecutor).items() == before.items()
