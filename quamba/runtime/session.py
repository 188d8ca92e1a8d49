"""Session: prefill, decode and slots for those who drive the loop themselves."""

import threading
from collections.abc import Hashable, Mapping, Sequence

import torch
from torch import Tensor, nn

from quamba.errors import DtypeError, SizeError, UnsupportedModelError
from quamba.models.adapter import find_adapter
from quamba.runtime.config import RuntimeConfig
from quamba.runtime.engine import Engine
from quamba.runtime.whole import WholeModel


class Session:
    """Up to `max_batch` sequences of one quantized model, each in a slot whose state stays where it is.

    On a CUDA device a model that is a stack of Mamba blocks runs through CUDA graphs as its RuntimeConfig says; on a
    CPU the same calls run eagerly. A hybrid (Jamba) runs through its own forward, eagerly, one batch at a time: it
    has no slots. Calls of several threads wait for each other; a call may come on another stream than the one before.
    The logits that a call returns may be overwritten by the next call: copy what has to outlast it.

    Example::

        session = Session(model, max_batch=8)
        tokens = session.prefill(input_ids).argmax(dim=-1)   # (B, L) -> (B,)
        while ...:
            tokens = session.decode(tokens).argmax(dim=-1)   # (B,) -> (B,)
    """

    def __init__(self, model: nn.Module, *, max_batch: int = 1, config: RuntimeConfig | None = None) -> None:
        """Allocate the states of `max_batch` sequences.

        Args:
            model: a quantized model of transformers or mamba-ssm.
            max_batch: number of slots.
            config: how to run it; None for the defaults.

        Raises:
            UnsupportedModelError: the model is not quantized, or lies on several devices.
            SizeError: max_batch is not positive.
        """
        if max_batch < 1:
            raise SizeError(f"found max_batch={max_batch}; expected at least 1")
        self.model = model
        self.max_batch = max_batch
        self.config = config or RuntimeConfig()
        self._lock = threading.RLock()
        self._engine: Engine | WholeModel = self._made()

    def _made(self) -> Engine | WholeModel:
        if find_adapter(self.model).tail(self.model) is None:
            return WholeModel(self.model)
        return Engine(self.model, self.max_batch, self.config)

    @property
    def device(self) -> torch.device:
        """Where the model and the states are."""
        return self._engine.device

    @property
    def captured(self) -> list[Hashable]:
        """The graphs that were captured: ("decode", B), ("prefill", B, L) and ("admit", 1, L), with padded L."""
        return self._engine.captured() if isinstance(self._engine, Engine) else []

    @property
    def ran(self) -> dict[str, int]:
        """How many prefills and decode steps ran, and whether as a graph: {"decode graph": 12, ...}."""
        return dict(self._engine.ran) if isinstance(self._engine, Engine) else {}

    @property
    def state_bytes(self) -> int:
        """Memory of the states of all slots."""
        return self._engine.states.bytes if isinstance(self._engine, Engine) else 0

    def prefill(
        self, input_ids: Tensor, attention_mask: Tensor | None = None, *, lengths: Tensor | Sequence[int] | None = None
    ) -> Tensor:
        """Start slots 0 to B - 1 anew, each with a prompt.

        Args:
            input_ids: integer (B, L), B at most max_batch.
            attention_mask: (B, L), 0 at padding on the left, or None.
            lengths: of B prompts that are padded on the right, or None; not beside a mask.

        Returns:
            (B, V): the logits behind each prompt's last token.

        Raises:
            SizeError, DtypeError: an argument is of the wrong shape or dtype.
        """
        with self._lock:
            ids, mask = self._prompts(input_ids, attention_mask, lengths, most=self.max_batch)
            if isinstance(self._engine, Engine) and not self._engine.serves(self.model):
                self._engine = self._made()
                ids, mask = ids.to(self.device), None if mask is None else mask.to(self.device)
            return self._engine.prefill(ids, mask)

    def decode(self, tokens: Tensor) -> Tensor:
        """One more token for slots 0 to B - 1.

        Args:
            tokens: integer (B,), B at most max_batch; on any device.

        Returns:
            (B, V) logits. Slots from B on are left as they are.

        Raises:
            SizeError, DtypeError: tokens are of the wrong shape or dtype.
        """
        with self._lock:
            if tokens.dim() != 1 or not 1 <= tokens.shape[0] <= self.max_batch:
                raise SizeError(
                    f"found tokens of shape {tuple(tokens.shape)}; expected (B,), B from 1 to {self.max_batch}"
                )
            _check_integer(tokens, "tokens")
            return self._engine.decode(tokens)

    def admit(self, slot: int, input_ids: Tensor) -> Tensor:
        """Start one slot anew with a prompt; the others are left as they are.

        Args:
            slot: 0 to max_batch - 1.
            input_ids: integer (L,) or (1, L), without padding.

        Returns:
            (V,): the logits behind the prompt's last token.

        Raises:
            SizeError, DtypeError: an argument is of the wrong shape or dtype.
            UnsupportedModelError: the model is a hybrid.
        """
        with self._lock:
            engine = self._stack("admit")
            self._check_slots([slot])
            ids, _ = self._prompts(input_ids[None] if input_ids.dim() == 1 else input_ids, None, None, most=1)
            return engine.admit(slot, ids, None)[0]

    def reset(self) -> None:
        """Clear the states of all slots."""
        with self._lock:
            if isinstance(self._engine, WholeModel):
                self._engine.reset()
            elif not self._engine.serves(self.model):
                self._engine = self._made()
            else:
                with self._engine.running():
                    self._engine.states.zero()

    def export_state(self, slots: Sequence[int]) -> dict[str, Tensor]:
        """Copies of some slots' states, which safetensors can store and `import_state` takes.

        Returns:
            "layers.<i>.conv" (n, D, K) and "layers.<i>.ssm" (n, D, N) for every layer i.
        """
        with self._lock:
            engine = self._stack("export_state")
            self._check_slots(slots)
            with engine.running():
                return engine.states.export(slots)

    def import_state(self, tensors: Mapping[str, Tensor], slots: Sequence[int]) -> None:
        """Put exported states, of this or another session of the same model, into some slots.

        Raises:
            SizeError, DtypeError: they are not of this model, or not as many as the slots.
        """
        with self._lock:
            engine = self._stack("import_state")
            self._check_slots(slots)
            with engine.running():
                engine.states.load(tensors, slots)

    def _stack(self, what: str) -> Engine:
        if isinstance(self._engine, Engine):
            return self._engine
        raise UnsupportedModelError(
            f"found {what} on a {type(self.model).__name__}, whose attention layers keep the past of a whole batch; "
            "expected prefill, decode and reset alone"
        )

    def _check_slots(self, slots: Sequence[int]) -> None:
        if not slots or len(set(slots)) != len(slots) or min(slots) < 0 or max(slots) >= self.max_batch:
            raise SizeError(f"found slots {list(slots)}; expected different ones from 0 to {self.max_batch - 1}")

    def _prompts(
        self, input_ids: Tensor, mask: Tensor | None, lengths: Tensor | Sequence[int] | None, *, most: int
    ) -> tuple[Tensor, Tensor | None]:
        """Prompts and mask, int64, padded on the left, on the session's device."""
        if input_ids.dim() != 2 or not 1 <= input_ids.shape[0] <= most or input_ids.shape[1] < 1:
            raise SizeError(
                f"found input_ids of shape {tuple(input_ids.shape)}; expected (B, L), B from 1 to {most}, L from 1"
            )
        _check_integer(input_ids, "input_ids")
        ids = input_ids.to(self.device, torch.int64)
        if lengths is not None:
            if mask is not None:
                raise SizeError("found attention_mask and lengths; expected one of the two, or none")
            return _to_the_right(ids, torch.as_tensor(lengths))
        if mask is not None and mask.shape != ids.shape:
            raise SizeError(f"found attention_mask of shape {tuple(mask.shape)}; expected {tuple(ids.shape)}")
        return ids, None if mask is None else mask.to(self.device)


def _check_integer(tensor: Tensor, name: str) -> None:
    if tensor.dtype not in (torch.int64, torch.int32):
        raise DtypeError(f"found {name} of dtype {tensor.dtype}; expected int64 or int32")


def _to_the_right(ids: Tensor, lengths: Tensor) -> tuple[Tensor, Tensor]:
    """Prompts padded on the right moved to the right end, and their mask."""
    batch, longest = ids.shape
    if lengths.shape != (batch,) or int(lengths.min()) < 1 or int(lengths.max()) > longest:
        raise SizeError(f"found lengths {lengths.tolist()}; expected {batch} numbers from 1 to {longest}")
    source = torch.arange(longest, device=ids.device) - (longest - lengths.to(ids.device))[:, None]
    return ids.gather(1, source.clamp(min=0)), (source >= 0).to(torch.int64)
