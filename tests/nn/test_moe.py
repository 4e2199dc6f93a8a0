import copy
import math
import pickle
from functools import partial

import pytest
import torch
import torch.nn.functional as F
from torch import nn
from torch.utils.checkpoint import checkpoint, create_selective_checkpoint_contexts

from moe_kernels import backend
from moe_kernels.nn import CosineRouter, LinearRouter, MoE, auxiliary_loss, save_routing
from moe_kernels.ops import routing as routing_module
from moe_kernels.reference import philox

DIM, HIDDEN, EXPERTS = 24, 40, 6


def layer(**kwargs):
    torch.manual_seed(1)
    return MoE(DIM, HIDDEN, EXPERTS, **kwargs)


def gradients(model, x, forward=None):
    model.zero_grad()
    x = x.detach().clone().requires_grad_()
    torch.manual_seed(5)
    y = (model if forward is None else forward)(x)
    (y.float().square().sum() + 0.01 * auxiliary_loss(model)).backward()
    return {"y": y.detach(), "x": x.grad} | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(one, other, **tolerances):
    assert one.keys() == other.keys()
    for name in one:
        torch.testing.assert_close(one[name], other[name], msg=lambda m, name=name: f"{name}: {m}", **tolerances)


@pytest.mark.parametrize("router", ["cosine", "linear"])
@pytest.mark.parametrize("k", [1, 2])
def test_output_is_the_weighted_sum_of_experts(router, k):
    moe = layer(top_k=k, router=router).eval()
    x = torch.randn(3, 5, DIM)
    gates, experts, _ = moe.router(x.view(-1, DIM))
    expected = torch.zeros(15, DIM)
    for t in range(15):
        for gate, e in zip(gates[t], experts[t], strict=True):
            hidden = F.gelu(moe.w1[e] @ x.view(-1, DIM)[t] + moe.b1[e])
            expected[t] += gate * (moe.w2[e] @ hidden + moe.b2[e])
    torch.testing.assert_close(moe(x), expected.view_as(x))


def tutel_token_by_token(moe, x, seeds):
    """Tutel's layer as its source computes it, with loops: gate, capacity with batch priority, experts, loss."""
    T, E, k = x.shape[0], moe.num_experts, moe.router.top_k
    router, sigma = moe.router, 1.0 / moe.num_experts
    logits = F.normalize(F.linear(x, router.projection.weight, router.projection.bias), dim=1)
    logits = logits @ F.normalize(router.expert_embedding.t(), dim=0) * router.log_scale.clamp(max=math.log(100)).exp()
    noisy = logits + sigma * philox.normal(seeds[0], T, E).to(x.dtype)
    scores = noisy.softmax(1)
    ids = scores.topk(k, 1).indices
    gates = scores.gather(1, ids)
    if k > 1:
        gates = gates / gates.sum(1, keepdim=True)
    capacity, served, y = k * int(1.5 * math.ceil(T / E)), [0] * E, torch.zeros_like(x)
    dropped = 0
    keep = philox.keep(seeds[1], torch.arange(T * E), moe.hidden_dim, 0.1).view(T, E, -1)
    for j in range(k):
        for t in scores.max(1).values.argsort(descending=True).tolist():
            e = int(ids[t, j])
            served[e] += 1
            if served[e] > capacity:
                dropped += 1
                continue
            hidden = F.gelu(moe.w1[e] @ x[t] + moe.b1[e]) * keep[t, e] / 0.9
            y[t] = y[t] + gates[t, j] * (moe.w2[e] @ hidden + moe.b2[e])
    importance = logits.softmax(1).sum(0)
    threshold = noisy.gather(1, ids[:, -1:])
    load = torch.special.ndtr((logits.softmax(1) - threshold) / sigma).sum(0)
    loss = sum(v.var() / (v.mean() ** 2 + 1e-10) for v in (importance, load)) / 2
    return y, loss, dropped


@pytest.mark.parametrize("k", [1, 2])
def test_tutel_layer_is_tutels(k):
    torch.manual_seed(0)
    moe = MoE.tutel(DIM, HIDDEN, EXPERTS, k).double()
    assert moe.router.projection.out_features == 256
    with torch.no_grad():  # a router with preferences, so that capacity binds
        moe.router.log_scale.fill_(2.5)
    x = torch.randn(90, DIM, dtype=torch.float64) + 0.5
    torch.manual_seed(9)
    y = moe(x)
    torch.manual_seed(9)
    seeds = [torch.randint(2**62, (1,)) for _ in range(2)]
    expected, loss, dropped = tutel_token_by_token(moe, x, seeds)
    assert dropped > 0
    assert moe.telemetry().dropped == dropped
    torch.testing.assert_close(y, expected, rtol=1e-6, atol=1e-7)
    torch.testing.assert_close(auxiliary_loss(moe), loss, rtol=1e-6, atol=1e-7)


