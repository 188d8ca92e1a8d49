"""Replacing a directory: the old one or the new one, whatever happens in between."""

import fcntl
import os
import stat
from pathlib import Path

import pytest

from quamba.checkpoint import directory as module
from quamba.checkpoint.directory import recover, replacing
from quamba.errors import CheckpointError


def is_ours(name: str) -> bool:
    return name.startswith("model")


def write(target: Path, text: str) -> None:
    with replacing(target, is_ours) as new:
        (new / "model").write_text(text)


@pytest.fixture(params=["exchange", "renames"])
def _both_ways(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> None:
    if request.param == "renames":
        monkeypatch.setattr(module, "_exchange", lambda one, other: False)


both_ways = pytest.mark.usefixtures("_both_ways")


@both_ways
def test_a_directory_is_made_and_replaced(tmp_path: Path) -> None:
    target = tmp_path / "deep" / "out"
    write(target, "one")
    assert [p.name for p in target.iterdir()] == ["model"]
    (target / "model-2").write_text("stale")
    (target / "tokenizer.json").write_text("kept")
    (target / "model-dir").mkdir()
    (target / "sub").mkdir()
    (target / "sub" / "model").write_text("not at the top: kept")
    (target / "link").symlink_to("tokenizer.json")
    (target / "dangling").symlink_to("nowhere")
    target.chmod(0o750)
    write(target, "two")
    assert sorted(p.name for p in target.iterdir()) == ["dangling", "link", "model", "sub", "tokenizer.json"]
    assert (target / "model").read_text() == "two"
    assert (target / "tokenizer.json").read_text() == "kept"
    assert (target / "sub" / "model").read_text() == "not at the top: kept"
    assert os.readlink(target / "link") == "tokenizer.json"
    assert stat.S_IMODE(target.stat().st_mode) == 0o750
    assert os.listdir(target.parent) == ["out"]


@both_ways
def test_an_error_in_the_block_changes_nothing(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "one")

    def interrupted() -> None:
        with replacing(target, is_ours) as new:
            (new / "model").write_text("two")
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        interrupted()
    assert (target / "model").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


@both_ways
def test_files_that_appear_meanwhile_are_kept(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "one")
    with replacing(target, is_ours) as new:
        (new / "model").write_text("two")
        (target / "tokenizer.json").write_text("late")
    assert (target / "tokenizer.json").read_text() == "late"
    assert (target / "model").read_text() == "two"


def test_a_link_to_a_directory_stays_a_link(tmp_path: Path) -> None:
    write(tmp_path / "real", "one")
    (tmp_path / "link").symlink_to("real")
    write(tmp_path / "link", "two")
    assert (tmp_path / "link").is_symlink()
    assert (tmp_path / "real" / "model").read_text() == "two"


def test_files_are_copied_where_links_are_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "one")
    (target / "tokenizer.json").write_text("kept")

    def refuse(*args: object, **kwargs: object) -> None:
        raise PermissionError("no links here")

    monkeypatch.setattr(os, "link", refuse)
    write(target, "two")
    assert (target / "tokenizer.json").read_text() == "kept"


def test_a_failed_second_rename_puts_the_old_directory_back(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target = tmp_path / "out"
    write(target, "one")
    rename = os.rename

    def fail(source: Path, to: Path) -> None:
        if "new-" in str(source):
            raise OSError("injected")
        rename(source, to)

    monkeypatch.setattr(module, "_exchange", lambda one, other: False)
    monkeypatch.setattr(os, "rename", fail)
    with pytest.raises(OSError, match="injected"):
        write(target, "two")
    assert (target / "model").read_text() == "one"
    assert os.listdir(tmp_path) == ["out"]


def test_recovery_after_death_between_two_renames(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "one")
    target.rename(tmp_path / ".out.quamba-old")
    recover(target)
    assert (target / "model").read_text() == "one"
    target.rename(tmp_path / ".out.quamba-old")
    write(target, "two")
    assert (target / "model").read_text() == "two"
    assert os.listdir(tmp_path) == ["out"]


def test_remains_of_dead_saves_are_removed_and_those_of_living_ones_stay(tmp_path: Path) -> None:
    target = tmp_path / "out"
    write(target, "one")
    dead, other = tmp_path / ".out.quamba-new-0123", tmp_path / ".out2.quamba-new-0123"
    dead.mkdir()
    other.mkdir()
    (dead / "model").write_text("half")
    with replacing(target, is_ours) as living:
        assert not dead.exists()
        write(target, "two")
        assert living.exists()
        (living / "model").write_text("three")
    assert (target / "model").read_text() == "three"
    assert sorted(os.listdir(tmp_path)) == [".out2.quamba-new-0123", "out"]


def test_a_file_system_without_locks(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    target, left = tmp_path / "out", tmp_path / ".out.quamba-new-0123"
    left.mkdir()

    def refuse(descriptor: int, operation: int) -> None:
        raise OSError("no locks here")

    monkeypatch.setattr(fcntl, "flock", refuse)
    before = len(os.listdir("/proc/self/fd"))
    write(target, "one")
    write(target, "two")
    assert (target / "model").read_text() == "two"
    assert left.exists()
    assert len(os.listdir("/proc/self/fd")) == before


def test_what_cannot_be_replaced_raises(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    file = tmp_path / "file"
    file.write_text("x")
    with pytest.raises(CheckpointError, match="found a file"):
        write(file, "one")
    inner = tmp_path / "cwd" / "inner"
    inner.mkdir(parents=True)
    monkeypatch.chdir(inner)
    for target in (inner, inner.parent, Path()):
        with pytest.raises(CheckpointError, match="working directory"):
            write(target, "one")
    with pytest.raises(CheckpointError, match="mount point"):
        write(Path("/proc"), "one")
    assert sorted(os.listdir(tmp_path)) == ["cwd", "file"]
    write(Path("new"), "one")
    assert (inner / "new" / "model").read_text() == "one"
