"""A save that is interrupted, at any step and in any way, leaves a whole checkpoint."""

import io
import itertools
import os
import resource
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pytest
import torch

from quamba.checkpoint import container, directory, load, save
from quamba.errors import CheckpointError
from tests.checkpoint.files import assert_same, logits, quantized


class Injected(Exception):
    """Raised in place of a step of the save."""


# Every call of a save that changes the disk, or may fail on it.
STEPS = [(os, "mkdir"), (os, "link"), (os, "rename"), (os, "fsync"), (os, "open"), (os, "chmod"), (io, "open")]


class Steps:
    """Counts the steps of a save, and does something in place of the one with a given number."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, number: int, action: Callable[[], None]) -> None:
        self.left = number
        self.action = action
        self.exchanged = False
        for module, name in [*STEPS, (directory, "_exchange")]:
            monkeypatch.setattr(module, name, self.counted(name, getattr(module, name)))
        monkeypatch.setattr(container, "raw", self.some(container.raw))
        monkeypatch.setattr(shutil, "rmtree", self.uncounted(shutil.rmtree))

    def some(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """Counts one call in sixteen: there are two for every tensor."""
        calls, counted = itertools.count(), self.counted("raw", original)
        return lambda tensor: (original if next(calls) % 16 else counted)(tensor)

    def uncounted(self, original: Callable[..., Any]) -> Callable[..., Any]:
        """The removal of what is left over may fail in silence; the next save removes it."""

        def call(*args: Any, **kwargs: Any) -> Any:
            left, self.left = self.left, -1
            original(*args, **kwargs)
            self.left = left

        return call

    def counted(self, name: str, original: Callable[..., Any]) -> Callable[..., Any]:
        def call(*args: Any, **kwargs: Any) -> Any:
            self.left -= 1
            if self.left == 0:
                self.action()
            result = original(*args, **kwargs)
            self.exchanged |= name == "_exchange" and bool(result)
            return result

        return call


def interruptions(monkeypatch: pytest.MonkeyPatch, attempt: Callable[[], None]) -> Iterator[Steps]:
    """Interrupt an attempt at its first step, its second, ..., until one gets through."""

    def action() -> None:
        raise Injected

    for number in itertools.count(1):
        with monkeypatch.context() as patch:
            steps = Steps(patch, number, action)
            try:
                attempt()
            except (Injected, CheckpointError):
                interrupted = True
            else:
                interrupted = False
        if not interrupted and steps.left > 0:
            assert number > 20
            return
        yield steps


@pytest.mark.parametrize("exchange", [True, False])
def test_an_interrupted_save_leaves_a_whole_checkpoint(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, exchange: bool
) -> None:
    out = tmp_path / "out"
    old, new = quantized(seed=0), quantized(seed=1)
    expected = {"old": logits(old), "new": logits(new)}
    if not exchange:
        monkeypatch.setattr(directory, "_exchange", lambda one, other: False)
    save(old, out)
    (out / "tokenizer.json").write_text("kept")
    seen = set()
    for steps in interruptions(monkeypatch, lambda: save(new, out, max_shard_size="8KB")):
        found = logits(load(out))
        state = next(name for name, value in expected.items() if torch.equal(found, value))
        if exchange:
            assert state == ("new" if steps.exchanged else "old")
        seen.add(state)
        assert (out / "tokenizer.json").read_text() == "kept"
        assert os.listdir(tmp_path) == ["out"]
        if state == "new":
            save(old, out)
    assert seen == {"old", "new"}
    assert torch.equal(logits(load(out)), expected["new"])
    assert os.listdir(tmp_path) == ["out"]


def test_a_first_save_that_is_interrupted_leaves_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    model, out = quantized(), tmp_path / "out"
    for _ in interruptions(monkeypatch, lambda: save(model, out)):
        if out.exists():
            assert torch.equal(logits(load(out)), logits(model))
            for path in out.iterdir():
                path.unlink()
            out.rmdir()
        assert os.listdir(tmp_path) == []


def test_a_full_disk_leaves_the_old_checkpoint(tmp_path: Path) -> None:
    old, new, out = quantized(seed=0), quantized(seed=1), tmp_path / "out"
    save(old, out)
    whole = (out / "model.safetensors").stat().st_size
    soft, hard = resource.getrlimit(resource.RLIMIT_FSIZE)
    for limit in (100, whole // 2, whole - 1):
        resource.setrlimit(resource.RLIMIT_FSIZE, (limit, hard))
        try:
            with pytest.raises(OSError, match="File too large"):
                save(new, out)
        finally:
            resource.setrlimit(resource.RLIMIT_FSIZE, (soft, hard))
        assert torch.equal(logits(load(out)), logits(old))
        assert os.listdir(tmp_path) == ["out"]


KILLS = """
import itertools, os, signal, sys
from pathlib import Path
import pytest, torch
torch.set_num_threads(1)
from quamba.checkpoint import directory, load, save
from tests.checkpoint.files import logits, quantized
from tests.checkpoint.test_interruption import Steps

root, exchange = Path(sys.argv[1]), sys.argv[2] == "exchange"
if not exchange:
    directory._exchange = lambda one, other: False
out = root / "out"
old, new = quantized(seed=0), quantized(seed=1)
expected = {"old": logits(old), "new": logits(new)}
save(old, out)
(out / "tokenizer.json").write_text("kept")
states = []
for number in itertools.count(1):
    child = os.fork()
    if child == 0:
        Steps(pytest.MonkeyPatch(), number, lambda: os.kill(os.getpid(), signal.SIGKILL))
        save(new, out)
        os._exit(0)
    _, status = os.waitpid(child, 0)
    found = logits(load(out))
    states.append(next(name for name, value in expected.items() if torch.equal(found, value)))
    assert (out / "tokenizer.json").read_text() == "kept"
    if status == 0:
        break
    assert os.WIFSIGNALED(status), status
    save(old, out)
    assert os.listdir(root) == ["out"], os.listdir(root)
print(len(states), states.index("new") == len(states) - states.count("new"), states.count("new"))
"""


@pytest.mark.parametrize("way", ["exchange", "renames"])
def test_a_killed_save_leaves_a_whole_checkpoint(tmp_path: Path, way: str) -> None:
    root = Path(__file__).parents[2]
    result = subprocess.run(
        [sys.executable, "-c", KILLS, str(tmp_path), way], cwd=root, capture_output=True, text=True, check=False
    )
    assert result.returncode == 0, result.stderr
    attempts, monotonic, new = result.stdout.split()
    assert int(attempts) > 20
    assert monotonic == "True"
    assert int(new) > 1


def test_readers_never_see_a_mixture(tmp_path: Path) -> None:
    """Each state of the disk while a save runs is a whole checkpoint, also for somebody who reads in between."""
    out = tmp_path / "out"
    old, new = quantized(seed=0), quantized(seed=1)
    expected = [logits(old), logits(new)]
    save(old, out)
    with pytest.MonkeyPatch.context() as patch:
        exchange = directory._exchange

        def look(one: Path, other: Path) -> bool:
            assert torch.equal(logits(load(out)), expected[0])
            done = exchange(one, other)
            assert torch.equal(logits(load(out)), expected[1])
            return done

        patch.setattr(directory, "_exchange", look)
        save(new, out)
    assert_same(load(out), new)
