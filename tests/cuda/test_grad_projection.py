"""The CUDA kernels of grad_projection, against float64: on a GPU where there is one, and, what a thread computes and
which launches there are, on the CPU, where every block and thread of ``csrc/cuda/grad_projection.h`` takes its turn.
"""

import ctypes
import random
from collections.abc import Sequence
from itertools import compress

import pytest
import torch
from support import assert_within_budget
from torch import Tensor

from moe_kernels import backend
from moe_kernels.ops import grad_projection as ops
from moe_kernels.ops.grad_projection import RULES
from moe_kernels.reference import grad_projection as reference

DTYPES = (torch.float32, torch.float64, torch.bfloat16, torch.float16)
UPDATES = ("moments", "grad_projection", "sgd", "adamw")
ROLES = 6
MIXED = (1, 2048, 5, 0, 4100, 3, 1023)


@pytest.fixture(scope="session")
def emulator(emulation):
    loaded = emulation("grad_projection")
    for name in ("emulate", "tensors_of_a_launch", "elements_of_a_block", "segments_of_a_launch", "piece_of"):
        getattr(loaded, name).restype = ctypes.c_int64
    return loaded


class Emulated:
    """The operators by name, with the arguments of their schemas, on CPU tensors."""

    device = "cpu"

    def __init__(self, library, backwards=False):
        self.library, self.backwards, self.launches = library, backwards, 0

    def _emulate(self, update, lists, rows, segments, settings) -> None:
        operands, scalars = [], dict.fromkeys(("grad_scale", "found_inf")) | settings
        for i, grad in enumerate(lists["grads"]):
            found = [lists[name][i] if i < len(lists.get(name, ())) else None for name in NAMES]
            like = found[1] if found[1] is not None else grad
            operands += [0 if tensor is None else tensor.data_ptr() for tensor in found]
            operands += [grad.numel(), segments[i], DTYPES.index(grad.dtype), DTYPES.index(like.dtype)]
        numbers = [float(scalars.get(name, 0)) for name in NUMBERS]
        flags = [bool(scalars.get(name, False)) for name in FLAGS] + [self.backwards]
        self.launches = self.library.emulate(
            ctypes.c_int64(UPDATES.index(update)),
            ctypes.c_int64(len(lists["grads"])),
            (ctypes.c_int64 * len(operands))(*operands),
            ctypes.c_int64(scalars.get("rule", 0)),
            (ctypes.c_double * len(numbers))(*numbers),
            (ctypes.c_bool * len(flags))(*flags),
            *(
                ctypes.c_void_p(None if scalars[name] is None else scalars[name].data_ptr())
                for name in ("grad_scale", "found_inf")
            ),
            ctypes.c_void_p(rows.data_ptr()),
            ctypes.c_int64(rows.shape[0]),
            ctypes.c_int64(rows.shape[1]),
        )

    def moments(self, grads, references, params, maximize, grad_scale):
        rows = torch.full((len(grads), 3), torch.nan, dtype=torch.float64)
        lists = {"grads": grads, "references": references, "params": params}
        settings = {"maximize": maximize, "grad_scale": grad_scale, "anchored": bool(params), "reduce": True}
        self._emulate("moments", lists, rows, range(len(grads)), settings | {"coefficient": 1})
        return rows

    def grad_projection(self, grads, references, params, record, segments, coefficient, rule, parameter, reduce):
        lists = {"grads": grads, "references": references, "params": params}
        settings = {"coefficient": coefficient, "rule": rule, "parameter": parameter, "reduce": reduce}
        self._emulate("grad_projection", lists, record, segments, settings | {"anchored": bool(params)})

    def sgd(self, params, grads, references, momentum_buffers, record, segments, *settings):
        lists = {"grads": grads, "references": references, "params": params, "first": momentum_buffers}
        self._emulate("sgd", lists, record, segments, dict(zip(SGD, settings, strict=True)))

    def adamw(self, params, grads, references, exp_avgs, exp_avg_sqs, steps, record, segments, *settings):
        lists = {"grads": grads, "references": references, "params": params}
        lists |= {"first": exp_avgs, "second": exp_avg_sqs, "steps": steps}
        self._emulate("adamw", lists, record, segments, dict(zip(ADAMW, settings, strict=True)))


NAMES = ("grads", "references", "params", "first", "second", "steps")
NUMBERS = ("parameter", "coefficient", "lr", "momentum", "dampening", "weight_decay", "beta1", "beta2", "eps")
FLAGS = ("anchored", "reduce", "maximize", "nesterov", "first_step")
_STEP = ("anchored", "coefficient", "rule", "parameter", "reduce", "lr")
SGD = (*_STEP, "momentum", "dampening", "weight_decay", "nesterov", "maximize", "first_step", "grad_scale", "found_inf")
ADAMW = (*_STEP, "beta1", "beta2", "eps", "weight_decay", "maximize", "grad_scale", "found_inf")


