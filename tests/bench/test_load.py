"""Who else uses the machine."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from quamba.bench import load
from quamba.bench.load import MOST, Others, disturbed


def test_time_of_others_is_what_is_left_of_the_machine_s(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_STAT", tmp_path / "stat")
    ticks = os.sysconf("SC_CLK_TCK")
    clock, own = [100.0], [7.0]
    monkeypatch.setattr(time, "perf_counter", lambda: clock[0])
    monkeypatch.setattr(time, "process_time", lambda: own[0])
    # user nice system idle iowait irq softirq steal guest guest_nice; a guest's time is in the user's.
    write = (tmp_path / "stat").write_text
    write("cpu 1000 200 300 9000 50 4 3 2 70 8\ncpu0 1 1 1 1 1 1 1 1 1 1\n")
    others = Others()
    clock[0] += 4
    own[0] += 3
    seconds = ticks * 5
    write(f"cpu {1000 + seconds} {200 + ticks} {300 + ticks} 99000 5000 {4 + ticks} {3 + ticks} {2 + ticks} 70 8\n")
    # Ten seconds of work in four, three of them ours.
    assert others.share() == pytest.approx(min(1.0, 7 / (4 * (os.cpu_count() or 1))))
    own[0] += 100
    assert others.share() == 0.0
    clock[0] -= 3.7
    assert others.share() is None


def test_without_the_kernel_s_figures_it_is_unknown(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(load, "_STAT", tmp_path / "absent")
    others = Others()
    time.sleep(0.55)
    assert others.share() is None


@pytest.mark.skipif(not Path("/proc/stat").exists(), reason="this system tells nothing of other processes")
def test_a_busy_process_is_seen() -> None:
    busy = subprocess.Popen([sys.executable, "-c", "while True: pass"])
    try:
        time.sleep(0.2)
        others = Others()
        time.sleep(0.8)
        share = others.share()
        assert share is not None
        assert share * (os.cpu_count() or 1) > 0.5
    finally:
        busy.kill()
        busy.wait()


def test_what_is_not_to_be_published() -> None:
    assert disturbed(None, "cpu")
    assert disturbed(MOST + 0.01, "cpu")
    assert not disturbed(MOST, "cpu")
    assert not disturbed(0.9, "cuda")
