"""What all regularizers have: plain identities, and coefficients that are checked."""

import inspect
import json
import math

import numpy as np
import pytest

from moe_kernels.models.transfer.regularizers import (
    DELTA,
    L2,
    L2SP,
    REGULARIZERS,
    AttentionTransfer,
    KnowledgeDistillation,
)


def test_identities_are_plain_and_make_the_same_again():
    made = [
        L2(1e-4),
        L2SP(0.05, parameters="all", head="fc", head_decay=0.0),
        KnowledgeDistillation(0.1, layers=("conv1",), head=()),
        DELTA(1),
        AttentionTransfer(0.0, head=["fc", "conv2"]),
    ]
    assert [regularizer.name for regularizer in made] == list(REGULARIZERS)
    for regularizer in made:
        identity = json.loads(json.dumps(regularizer.identity()))
        assert identity == regularizer.identity()
        arguments = {name: value for name, value in identity.items() if name != "name"}
        assert set(arguments) == set(inspect.signature(type(regularizer)).parameters)
        assert REGULARIZERS[identity["name"]](**arguments).identity() == identity
        assert regularizer.state_dict() == {}
    assert repr(L2SP(0.05)) == "L2SP(coefficient=0.05, head=None, head_decay=0.01, parameters='kernels')"
    assert repr(L2(1e-4)) == "L2(coefficient=0.0001, parameters='all')"


@pytest.mark.parametrize("kind", REGULARIZERS.values())
def test_bad_coefficients(kind):
    for value in (-0.1, math.nan, math.inf, "0.1", True, None):
        with pytest.raises(ValueError, match="coefficient: expected a finite number of 0 or more, got"):
            kind(value)
    if kind is not L2:
        with pytest.raises(ValueError, match="head_decay: expected a finite number of 0 or more, got -1"):
            kind(0.1, head_decay=-1)
    for method in ("anchors", "penalty", "decay"):
        with pytest.raises(RuntimeError, match=rf"{kind.name}: bind\(model\) comes first"):
            getattr(kind(0.1), method)()


@pytest.mark.parametrize("kind", REGULARIZERS.values())
def test_any_real_number_is_a_coefficient(kind):
    for value in (np.float32(0.5), np.float64(0.5), np.int64(2), 1):
        identity = kind(value).identity()
        assert type(identity["coefficient"]) is float
        assert identity["coefficient"] == value
