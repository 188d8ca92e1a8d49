"""The runtime's settings."""

import pytest

from quamba.errors import RuntimeConfigError
from quamba.runtime import RuntimeConfig


def test_json_round_trip() -> None:
    config = RuntimeConfig(
        graphs=False, generate_on=("cpu",), prefill_lengths=(3, 8), prefill_tokens=24, prefill_uses=3, prefill_graphs=2,
        decode_graphs=5, idle_sessions=0,
    )  # fmt: skip
    assert RuntimeConfig.from_json(config.to_json()) == config
    assert RuntimeConfig.from_json("{}") == RuntimeConfig()


@pytest.mark.parametrize(
    ("batch", "length", "expected"), [(1, 1, 3), (1, 3, 3), (1, 4, 8), (3, 8, 8), (4, 4, None), (8, 3, 3), (1, 9, None)]
)
def test_padded_length(batch: int, length: int, expected: int | None) -> None:
    assert RuntimeConfig(prefill_lengths=(3, 8), prefill_tokens=24).padded_length(batch, length) == expected


@pytest.mark.parametrize(
    "changes",
    [
        {"prefill_lengths": (8, 3)},
        {"prefill_lengths": (3, 3)},
        {"prefill_lengths": (0, 3)},
        {"prefill_tokens": -1},
        {"prefill_uses": 0},
        {"prefill_graphs": 0},
        {"decode_graphs": 0},
        {"idle_sessions": -1},
    ],
)
def test_bad_settings_raise(changes: dict[str, object]) -> None:
    with pytest.raises(RuntimeConfigError, match=f"found {next(iter(changes))}.*expected"):
        RuntimeConfig(**changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("text", ["{", "[]", '{"graph": true}'])
def test_bad_json_raises(text: str) -> None:
    with pytest.raises(RuntimeConfigError, match=r"found .*expected|found no JSON"):
        RuntimeConfig.from_json(text)