def test_tutel_settings_can_be_replaced_and_evaluation_is_without_noise_and_dropout():
    moe = MoE.tutel(DIM, HIDDEN, EXPERTS, 2, eval_capacity_factor=None)
    assert (moe.router.noise, moe.dropout, moe.capacity_factor, moe.batch_priority) == (1.0, 0.1, 1.5, True)
    assert moe.router.renormalize
    assert moe.eval_capacity_factor is None
    moe.eval()
    x = torch.randn(50, DIM)
    assert torch.equal(moe(x), moe(x))
    moe.train()
    assert not torch.equal(moe(x), moe(x))


def test_from_ffn_with_equal_experts_and_unit_gates_is_the_ffn():
    fc1, fc2 = nn.Linear(DIM, HIDDEN), nn.Linear(HIDDEN, DIM)
    x = torch.randn(70, DIM)
    dense = fc2(F.gelu(fc1(x)))
    for options in ({"num_experts": 4, "top_k": 2, "renormalize": True}, {"num_experts": 1}):
        torch.testing.assert_close(MoE.from_ffn(fc1, fc2, **options)(x), dense)
    assert MoE.from_ffn(fc1.double(), fc2.double()).w1.dtype == torch.float64
    moe = MoE.from_ffn(nn.Linear(DIM, HIDDEN, bias=False), fc2)
    assert (moe.b1 == 0).all()
    with pytest.raises(ValueError, match=r"fc2: expected 40 → 24 features.*got 24 → 40"):
        MoE.from_ffn(nn.Linear(DIM, HIDDEN), nn.Linear(DIM, HIDDEN))


def test_dropped_tokens_give_zero_and_leave_the_others_alone():
    moe = layer(eval_capacity_factor=0.5).eval()
    x = torch.randn(60, DIM)
    y = moe(x)
    telemetry = moe.telemetry()
    assert telemetry.dropped > 0
    zero = (y == 0).all(1)
    assert zero.sum() == telemetry.dropped
    moe.eval_capacity_factor = None
    torch.testing.assert_close(y[~zero], moe(x)[~zero])


def test_priority_keeps_the_most_probable_tokens():
    moe = layer(eval_capacity_factor=0.5, batch_priority=True).eval()
    x = torch.randn(60, DIM)
    zero = (moe(x) == 0).all(1)
    routing = moe.last_routing
    for e in range(EXPERTS):
        mine = routing.experts[:, 0] == e
        if (mine & zero).any() and (mine & ~zero).any():
            assert routing.gates[mine & zero].max() <= routing.gates[mine & ~zero].min()


def test_priority_goes_by_the_probability_and_not_by_the_renormalized_gate():
    router = LinearRouter(3, 3, top_k=2, renormalize=True)
    with torch.no_grad():
        router.weight.copy_(torch.eye(3))
    moe = MoE(3, 4, 3, router=router, eval_capacity_factor=1.0, batch_priority=True).eval()
    # All three want expert 0, which keeps two. The first has a larger share of its two best than the second, and yet
    # the smaller probability: it is the one to go.
    moe(torch.tensor([[1.2, 0.0, 0.8], [2.0, 1.9, -9.0], [5.0, 0.0, 0.0]]))
    gates, experts, statistics = moe.last_routing
    assert experts[:, 0].tolist() == [0, 0, 0]
    assert gates[0, 0] > gates[1, 0]
    assert statistics.confidence[0] < statistics.confidence[1]
    with torch.no_grad():
        moe.b2.fill_(1)
        moe.w2.zero_()
    y = moe(torch.tensor([[1.2, 0.0, 0.8], [2.0, 1.9, -9.0], [5.0, 0.0, 0.0]]))
    torch.testing.assert_close(y[:, 0], torch.tensor([float(gates[0, 1]), 1.0, 1.0]))


@pytest.mark.parametrize("options", [{}, {"balance_loss": "tutel", "noise": 1.0, "dropout": 0.1, "top_k": 2}])
def test_compiles_as_one_graph_with_gradients(options):
    moe = layer(**options)
    x = torch.randn(4, 7, DIM)
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    assert_same(gradients(moe, x), gradients(moe, x, compiled))


