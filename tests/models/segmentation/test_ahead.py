import threading

import pytest

from moe_kernels.models.segmentation.ahead import ahead


def test_results_come_in_order_and_no_more_than_asked_for_early():
    begun, main = [], threading.get_ident()

    def square(number):
        begun.append((number, threading.get_ident()))
        return number * number

    results = ahead(square, iter(range(6)), depth=2)
    assert next(results) == 0
    assert list(results) == [1, 4, 9, 16, 25]
    assert [number for number, _ in begun] == list(range(6))
    assert main not in {thread for _, thread in begun}
    begun.clear()
    results = ahead(square, range(100), depth=3)
    next(results)
    results.close()
    assert len(begun) <= 4
    assert list(ahead(square, [])) == []


def test_an_error_comes_where_its_result_would():
    def inverse(number):
        return 1 / number

    results = ahead(inverse, [1, 0, 2])
    assert next(results) == 1
    with pytest.raises(ZeroDivisionError):
        next(results)
