"""Weights go between files, the official GMoE code and this package without changing a bit; misfits are listed."""

import copy
import math

import pytest
import safetensors.torch
import torch
import torch.nn.functional as F
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import nn

from moe_kernels.models import gmoe
from moe_kernels.nn import CosineRouter, MoE


def small(classes=5, **options):
    torch.manual_seed(0)
    return gmoe.create("gmoe_digits", classes, num_experts=3, projection_dim=8, **options)


def randomized(model, seed=1):
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in model.parameters():
            parameter.copy_(torch.randn(parameter.shape, generator=generator))
    return model


def same(one, other):
    return one.keys() == other.keys() and all(
        one[key].dtype == other[key].dtype and torch.equal(one[key], other[key]) for key in one
    )


class Mixtures(nn.Module):
    """Only what the converters look at: mixtures at the official places, and some dense weights."""

    def __init__(self, dim, hidden, experts, projection, router, blocks):
        super().__init__()
        self.blocks = nn.ModuleList(nn.ModuleDict({"norm1": nn.LayerNorm(dim)}) for _ in range(blocks))
        for block in self.blocks[::2]:
            block["mlp"] = MoE(dim, hidden, experts, router=router, projection_dim=projection)
        self.head = nn.Linear(dim, 3)


@settings(max_examples=60, deadline=None)
@given(
    sizes=st.tuples(*[st.integers(1, 7)] * 4),
    router=st.sampled_from(["cosine", "linear"]),
    blocks=st.integers(1, 4),
    dtype=st.sampled_from([torch.float32, torch.float16, torch.bfloat16]),
    seed=st.integers(0, 1000),
)
def test_the_round_trip_is_exact(sizes, router, blocks, dtype, seed):
    model = randomized(Mixtures(*sizes, router, blocks), seed).to(dtype)
    ours = model.state_dict()
    official = gmoe.to_official_state_dict(model)
    assert same(gmoe.from_official_state_dict(official, model), ours)
    # and in the other direction, from tensors that were never ours, in any dtype
    theirs = {
        key: value if value.dtype == torch.int64 else torch.randn(value.shape).double()
        for key, value in official.items()
    }
    model.double().load_state_dict(gmoe.from_official_state_dict(theirs, model), strict=True)
    assert same(gmoe.to_official_state_dict(model), theirs)


def test_the_official_names_and_shapes():
    model = small(layers=[2])
    official = gmoe.to_official_state_dict(model)
    dense = gmoe.create("gmoe_digits", 5, layers=[]).state_dict()
    prefix = "blocks.2.mlp."
    shapes = {key.removeprefix(prefix): tuple(value.shape) for key, value in official.items() if key not in dense}
    assert shapes == {
        "experts.batched_fc1_w": (3, 256, 64),
        "experts.batched_fc1_bias": (3, 1, 256),
        "experts.batched_fc2_w": (3, 256, 64),
        "experts.batched_fc2_bias": (3, 1, 64),
        "gates.0.cosine_projector.weight": (8, 64),
        "gates.0.cosine_projector.bias": (8,),
        "gates.0.sim_matrix": (8, 3),
        "gates.0.temperature": (1,),
        "_num_global_experts": (),
    }
    missing = {key for key in dense if key not in official}
    assert missing == {f"{prefix}fc{i}.{kind}" for i in (1, 2) for kind in ("weight", "bias")}
    assert all(value.is_contiguous() for value in official.values())
    assert int(official[prefix + "_num_global_experts"]) == 3


def tutel_layer(state, x):
    """Tutel's cosine_top gate with k = 1, without capacity, and its experts, token by token, from its own tensors."""
    p = F.linear(x, state["gates.0.cosine_projector.weight"], state["gates.0.cosine_projector.bias"])
    logits = F.normalize(p, dim=1) @ F.normalize(state["gates.0.sim_matrix"], dim=0)
    scores = torch.softmax(logits * state["gates.0.temperature"].clamp(max=math.log(100)).exp(), dim=1)
    rows = []
    for token, score in zip(x, scores, strict=True):
        e = int(score.argmax())
        hidden = F.gelu(token @ state["experts.batched_fc1_w"][e].T + state["experts.batched_fc1_bias"][e, 0])
        y = hidden @ state["experts.batched_fc2_w"][e] + state["experts.batched_fc2_bias"][e, 0]
        rows.append(score[e] * y)
    return torch.stack(rows)


