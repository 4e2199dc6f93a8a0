"""Decoding every image before training."""

import os
import threading
import time

import numpy as np
import pytest
from PIL import Image

from moe_kernels.models.data import checking


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "moe-kernels"


@pytest.fixture
def decoded(monkeypatch):
    """The files that were decoded, in the order of decoding."""
    seen, decode = [], checking.read_rgb
    monkeypatch.setattr(checking, "read_rgb", lambda file: (seen.append(file), decode(file))[1])
    return seen


def write(path, seed=0):
    path.parent.mkdir(parents=True, exist_ok=True)
    pixels = np.random.default_rng(seed).integers(0, 256, (40, 40, 3), dtype=np.uint8)
    Image.fromarray(pixels).save(path)
    return str(path)


def test_every_kind_of_bad_file_is_found_with_its_reason(tmp_path):
    good = [write(tmp_path / name) for name in ("a.png", "b.jpg", "c.bmp", "d.webp", "e.tiff")]
    whole = (tmp_path / "b.jpg").read_bytes()
    (tmp_path / "cut.jpg").write_bytes(whole[: len(whole) // 2])
    (tmp_path / "cut.png").write_bytes((tmp_path / "a.png").read_bytes()[:-200])
    (tmp_path / "empty.png").touch()
    (tmp_path / "text.jpg").write_text("<html>404</html>")
    (tmp_path / "gone.png").symlink_to(tmp_path / "nowhere.png")
    bad = [str(tmp_path / name) for name in ("cut.jpg", "cut.png", "empty.png", "text.jpg", "gone.png")]
    found = checking.unreadable([*good, *bad], tmp_path)
    assert list(found) == bad
    assert "truncated" in found[bad[0]]
    assert found[bad[2]] == found[bad[3]] == "cannot identify image file"
    assert found[bad[4]] == "No such file or directory"


def test_only_new_and_changed_files_are_decoded_again(tmp_path, decoded):
    files = [write(tmp_path / f"{i}.png", i) for i in range(5)]
    (tmp_path / "bad.png").write_bytes(b"no image")
    bad = str(tmp_path / "bad.png")
    assert list(checking.unreadable([*files, bad], tmp_path)) == [bad]
    assert sorted(decoded) == sorted([*files, bad])

    decoded.clear()
    assert list(checking.unreadable([*files, bad], tmp_path)) == [bad]
    assert decoded == [bad]

    decoded.clear()
    (tmp_path / "2.png").write_bytes(b"cut short")
    new = write(tmp_path / "new.png")
    write(tmp_path / "bad.png")
    assert list(checking.unreadable([*files, bad, new], tmp_path)) == [files[2]]
    assert sorted(decoded) == sorted([files[2], bad, new])


def test_a_file_of_the_same_size_is_told_by_its_time(tmp_path, decoded):
    file = write(tmp_path / "a.bmp", 0)
    checking.unreadable([file], tmp_path)
    decoded.clear()
    status = os.stat(file)
    os.utime(file, ns=(status.st_atime_ns, status.st_mtime_ns + 1))
    assert checking.unreadable([file], tmp_path) == {}
    assert decoded == [file]


def test_parts_of_a_root_do_not_make_one_another_forgotten(tmp_path, decoded):
    files = [write(tmp_path / f"{i}.png", i) for i in range(4)]
    checking.unreadable(files[:2], tmp_path)
    checking.unreadable(files[2:], tmp_path)
    decoded.clear()
    assert checking.unreadable(files, tmp_path) == {}
    assert decoded == []


def test_another_way_of_reading_has_a_memory_of_its_own(tmp_path, decoded):
    file = write(tmp_path / "a.png")
    checking.unreadable([file], tmp_path)

    def refuse(file):
        raise ValueError("not a mask")

    for _ in range(2):
        assert checking.unreadable([file], tmp_path, refuse, what="masks") == {file: "not a mask"}
    assert checking.unreadable([file], tmp_path) == {}
    assert decoded == [file]


def test_other_rules_for_what_is_sound_make_all_forgotten(tmp_path, decoded, monkeypatch):
    file = write(tmp_path / "a.png")
    checking.unreadable([file], tmp_path)
    monkeypatch.setattr(checking, "_ACCEPTED", checking._ACCEPTED + 1)
    checking.unreadable([file], tmp_path)
    assert decoded == [file, file]


def test_a_digest_is_of_the_bytes(tmp_path):
    files = [write(tmp_path / f"{i}.png", seed=i % 70) for i in range(140)]
    found = checking.digests(files, tmp_path)
    assert set(found) == set(files)
    assert len(set(found.values())) == 70
    assert found[files[3]] == found[files[73]]
    (tmp_path / "3.png").write_bytes((tmp_path / "3.png").read_bytes() + b"\0")
    changed = checking.digests(files, tmp_path)
    assert [file for file in files if changed[file] != found[file]] == [files[3]]
    with pytest.raises(FileNotFoundError, match=r"gone\.png"):
        checking.digests([str(tmp_path / "gone.png")], tmp_path)


@pytest.mark.parametrize("content", [b"", b"junk", b"\x93NUMPY\x01\x00"])
def test_a_damaged_memory_costs_only_a_check(tmp_path, cache, decoded, content):
    file = write(tmp_path / "a.png")
    checking.unreadable([file], tmp_path)
    (memory,) = cache.iterdir()
    memory.write_bytes(content)
    assert checking.unreadable([file], tmp_path) == {}
    assert decoded == [file, file]


def test_a_home_that_cannot_be_written_to_does_not_matter(tmp_path, monkeypatch):
    (tmp_path / "file").touch()
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert checking.unreadable([write(tmp_path / "a.png")], tmp_path) == {}


def test_an_interrupt_does_not_wait_for_all_files():
    """Ctrl-C arrives in the main thread while workers decode; the files not yet begun are dropped."""
    begun = []

    def slow(files):
        begun.append(threading.current_thread().name)
        time.sleep(0.01)

    checks = checking._in_threads([str(i) for i in range(64 * 1000)], slow, "checking")
    next(checks)
    with pytest.raises(KeyboardInterrupt):
        checks.throw(KeyboardInterrupt)
    assert len(begun) < 200
    assert not any(thread.name in begun for thread in threading.enumerate())
