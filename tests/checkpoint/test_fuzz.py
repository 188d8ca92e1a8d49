"""Damaged checkpoints, thousands of them: each loads bit-equal or raises CheckpointError, and nothing else happens."""

import json
import random
import re
import time
from collections import Counter
from collections.abc import Callable
from pathlib import Path

import pytest
import torch

from quamba.checkpoint import layout, load, save
from quamba.errors import CheckpointError
from tests.checkpoint.files import logits, quantized

CASES = 1250
CPU_SECONDS = 30

Mutation = Callable[[random.Random, bytes], bytes]


def flip_bit(dice: random.Random, data: bytes) -> bytes:
    position = dice.randrange(len(data))
    return data[:position] + bytes([data[position] ^ 1 << dice.randrange(8)]) + data[position + 1 :]


def flip_bits(dice: random.Random, data: bytes) -> bytes:
    for _ in range(dice.randrange(2, 50)):
        data = flip_bit(dice, data)
    return data


def overwrite(dice: random.Random, data: bytes) -> bytes:
    position, length = dice.randrange(len(data)), dice.choice((1, 2, 8, 100, 5000))
    filling = dice.choice((bytes(length), b"\xff" * length, b" " * length, dice.randbytes(length)))
    return (data[:position] + filling + data[position + length :])[: len(data)]


def truncate(dice: random.Random, data: bytes) -> bytes:
    return data[: dice.choice((0, 7, 8, 9, len(data) - 1, dice.randrange(len(data))))]


def insert(dice: random.Random, data: bytes) -> bytes:
    position = dice.choice((0, 8, len(data), dice.randrange(len(data))))
    return data[:position] + dice.randbytes(dice.choice((1, 8, 64))) + data[position:]


def delete(dice: random.Random, data: bytes) -> bytes:
    position = dice.randrange(len(data))
    return data[:position] + data[position + dice.choice((1, 8, 64)) :]


