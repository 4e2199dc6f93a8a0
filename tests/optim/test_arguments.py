"""What the optimizers refuse, and how they say so."""

import pytest
import torch
from torch import nn

from moe_kernels import backend
from moe_kernels.optim import AnchoredAdamW, AnchoredSGD, project_gradients_

OPTIMIZERS = [AnchoredSGD, AnchoredAdamW]


def network():
    return nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4))


def copies(model):
    return {name: parameter.detach().clone() for name, parameter in model.named_parameters()}


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize(
    ("kwargs", "message"),
    [
        ({"coefficient": -0.1}, "coefficient: expected a finite number ≥ 0, got -0.1"),
        ({"coefficient": float("nan")}, "coefficient: expected a finite number ≥ 0, got nan"),
        ({"coefficient": float("inf")}, "coefficient: expected a finite number ≥ 0, got inf"),
        (
            {"coefficient": torch.ones(2)},
            r"coefficient: expected a number or a tensor of one element, got shape \(2,\)",
        ),
        ({"rule": "surgery"}, "rule: expected one of none, l2sp, dtnh, pcgrad, agem, digrap, gradvac, got 'surgery'"),
        ({"scope": "layer"}, "scope: expected one of global, tensor, group, got 'layer'"),
        ({"omega": 1.1}, r"omega: expected a number in \[0, 1\], got 1.1"),
        ({"target_cosine": 1.0}, r"target_cosine: expected a number in \[-1, 1\), got 1.0"),
        ({"lr": -1.0}, "lr: expected a finite number ≥ 0, got -1.0"),
        ({"weight_decay": -1.0}, "weight_decay: expected a finite number ≥ 0, got -1.0"),
        ({"coefficient": torch.tensor(-0.5)}, "coefficient: expected a finite number ≥ 0, got -0.5"),
    ],
)
def test_numbers_and_names(optimizer, kwargs, message):
    with pytest.raises(ValueError, match=f"^{message}$"):
        optimizer(network().parameters(), **({"coefficient": 0.1} | kwargs))


