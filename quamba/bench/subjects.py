"""What is timed: a model that quamba.quantize has been through, by quamba.runtime. Calls are made ready first."""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from quamba.checkpoint.sizes import weight_bytes
from quamba.errors import UnsupportedModelError
from quamba.models.adapter import find_adapter, quantized_layers
from quamba.nn.config import BlockConfig
from quamba.runtime import RuntimeConfig, Session

Call = Callable[[], object]


class Subject(ABC):
    """One model.

    Attributes:
        name: in tables.
        device: where it is.
        vocabulary: token ids are drawn from 0 to this.
        modes: "graph" and "eager", as far as it has them.
    """

    name: str
    device: torch.device
    vocabulary: int
    modes: tuple[str, ...]

    def prompt(self, batch: int, length: int) -> Tensor:
        """Random token ids (B, L), the same for every subject."""
        generator = torch.Generator().manual_seed(0)
        return torch.randint(self.vocabulary, (batch, length), generator=generator).to(self.device)

    @abstractmethod
    def prefill(self, batch: int, length: int, mode: str) -> Call:
        """Prompts in, the logits behind their last tokens out."""

    @abstractmethod
    def decode(self, batch: int, mode: str) -> Call:
        """One token per sequence in, logits out."""

    @abstractmethod
    def whole(self, batch: int, length: int, new_tokens: int) -> Call:
        """Prompts in, new_tokens greedy tokens out, as fast as it goes."""

    @property
    @abstractmethod
    def weight_bytes(self) -> int:
        """Of the whole model in memory."""

    @property
    @abstractmethod
    def checkpoint_bytes(self) -> int:
        """Of the tensors in a checkpoint."""

    @property
    @abstractmethod
    def step_weight_bytes(self) -> int | None:
        """What a decode step has to read; None where it depends on the tokens (experts)."""

    @abstractmethod
    def state_bytes(self, batch: int) -> int:
        """Of the recurrent state of so many sequences."""

    @property
    @abstractmethod
    def token_operations(self) -> int | None:
        """Multiplications and additions of the blocks' linears per token; None where it depends on the tokens."""


class Quantized(Subject):
    """A model with our mixers: quantized, or in float by recipe "float"."""

    def __init__(self, name: str, model: nn.Module, *, dtype: torch.dtype | None = None) -> None:
        """Read a model.

        Args:
            name: in tables.
            model: quantized, in place.
            dtype: of float tensors in a checkpoint; None for the one that the model computes in.

        Raises:
            UnsupportedModelError: the model has not been through quamba.quantize, or with a recipe that simulates
                fewer bits in float, whose time says nothing of theirs.
        """
        quantization: Any = getattr(model, "quantization", None)
        if quantization is None:
            raise UnsupportedModelError("found a float model; expected one that quamba.quantize has been through")
        if quantization.recipe.simulated:
            raise UnsupportedModelError(
                f"found the recipe {quantization.recipe.name!r}, which simulates its bits in float; expected one whose "
                "integers are computed: the time of a simulation says nothing of them"
            )
        self.name = name
        self.model = model
        adapter = find_adapter(model)
        self._adapter = adapter
        self._stack = adapter.tail(model) is not None
        self._dtype = dtype or next(mixer for _, mixer in quantized_layers(adapter, model)).config.dtype
        embedding = model.get_submodule(adapter.embedding(model))
        self.vocabulary = int(embedding.weight.shape[0])  # type: ignore[index]
        self.device = next(t.device for t in (*model.parameters(), *model.buffers()))
        graphs = self._stack and self.device.type == "cuda"
        self.modes = ("graph", "eager") if graphs else ("eager",)

    def prefill(self, batch: int, length: int, mode: str) -> Call:
        config = RuntimeConfig(
            graphs=mode == "graph", prefill_lengths=(length,), prefill_tokens=batch * length, prefill_uses=1
        )
        session, ids = Session(self.model, max_batch=batch, config=config), self.prompt(batch, length)
        return lambda: session.prefill(ids)

    def decode(self, batch: int, mode: str) -> Call:
        session = Session(self.model, max_batch=batch, config=RuntimeConfig(graphs=mode == "graph"))
        tokens = session.prefill(self.prompt(batch, 4)).argmax(dim=-1)
        return lambda: session.decode(tokens)

    def whole(self, batch: int, length: int, new_tokens: int) -> Call:
        session, ids = Session(self.model, max_batch=batch), self.prompt(batch, length)

        def run() -> None:
            tokens = session.prefill(ids).argmax(dim=-1)
            for _ in range(new_tokens - 1):
                tokens = session.decode(tokens).argmax(dim=-1)

        return run

    @property
    def weight_bytes(self) -> int:
        return tensor_bytes(self.model)

    @property
    def checkpoint_bytes(self) -> int:
        return weight_bytes(self.model, dtype=self._dtype)

    @property
    def step_weight_bytes(self) -> int | None:
        if not self._stack:
            return None
        blocks = 0
        for _, mixer in quantized_layers(self._adapter, self.model):
            tensors = {**dict(mixer.named_parameters()), **dict(mixer.named_buffers())}
            # Where there is an A, it is read instead.
            read = (tensor for name, tensor in tensors.items() if name != "A_log" or "A" not in tensors)
            blocks += sum(tensor.numel() * tensor.element_size() for tensor in read)
        head = self.model.get_submodule(self._adapter.head(self.model))
        return blocks + tensor_bytes(getattr(head, "table", head))

    def state_bytes(self, batch: int) -> int:
        return batch * sum(
            tensor.numel() * tensor.element_size()
            for _, mixer in quantized_layers(self._adapter, self.model)
            for state in (mixer.new_state(1, torch.device("meta")),)
            for tensor in (state.conv, state.ssm)
        )

    @property
    def token_operations(self) -> int | None:
        if not self._stack:
            return None
        return sum(block_operations(mixer.config) for _, mixer in quantized_layers(self._adapter, self.model))


def block_operations(config: BlockConfig) -> int:
    """Multiplications and additions of a block's four linears per token."""
    rank, state = config.dt_rank, config.d_state
    return 2 * config.d_inner * (3 * config.d_model + 2 * rank + 2 * state)


def tensor_bytes(module: nn.Module) -> int:
    """Of a module's parameters and buffers, each once."""
    tensors = {tensor.data_ptr(): tensor for tensor in (*module.parameters(), *module.buffers())}
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors.values())
