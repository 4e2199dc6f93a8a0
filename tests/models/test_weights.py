import torch

from moe_kernels.models.weights import digest


def test_the_digest_is_of_names_and_bits():
    state = {"a": torch.arange(6.0).reshape(2, 3), "b": torch.tensor(1), "c": torch.ones(2, dtype=torch.bfloat16)}
    found = digest(state)
    assert digest(dict(reversed(state.items()))) == found
    assert digest({**state, "a": torch.arange(6.0).reshape(3, 2).t().contiguous()}) != found
    assert digest({"a": state["a"], "b": state["b"], "d": state["c"]}) != found
    view = torch.arange(6.0).reshape(3, 2)[:, 0]
    assert digest({"a": view}) == digest({"a": view.clone()})