class Gpu:
    """The same on the GPU."""

    device = "cuda"
    moments, grad_projection = ops._MOMENTS, ops._COMBINE
    sgd, adamw = ops._SGD, ops._ADAMW


GPU = pytest.param(
    "cuda",
    marks=pytest.mark.skipif(bool(backend.refusal("cuda", "cuda")), reason=backend.refusal("cuda", "cuda") or "runs"),
)


@pytest.fixture(params=["emulated", GPU])
def machine(request):
    return Gpu if request.param == "cuda" else Emulated(request.getfixturevalue("emulator"))


class Case:
    """Lists of tensors, each between NaNs that must stay, and what the update of a rule makes of them."""

    def __init__(
        self,
        sizes: Sequence[int] = MIXED,
        dtypes: Sequence[torch.dtype] = (torch.float32,),
        anchor_dtypes: Sequence[torch.dtype] | None = None,
        *,
        referenced: int | None = None,
        segments: Sequence[int] | None = None,
        conflict: bool = True,
        offset: int = 0,
    ) -> None:
        self.offset = offset
        count = len(sizes)
        dtypes = [dtypes[i % len(dtypes)] for i in range(count)]
        anchor_dtypes = [anchor_dtypes[i % len(anchor_dtypes)] for i in range(count)] if anchor_dtypes else dtypes
        referenced = count if referenced is None else referenced
        self.segments = [0] * count if segments is None else list(segments)
        self.lists = {
            name: [torch.randn(size).to(dtype) for size, dtype in zip(sizes, dtypes, strict=True)]
            for name in ("params", "grads", "first", "second")
        }
        self.lists["second"] = [tensor.abs() for tensor in self.lists["second"]]
        pulls = [torch.randn(size) for size in sizes[:referenced]]
        if conflict:
            pulls = [pull - 2 * grad.float() for pull, grad in zip(pulls, self.lists["grads"], strict=False)]
        self.pulls = [pull.to(dtype) for pull, dtype in zip(pulls, anchor_dtypes, strict=False)]
        self.anchors = [
            (w.double() - pull.double() / 2).to(dtype)
            for w, pull, dtype in zip(self.lists["params"], pulls, anchor_dtypes, strict=False)
        ]
        self.steps = [torch.tensor(float(3 + i % 4)) for i in range(count)]

    def rows(self) -> int:
        return max(self.segments, default=-1) + 1

    def run(self, update, machine, *, anchored=True, rule="dtnh", parameter=0.5, wide=False, **settings):
        """Everything that the update wrote, by name; in float64 where ``wide``."""

        def put(tensors):
            return [self._place(t.double() if wide else t, machine.device) for t in tensors]

        lists = {name: put(tensors) for name, tensors in self.lists.items()}
        references = put(self.anchors if anchored else self.pulls)
        scalars = {"coefficient": 0.3, "lr": 0.1, "reduce": True, "rule": RULES.index(rule), "parameter": parameter}
        scalars |= {"momentum": 0.9, "dampening": 0.1, "weight_decay": 0.01, "nesterov": False, "first_step": False}
        scalars |= {"beta1": 0.9, "beta2": 0.99, "eps": 1e-3, "maximize": False, "anchored": anchored}
        scalars |= {"grad_scale": None, "found_inf": None} | settings
        scalars = {
            name: value.to(machine.device) if isinstance(value, Tensor) else value for name, value in scalars.items()
        }
        for name in ("coefficient", "lr"):
            scalars[name] = torch.as_tensor(scalars[name], dtype=torch.float64)
        record = torch.zeros(self.rows(), ops.COLUMNS, dtype=torch.float64)
        record[:, :3] = torch.tensor([-2.0, 3.0, 5.0]) if not scalars["reduce"] else torch.nan
        record = record.to(machine.device)
        steps = [step.to(machine.device) for step in self.steps]
        params, grads, first, second = (lists[name] for name in ("params", "grads", "first", "second"))
        if update == "moments":
            anchors = params if anchored else ()
            record = machine.moments(grads, references, anchors, scalars["maximize"], scalars["grad_scale"])
        elif update == "grad_projection":
            arguments = [scalars[name] for name in ("coefficient", "rule", "parameter", "reduce")]
            anchors = params if anchored else ()
            machine.grad_projection(grads, references, anchors, record, self.segments, *arguments)
        elif update == "sgd":
            buffers = first if scalars["momentum"] else ()
            machine.sgd(params, grads, references, buffers, record, self.segments, *(scalars[name] for name in SGD))
        else:
            arguments = [scalars[name] for name in ADAMW]
            machine.adamw(params, grads, references, first, second, steps, record, self.segments, *arguments)
        for tensor in (*references, *(t for tensors in lists.values() for t in tensors)):
            self._check_guards(tensor)
        return {"record": record.cpu(), **{name: [t.cpu() for t in tensors] for name, tensors in lists.items()}}

    def _place(self, tensor: Tensor, device) -> Tensor:
        """A copy at an address that is ``offset`` elements beside one for vectors."""
        around = torch.full((tensor.numel() + 64,), torch.nan, dtype=tensor.dtype)
        start = 16 + self.offset
        around[start : start + tensor.numel()] = tensor
        return around.to(device)[start : start + tensor.numel()]

    @staticmethod
    def _check_guards(tensor: Tensor) -> None:
        start = tensor.storage_offset()
        around = torch.as_strided(tensor, (tensor.numel() + 64,), (1,), 0)
        assert around[:start].isnan().all()
        assert around[start + tensor.numel() :].isnan().all()


