import os
import signal
import stat
from collections.abc import Callable

import pytest
import torch

from moe_kernels.models import files


def in_child(action: Callable[[], object]) -> int:
    """Runs ``action`` in a forked process; what ``os.waitstatus_to_exitcode`` says of its end."""
    child = os.fork()
    if child == 0:
        try:
            action()
            os._exit(0)
        except BaseException:
            os._exit(1)
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def test_content_round_trips(tmp_path):
    files.write_bytes(tmp_path / "deep" / "er" / "a", b"\x00\xff")
    assert (tmp_path / "deep" / "er" / "a").read_bytes() == b"\x00\xff"
    files.write_text(tmp_path / "b", "σ ± τ")
    assert (tmp_path / "b").read_text(encoding="utf-8") == "σ ± τ"
    content = {"third": 1 / 3, "tiny": 5e-324, "name": "Pässe", "list": [1, None, True]}
    files.write_json(tmp_path / "c.json", content)
    assert files.read_json(tmp_path / "c.json") == content
    tensors = {"x": torch.randn(3), "step": 4, "history": [{"loss": 0.1}]}
    files.write_torch(tmp_path / "d.pt", tensors)
    read = files.read_torch(tmp_path / "d.pt")
    assert torch.equal(read.pop("x"), tensors.pop("x"))
    assert read == tensors


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_json_refuses_what_it_has_no_word_for(tmp_path, value):
    files.write_json(tmp_path / "a.json", 1)
    with pytest.raises(ValueError, match="not JSON compliant"):
        files.write_json(tmp_path / "a.json", {"loss": value})
    assert files.read_json(tmp_path / "a.json") == 1
    assert os.listdir(tmp_path) == ["a.json"]


def test_an_error_inside_the_block_leaves_the_old_file_and_nothing_else(tmp_path):
    files.write_text(tmp_path / "a", "old")

    def fail() -> None:
        with files.replacing(tmp_path / "a") as file:
            file.write(b"new")
            raise KeyError("no")

    with pytest.raises(KeyError):
        fail()
    assert (tmp_path / "a").read_text() == "old"
    assert os.listdir(tmp_path) == ["a"]


@pytest.mark.parametrize("moment", ["write", "fsync", "replace"])
def test_a_kill_inside_a_write_leaves_the_old_file(tmp_path, monkeypatch, moment):
    files.write_text(tmp_path / "a", "old")

    def die(*_: object) -> None:
        os.kill(os.getpid(), signal.SIGKILL)

    def write() -> None:
        if moment != "write":
            monkeypatch.setattr(files.os, moment, die)
        with files.replacing(tmp_path / "a") as file:
            file.write(b"half of the ne")
            file.flush()
            if moment == "write":
                die()

    assert in_child(write) == -signal.SIGKILL
    assert (tmp_path / "a").read_text() == "old"
    leftovers = [name for name in os.listdir(tmp_path) if name.endswith(".tmp")]
    assert len(leftovers) == 1
    files.remove_leftovers(tmp_path)
    assert os.listdir(tmp_path) == ["a"]


def test_file_and_folder_are_flushed_before_and_after_the_rename(tmp_path, monkeypatch):
    calls = []
    fsync, replace = os.fsync, os.replace

    def spy_fsync(descriptor: int) -> None:
        calls.append("folder" if stat.S_ISDIR(os.fstat(descriptor).st_mode) else "file")
        fsync(descriptor)

    def spy_replace(*names: str) -> None:
        calls.append("rename")
        replace(*names)

    monkeypatch.setattr(files.os, "fsync", spy_fsync)
    monkeypatch.setattr(files.os, "replace", spy_replace)
    files.write_text(tmp_path / "a", "content")
    assert calls == ["file", "rename", "folder"]


def test_permissions_are_those_of_any_new_file(tmp_path):
    old = os.umask(0o027)
    try:
        files.write_text(tmp_path / "a", "content")
    finally:
        os.umask(old)
    assert stat.S_IMODE((tmp_path / "a").stat().st_mode) == 0o640


def test_a_link_stays_a_link(tmp_path):
    (tmp_path / "disk").mkdir()
    files.write_text(tmp_path / "disk" / "a", "old")
    (tmp_path / "a").symlink_to(tmp_path / "disk" / "a")
    files.write_text(tmp_path / "a", "new")
    assert (tmp_path / "a").is_symlink()
    assert (tmp_path / "disk" / "a").read_text() == "new"


def test_unreadable_files_are_named(tmp_path):
    (tmp_path / "a.json").write_text("{")
    with pytest.raises(ValueError, match=r"a\.json is not a JSON file"):
        files.read_json(tmp_path / "a.json")
    (tmp_path / "b.pt").write_bytes(b"not a zip")
    torch.save({"module": torch.nn.ReLU()}, tmp_path / "c.pt")
    for file in ("b.pt", "c.pt"):
        with pytest.raises(
            ValueError, match=rf"{file} cannot be read as a torch file of tensors and plain data"
        ) as found:
            files.read_torch(tmp_path / file)
        assert "\n" not in str(found.value)
        assert "weights_only" not in str(found.value)
    with pytest.raises(FileNotFoundError):
        files.read_torch(tmp_path / "missing.pt")


def test_code_in_a_torch_file_is_not_run(tmp_path):
    class Evil:
        def __reduce__(self) -> tuple[object, ...]:
            return os.mkdir, (str(tmp_path / "ran"),)

    torch.save(Evil(), tmp_path / "evil.pt")
    with pytest.raises(ValueError, match=r"evil\.pt cannot be read"):
        files.read_torch(tmp_path / "evil.pt")
    assert not (tmp_path / "ran").exists()


def test_a_folder_is_locked_against_other_processes_until_the_holder_ends(tmp_path):
    def take() -> None:
        with files.lock(tmp_path):
            pass

    def take_and_die() -> None:
        with files.lock(tmp_path):
            os.kill(os.getpid(), signal.SIGKILL)

    def is_refused() -> None:
        with pytest.raises(RuntimeError, match=f"another process is writing to {tmp_path}"):
            take()

    assert in_child(take_and_die) == -signal.SIGKILL
    with files.lock(tmp_path):
        assert in_child(is_refused) == 0
    assert in_child(take) == 0
