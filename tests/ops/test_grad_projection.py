import math

import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from support import assert_within_budget

from moe_kernels import backend
from moe_kernels.ops import grad_projection as ops
from moe_kernels.ops.grad_projection import NEEDS_MOMENTS, RULES, adamw_, moments, new_record, project_gradients_, sgd_

DEVICE = "cuda" if torch.cuda.is_available() else "cpu"
KERNEL = "cuda" if torch.cuda.is_available() else "cpp"
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)
LARGE = (1 << 20) + 70001  # a segment that all threads share

pytestmark = [
    pytest.mark.usefixtures("poisoned"),
    pytest.mark.skipif(
        bool(backend.refusal(KERNEL, DEVICE, operator="grad_projection")), reason=f"no {KERNEL} kernels are here"
    ),
]


def draw(sizes, dtypes=(torch.float32,), seed=0, std=1.0):
    generator = torch.Generator().manual_seed(seed)
    kinds = [dtypes[i % len(dtypes)] for i in range(len(sizes))]
    return [
        (torch.randn(n, generator=generator) * std).to(kind).to(DEVICE) for n, kind in zip(sizes, kinds, strict=True)
    ]


def double(tensors):
    return [tensor.double() for tensor in tensors]


def clones(tensors):
    return [tensor.clone() for tensor in tensors]


def pulls(references, params):
    """r of the tensors that have one, in float64."""
    references = double(references)
    return [2 * (w - w0) for w, w0 in zip(double(params), references)] if params else references  # noqa: B905


def exact_direction(grads, references, params, segments, coefficient, rule, parameter=0.0):
    """d in float64, from the definition, one segment at a time, on concatenated vectors."""
    g, r = double(grads), pulls(references, params)
    r += [torch.zeros_like(x) for x in g[len(r) :]]
    result = clones(g)
    for segment in set(segments) - {-1}:
        members = [i for i, s in enumerate(segments) if s == segment]
        loss, pull = (torch.cat([x[i].flatten() for i in members]) for x in (g, r))
        pull = coefficient * pull
        c, along, across = (loss @ pull).clamp(max=0), loss @ loss, pull @ pull
        conflict = bool(c < 0)
        d = {"none": loss, "l2sp": loss + pull}.get(rule)
        if rule == "dtnh":
            d = loss + (pull - c / along * loss if conflict else pull)
        elif rule == "pcgrad":
            d = loss + pull - (c / across * pull + c / along * loss if conflict else 0)
        elif rule in ("agem", "digrap"):
            d = loss - ((1 if rule == "agem" else parameter) * c / across * pull if conflict else 0)
        elif rule == "gradvac":
            d, cosine = loss + pull, float(loss @ pull / (along * across).sqrt()) if along * across > 0 else math.inf
            if cosine < parameter:
                turn = parameter * math.sqrt(1 - cosine**2) - cosine * math.sqrt(1 - parameter**2)
                d = d + loss * across.sqrt() * turn / (along.sqrt() * math.sqrt(1 - parameter**2))
        for i, part in zip(members, d.split([g[i].numel() for i in members]), strict=True):
            result[i] = part.view_as(g[i])
    return result


def segments_of(scope, count):
    return [0] * count if scope == "global" else list(range(count))