def move(dice: random.Random, data: bytes) -> bytes:
    """Exchange two stretches of equal length: tensors, or parts of them."""
    length = min(dice.choice((1, 4, 24, 96, 1152)), len(data) // 3)
    one, other = sorted(dice.sample(range(0, len(data) - length), 2))
    other = max(other, one + length)
    first, second = data[one : one + length], data[other : other + length]
    return data[:one] + second + data[one + length : other] + first + data[other + length :]


def header(data: bytes) -> tuple[bytes, bytes]:
    """The text of a safetensors header, and the rest of the file."""
    end = 8 + int.from_bytes(data[:8], "little")
    return data[8:end], data[end:]


def with_header(text: bytes, rest: bytes) -> bytes:
    return len(text).to_bytes(8, "little") + text + rest


def header_length(dice: random.Random, data: bytes) -> bytes:
    length = int.from_bytes(data[:8], "little")
    found = dice.choice(
        (0, 1, length - 8, length + 8, length ^ 1 << dice.randrange(64), dice.getrandbits(64), 2**64 - 1)
    )
    return found.to_bytes(8, "little") + data[8:]


def flip_bit_of_header(dice: random.Random, data: bytes) -> bytes:
    text, rest = header(data)
    return with_header(flip_bit(dice, text), rest)


def number_of_header(dice: random.Random, data: bytes) -> bytes:
    text, rest = header(data)
    return with_header(change_number(dice, text), rest)


def exchange_names(dice: random.Random, data: bytes) -> bytes:
    """Exchange two names in the header, with or without their checksums."""
    text, rest = header(data)
    content = json.loads(text)
    one, other = dice.sample([name for name in content if name != "__metadata__"], 2)
    content[one], content[other] = content[other], content[one]
    if dice.random() < 0.5:
        checksums = content["__metadata__"]["quamba.tensors"].split()
        dice.shuffle(checksums)
        content["__metadata__"]["quamba.tensors"] = " ".join(checksums)
    return with_header(json.dumps(content).encode(), rest)


def drop_key_of_header(dice: random.Random, data: bytes) -> bytes:
    text, rest = header(data)
    return with_header(drop_key(dice, text), rest)


def change_number(dice: random.Random, text: bytes) -> bytes:
    numbers = list(re.finditer(rb"\d+(\.\d+)?(e-?\d+)?", text))
    match = dice.choice(numbers)
    values = (b"0", b"-1", b"1", b"1e400", b"NaN", b"null", b"true", b"[]", b'"a"', b"9" * 30, b"9" * 5000)
    value = dice.choice((*values, str(dice.randrange(-5, 200)).encode()))
    return text[: match.start()] + value + text[match.end() :]


def drop_key(dice: random.Random, text: bytes) -> bytes:
    content = json.loads(text)
    found = [content]
    for node in found:
        found += [child for child in node.values() if isinstance(child, dict) and child]
    node = dice.choice(found)
    del node[dice.choice(sorted(node))]
    return json.dumps(content).encode()


def exchange_words(dice: random.Random, text: bytes) -> bytes:
    """Exchange two quoted words: keys, values, or one of each."""
    one, other = sorted(dice.sample(list(re.finditer(rb'"[^"]*"', text)), 2), key=lambda match: match.start())
    return text[: one.start()] + other[0] + text[one.end() : other.start()] + one[0] + text[other.end() :]


def nest(dice: random.Random, text: bytes) -> bytes:
    depth = dice.choice((1, 100, 100_000))
    return b'{"a":' * depth + text + b"}" * depth


BYTES: tuple[Mutation, ...] = (flip_bit, flip_bits, overwrite, truncate, insert, delete, move)
OF_JSON: tuple[Mutation, ...] = (*BYTES, flip_bit, flip_bit, change_number, drop_key, exchange_words, nest)
OF_WEIGHTS: tuple[Mutation, ...] = (
    *BYTES,
    flip_bit,
    header_length,
    flip_bit_of_header,
    flip_bit_of_header,
    number_of_header,
    exchange_names,
    drop_key_of_header,
)
# The size of a shard -> file name -> its mutations, and its share of the cases.
FILES: dict[str, dict[str, tuple[tuple[Mutation, ...], int]]] = {
    "1GB": {
        layout.WEIGHTS: (OF_WEIGHTS, 5),
        layout.CONFIG: (OF_JSON, 4),
        layout.GENERATION_CONFIG: (OF_JSON, 1),
    },
    "12KB": {
        "model-00001-of-00003.safetensors": (OF_WEIGHTS, 3),
        "model-00003-of-00003.safetensors": (OF_WEIGHTS, 3),
        layout.INDEX: (OF_JSON, 4),
    },
}


@pytest.mark.parametrize("size", FILES)
def test_damaged_checkpoints_raise_or_load_bit_equal(tmp_path: Path, size: str) -> None:
    model, files = quantized("mamba", "quamba-c"), FILES[size]
    expected = logits(model)
    save(model, tmp_path, max_shard_size=size)
    whole = {path.name: path.read_bytes() for path in tmp_path.iterdir()}
    assert set(files) <= set(whole)
    dice = random.Random(20)
    names = [name for name, (_, share) in files.items() for _ in range(share)]
    outcomes: Counter[tuple[str, str]] = Counter()
    start = time.process_time()
    for case in range(CASES):
        name = dice.choice(names)
        mutation = dice.choice(files[name][0])
        damaged = mutation(dice, whole[name])
        (tmp_path / name).write_bytes(damaged)
        # Shown by pytest where an assertion or another exception ends the test.
        print(f"case {case}: {mutation.__name__} of {name}")
        message = ""
        try:
            found = load(tmp_path)
        except CheckpointError as error:
            outcome, message = "raised", str(error)
        else:
            outcome = "same" if damaged == whole[name] else "loaded"
            assert torch.equal(logits(found), expected)
        assert (outcome == "raised") == (str(tmp_path) in message)
        outcomes[name, outcome] += 1
        (tmp_path / name).write_bytes(whole[name])
    assert time.process_time() - start < CPU_SECONDS
    print(dict(outcomes))
    for name in files:
        assert outcomes[name, "raised"] > 100 or name == layout.GENERATION_CONFIG
    assert sum(count for (_, outcome), count in outcomes.items() if outcome != "same") > 0.97 * CASES
    assert torch.equal(logits(load(tmp_path)), expected)
