import pytest
import torch
from support import assert_within_budget


def test_budget_accepts_what_plain_pytorch_reaches_and_refuses_more():
    exact = torch.randn(50, 40, dtype=torch.float64)
    plain = (exact * (1 + 1e-3 * torch.randn_like(exact))).float()
    assert_within_budget(plain, plain, exact)
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget((exact * (1 + 2e-3 * torch.randn_like(exact))).float(), plain, exact)


def test_budget_sees_one_wrong_element_among_many():
    exact = torch.randn(300, 300, dtype=torch.float64)
    wrong = exact.float()
    wrong[7, 7] += 1e-4
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(wrong, exact.float(), exact)


def test_budget_refuses_nan_shape_and_dtype():
    exact = torch.ones(2, 2, dtype=torch.float64)
    for wrong in (exact.float() * float("nan"), exact.float()[:1], exact.half()):
        with pytest.raises(AssertionError):
            assert_within_budget(wrong, exact.float(), exact)


def test_budget_leaves_a_norm_that_few_rows_carry_to_luck():
    exact = torch.ones(40, 50, dtype=torch.float64)
    plain = (exact * (1 + 1e-3)).float()
    kernel = (exact * (1 + 2e-3)).float()
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(kernel, plain, exact)
    for tensor in (exact, plain, kernel):
        tensor[0] *= 1e3
    assert_within_budget(kernel, plain, exact)


def test_the_worst_nudge_counts():
    exact = torch.ones(20, 20, dtype=torch.float64)
    kernel = (exact * (1 + 1e-3)).float()
    with pytest.raises(AssertionError, match="error"):
        assert_within_budget(kernel, exact.float(), exact, exact)
    assert_within_budget(kernel, exact.float(), exact, exact * (1 + 1e-3), exact)