@settings(max_examples=120)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 3, 17, 64, 255, 1023, 1025, 5000, 16385, 40000]), min_size=1, max_size=7),
    dtypes=st.lists(st.sampled_from(DTYPES), min_size=1, max_size=3),
    narrow=st.booleans(),
    rule=st.sampled_from(RULES),
    anchored=st.booleans(),
    coefficient=st.sampled_from([0.0, 0.01, 0.7, 30.0]),
    parameter=st.sampled_from([0.0, 0.3, 0.9]),
    data=st.data(),
)
def test_direction_of_any_list_is_the_definitions(sizes, dtypes, narrow, rule, anchored, coefficient, parameter, data):
    count = len(sizes)
    rows = data.draw(st.integers(1, count), label="rows")
    segments = data.draw(st.lists(st.integers(-1, rows - 1), min_size=count, max_size=count), label="segments")
    given_references = data.draw(st.integers(0, count), label="references")
    grads = draw(sizes, dtypes, seed=1)
    params = draw(sizes, dtypes, seed=2) if anchored else []
    kinds = (torch.bfloat16,) if narrow else dtypes
    references = draw(sizes, kinds, seed=3)[:given_references]
    exact = exact_direction(grads, references, params, segments, coefficient, rule, parameter)
    found = {}
    for reference in (False, True):
        found[reference] = clones(grads)
        record = new_record(rows, DEVICE)
        options = {"segments": segments, "coefficient": coefficient, "rule": rule, "parameter": parameter}
        project_gradients_(found[reference], references, params=params, record=record, reference=reference, **options)
        assert (record[:, 3] == 1).all()
        assert torch.equal(record[:, 4], (record[:, 0] < 0).double())
    for kernel, plain, right in zip(found[False], found[True], exact, strict=True):
        if kernel.dtype == torch.float64:
            torch.testing.assert_close(kernel, right, rtol=1e-9, atol=1e-9)
        elif kernel.dtype != torch.float16 or right.abs().max() < 60000 if right.numel() else True:
            assert_within_budget(kernel, plain, right)


@settings(max_examples=60)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 31, 1025, 20000]), min_size=1, max_size=5),
    scope=st.sampled_from(["global", "tensor"]),
    rule=st.sampled_from(RULES),
    momentum=st.sampled_from([0.0, 0.9]),
    dampening=st.sampled_from([0.0, 0.3]),
    weight_decay=st.sampled_from([0.0, 0.05]),
    nesterov=st.booleans(),
    maximize=st.booleans(),
    first_step=st.booleans(),
    anchored=st.booleans(),
    scale=st.sampled_from([None, 8.0]),
)
def test_sgd_steps_along_the_direction(
    sizes, scope, rule, momentum, dampening, weight_decay, nesterov, maximize, first_step, anchored, scale
):
    params, grads, references = (draw(sizes, seed=s) for s in (1, 2, 3))
    references = references[: max(1, len(sizes) - 1)]
    buffers = draw(sizes, seed=4) if momentum else []
    if first_step:
        for buffer in buffers:
            buffer.fill_(torch.nan)  # which is not read
    segments = segments_of(scope, len(sizes))
    factor = 1.0 if scale is None else scale
    g = [grad.double() / factor * (-1 if maximize else 1) for grad in grads]
    r = references if anchored else [reference.double() / factor for reference in references]
    steps = exact_direction(g, r, params if anchored else [], segments, 0.2, rule, 0.4)
    steps = [d + weight_decay * w for d, w in zip(steps, double(params), strict=True)]
    if momentum:
        old = double(buffers)
        new = steps if first_step else [momentum * b + (1 - dampening) * d for b, d in zip(old, steps, strict=True)]
        steps = [d + momentum * b for d, b in zip(steps, new, strict=True)] if nesterov else new
    exact = [w - 0.1 * d for w, d in zip(double(params), steps, strict=True)]
    found = {}
    for reference in (False, True):
        w, own, b = clones(params), clones(grads), clones(buffers)
        sgd_(
            w,
            own,
            references,
            b,
            record=new_record(max(segments) + 1, DEVICE),
            segments=segments,
            anchored=anchored,
            coefficient=0.2,
            rule=rule,
            parameter=0.4,
            lr=0.1,
            momentum=momentum,
            dampening=dampening,
            weight_decay=weight_decay,
            nesterov=nesterov,
            maximize=maximize,
            first_step=first_step,
            grad_scale=None if scale is None else torch.tensor([scale], device=DEVICE),
            reference=reference,
        )
        found[reference] = w
        if momentum:
            for buffer, right in zip(b, new, strict=True):
                torch.testing.assert_close(buffer.double(), right, rtol=1e-4, atol=1e-5)
        for grad, before in zip(own, grads, strict=True):
            assert torch.equal(grad, before / factor), "g is unscaled, as torch's fused optimizers do, and else kept"
    for kernel, plain, right in zip(found[False], found[True], exact, strict=True):
        assert_within_budget(kernel, plain, right)


