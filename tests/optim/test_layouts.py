"""Parameters of every shape, layout and dtype that a model can have."""

import pytest
import torch
from torch import Tensor, nn

from moe_kernels.optim import AnchoredAdamW, AnchoredSGD, project_gradients_

KINDS = {
    "sgd": (AnchoredSGD, {"lr": 0.1}),
    "momentum": (AnchoredSGD, {"lr": 0.1, "momentum": 0.9}),
    "adamw": (AnchoredAdamW, {"lr": 0.1}),
}
LAYOUTS = {
    "contiguous": lambda x: x.contiguous(),
    "channels_last": lambda x: x.contiguous(memory_format=torch.channels_last),
    "transposed": lambda x: x.transpose(0, 3).contiguous().transpose(0, 3),
    "gaps": lambda x: torch.stack((x, torch.full_like(x, torch.nan)), dim=-1)[..., 0],
}


@pytest.fixture(params=KINDS)
def kind(request):
    return KINDS[request.param]


@pytest.fixture(params=[{}, {"foreach": True}], ids=["kernels", "reference"])
def backend(request):
    return request.param


def run(kind, params, grads, anchors, steps=3, **kwargs):
    ours, options = kind
    optimizer = ours(params, anchor=anchors, coefficient=0.3, **options, **kwargs)
    for _ in range(steps):
        for param, grad in zip(params, grads, strict=True):
            param.grad = None if grad is None else clone(grad)
        optimizer.step()
    return [param.detach() for param in params], optimizer


def clone(tensor):
    """With the strides, and the gaps, of ``tensor``."""
    result = torch.full((tensor.untyped_storage().size() // tensor.element_size(),), torch.nan, dtype=tensor.dtype)
    return result.as_strided(tensor.shape, tensor.stride()).copy_(tensor)


@pytest.mark.parametrize("of_anchor", LAYOUTS)
@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_layouts_do_not_matter(kind, backend, of_param, of_grad, of_anchor):
    torch.manual_seed(0)
    w, g, anchor = (torch.randn(4, 3, 2, 5) for _ in range(3))
    expected, _ = run(kind, [nn.Parameter(w.clone())], [g], [anchor], **backend)
    param = nn.Parameter(LAYOUTS[of_param](w.clone()))
    strides, neighbours = param.stride(), param.untyped_storage().size()
    found, optimizer = run(kind, [param], [LAYOUTS[of_grad](g)], [LAYOUTS[of_anchor](anchor)], **backend)
    torch.testing.assert_close(found[0], expected[0])
    assert param.stride() == strides
    assert param.untyped_storage().size() == neighbours
    for key, state in optimizer.state[param].items():
        if key != "step":
            assert state.untyped_storage().nbytes() == state.numel() * state.element_size(), key


def test_strides_of_dimensions_of_size_one_do_not_matter(kind, monkeypatch):
    """A 1×1 convolution in channels_last: other strides, the same memory, and nothing is copied."""
    weight = nn.Parameter(torch.randn(4, 3, 1, 1).contiguous(memory_format=torch.channels_last))
    ours, options = kind
    optimizer = ours([weight], anchor=[torch.zeros(4, 3, 1, 1)], coefficient=0.3, **options)
    weight.grad = torch.randn(4, 3, 1, 1).as_strided((4, 3, 1, 1), (3, 1, 3, 3))
    assert weight.grad.stride() != weight.stride()
    before = weight.detach().clone()
    monkeypatch.setattr(Tensor, "copy_", None)
    optimizer.step()
    assert not torch.equal(weight, before)


def test_a_model_whose_layout_changes_on_the_way(kind, backend):
    torch.manual_seed(0)
    w, g, anchor = (torch.randn(4, 3, 2, 5) for _ in range(3))
    expected, _ = run(kind, [nn.Parameter(w.clone())], [g], [anchor], **backend)
    param = nn.Parameter(w.clone())
    ours, options = kind
    optimizer = ours([param], anchor=[anchor], coefficient=0.3, **options, **backend)
    for step in range(3):
        if step == 1:
            param.data = param.data.contiguous(memory_format=torch.channels_last)
        param.grad = g.clone()
        optimizer.step()
    torch.testing.assert_close(param.detach(), expected[0])
    assert optimizer.state[param]["anchor"].stride() == param.stride()


def test_a_loaded_state_of_another_layout(kind, backend):
    torch.manual_seed(0)
    w, g, anchor = (torch.randn(4, 3, 2, 5) for _ in range(3))
    expected, _ = run(kind, [nn.Parameter(w.clone())], [g], [anchor], steps=2, **backend)
    param = nn.Parameter(w.clone())
    _, optimizer = run(kind, [param], [g], [anchor], steps=1, **backend)
    state = optimizer.state_dict()
    for key, value in state["state"][0].items():
        if key != "step":
            state["state"][0][key] = value.contiguous(memory_format=torch.channels_last)
    optimizer.load_state_dict(state)
    param.grad = g.clone()
    optimizer.step()
    torch.testing.assert_close(param.detach(), expected[0])


def test_a_list_of_everything(kind, backend):
    """Scalars, nothing, vectors and matrices of four dtypes beside one another, against each by itself in float64."""
    torch.manual_seed(0)
    shapes = [(), (0,), (3, 0, 2), (5,), (4, 3), (1, 1)]
    dtypes = [torch.float32, torch.bfloat16, torch.float16, torch.float64]
    w, g, anchors = ([torch.randn(shape, dtype=torch.float64) for shape in shapes for _ in dtypes] for _ in range(3))
    kinds = dtypes * len(shapes)
    params = [nn.Parameter(x.to(dtype)) for x, dtype in zip(w, kinds, strict=True)]
    grads = [x.to(dtype) for x, dtype in zip(g, kinds, strict=True)]
    anchors = [x.float() for x in anchors]
    exact = [nn.Parameter(param.detach().double().clone()) for param in params]
    expected, reference = run(kind, exact, [grad.double() for grad in grads], anchors, steps=1)
    found, optimizer = run(kind, params, grads, anchors, steps=1, **backend)
    for param, value, dtype in zip(found, expected, kinds, strict=True):
        assert param.dtype == dtype
        torch.testing.assert_close(
            param.double(), value, rtol=4 * torch.finfo(dtype).eps, atol=4 * torch.finfo(dtype).eps
        )
    torch.testing.assert_close(optimizer.facts().cosine, reference.facts().cosine, rtol=1e-5, atol=1e-6)


def test_only_empty_parameters(kind, backend):
    found, optimizer = run(kind, [nn.Parameter(torch.empty(0))], [torch.empty(0)], [torch.empty(0)], **backend)
    assert found[0].numel() == 0
    assert optimizer.facts().scale.tolist() == [1]


@pytest.mark.parametrize("of_grad", LAYOUTS)
@pytest.mark.parametrize("of_param", LAYOUTS)
def test_project_gradients_writes_into_any_layout(of_param, of_grad):
    torch.manual_seed(0)
    w, g, r = (torch.randn(4, 3, 2, 5) for _ in range(3))
    r = r - g
    assert (g * r).sum() < 0
    param = nn.Parameter(LAYOUTS[of_param](w))
    param.grad = LAYOUTS[of_grad](g.clone())
    same = param.grad
    project_gradients_([param], [r], coefficient=0.5)
    assert param.grad is same
    torch.testing.assert_close(param.grad, (1 - 0.5 * (g * r).sum() / (g * g).sum()) * g + 0.5 * r)