def test_the_official_tensors_mean_what_tutel_computes():
    model = randomized(small(layers=[2])).eval()
    layer = model.blocks[2].mlp
    layer.eval_capacity_factor = None
    prefix = "blocks.2.mlp."
    official = gmoe.to_official_state_dict(model)
    x = torch.randn(40, 64)
    expected = tutel_layer({key.removeprefix(prefix): value for key, value in official.items()}, x)
    assert len(set(layer.router(x).experts.flatten().tolist())) == 3
    assert torch.allclose(layer(x), expected, rtol=1e-4, atol=1e-4 * float(expected.abs().max()))


@pytest.mark.parametrize("prefix", ["", "model.", "module.", "network.", "module.model.", "_orig_mod.module."])
@pytest.mark.parametrize("nested", [None, "model", "state_dict", "model_dict"])
def test_prefixes_and_wrappers_that_users_have(prefix, nested):
    model = randomized(small())
    state = {prefix + key: value for key, value in gmoe.to_official_state_dict(model).items()}
    if nested:
        state = {nested: state, "args": {"lr": 3e-5}, "model_num_classes": 5}
    assert same(gmoe.from_official_state_dict(state, small()), model.state_dict())


def test_biases_of_newer_tutel_and_no_expert_count():
    model = randomized(small())
    official = gmoe.to_official_state_dict(model)
    newer = {
        key: value.squeeze(1) if key.endswith("_bias") else value
        for key, value in official.items()
        if not key.endswith("_num_global_experts")
    }
    assert same(gmoe.from_official_state_dict(newer, model), model.state_dict())


def test_everything_that_does_not_fit_is_in_one_error():
    model = small()
    state = gmoe.to_official_state_dict(model)
    del state["blocks.0.mlp.gates.0.temperature"], state["norm.bias"]
    state["extra.weight"] = torch.zeros(1)
    state["blocks.2.mlp.gates.0.sim_matrix"] = torch.zeros(8, 6)
    state["blocks.2.mlp.experts.batched_fc1_bias"] = torch.zeros(6, 1, 256)
    with pytest.raises(ValueError, match="does not fit VisionTransformer") as caught:
        gmoe.from_official_state_dict(state, model)
    lines = str(caught.value).splitlines()
    assert set(lines[1].removeprefix("  missing: ").split(", ")) == {
        "blocks.0.mlp.gates.0.temperature",
        "norm.bias",
    }
    assert lines[2] == "  unknown: extra.weight"
    assert "blocks.2.mlp.gates.0.sim_matrix (expected (8, 3), got (8, 6))" in lines[3]
    assert "batched_fc1_bias (expected (3, 1, 256) or (3, 256), got (6, 1, 256))" in lines[3]
    assert len(lines) == 4


def test_the_same_name_with_and_without_a_prefix():
    state = gmoe.to_official_state_dict(small())
    state["module.norm.bias"] = state["norm.bias"]
    with pytest.raises(ValueError, match=r"norm\.bias is there more than once"):
        gmoe.from_official_state_dict(state, small())


def test_what_is_no_state_dict():
    with pytest.raises(ValueError, match="state: expected a state dict, got list"):
        gmoe.from_official_state_dict([1], small())
    with pytest.raises(ValueError, match=r"expected names with tensors, got something else under epoch$"):
        gmoe.from_official_state_dict({"epoch": 3, "w": torch.zeros(1)}, small())


def test_a_router_that_tutel_does_not_have():
    class Other(CosineRouter):
        pass

    class Foreign(nn.Module):
        top_k, num_experts, noise = 1, 3, 1.0

    model = small(router=Foreign())
    with pytest.raises(ValueError, match=r"blocks\.0\.mlp\.router.*cosine or linear, got Foreign"):
        gmoe.to_official_state_dict(model)
    assert gmoe.to_official_state_dict(small(router=Other(64, 3, noise=1.0)))