@settings(max_examples=40)
@given(
    sizes=st.lists(st.sampled_from([0, 1, 31, 1025, 20000]), min_size=1, max_size=5),
    scope=st.sampled_from(["global", "tensor"]),
    rule=st.sampled_from(RULES),
    weight_decay=st.sampled_from([0.0, 0.05]),
    maximize=st.booleans(),
    anchored=st.booleans(),
    step=st.sampled_from([1, 2, 1000]),
)
def test_adamw_steps_along_the_direction(sizes, scope, rule, weight_decay, maximize, anchored, step):
    params, grads, references = (draw(sizes, seed=s) for s in (1, 2, 3))
    averages, squares = draw(sizes, seed=4), [x.abs() for x in draw(sizes, seed=5)]
    steps = [torch.tensor(float(step), device=DEVICE) for _ in sizes]
    segments = segments_of(scope, len(sizes))
    g = [-grad if maximize else grad for grad in grads]
    directions = exact_direction(g, references, params if anchored else [], segments, 0.2, rule, 0.4)
    average = [0.9 * m + 0.1 * d for m, d in zip(double(averages), directions, strict=True)]
    square = [0.99 * v + 0.01 * d * d for v, d in zip(double(squares), directions, strict=True)]
    exact = [
        w * (1 - 0.1 * weight_decay) - 0.1 / (1 - 0.9**step) * m / (v.sqrt() / math.sqrt(1 - 0.99**step) + 1e-8)
        for w, m, v in zip(double(params), average, square, strict=True)
    ]
    found = {}
    for reference in (False, True):
        w, m, v = clones(params), clones(averages), clones(squares)
        adamw_(
            w,
            clones(grads),
            references,
            m,
            v,
            steps,
            record=new_record(max(segments) + 1, DEVICE),
            segments=segments,
            anchored=anchored,
            coefficient=0.2,
            rule=rule,
            parameter=0.4,
            lr=0.1,
            beta1=0.9,
            beta2=0.99,
            eps=1e-8,
            weight_decay=weight_decay,
            maximize=maximize,
            reference=reference,
        )
        found[reference] = w
        for own, right in zip((*m, *v), (*average, *square), strict=True):
            torch.testing.assert_close(own.double(), right, rtol=1e-4, atol=1e-5)
    for kernel, plain, right in zip(found[False], found[True], exact, strict=True):
        assert_within_budget(kernel, plain, right)


def project(g, r, rule="dtnh", coefficient=1.0, parameter=0.0, reference=False):
    """d and the record of one tensor."""
    d, record = [g.clone().to(DEVICE)], new_record(1, DEVICE)
    project_gradients_(
        d,
        [r.to(DEVICE)],
        record=record,
        segments=[0],
        coefficient=coefficient,
        rule=rule,
        parameter=parameter,
        reference=reference,
    )
    return d[0].cpu(), record.cpu()


REFERENCE = pytest.mark.parametrize("reference", [False, True], ids=["kernel", "reference"])


@REFERENCE
@given(seed=st.integers(0, 10_000), coefficient=st.floats(1e-3, 10), n=st.integers(2, 300))
def test_a_conflict_leaves_the_loss_its_descent_and_else_it_is_the_sum(reference, seed, coefficient, n):
    generator = torch.Generator().manual_seed(seed)
    g, r = torch.randn(2, n, generator=generator, dtype=torch.float64)
    d, record = project(g, r, coefficient=coefficient, reference=reference)
    if g @ r < 0:
        torch.testing.assert_close(d @ g, g @ g, rtol=1e-10, atol=1e-12)
    else:
        torch.testing.assert_close(d, g + coefficient * r, rtol=1e-12, atol=1e-12)
    torch.testing.assert_close(
        record[0, :3], torch.stack((coefficient * (g @ r), g @ g, coefficient**2 * (r @ r))), rtol=1e-10, atol=1e-12
    )


@REFERENCE
def test_it_is_continuous_where_the_conflict_begins(reference):
    g, across = torch.tensor([1.0, 2.0, -1.0]).double(), torch.tensor([2.0, -1.0, 0.0]).double()
    right = g + across
    for step in (1e-3, 1e-6, 1e-9, 0.0):
        for sign in (-1, 1):
            d, _ = project(g, across + sign * step * g, reference=reference)
            assert (d - right).norm() <= 4 * step * g.norm()


