import math

import pytest

from moe_kernels.models.transfer.schedules import coefficient_at


def test_it_decays_by_the_ratio_once_an_epoch():
    assert [coefficient_at(epoch, 0.4, 0.5) for epoch in range(4)] == [0.4, 0.2, 0.1, 0.05]
    assert coefficient_at(1000, 0.3) == 0.3
    assert [coefficient_at(epoch, 0.3, 0) for epoch in (0, 1, 2)] == [0.3, 0.0, 0.0]
    assert coefficient_at(5, 0, 0.9) == 0.0


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ((-1, 0.1), "epoch: expected 0 or more, got -1"),
        ((0, -0.1), "initial: expected a finite coefficient of 0 or more, got -0.1"),
        ((0, math.nan), "initial: .* got nan"),
        ((0, 0.1, 1.5), "ratio: expected a number in 0 … 1, got 1.5"),
        ((0, 0.1, math.nan), "ratio: .* got nan"),
    ],
)
def test_bad_arguments_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        coefficient_at(*arguments)
