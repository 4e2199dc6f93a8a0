import math
from dataclasses import replace

import numpy as np
import pytest

from moe_kernels.models.runs import identity
from moe_kernels.models.transfer.configuration import COEFFICIENTS, METHODS, FineTuneConfig
from moe_kernels.models.transfer.regularizers import L2SP, Regularizer


def test_the_defaults_are_the_papers_recipe():
    config = FineTuneConfig()
    assert (config.batch, config.momentum, config.steps, config.learning_rate) == (48, 0.9, 8000, 0.01)
    rates = [config.learning_rate_at(step) for step in (0, 5999, 6000, 7999)]
    assert rates == pytest.approx([0.01, 0.01, 0.001, 0.001])
    assert (config.scope, config.anchored_only) == ("global", False)
    assert METHODS == ("fine-tuning", "l2", "l2-sp", "know-dist", "delta", "attention-transfer")
    assert set(COEFFICIENTS) == set(METHODS)


def test_the_coefficient_is_the_methods_own_or_what_is_given_and_decays_by_epoch():
    assert FineTuneConfig("l2-sp").initial_coefficient == 0.05
    assert FineTuneConfig("l2-sp", coefficient=0.0).initial_coefficient == 0
    config = FineTuneConfig("know-dist", coefficient=8.0, coefficient_decay=0.5, batch=10)
    # an epoch of 25 images ends within step 2
    assert [config.coefficient_at(step, 25) for step in range(6)] == [8, 8, 8, 4, 4, 2]


@pytest.mark.parametrize("method", METHODS[1:])
def test_each_method_makes_its_regularizer(method):
    regularizer = FineTuneConfig(method, coefficient=0.25).regularizer()
    assert (regularizer.name, regularizer.coefficient) == (method, 0.25)
    assert FineTuneConfig().regularizer() is None


def test_options_reach_the_regularizer():
    assert FineTuneConfig("l2-sp", parameters="all", head=("fc",), head_decay=0.5).regularizer().identity() == {
        "name": "l2-sp",
        "coefficient": 0.05,
        "head": ["fc"],
        "head_decay": 0.5,
        "parameters": "all",
    }
    assert FineTuneConfig("delta", layers=("a", "b")).regularizer().identity()["layers"] == ["a", "b"]


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("method", "l3"),
        ("scope", "layer"),
        ("parameters", "some"),
        ("precision", "float16"),
        ("steps", 0),
        ("batch", -1),
        ("eval_every", 0),
        ("head_epochs", 0),
        ("estimate_batches", 0),
        ("learning_rate", math.inf),
        ("coefficient", -0.1),
        ("coefficient", math.nan),
        ("head_decay", -1.0),
        ("seed", -1),
        ("coefficient_decay", 1.5),
        ("drop_at", -0.5),
        ("momentum", 2.0),
    ],
)
def test_a_bad_value_is_named(field, value):
    with pytest.raises(ValueError, match=rf"{field} must be .*, got {value!r}"):
        replace(FineTuneConfig("l2-sp"), **{field: value})


@pytest.mark.parametrize(
    ("method", "changes"),
    [
        ("fine-tuning", {"dtnh": True}),
        ("fine-tuning", {"coefficient": 0.1}),
        ("fine-tuning", {"layers": ("layer1",)}),
        ("l2-sp", {"layers": ("layer1",)}),
        ("know-dist", {"parameters": "all"}),
    ],
)
def test_what_would_do_nothing_is_refused(method, changes):
    (name,) = changes
    with pytest.raises(ValueError, match=f"{name} means nothing for method '{method}'"):
        FineTuneConfig(method, **changes)


@pytest.mark.parametrize(
    ("field", "value"),
    [
        *(("coefficient", value) for value in ("0.1", True, [0.1])),
        *(("steps", value) for value in (2.5, "3", None, True)),
        *(("seed", value) for value in (0.0, "0")),
        *(("learning_rate", value) for value in (None, "1e-3")),
        ("drop_at", "half"),
    ],
)
def test_what_is_no_number_is_named(field, value):
    with pytest.raises(TypeError, match=rf"{field} must be a (whole )?number, got ") as error:
        replace(FineTuneConfig("l2-sp"), **{field: value})
    assert repr(value) in str(error.value)


def test_any_real_number_will_do():
    numbers = {"coefficient": np.float32(0.5), "steps": np.int64(3), "drop_at": np.float64(0.5), "momentum": 0}
    config = FineTuneConfig("l2-sp", **numbers)
    assert (config.coefficient, config.steps, config.drop_at, config.momentum) == (0.5, 3, 0.5, 0)
    assert identity(config.identity())["coefficient"] == 0.5


def test_a_regularizer_object_has_its_own_options():
    own = L2SP(0.25, parameters="all", head="fc")
    config = FineTuneConfig(method=own, dtnh=True)
    assert config.regularizer() is own
    assert (config.name, config.initial_coefficient) == ("l2-sp", 0.25)
    assert replace(config, coefficient=0.5).initial_coefficient == 0.5
    known = identity(config.identity())
    assert (known["method"], known["coefficient"]) == ("l2-sp", 0.25)
    assert known["regularizer"]["parameters"] == "all"
    assert "regularizer" not in FineTuneConfig("l2-sp").identity()
    for name, value in {"parameters": "all", "layers": ("a",), "head": ("fc",), "head_decay": 0.5}.items():
        with pytest.raises(ValueError, match=f"{name} means nothing for method 'l2-sp'"):
            replace(config, **{name: value})


def test_a_regularizer_without_a_name_is_refused():
    class Nameless(Regularizer):
        pass

    with pytest.raises(TypeError, match="method: Nameless must have a name"):
        FineTuneConfig(Nameless(0.1))
    with pytest.raises(ValueError, match="method must be one of fine-tuning"):
        FineTuneConfig(L2SP)