@REFERENCE
@pytest.mark.parametrize("rule", RULES)
def test_zero_gradients_zero_regularizers_and_zero_coefficients_divide_nothing(rule, reference):
    g, r, nothing = torch.tensor([1.0, -2.0]), torch.tensor([-3.0, 1.0]), torch.zeros(2)
    pulled = 0.5 * r if rule in ("l2sp", "dtnh", "pcgrad", "gradvac") else nothing
    torch.testing.assert_close(project(nothing, r, rule, 0.5, reference=reference)[0], pulled)
    assert torch.equal(project(g, nothing, rule, 0.5, reference=reference)[0], g)
    assert torch.equal(project(g, r, rule, 0.0, 0.5, reference=reference)[0], g), "λ = 0 is the plain gradient"


@REFERENCE
@pytest.mark.parametrize("value", [torch.nan, torch.inf, -torch.inf])
@pytest.mark.parametrize("rule", RULES)
def test_what_is_not_finite_is_not_hidden(rule, value, reference):
    g = torch.tensor([1.0, value, 2.0])
    d, _ = project(g, torch.tensor([1.0, 1.0, -4.0]), rule, reference=reference)
    assert not d[1].isfinite()
    if rule not in ("none", "agem", "digrap"):
        d, _ = project(torch.tensor([1.0, 2.0, 3.0]), g, rule, reference=reference)
        assert not d[1].isfinite()


def test_global_and_tensor_scope_differ_where_one_tensor_agrees_and_another_does_not():
    g = [torch.tensor([1.0, 0.0]), torch.tensor([1.0, 0.0])]
    r = [torch.tensor([3.0, 1.0]), torch.tensor([-1.0, 1.0])]
    found = {}
    for scope in ("global", "tensor"):
        found[scope] = [x.clone().to(DEVICE) for x in g]
        segments = segments_of(scope, 2)
        record = new_record(max(segments) + 1, DEVICE)
        options = {"record": record, "segments": segments, "coefficient": 1.0, "rule": "dtnh"}
        project_gradients_(found[scope], [x.to(DEVICE) for x in r], **options)
    assert torch.equal(found["global"][1].cpu(), torch.tensor([0.0, 1.0])), "all in all there is no conflict"
    assert torch.equal(found["tensor"][1].cpu(), torch.tensor([1.0, 1.0])), "in the second tensor there is one"


def step_all(kind, sizes, segments, threads=None, dtype=torch.float32, **options):
    """The bits that a step leaves behind."""
    params, grads, references = (draw(sizes, (dtype,), seed=s) for s in (1, 2, 3))
    states = [draw(sizes, (dtype,), seed=4), [x.abs() for x in draw(sizes, (dtype,), seed=5)]]
    record = new_record(max(segments) + 1, DEVICE)
    common = {"record": record, "segments": segments, "anchored": True, "coefficient": 0.1, "rule": "dtnh", "lr": 0.1}
    before = torch.get_num_threads()
    torch.set_num_threads(threads or before)
    try:
        if kind == "sgd":
            sgd_(params, grads, references, states[0], momentum=0.9, **common, **options)
        else:
            steps = [torch.ones((), device=DEVICE) for _ in sizes]
            betas = {"beta1": 0.9, "beta2": 0.99, "eps": 1e-8, "weight_decay": 0.01}
            adamw_(params, grads, references, *states, steps, **common, **betas, **options)
    finally:
        torch.set_num_threads(before)
    return [*params, *grads, *states[0], *states[1], record]


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@pytest.mark.parametrize("segments", [[0, 0, 0, 0], [0, 1, 2, 3], [0, 1, 0, -1]], ids=str)
def test_the_bits_are_the_same_again_and_for_any_number_of_threads(segments, kind, dtype):
    sizes = [LARGE, 3, 50_001, 17_000]
    right = step_all(kind, sizes, segments, 1, dtype)
    for threads in (1, 2, 3):
        for a, b in zip(right, step_all(kind, sizes, segments, threads, dtype), strict=True):
            assert torch.equal(a, b)