def test_compiles_with_inductor_and_varying_batches():
    moe = layer(capacity_factor=1.0, batch_priority=True)
    torch._dynamo.reset()
    compiled = torch.compile(moe, fullgraph=True)
    for batch in (2, 3, 5):
        x = torch.randn(batch, 7, DIM)
        assert_same(gradients(moe, x), gradients(moe, x, compiled))


@pytest.mark.parametrize("policy", [False, True])
@pytest.mark.parametrize("options", [{}, {"noise": 1.0, "dropout": 0.2, "balance_loss": "load_importance"}])
def test_checkpointing_replays_the_routing_bit_for_bit(options, policy):
    moe = layer(**options)
    with torch.no_grad():  # forced ties: a recomputation that broke them otherwise would take other experts
        moe.router.expert_embedding[1:] = moe.router.expert_embedding[0]
    x = torch.randn(30, DIM)
    context = {"context_fn": partial(create_selective_checkpoint_contexts, save_routing)} if policy else {}

    def recomputed(value):
        return checkpoint(moe, value, use_reentrant=False, **context)

    plain, replayed = gradients(moe, x), gradients(moe, x, recomputed)
    for name in plain:
        assert torch.equal(plain[name], replayed[name]), name


def test_selective_policy_does_not_route_twice(monkeypatch):
    moe, x = layer(), torch.randn(30, DIM, requires_grad=True)
    calls = []
    original = routing_module._cosine

    class Counting(torch.utils._python_dispatch.TorchDispatchMode):
        def __torch_dispatch__(self, function, types, args=(), kwargs=None):
            calls.append(function)
            return function(*args, **(kwargs or {}))

    context = partial(create_selective_checkpoint_contexts, save_routing)
    with Counting():
        checkpoint(moe, x, use_reentrant=False, context_fn=context).sum().backward()
    assert calls.count(original) == 1
    assert calls.count(torch.ops.moe_kernels.expert_ffn.default) == 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(dtype):
    moe, x = layer(), torch.randn(50, DIM)
    full = moe(x)
    experts = moe.last_routing.experts
    with torch.autocast("cpu", dtype=dtype):
        y = moe(x)
        assert y.dtype == dtype
        assert torch.equal(moe.last_routing.experts, experts), "routing stays in float32"
    torch.testing.assert_close(y.float(), full, rtol=5e-2, atol=5e-2)
    y.float().sum().backward()
    assert all(p.grad.dtype == torch.float32 for p in moe.parameters())


