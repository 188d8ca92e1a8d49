"""How busy others keep the machine while something is timed: a latency taken beside them is no figure to publish."""

import os
import time
from pathlib import Path

# Of all cores: what a machine at rest may do besides.
MOST = 0.05
# Seconds below which the kernel's ticks, of 10 ms, tell too little.
_LEAST = 0.5
_STAT = Path("/proc/stat")


class Others:
    """What processes other than this one do to the CPU's cores, from the moment this is made."""

    def __init__(self) -> None:
        self._busy, self._own, self._clock = _busy_seconds(), time.process_time(), time.perf_counter()

    def share(self) -> float | None:
        """The share of all cores, 0 to 1, that others kept busy since; None where that is unknown.

        Known on Linux, after half a second.
        """
        busy, own = _busy_seconds(), time.process_time() - self._own
        seconds = time.perf_counter() - self._clock
        if busy is None or self._busy is None or seconds < _LEAST:
            return None
        return min(1.0, max(0.0, (busy - self._busy - own) / (seconds * (os.cpu_count() or 1))))


def disturbed(share: float | None, device_type: str) -> bool:
    """True for times that are not to be published: of a CPU that others used, or may have used."""
    return device_type == "cpu" and (share is None or share > MOST)


def _busy_seconds() -> float | None:
    """Of all cores, all processes and the hypervisor's other guests, since the machine started."""
    try:
        fields = _STAT.read_text(encoding="ascii").splitlines()[0].split()
    except OSError:
        return None
    user, nice, system, _, _, interrupts, soft_interrupts, stolen = map(int, fields[1:9])
    return (user + nice + system + interrupts + soft_interrupts + stolen) / os.sysconf("SC_CLK_TCK")