class Reference:
    device = "cpu"
    moments, grad_projection = reference.moments, reference.grad_projection
    sgd, adamw = reference.sgd, reference.adamw


def check(case: Case, update: str, machine, **settings) -> None:
    """Every result of the machine, as near to float64 as plain PyTorch is."""
    ours = case.run(update, machine, **settings)
    plain = case.run(update, Reference, **settings)
    exact = case.run(update, Reference, wide=True, **settings)
    torch.testing.assert_close(ours["record"], exact["record"], rtol=1e-5, atol=1e-5, equal_nan=True)
    for name in case.lists:
        for dtype in {tensor.dtype for tensor in ours[name]}:
            of_dtype = [tensor.dtype == dtype for tensor in ours[name]]
            one, other, right = (torch.cat(list(compress(x[name], of_dtype))) for x in (ours, plain, exact))
            if dtype == torch.float64:  # as the reference's, but for the order of the sums
                torch.testing.assert_close(one, right, rtol=1e-12, atol=1e-12)
            else:
                assert_within_budget(one, other, right, name=f"{name}, {dtype}")


def same_bits(one, other) -> bool:
    return all(
        torch.equal(a.nan_to_num(7), b.nan_to_num(7))
        for name in one
        for a, b in zip(*([x[name]] if isinstance(x[name], Tensor) else x[name] for x in (one, other)), strict=True)
    )


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("anchored", [True, False], ids=["anchored", "given"])
def test_every_dtype(machine, update, dtype, anchored):
    segments = [0, 2, 0, 2, 2, -1, 3]
    check(Case(dtypes=[dtype], referenced=6, segments=segments), update, machine, anchored=anchored)


@pytest.mark.parametrize("update", UPDATES[1:])
@pytest.mark.parametrize("rule", RULES)
@pytest.mark.parametrize("conflict", [True, False], ids=["conflict", "harmony"])
def test_every_rule(machine, update, rule, conflict):
    check(Case(referenced=5, conflict=conflict), update, machine, rule=rule)


@pytest.mark.parametrize(
    "settings",
    [
        {"momentum": 0.0},
        {"momentum": 0.0, "weight_decay": 0.0},
        {"nesterov": True, "dampening": 0.0},
        {"first_step": True},
        {"first_step": True, "nesterov": True, "dampening": 0.0},
        {"maximize": True},
        {"reduce": False},
        {"grad_scale": torch.tensor([48.0])},
        {"grad_scale": torch.tensor([48.0]), "anchored": False},
        {"found_inf": torch.tensor([0.0])},
    ],
    ids=lambda settings: ", ".join(settings),
)
@pytest.mark.parametrize("update", ["sgd", "adamw"])
def test_every_setting(machine, update, settings):
    check(Case(referenced=5), update, machine, **settings)


@pytest.mark.parametrize("update", UPDATES)
def test_mixed_dtypes(machine, update):
    own, others = DTYPES * 4, [dtype for dtype in DTYPES for _ in DTYPES]
    segments = range(len(own))  # of its own, or the rounding of one would be that of all
    check(Case([100] * len(own), own, others, segments=segments), update, machine)


@pytest.mark.parametrize("update", UPDATES)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_address_changes_no_bit(machine, update, dtype):
    torch.manual_seed(1)
    aligned = Case(dtypes=[dtype]).run(update, machine)
    torch.manual_seed(1)
    assert same_bits(aligned, Case(dtypes=[dtype], offset=1).run(update, machine))


@pytest.mark.parametrize("update", UPDATES)
def test_order_of_blocks_and_threads_changes_no_bit(emulator, update):
    case = Case(MIXED * 3, segments=[i % 4 for i in range(21)])
    assert same_bits(case.run(update, Emulated(emulator)), case.run(update, Emulated(emulator, backwards=True)))


