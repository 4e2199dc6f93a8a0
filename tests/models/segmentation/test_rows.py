import os

import numpy as np
import pytest

from moe_kernels.models.segmentation import rows

LAYOUT = {"columns": ("float16", 3), "nothing": ("float16", 0), "about": ("int32", 2)}
RUN = {"of": "this"}


def item(number: int) -> dict[str, np.ndarray]:
    return {
        "columns": np.full((number + 1, 3), number, np.float16),
        "nothing": np.empty((1, 0), np.float16),
        "about": np.arange(2 * number, dtype=np.int32).reshape(number, 2),
    }


def write(folder, stop=None, run=RUN, layout=LAYOUT):
    """Items 0 to 4, each committed; broken off before item ``stop``, which was written."""
    with rows.Writer(folder, layout, run, share=1e9) as writer:
        begun = writer.done
        for number in range(begun, 5):
            writer.append(**item(number))
            if number == stop:
                return begun
            writer.offer(number + 1)
        writer.finish(5)
    return begun


def assert_whole(folder):
    found = rows.read(folder)
    for name in LAYOUT:
        expected = np.concatenate([item(number)[name] for number in range(5)])
        np.testing.assert_array_equal(found[name], expected)
        assert found[name].dtype == expected.dtype


def test_rows_come_back(tmp_path):
    assert write(tmp_path) == 0
    assert_whole(tmp_path)
    assert write(tmp_path) == 5
    assert_whole(tmp_path)


def test_what_was_not_committed_is_written_again(tmp_path):
    assert write(tmp_path, stop=3) == 0
    with pytest.raises(ValueError, match="is not finished"):
        rows.read(tmp_path)
    assert (tmp_path / "columns.bin").stat().st_size > 2 * 3 * (1 + 2 + 3)
    assert write(tmp_path, stop=3) == 3
    assert write(tmp_path) == 3
    assert_whole(tmp_path)


@pytest.mark.parametrize("change", [{"run": {"of": "other"}}, {"layout": LAYOUT | {"more": ("int8", 1)}}])
def test_another_run_begins_anew(tmp_path, change):
    write(tmp_path, stop=3)
    assert write(tmp_path, stop=2, **change) == 0
    assert write(tmp_path) == 0
    assert_whole(tmp_path)


def test_a_file_that_was_cut_is_named(tmp_path):
    write(tmp_path)
    with open(tmp_path / "columns.bin", "ab") as file:
        file.truncate(10)
    with pytest.raises(ValueError, match=r"columns\.bin must have 15 rows of 3 float16, it has 10 bytes"):
        rows.read(tmp_path)


@pytest.mark.parametrize(("pages", "loaded"), [(8, []), (2**20, ["about.bin", "columns.bin", "nothing.bin"])])
def test_what_fits_into_memory_is_loaded_at_once(tmp_path, monkeypatch, pages, loaded):
    write(tmp_path)
    asked, advise = [], os.posix_fadvise

    def advised(number, first, length, advice):
        assert (first, length, advice) == (0, 0, os.POSIX_FADV_WILLNEED)
        asked.append(os.path.basename(os.readlink(f"/proc/self/fd/{number}")))
        advise(number, first, length, advice)

    monkeypatch.setattr(rows.os, "posix_fadvise", advised)
    monkeypatch.setattr(rows.os, "sysconf", {"SC_PAGE_SIZE": 32, "SC_PHYS_PAGES": pages}.__getitem__)
    rows.read_ahead([tmp_path])
    assert sorted(asked) == loaded
    assert_whole(tmp_path)


def test_nothing_there(tmp_path):
    with pytest.raises(ValueError, match="is not finished"):
        rows.read(tmp_path / "nowhere")
