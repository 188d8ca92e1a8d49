"""Shapes of published models, as data: what random weights are made for."""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from quamba.errors import RuntimeConfigError


@dataclass(frozen=True)
class Shape:
    """A transformers config by its model type and the settings that differ from that type's defaults."""

    model_type: str
    settings: Mapping[str, Any]


def _mamba(width: int, layers: int) -> Shape:
    return Shape("mamba", {"hidden_size": width, "num_hidden_layers": layers, "vocab_size": 50280})


SHAPES: Mapping[str, Shape] = {
    "mamba-130m": _mamba(768, 24),
    "mamba-370m": _mamba(1024, 48),
    "mamba-790m": _mamba(1536, 48),
    "mamba-1.4b": _mamba(2048, 48),
    "mamba-2.8b": _mamba(2560, 64),
    "falcon-mamba-7b": Shape(
        "falcon_mamba",
        {
            "hidden_size": 4096,
            "intermediate_size": 8192,
            "num_hidden_layers": 64,
            "vocab_size": 65024,
            "tie_word_embeddings": False,
        },
    ),
    # No published model: the layers of Jamba at a size that fits everywhere.
    "jamba-small": Shape(
        "jamba",
        {
            "hidden_size": 1024,
            "intermediate_size": 2048,
            "num_hidden_layers": 8,
            "num_attention_heads": 16,
            "num_key_value_heads": 8,
            "num_experts": 4,
            "vocab_size": 65536,
        },
    ),
    "tiny": Shape("mamba", {"hidden_size": 64, "num_hidden_layers": 2, "vocab_size": 512}),
}


def find_shape(name: str) -> Shape:
    """The shape of that name. Raises RuntimeConfigError where there is none."""
    if name not in SHAPES:
        raise RuntimeConfigError(f"found the shape {name!r}; expected one of {', '.join(SHAPES)}")
    return SHAPES[name]