@pytest.mark.parametrize("update", UPDATES)
def test_more_tensors_than_a_launch_takes(machine, emulator, update):
    of_moments, of_update = (emulator.tensors_of_a_launch(UPDATES.index(name)) for name in ("moments", update))
    tensors = 2 * of_moments + 3
    sizes = [random.Random(i).randrange(1, 4) for i in range(tensors)]
    check(Case(sizes, segments=[i * 7 % 1000 for i in range(tensors)]), update, machine)
    if machine.device == "cpu":
        moments = -(-tensors // of_moments)
        settling = -(-tensors // emulator.segments_of_a_launch()) if update == "moments" else 1
        assert machine.launches == moments + settling + (0 if update == "moments" else -(-tensors // of_update))


def test_more_segments_than_a_launch_takes(machine, emulator):
    segments = emulator.segments_of_a_launch() + 3
    case = Case([1 + i % 3 for i in range(segments)], segments=[i * 7 % segments for i in range(segments)])
    found = case.run("grad_projection", machine)["record"]
    squares = torch.stack([grad.double().square().sum() for grad in case.lists["grads"]])
    expected = torch.zeros(segments, dtype=torch.float64).index_add(0, torch.tensor(case.segments), squares)
    torch.testing.assert_close(found[:, 1], expected, rtol=1e-6, atol=0)
    assert found[:, 3].tolist() == [1] * segments


@pytest.mark.parametrize("update", ["sgd", "adamw"])
def test_skipped_step_counts_and_changes_nothing(machine, update):
    case = Case(segments=[0, 1, 2, 3, -1, 0, 1])
    case.lists["grads"][0][:] = torch.inf
    record, *lists = case.run(update, machine, found_inf=torch.tensor([1.0]), grad_scale=torch.tensor([8.0])).values()
    assert record[:, :3].isnan().all()
    assert record[:, 3:].tolist() == [[0, 0, 1]] * 4
    for found, before in zip(lists, case.lists.values(), strict=True):
        assert all(map(torch.equal, found, before))


def test_nan_of_a_tensor_that_is_left_alone_stays_there(machine):
    case = Case((5, 6), segments=[-1, 0])
    case.lists["grads"][0][2] = torch.nan
    found = case.run("sgd", machine)
    assert found["params"][0].isnan().sum() == 1
    assert not found["params"][1].isnan().any()
    assert not found["record"].isnan().any()


def test_nothing_to_do(machine):
    check(Case((0, 0), segments=[0, 1]), "sgd", machine)
    check(Case((0, 0), segments=[0, 1]), "moments", machine)


def test_blocks_are_many_but_not_small(emulator):
    for elements, expected in ((0, 2048), (1, 2048), (4_000_000, 2048), (11_700_000, 6144), (10**10, 65536)):
        assert emulator.elements_of_a_block(ctypes.c_int64(elements)) == expected


@pytest.mark.parametrize("numel", [1, 2047, 2048, 2049, 2**31 + 5, 2**33])
def test_blocks_begin_and_end_where_the_tensor_does(emulator, numel):
    """Also beyond what 32 bits count: those of the middle one of three tensors."""
    begin, end, tensor = ctypes.c_int64(), ctypes.c_int64(), ctypes.c_int64()
    for last in (False, True):
        places = map(ctypes.byref, (tensor, begin, end))
        chunk = emulator.piece_of(ctypes.c_int64(numel), ctypes.c_bool(last), *places)
        assert tensor.value == 1
        assert begin.value == ((numel - 1) // chunk * chunk if last else 0)
        assert end.value == min(begin.value + chunk, numel)


@pytest.mark.skipif(bool(backend.refusal("cuda", "cuda")), reason=backend.refusal("cuda", "cuda") or "runs")
def test_step_in_a_cuda_graph_waits_for_nothing():
    params, grads, anchors, buffers = ([torch.randn(n, device="cuda") for n in MIXED] for _ in range(4))
    record = ops.new_record(1, "cuda")
    lr, coefficient = (torch.tensor(value, device="cuda") for value in (0.1, 0.3))

    def step():
        settings = {"record": record, "segments": [0] * len(MIXED), "anchored": True, "rule": "dtnh"}
        ops.sgd_(params, grads, anchors, buffers, lr=lr, coefficient=coefficient, momentum=0.9, **settings)

    step()
    before = [[t.clone() for t in tensors] for tensors in (params, buffers)]
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
        graph = torch.cuda.CUDAGraph()
        expected = [[t.clone() for t in tensors] for tensors in (params, buffers)]
        with torch.cuda.graph(graph):
            step()
    finally:
        torch.cuda.set_sync_debug_mode("default")
    for tensors, values in zip((params, buffers), before, strict=True):
        for tensor, value in zip(tensors, values, strict=True):
            tensor.copy_(value)
    graph.replay()
    for tensors, values in zip((params, buffers), expected, strict=True):
        assert all(map(torch.equal, tensors, values))
