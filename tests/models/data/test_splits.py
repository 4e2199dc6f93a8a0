"""DomainBed's seeds and splits."""

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st

from moe_kernels.models.data.splits import seed_hash, split


def test_seed_hash_gives_domainbeds_seeds():
    assert seed_hash(0, 0) == 894182419
    assert seed_hash(2, 3) == 1709828778
    assert seed_hash("PACS", "GMOE", [1], 0, 1) == 1801777538


def test_numpy_scalars_count_as_python_values():
    assert seed_hash(np.int64(2), np.int32(3)) == seed_hash(2, 3)
    assert split(20, np.int64(1), np.int64(2)) == split(20, 1, 2)


@pytest.mark.parametrize(
    ("length", "trial_seed", "domain_index", "shuffled"),
    [
        (13, 0, 0, [2, 9, 0, 3, 11, 5, 10, 4, 1, 8, 6, 7, 12]),
        (20, 1, 2, [8, 1, 16, 3, 14, 0, 9, 11, 19, 7, 18, 17, 10, 12, 13, 4, 5, 6, 15, 2]),
    ],
)
def test_split_is_domainbeds(length, trial_seed, domain_index, shuffled):
    held_out = int(0.2 * length)
    assert split(length, trial_seed, domain_index) == (shuffled[held_out:], shuffled[:held_out])


@given(st.integers(0, 500), st.integers(0, 10), st.integers(0, 6), st.floats(0, 0.99))
def test_the_parts_are_disjoint_and_complete(length, trial_seed, domain_index, holdout):
    inside, outside = split(length, trial_seed, domain_index, holdout)
    assert len(outside) == int(length * holdout)
    assert sorted(inside + outside) == list(range(length))


def test_trials_and_domains_have_their_own_split():
    splits = [tuple(split(200, trial, domain)[1]) for trial in range(3) for domain in range(3)]
    assert len(set(splits)) == 9


@pytest.mark.parametrize("arguments", [(-1, 0, 0), (10, 0, 0, 1.0), (10, 0, 0, -0.1), (10, 0, 0, float("nan"))])
def test_bad_arguments_are_refused(arguments):
    with pytest.raises(ValueError, match=r"length must|holdout must"):
        split(*arguments)
