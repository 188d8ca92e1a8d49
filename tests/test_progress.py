"""Progress bars: where somebody can see them, and only there."""

import os
import pty
import subprocess
import sys

import pytest

from quamba.progress import track


@pytest.mark.parametrize("show", [None, False])
def test_quiet_where_stderr_is_no_terminal(show: bool | None, capfd: pytest.CaptureFixture[str]) -> None:
    assert list(track(iter("abc"), "working", total=3, show=show)) == ["a", "b", "c"]
    assert capfd.readouterr() == ("", "")


def test_a_bar_with_the_time_left_on_a_terminal() -> None:
    program = "import time\nfrom quamba.progress import track\n"
    program += "for i in track(range(3), 'working', total=3): time.sleep(0.3)\n"
    terminal, end = pty.openpty()
    done = subprocess.run(
        [sys.executable, "-c", program],
        stdout=subprocess.PIPE,
        stderr=end,
        env=os.environ | {"TERM": "xterm", "COLUMNS": "80"},
        timeout=120,
        check=True,
    )
    os.close(end)
    shown = os.read(terminal, 100_000).decode()
    os.close(terminal)
    assert done.stdout == b""
    assert "working" in shown
    assert "1/3" in shown
    assert "0:00:0" in shown


def test_nothing_is_read_ahead() -> None:
    items = iter(range(3))
    tracked = track(items, "working", total=3, show=True)
    assert next(tracked) == 0
    assert next(items) == 1
    tracked.close()