@pytest.mark.parametrize("suffix", [".safetensors", ".pth", ".pt"])
def test_a_file_gives_the_same_model(tmp_path, suffix):
    model = randomized(small())
    path = tmp_path / f"gmoe{suffix}"
    if suffix == ".safetensors":
        safetensors.torch.save_file(model.state_dict(), path)
    else:
        torch.save({"state_dict": model.state_dict(), "epoch": 3}, path)
    loaded = small()
    gmoe.load_weights(loaded, path)
    assert same(loaded.state_dict(), model.state_dict())
    x = torch.randn(2, 3, 32, 32)
    assert torch.equal(loaded.eval()(x), model.eval()(x))


def test_an_official_file_goes_through_safetensors(tmp_path):
    model = randomized(small())
    safetensors.torch.save_file(gmoe.to_official_state_dict(model), tmp_path / "official.safetensors")
    loaded = small()
    gmoe.load_weights(loaded, str(tmp_path / "official.safetensors"))
    assert same(loaded.state_dict(), model.state_dict())


def test_a_deep_copy_has_the_same_state():
    model = randomized(small()).train()
    model(torch.randn(2, 3, 32, 32))  # what a forward leaves behind is not part of a copy
    copied = copy.deepcopy(model)
    assert same(copied.state_dict(), model.state_dict())
    model.load_state_dict(copied.state_dict(), strict=True)
    with torch.no_grad():
        copied.blocks[2].mlp.w1.zero_()
    assert model.blocks[2].mlp.w1.count_nonzero() > 0


@pytest.mark.parametrize("official", [False, True])
@pytest.mark.parametrize("classes", [7, 0])
def test_a_head_of_other_classes_is_kept_with_a_warning(official, classes):
    source = randomized(small())
    state = gmoe.to_official_state_dict(source) if official else source.state_dict()
    model = small(classes)
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.warns(UserWarning, match="head is for another number of classes"):
        gmoe.load_weights(model, state)
    after = model.state_dict()
    for key in after:
        assert torch.equal(after[key], before[key] if key.startswith("head.") else source.state_dict()[key])


def test_a_file_without_a_head():
    state = randomized(small(0)).state_dict()
    model = small(7)
    with pytest.warns(UserWarning, match="head"):
        gmoe.load_weights(model, state)
    assert torch.equal(model.norm.weight, state["norm.weight"])


def test_nothing_is_loaded_when_something_does_not_fit():
    state = randomized(small()).state_dict()
    del state["norm.bias"]
    model = small()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    with pytest.raises(ValueError, match=r"missing: norm\.bias$"):
        gmoe.load_weights(model, state)
    assert same(model.state_dict(), before)


def test_dense_weights_for_a_mixture_say_what_to_do():
    dense = gmoe.create("gmoe_digits", 5, layers=[]).state_dict()
    with pytest.raises(ValueError, match=r"(?s)blocks\.2\.mlp\.fc1\.weight.*loaded before convert"):
        gmoe.load_weights(small(), dense)


@pytest.mark.parametrize("suffix", [".safetensors", ".pth"])
def test_a_file_that_is_broken_or_missing(tmp_path, suffix):
    path = tmp_path / f"broken{suffix}"
    path.write_bytes(b"not weights")
    with pytest.raises(ValueError, match=f"broken{suffix} cannot be read"):
        gmoe.load_weights(small(), path)
    with pytest.raises(FileNotFoundError):
        gmoe.load_weights(small(), tmp_path / f"none{suffix}")


class Harmful:
    def __reduce__(self):
        return (print, ("this must not run",))


def test_a_pickle_that_runs_code_is_refused(tmp_path, capsys):
    torch.save({"model": Harmful()}, tmp_path / "harmful.pth")
    with pytest.raises(ValueError, match=r"harmful\.pth cannot be read"):
        gmoe.load_weights(small(), tmp_path / "harmful.pth")
    assert capsys.readouterr().out == ""