def test_numbers_of_one_optimizer():
    parameters = list(network().parameters())
    with pytest.raises(TypeError, match="coefficient: expected a number or a tensor of one element, got str"):
        AnchoredSGD(parameters, coefficient="0.1")
    with pytest.raises(ValueError, match="momentum: expected a finite number ≥ 0, got -1"):
        AnchoredSGD(parameters, coefficient=0.1, momentum=-1)
    with pytest.raises(ValueError, match="nesterov: expected a momentum > 0 and no dampening"):
        AnchoredSGD(parameters, coefficient=0.1, nesterov=True)
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got \(0.9, 1.0\)"):
        AnchoredAdamW(parameters, coefficient=0.1, betas=(0.9, 1.0))
    with pytest.raises(ValueError, match=r"betas: expected two numbers in \[0, 1\), got 0.9"):
        AnchoredAdamW(parameters, coefficient=0.1, betas=0.9)
    with pytest.raises(ValueError, match="dampening: expected a finite number"):
        AnchoredSGD(parameters, coefficient=0.1, momentum=0.9, dampening=float("nan"))
    with pytest.raises(TypeError, match="omega: expected a number"):
        AnchoredSGD(parameters, coefficient=0.1, omega="a")
    with pytest.raises(ValueError, match="eps: expected a finite number ≥ 0, got -1"):
        AnchoredAdamW(parameters, coefficient=0.1, eps=-1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_anchors_that_do_not_fit(optimizer):
    model = network()
    names, anchors = list(copies(model)), list(copies(model).values())

    def make(anchor, params=None):
        return optimizer(model.parameters() if params is None else params, anchor=anchor, coefficient=0.1)

    with pytest.raises(ValueError, match="anchor: expected 4, a tensor or None for every parameter, got 3"):
        make(anchors[:3])
    with pytest.raises(
        ValueError,
        match=r"anchor: expected the shapes of the parameters: parameter 0 has \(4, 3\), got \(3, 4\); "
        r"parameter 3 has \(4,\), got \(2,\)$",
    ):
        make([anchors[0].T, anchors[1], None, anchors[3][:2]])
    with pytest.raises(ValueError, match=r"1\.bias has \(4,\), got \(3,\)$"):
        make({"1.bias": torch.ones(3)}, model.named_parameters())
    with pytest.raises(
        ValueError, match=r"got '1.running_mean', .*num_batches_tracked'; pass the named_parameters\(\) of"
    ):
        make(model.state_dict(), model.named_parameters())
    with pytest.raises(ValueError, match=r"anchor: a mapping needs names, pass model.named_parameters\(\)"):
        make(dict(zip(names, anchors, strict=True)))
    with pytest.raises(TypeError, match="anchor: expected a sequence or a mapping of tensors, got Tensor"):
        make(anchors[0])
    with pytest.raises(TypeError, match=r"dense floating-point tensors or None, got torch.int64 for parameter 1"):
        make([None, anchors[1].long(), None, None])
    with pytest.raises(TypeError, match="expected dense floating-point tensors or None, got float for parameter 1"):
        make([None, 0.0, None, None])
    with pytest.raises(TypeError, match=r"got torch\.sparse_coo for parameter 1"):
        make([None, anchors[1].to_sparse(), None, None])
    with pytest.raises(TypeError, match="got a meta tensor for parameter 1"):
        make([None, anchors[1].to("meta"), None, None])
    broken = [anchors[0], anchors[1] / 0 * 0, anchors[2], anchors[3] + torch.inf]
    with pytest.raises(ValueError, match=r"anchor: expected finite values, got others for parameter 1, parameter 3$"):
        make(broken)
    with pytest.raises(ValueError, match="anchor: expected the argument or one in the groups, got both"):
        make(anchors, [{"params": model.parameters(), "anchor": anchors}])


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_names_have_to_tell_the_parameters(optimizer):
    one, other = nn.Linear(2, 2), nn.Linear(2, 2)
    groups = [{"params": one.named_parameters()}, {"params": other.named_parameters()}]
    message = "anchor: a mapping needs a name of its own for every parameter, got "
    with pytest.raises(ValueError, match=f"{message}bias, weight twice"):
        optimizer(groups, anchor=copies(one), coefficient=0.1)
    groups = [{"params": one.named_parameters()}, {"params": other.parameters()}]
    with pytest.raises(ValueError, match=f"{message}2 of 4 without"):
        optimizer(groups, anchor=copies(one), coefficient=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
@pytest.mark.parametrize("name", ["rule", "scope", "anchored_only", "omega", "target_cosine", "measure"])
def test_options_of_all_groups_are_refused_in_one(optimizer, name):
    with pytest.raises(ValueError, match=f"{name}: expected as an argument, the same for all groups"):
        optimizer([{"params": [nn.Parameter(torch.ones(2))], name: "none"}], coefficient=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_parameter_of_another_shape_by_now(optimizer):
    weight = nn.Parameter(torch.ones(4, 6))
    made = optimizer([weight], anchor=[torch.zeros(4, 6)], coefficient=0.1)
    weight.data = torch.ones(3, 8)
    weight.grad = torch.ones(3, 8)
    with pytest.raises(RuntimeError, match=r"parameter 0 of its group: expected .* by now, \(3, 8\), got \(4, 6\)"):
        made.step()
    assert torch.equal(weight, torch.ones(3, 8))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_of_nothing(optimizer):
    made = optimizer([{"params": []}], coefficient=0.1)
    made.step()
    assert made.facts().steps.tolist() == [0]


@pytest.mark.filterwarnings("ignore:optimizer contains a parameter group with duplicate parameters")
@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_group_that_does_not_fit_is_not_added(optimizer):
    model = network()
    made = optimizer([model[0].weight], coefficient=0.1)
    for wrong, message in (
        ({"anchor": [torch.ones(3)]}, r"parameter 1 has \(4,\), got \(3,\)"),
        ({"anchor": [torch.full((4,), torch.nan)]}, "got others for parameter 1"),
        ({"coefficient": -1.0}, "coefficient: "),
        ({"params": [model[0].bias, model[0].bias]}, "params: expected every parameter once"),
    ):
        with pytest.raises(ValueError, match=message):
            made.add_param_group({"params": [model[0].bias]} | wrong)
        assert len(made.param_groups) == 1
        assert model[0].bias not in made.state
    made.add_param_group({"params": [model[0].bias], "anchor": [torch.ones(4)]})
    assert torch.equal(made.state[model[0].bias]["anchor"], torch.ones(4))
    assert "anchor" not in made.param_groups[1]


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_parameters_that_do_not_fit(optimizer):
    with pytest.raises(
        TypeError, match=r"params: expected floating-point tensors, got torch.complex64 for parameter 1"
    ):
        optimizer([nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2, dtype=torch.complex64))], coefficient=0.1)
    weight = nn.Parameter(torch.ones(2))
    for anchor in (None, [torch.zeros(2)]):
        with pytest.raises(TypeError, match="iterable of Tensors"):
            optimizer(weight, anchor=anchor, coefficient=0.1)
        with pytest.raises(TypeError, match="ordered collections"):
            optimizer([{"params": {weight}}], anchor=anchor, coefficient=0.1)
    with pytest.raises(ValueError, match="more than one parameter group"):
        optimizer([{"params": [weight]}, {"params": [weight]}], coefficient=0.1)
    with pytest.raises(ValueError, match="empty parameter list"):
        optimizer([], anchor=[], coefficient=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_steps_that_lack_or_double_the_regularizer(optimizer):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(ValueError, match="regularizer_grads: rule 'dtnh' needs the regularizer's gradient"):
        optimizer([weight], coefficient=0.1).step()
    optimizer([weight], coefficient=0.1, rule="none").step()
    anchored = optimizer([weight], anchor=[torch.zeros(2)], coefficient=0.1)
    with pytest.raises(ValueError, match="regularizer_grads: expected None where there are anchors, got both"):
        anchored.step(regularizer_grads=[torch.ones(2)])
    free = optimizer([("w", weight)], coefficient=0.1)
    with pytest.raises(ValueError, match=r"regularizer_grads: expected the shapes .* w has \(2,\), got \(3,\)"):
        free.step(regularizer_grads=[torch.ones(3)])
    with pytest.raises(ValueError, match="regularizer_grads: expected 1, a tensor or None for every parameter, got 2"):
        free.step(regularizer_grads=[None, None])
    with pytest.raises(ValueError, match="regularizer_grads: expected names of parameters, got 'v'"):
        free.step(regularizer_grads={"v": torch.ones(2)})


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_a_phase_in_which_only_the_head_trains(optimizer):
    """Anchored parameters without a gradient are no reason to refuse the step."""
    body, head = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    made = optimizer([body, head], anchor=[torch.zeros(2), None], coefficient=0.1)
    head.grad = torch.ones(2)
    made.step()
    assert torch.equal(body, torch.ones(2))
    assert not torch.equal(head, torch.ones(2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_no_gradients_at_all(optimizer):
    weight = nn.Parameter(torch.ones(2))
    optimizer([weight], anchor=[torch.zeros(2)], coefficient=0.1).step()
    assert torch.equal(weight, torch.ones(2))


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_sparse_gradients_are_refused_by_name(optimizer):
    embedding = nn.Embedding(5, 3, sparse=True)
    dense = nn.Linear(3, 1)
    model = nn.ModuleDict({"embedding": embedding, "dense": dense})
    made = optimizer(model.named_parameters(), anchor=copies(model), coefficient=0.1)
    dense(embedding(torch.tensor([1, 2]))).sum().backward()
    before = copies(model)
    with pytest.raises(RuntimeError, match=r"grad: expected dense gradients, got sparse ones for embedding\.weight$"):
        made.step()
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, before[name])
    with pytest.raises(RuntimeError, match=r"got sparse ones for parameter 0$"):
        project_gradients_(model.parameters(), list(before.values()), coefficient=0.1)


@pytest.mark.parametrize("optimizer", OPTIMIZERS)
def test_fused_and_foreach(optimizer):
    weight = nn.Parameter(torch.ones(2))
    with pytest.raises(RuntimeError, match="fused, foreach: expected one of them to be True at most"):
        optimizer([weight], coefficient=0.1, fused=True, foreach=True)
    with backend.force("reference"), pytest.raises(RuntimeError, match=r"fused: .* no kernel for torch.float32 on cpu"):
        optimizer([weight], coefficient=0.1, fused=True)


def test_tied_parameters_count_once():
    model = nn.Sequential(nn.Linear(3, 3, bias=False), nn.Linear(3, 3, bias=False))
    model[1].weight = model[0].weight
    start = model[0].weight.detach().clone()
    optimizer = AnchoredSGD(
        model.named_parameters(), lr=1.0, anchor={"0.weight": start + 1}, coefficient=0.1, rule="l2sp"
    )
    model(torch.ones(1, 3)).sum().backward()
    grad = model[0].weight.grad.clone()
    optimizer.step()
    torch.testing.assert_close(start - model[0].weight, grad - 0.2)


def test_project_gradients_arguments():
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    for kwargs, message in (
        ({"scope": "group"}, "scope: expected one of global, tensor, got 'group'"),
        ({"rule": "x"}, "rule: expected one of none"),
        ({"coefficient": -1}, "coefficient: expected a finite number"),
        ({"regularizer_grads": []}, "regularizer_grads: expected 1, a tensor or None for every parameter, got 0"),
        ({"regularizer_grads": [torch.ones(3)]}, r"parameter 0 has \(2,\), got \(3,\)"),
    ):
        with pytest.raises(ValueError, match=message):
            project_gradients_(**({"params": [weight], "regularizer_grads": [None], "coefficient": 0.1} | kwargs))
    with pytest.raises(ValueError, match="params: expected every parameter once, got one twice"):
        project_gradients_([weight, weight], [None, None], coefficient=0.1)
    with pytest.raises(TypeError, match="params: expected tensors, without names, got tuple"):
        project_gradients_([("w", weight)], [None], coefficient=0.1)
    with pytest.raises(TypeError, match=r"regularizer_grads: expected dense .* got a meta tensor for parameter 0"):
        project_gradients_([weight], [torch.ones(2, device="meta")], coefficient=0.1)