def test_half_precision_module_takes_half_precision_tokens():
    moe = layer().bfloat16()
    assert moe(torch.randn(9, DIM, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_state_dict_round_trip_and_names(tmp_path):
    moe = layer()
    assert {n: tuple(p.shape) for n, p in moe.named_parameters()} == {
        "w1": (6, 40, 24),
        "b1": (6, 40),
        "w2": (6, 24, 40),
        "b2": (6, 24),
        "router.projection.weight": (256, 24),
        "router.projection.bias": (256,),
        "router.expert_embedding": (6, 256),
        "router.log_scale": (1,),
    }
    safetensors = pytest.importorskip("safetensors.torch")
    safetensors.save_file(moe.state_dict(), tmp_path / "layer.safetensors")
    other = MoE(DIM, HIDDEN, EXPERTS)
    other.load_state_dict(safetensors.load_file(tmp_path / "layer.safetensors"))
    x = torch.randn(20, DIM)
    assert torch.equal(moe(x), other(x))


def test_copies_leave_the_last_forward_behind():
    moe = layer(balance_loss="switch")
    moe(torch.randn(20, DIM))
    for copied in (copy.deepcopy(moe), pickle.loads(pickle.dumps(moe))):
        assert copied.auxiliary_loss is None
        assert copied.last_routing is None
        assert torch.equal(copied.w1, moe.w1)
    assert moe.auxiliary_loss is not None


def test_auxiliary_loss_is_of_the_last_training_forward():
    moe = nn.Sequential(layer(balance_loss="switch"), layer(balance_loss="gshard", z_loss=0.1), nn.Linear(DIM, 2))
    assert auxiliary_loss(moe) == 0
    moe(torch.randn(20, DIM))
    first = auxiliary_loss(moe)
    assert first.requires_grad
    torch.testing.assert_close(first, moe[0].auxiliary_loss + moe[1].auxiliary_loss)
    moe(torch.randn(20, DIM))
    assert not torch.equal(first, auxiliary_loss(moe))
    moe.eval()
    moe(torch.randn(20, DIM))
    assert auxiliary_loss(moe) == 0


def test_telemetry():
    moe = layer(top_k=2).eval()
    with pytest.raises(RuntimeError, match="telemetry: expected a forward"):
        moe.telemetry()
    moe(torch.randn(500, DIM))
    telemetry = moe.telemetry()
    counts = torch.bincount(moe.last_routing.experts.flatten(), minlength=EXPERTS)
    torch.testing.assert_close(telemetry.load, counts / 1000)
    assert 0 < telemetry.entropy <= math.log(EXPERTS) + 1e-6
    assert telemetry.dead_experts == (counts == 0).sum()
    assert telemetry.dropped == 0


def test_exports_in_evaluation():
    moe = layer(top_k=2).eval()
    x = torch.randn(2, 5, DIM)
    batch = torch.export.Dim("batch", min=2, max=64)
    program = torch.export.export(moe, (x,), dynamic_shapes=({0: batch},))
    other = torch.randn(9, 5, DIM)
    torch.testing.assert_close(program.module()(other), moe(other))


def test_shapes_without_data():
    with torch.device("meta"):
        moe = layer(capacity_factor=1.0, balance_loss="switch")
        y = moe(torch.randn(3, 5, DIM))
    assert y.shape == (3, 5, DIM)
    assert auxiliary_loss(moe).device.type == "meta"


def test_empty_batch():
    moe = layer(balance_loss="switch", z_loss=0.1)
    y = moe(torch.zeros(0, 5, DIM))
    assert y.shape == (0, 5, DIM)
    (y.sum() + auxiliary_loss(moe)).backward()
    assert all((p.grad == 0).all() for p in moe.parameters())


def test_trains_on_the_reference_too():
    moe, x = layer(top_k=2, balance_loss="switch"), torch.randn(30, DIM)
    ours = gradients(moe, x)
    with backend.force("reference"):
        assert_same(ours, gradients(moe, x), rtol=1e-4, atol=1e-5)


def test_a_router_module_counts():
    router = LinearRouter(DIM, EXPERTS, top_k=3, renormalize=True)
    moe = MoE(DIM, HIDDEN, EXPERTS, router=router)
    moe(torch.randn(10, DIM))
    assert moe.last_routing.experts.shape == (10, 3)
    assert MoE(DIM, HIDDEN, EXPERTS, top_k=3, router=router).router is router


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"num_experts": 0}, "num_experts: expected at least 1, got 0"),
        ({"dim": 0}, "dim: expected at least 1, got 0"),
        ({"top_k": 7}, r"top_k: expected 1 to 6 \(the number of experts\), got 7"),
        ({"router": "hash"}, "router: expected one of cosine, linear or a module, got 'hash'"),
        ({"activation": "elu"}, "activation: expected one of gelu"),
        ({"dropout": 1.0}, "dropout: expected a probability"),
        ({"capacity_factor": -1.5}, "capacity_factor: expected a number > 0 or None, got -1.5"),
        ({"eval_capacity_factor": 0.0}, "eval_capacity_factor: expected a number > 0 or None, got 0.0"),
        ({"balance_loss": "even"}, "balance_loss: expected one of gshard, switch, load_importance, tutel or None"),
        ({"balance_loss": "tutel"}, "balance_loss: 'tutel' is a function of the noise, which is 0"),
        ({"renormalize": True}, "renormalize: a single gate would be constant"),
        ({"noise": -1.0}, "noise: expected a number ≥ 0"),
        ({"save": "nothing"}, "save: expected one of preactivation, input"),
        ({"router": CosineRouter(DIM, 5)}, "router: expected num_experts=6, got a router with num_experts=5"),
        ({"router": CosineRouter(DIM, 6), "top_k": 2}, "top_k: the router module has top_k=1, got 2"),
    ],
)
def test_bad_settings_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        MoE(**({"dim": DIM, "hidden_dim": HIDDEN, "num_experts": EXPERTS} | arguments))


def test_bad_tokens_are_named():
    with pytest.raises(ValueError, match=r"x: expected shape \(..., 24\), got \(3, 25\)"):
        layer()(torch.randn(3, 25))
    with pytest.raises(TypeError, match=r"x: expected a floating-point tensor, got torch.int64"):
        layer()(torch.ones(3, 24, dtype=torch.int64))