@pytest.mark.parametrize("scope", ["global", "tensor"])
def test_the_moments_of_a_large_tensor_are_those_of_float64(scope):
    sizes = [LARGE, 5]
    segments = segments_of(scope, 2)
    *_, record = step_all("sgd", sizes, segments)
    params, grads, references = (draw(sizes, seed=s) for s in (1, 2, 3))
    own = moments(grads, references, params=params)
    for i, (w, g, w0) in enumerate(zip(*map(double, (params, grads, references)), strict=True)):
        r = 2 * (w - w0)
        torch.testing.assert_close(
            own[i], torch.stack((g @ r, g @ g, r @ r)), rtol=1e-6, atol=1e-6 * g.norm() * r.norm()
        )
    weighted = own * torch.tensor([0.1, 1.0, 0.01], device=DEVICE, dtype=torch.float64)
    right = weighted.sum(0, keepdim=True) if scope == "global" else weighted
    torch.testing.assert_close(record[:, :3], right, rtol=1e-12, atol=1e-12)


@pytest.mark.parametrize("kind", ["sgd", "adamw"])
@REFERENCE
def test_a_step_that_found_infinities_changes_nothing_and_is_counted(kind, reference):
    sizes, segments = [5, 2000], [0, 1]
    flags = {"grad_scale": torch.tensor([4.0], device=DEVICE), "reference": reference}
    after = step_all(kind, sizes, segments, found_inf=torch.ones(1, device=DEVICE), **flags)
    params, grads = draw(sizes, seed=1), draw(sizes, seed=2)
    states = [*draw(sizes, seed=4), *(x.abs() for x in draw(sizes, seed=5))]
    for own, before in zip(after[:-1], [*params, *grads, *states], strict=True):
        assert torch.equal(own, before)
    record = after[-1].cpu()
    assert record[:, :3].isnan().all()
    assert record[:, 3:].tolist() == [[0, 0, 1]] * 2
    taken = step_all(kind, sizes, segments, found_inf=torch.zeros(1, device=DEVICE), **flags)
    assert not torch.equal(taken[0], params[0])
    assert taken[-1][:, 5].tolist() == [0, 0]


def test_moments_that_stand_in_the_record_are_taken_and_rules_that_need_none_measure_none():
    g, r = torch.tensor([1.0, 0.0], device=DEVICE), torch.tensor([0.0, 1.0], device=DEVICE)
    record = new_record(1, DEVICE)
    record[0, :3] = torch.tensor([-2.0, 4.0, 1.0])  # of other ranks too
    d = [g.clone()]
    options = {"record": record, "segments": [0], "coefficient": 1.0, "reduce": False}
    project_gradients_(d, [r], rule="dtnh", **options)
    assert d[0].tolist() == [1.5, 1.0]
    assert record[0].tolist() == [-2.0, 4.0, 1.0, 1.0, 1.0, 0.0]
    assert {"none", "l2sp"}.isdisjoint(NEEDS_MOMENTS)
    for rule in ("none", "l2sp"):
        record = new_record(1, DEVICE)
        project_gradients_([g.clone()], [r], rule=rule, **options | {"record": record})
        assert record[0, :3].isnan().all()
        assert record[0, 3:].tolist() == [1, 0, 0]


def test_rates_and_coefficients_may_be_tensors():
    found = []
    for wrap in (float, lambda x: torch.tensor(x), lambda x: torch.tensor([x], dtype=torch.float32, device=DEVICE)):
        params, grads, references = (draw([700], seed=s) for s in (1, 2, 3))
        record = new_record(1, DEVICE)
        options = {"record": record, "segments": [0], "anchored": True, "rule": "dtnh"}
        sgd_(params, grads, references, [], coefficient=wrap(0.25), lr=wrap(0.5), **options)
        found.append(params[0])
    assert torch.equal(found[0], found[1])
    assert torch.equal(found[0], found[2])


def test_autograd_hears_of_the_change():
    w = torch.nn.Parameter(torch.ones(3, device=DEVICE))
    loss = (w * w).sum()
    options = {"record": new_record(1, DEVICE), "segments": [0], "anchored": True, "coefficient": 1.0, "rule": "dtnh"}
    sgd_([w], [torch.ones(3, device=DEVICE)], [torch.zeros(3, device=DEVICE)], [], lr=0.1, **options)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        loss.backward()


