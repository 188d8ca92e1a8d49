"""How the runtime executes models, as data."""

import json
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any

from quamba.errors import RuntimeConfigError


@dataclass(frozen=True)
class RuntimeConfig:
    """What is captured into CUDA graphs, and how many of them are kept.

    Attributes:
        graphs: False runs everything eagerly.
        generate_on: kinds of device on which `model.generate()` goes through the runtime.
        prefill_lengths: lengths to which prompts are padded (on the left, under a mask) for a prefill graph;
            increasing.
        prefill_tokens: prompts of more tokens than this, padding and all sequences counted, are run eagerly: the
            device is busy longer with them than the host.
        prefill_uses: which use of a padded shape captures its graph; earlier ones are run eagerly, since capturing
            costs as much as two eager passes.
        prefill_graphs, decode_graphs: how many are kept per session; the one that was not used for longest goes.
        idle_sessions: sessions of `generate()` (states of one batch size, and graphs) that a model keeps for later.
    """

    graphs: bool = True
    generate_on: tuple[str, ...] = ("cuda",)
    prefill_lengths: tuple[int, ...] = (16, 32, 48, 64, 96, 128, 192, 256, 384, 512, 768, 1024, 1536, 2048)
    prefill_tokens: int = 2048
    prefill_uses: int = 2
    prefill_graphs: int = 8
    decode_graphs: int = 16
    idle_sessions: int = 1

    def __post_init__(self) -> None:
        # JSON has lists.
        object.__setattr__(self, "generate_on", tuple(self.generate_on))
        object.__setattr__(self, "prefill_lengths", tuple(self.prefill_lengths))
        if list(self.prefill_lengths) != sorted({n for n in self.prefill_lengths if n > 0}):
            raise RuntimeConfigError(
                f"found prefill_lengths {self.prefill_lengths}; expected positive numbers in increasing order"
            )
        for name, least in (("prefill_tokens", 0), ("prefill_uses", 1), ("prefill_graphs", 1), ("decode_graphs", 1)):
            if getattr(self, name) < least:
                raise RuntimeConfigError(f"found {name}={getattr(self, name)}; expected at least {least}")
        if self.idle_sessions < 0:
            raise RuntimeConfigError(f"found idle_sessions={self.idle_sessions}; expected at least 0")

    def padded_length(self, batch: int, length: int) -> int | None:
        """The length to which a prompt (batch, length) is padded for a prefill graph; None where it runs eagerly."""
        found = next((n for n in self.prefill_lengths if n >= length), None)
        return None if found is None or batch * found > self.prefill_tokens else found

    def to_json(self) -> str:
        """JSON text; `from_json` reads it back equal."""
        return json.dumps(asdict(self))

    @classmethod
    def from_json(cls, text: str) -> "RuntimeConfig":
        """Inverse of `to_json`. Raises RuntimeConfigError on anything unknown or malformed."""
        try:
            content: Any = json.loads(text)
        except ValueError as error:
            raise RuntimeConfigError(f"found no JSON ({error}); expected a RuntimeConfig") from error
        known = {field.name for field in fields(cls)}
        if not isinstance(content, Mapping) or not set(content) <= known:
            found = sorted(set(content) - known) if isinstance(content, Mapping) else type(content).__name__
            raise RuntimeConfigError(f"found {found} in a RuntimeConfig; expected keys among {sorted(known)}")
        return cls(**content)
