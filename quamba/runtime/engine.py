"""Prefill and decode of a stack of our blocks on preallocated states, through CUDA graphs or eagerly."""

from collections import Counter
from collections.abc import Hashable, Iterator
from contextlib import contextmanager
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from quamba import ops
from quamba.nn.config import MixerState
from quamba.runtime.config import RuntimeConfig
from quamba.runtime.graphs import Graphs
from quamba.runtime.program import Program
from quamba.runtime.states import States


class Engine:
    """States for a number of sequences and what runs on them; one thread at a time.

    Attributes:
        program: the model's modules.
        states: the sequences' states, at the same place for ever.
        ran: how often each of "prefill graph", "prefill eager", "decode graph", "decode eager" ran.
    """

    def __init__(self, model: nn.Module, slots: int, config: RuntimeConfig) -> None:
        """Allocate the states.

        Args:
            model: a quantized model.
            slots: how many sequences at most.
            config: what to capture.

        Raises:
            UnsupportedModelError: see `Program`.
        """
        self.program = Program(model)
        self.config = config
        self.device = self.program.device
        self.states = States(self.program.layers, slots, self.device)
        self.ran: Counter[str] = Counter()
        # Grows by a few bytes with every shape of prompt that a graph may serve.
        self._uses: Counter[Hashable] = Counter()
        self._staging: States | None = None
        self._stream: Any = None
        self._decoding: Graphs | None = None
        self._prefilling: Graphs | None = None
        if self.device.type == "cuda" and config.graphs:
            pool = torch.cuda.graph_pool_handle()
            # A loop's tokens come at one or two addresses.
            self._decoding = Graphs(self.device, config.decode_graphs, pool, places=2)
            self._prefilling = Graphs(self.device, config.prefill_graphs, pool)

    def captured(self) -> list[Hashable]:
        """The graphs that there are: ("decode", B), ("prefill", B, padded L), ("admit", 1, padded L)."""
        return [key for graphs in (self._decoding, self._prefilling) if graphs is not None for key in graphs.keys]

    @property
    def slots(self) -> int:
        """How many sequences at most."""
        return self.states.slots

    @property
    def has_graphs(self) -> bool:
        """True where decode steps are graphs."""
        return self._decoding is not None

    def serves(self, model: nn.Module) -> bool:
        """False once the model's tensors were moved or replaced."""
        return self.program.describes(model)

    def prefill(self, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Start the first B slots with prompts (B, L), padded on the left where mask (B, L) is 0; (B, V) logits."""
        logits = self.prefill_graph(input_ids, mask)
        if logits is not None:
            return logits
        self.ran["prefill eager"] += 1
        with self.running():
            return self._prefill(input_ids, mask, self.states, input_ids.shape[0])

    def prefill_graph(self, input_ids: Tensor, mask: Tensor | None) -> Tensor | None:
        """`prefill` where a graph serves such prompts (quamba.runtime.RuntimeConfig); None, with nothing done, else."""
        return self._replayed("prefill", input_ids, mask, self.states)

    def decode(self, tokens: Tensor) -> Tensor:
        """Go on with the first B slots by one token each, (B,); (B, V) logits."""
        batch = tokens.shape[0]
        with self.running():
            if self._decoding is None or ops.references_forced():
                self.ran["decode eager"] += 1
                return self.program.step(tokens.to(self.device, torch.int64), self.states.first(batch))
            self.ran["decode graph"] += 1
            return self._decoding.run(
                ("decode", batch),
                (tokens.to(self.device, torch.int64),),
                body=lambda tokens: self.program.step(tokens, self.states.first(batch)),
                warm_up=lambda tokens: self.program.step(tokens, self._scratch(batch)),
            )

    def admit(self, slot: int, input_ids: Tensor, mask: Tensor | None) -> Tensor:
        """Start one slot with a prompt (1, L), the others left as they are; (1, V) logits."""
        with self.running():
            if self._staging is None:
                self._staging = States(self.program.layers, 1, self.device)
            logits = self._replayed("admit", input_ids, mask, self._staging)
            if logits is None:
                self.ran["prefill eager"] += 1
                logits = self._prefill(input_ids, mask, self._staging, 1)
            self.states.copy_slot(slot, self._staging)
            return logits

    def _replayed(self, name: str, input_ids: Tensor, mask: Tensor | None, states: States) -> Tensor | None:
        batch, length = input_ids.shape
        padded = self.config.padded_length(batch, length)
        graphs = self._prefilling
        if graphs is None or padded is None or ops.references_forced():
            return None
        key = (name, batch, padded)
        self._uses[key] += 1
        if key not in graphs and self._uses[key] < self.config.prefill_uses:
            return None
        self.ran["prefill graph"] += 1
        with self.running():
            return graphs.run(
                key,
                _padded(input_ids, mask, padded),
                body=lambda ids, mask: self._prefill(ids, mask, states, batch),
                warm_up=lambda ids, mask: self.program.prefill(ids, mask, self._scratch(batch)),
            )

    def _prefill(self, input_ids: Tensor, mask: Tensor | None, states: States, batch: int) -> Tensor:
        states.zero(batch)
        return self.program.prefill(input_ids, mask, states.first(batch))

    def _scratch(self, batch: int) -> list[MixerState]:
        """States to warm up on: one for all layers of a shape, since their values do not count."""
        made: dict[Hashable, MixerState] = {}
        found = []
        for mixer in self.program.layers.values():
            kind = (mixer.config.d_inner, mixer.config.d_conv, mixer.config.d_state, mixer.state_dtype())
            if kind not in made:
                made[kind] = mixer.new_state(batch, self.device)
            found.append(made[kind])
        return found

    @contextmanager
    def running(self) -> Iterator[None]:
        """Without gradients, on the states' device, after what another stream may still be doing to them."""
        if self.device.type != "cuda":
            with torch.no_grad():
                yield
            return
        with torch.no_grad(), torch.cuda.device(self.device):
            stream = torch.cuda.current_stream(self.device)
            if self._stream is not None and stream != self._stream:
                stream.wait_stream(self._stream)
                for tensor in self.states.tensors:
                    tensor.record_stream(stream)
            self._stream = stream
            yield


def _padded(input_ids: Tensor, mask: Tensor | None, length: int) -> tuple[Tensor, Tensor]:
    """A prompt and its mask, bool as the kernels read it, padded on the left."""
    missing = length - input_ids.shape[1]
    mask = torch.ones_like(input_ids, dtype=torch.bool) if mask is None else mask.to(torch.bool)
    return F.pad(input_ids, (missing, 0)), F.pad(mask, (missing, 0))