def _arguments(kind):
    scalar = torch.tensor(0.1, dtype=torch.float64)
    params, grads, references, first, second = (draw([5, 0, 33], seed=s) for s in (1, 2, 3, 4, 5))
    tail = (False, torch.ones(1, device=DEVICE), torch.zeros(1, device=DEVICE))
    record, projection = new_record(2, DEVICE), (scalar, RULES.index("pcgrad"), 0.0, True)
    segments = [0, 1, -1]
    if kind == "moments":
        return ops._MOMENTS, (grads, references[:2], params, False, None)
    if kind == "combine":
        return ops._COMBINE, (grads, references[:2], params, record, segments, *projection)
    if kind == "sgd":
        settings = (scalar, 0.9, 0.0, 0.01, True, False, *tail)
        return ops._SGD, (params, grads, references[:2], first, record, segments, True, *projection, *settings)
    steps = [torch.ones((), device=DEVICE) for _ in params]
    settings = (scalar, 0.9, 0.99, 1e-8, 0.01, *tail)
    squares = [x.abs() for x in second]
    return ops._ADAMW, (
        *(params, grads, references[:2], first, squares, steps),
        *(record, segments, True, *projection, *settings),
    )


@pytest.mark.parametrize("kind", ["moments", "combine", "sgd", "adamw"])
def test_opcheck(kind):
    operator, arguments = _arguments(kind)
    torch.library.opcheck(operator, arguments)


def test_under_torch_compile():
    def step(grads, references, record):
        doubled = [grad * 2 for grad in grads]
        project_gradients_(doubled, references, record=record, segments=[0, 0], coefficient=0.5, rule="dtnh")
        return [grad + 1 for grad in doubled]

    grads, references = draw([40, 7], seed=1), draw([40, 7], seed=2)
    right, record = step(grads, references, first := new_record(1, DEVICE)), new_record(1, DEVICE)
    compiled = torch.compile(step, fullgraph=True, backend="aot_eager")(grads, references, record)
    for a, b in zip(right, compiled, strict=True):
        assert torch.equal(a, b)
    assert torch.equal(first, record)


def test_bad_input_is_named():
    a, b, c = (torch.ones(n, device=DEVICE) for n in (3, 3, 4))
    good = {"record": new_record(1, DEVICE), "segments": [0], "coefficient": 1.0, "rule": "dtnh"}
    for change, lists, message in (
        ({"rule": "cagrad"}, ([a], [b]), "rule: expected one of none, l2sp, dtnh"),
        ({}, ([a], [b, b]), "references: expected at most 1, one a tensor, got 2"),
        ({"segments": [0, 0]}, ([a], [b]), "segments: expected 1, one a tensor, got 2"),
        ({"params": [a, a]}, ([a], [b]), "params: expected 1, one a tensor, got 2"),
        ({"segments": [1]}, ([a], [b]), "segments: expected rows of the record, -1 to 0, got 1"),
        ({}, ([a], [c]), "references: expected 3 elements, got 4"),
        ({"params": [b.double()]}, ([a], [b]), "params: expected Float as the others of tensor 0, got Double"),
        ({}, ([a.long()], [b]), "grads: expected float32, bfloat16, float16 or float64, got Long"),
        ({"record": torch.zeros(1, 3, device=DEVICE)}, ([a], [b]), "record: expected a contiguous float64 tensor"),
    ):
        with pytest.raises((ValueError, RuntimeError), match=message):
            project_gradients_(*lists, **good | change)
    step = good | {"anchored": True, "lr": 0.1}
    with pytest.raises(ValueError, match="momentum_buffers: expected 1 tensors, got 0"):
        sgd_([a], [b], [b], [], momentum=0.9, **step)
    with pytest.raises(ValueError, match="grads: expected 1, one a tensor, got 2"):
        sgd_([a], [b, b], [b], [], **step)


def test_an_empty_list_is_no_step_of_anything():
    record = new_record(1, DEVICE)
    project_gradients_([], [], record=record, segments=[], coefficient=1.0, rule="dtnh")
    assert record[0].tolist() == [0, 0, 0, 1, 0, 0]
    assert moments([], []).shape == (0, 3)
