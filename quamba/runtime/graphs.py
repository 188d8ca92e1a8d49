"""CUDA graphs: captured once per key, replayed, and a bounded number of them kept."""

import contextlib
import threading
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

# Captures of several threads would meet in the caching allocator, and none may come while another synchronizes the
# device: one at a time in the process.
_CAPTURING = threading.Lock()

# Which use of a place captures a graph that reads there: the copy costs some 3 us, a capture some hundred of them.
_USES = 8
# Places whose uses are counted: a loop has one or two, while one that makes its inputs anew each time has many.
_COUNTED = 8


@dataclass(frozen=True)
class _Captured:
    graph: torch.cuda.CUDAGraph
    inputs: tuple[Tensor, ...]
    out: Tensor


@dataclass
class _Key:
    """What there is for a key.

    Attributes:
        copying: the graph whose inputs are copied to where it reads them.
        reading: those that read the caller's, by where these are.
        uses: of places of the caller's inputs, the last ones.
    """

    copying: _Captured
    reading: dict[Hashable, _Captured] = field(default_factory=dict)
    uses: OrderedDict[Hashable, int] = field(default_factory=OrderedDict)

    def used(self, place: Hashable) -> int:
        """Count one more use of a place."""
        self.uses[place] = self.uses.pop(place, 0) + 1
        if len(self.uses) > _COUNTED:
            self.uses.popitem(last=False)
        return self.uses[place]


class Graphs:
    """Graphs of one session on one device, in a memory pool that they share: they must not run at the same time."""

    def __init__(self, device: torch.device, keep: int, pool: object, *, places: int = 0) -> None:
        """Start with none.

        Args:
            device: a CUDA device.
            keep: for how many keys to keep graphs at most.
            pool: from torch.cuda.graph_pool_handle(), shared with whatever never runs at the same time.
            places: of a key's inputs that come at the same address again and again, so many get a graph each that
                reads them there, without a copy.
        """
        self.device = device
        self.keep = keep
        self.pool = pool
        self.places = places
        self._kept: OrderedDict[Hashable, _Key] = OrderedDict()

    def __contains__(self, key: Hashable) -> bool:
        return key in self._kept

    @property
    def keys(self) -> list[Hashable]:
        """What is captured, the least recently used first."""
        return list(self._kept)

    def run(
        self,
        key: Hashable,
        inputs: Sequence[Tensor],
        *,
        body: Callable[..., Tensor],
        warm_up: Callable[..., object],
    ) -> Tensor:
        """Replay the graph of a key on the current stream, capturing it first where there is none.

        Args:
            key: names the graph; the inputs' shapes and dtypes belong to it.
            inputs: copied to where the graph reads them, unless it reads them where they are.
            body: what to capture, called with the tensors that the graph reads; what else it reads or writes has to
                stay where it is.
            warm_up: the same work on other states, run before a capture: nothing may be loaded during one.

        Returns:
            What `body` returned when it was captured, with this replay's values; the next replay of any graph of the
            pool may overwrite it.
        """
        if key not in self._kept:
            with _CAPTURING:
                if len(self._kept) >= self.keep:
                    # A graph must not go while it runs.
                    torch.cuda.synchronize(self.device)
                    self._kept.popitem(last=False)
                self._kept[key] = _Key(
                    self._capture(tuple(tensor.clone() for tensor in inputs), body=body, warm_up=warm_up)
                )
        self._kept.move_to_end(key)
        kept = self._kept[key]
        # The caller's tensors are alive while they are passed, whoever had the memory before.
        place = tuple((tensor.data_ptr(), tensor.stride()) for tensor in inputs)
        reading = kept.reading.get(place)
        if reading is None and len(kept.reading) < self.places and kept.used(place) >= _USES:
            with _CAPTURING:
                captured = self._capture(tuple(inputs), body=body, warm_up=warm_up)
                # Their memory stays the caller's: held here, it would not come again.
                reading = kept.reading[place] = replace(captured, inputs=())
        if reading is not None:
            reading.graph.replay()
            return reading.out
        for static, tensor in zip(kept.copying.inputs, inputs, strict=True):
            static.copy_(tensor, non_blocking=True)
        kept.copying.graph.replay()
        return kept.copying.out

    def _capture(
        self, inputs: tuple[Tensor, ...], *, body: Callable[..., Tensor], warm_up: Callable[..., object]
    ) -> _Captured:
        here = torch.cuda.current_stream(self.device)
        aside = torch.cuda.Stream(self.device)  # type: ignore[no-untyped-call]
        aside.wait_stream(here)
        graph = torch.cuda.CUDAGraph()
        with torch.cuda.stream(aside):
            warm_up(*inputs)
            aside.synchronize()
            # Not torch.cuda.graph: its garbage collection and emptying of the cache take longer than a capture.
            graph.capture_begin(pool=self.pool, capture_error_mode="thread_local")  # type: ignore[arg-type]
            try:
                out = body(*inputs)
            except BaseException:
                # The capture has failed with the body; what ends it says so once more.
                with contextlib.suppress(RuntimeError):
                    graph.capture_end()
                raise
            graph.capture_end()
        here.wait_stream(aside)
        return _Captured(graph=graph, inputs=inputs, out=out)
