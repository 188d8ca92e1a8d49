"""Token streams, windows and calibration sequences, with a tokenizer made here."""

import json
from pathlib import Path
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import WhitespaceSplit
from transformers import PreTrainedTokenizerFast

from quamba.errors import CalibrationError
from quamba.text import TextPart, calibration_sequences, encode, read_ids, sequences_of_rows, windows


@pytest.fixture
def tokenizer() -> Any:
    """The word "w<i>" has id i; "<end>" has id 0."""
    words = {"<end>": 0} | {f"w{i}": i for i in range(1, 100)}
    core = Tokenizer(WordLevel(words, unk_token="<end>"))
    core.pre_tokenizer = WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=core, eos_token="<end>", bos_token="<end>", model_max_length=8)


def words(begin: int, end: int) -> str:
    return " ".join(f"w{i}" for i in range(begin, end))


def test_encode_gives_the_words_alone(tokenizer: Any) -> None:
    ids = encode(tokenizer, words(1, 50))
    assert ids.dtype == torch.int64
    assert ids.tolist() == list(range(1, 50))


def test_read_ids(tokenizer: Any, tmp_path: Path) -> None:
    (tmp_path / "a.txt").write_text("w3\nw5\n\nw7", encoding="utf-8")
    assert read_ids(tokenizer, tmp_path / "a.txt").tolist() == [3, 5, 7]
    (tmp_path / "b.txt").write_bytes(b"w3 \xff\xfe")
    with pytest.raises(CalibrationError, match="UTF-8"):
        read_ids(tokenizer, tmp_path / "b.txt")


@given(total=st.integers(1, 300), length=st.integers(1, 40), count=st.none() | st.integers(1, 20))
def test_windows_cover_the_stream_evenly(total: int, length: int, count: int | None) -> None:
    ids = torch.arange(total)
    if total < length:
        with pytest.raises(CalibrationError, match="at least one window"):
            windows(ids, length=length, count=count)
        return
    found = windows(ids, length=length, count=count)
    assert found.shape == (min(count or total, total // length), length)
    starts = found[:, 0]
    assert torch.equal(found, starts[:, None] + torch.arange(length))
    gaps = starts.diff()
    assert starts[0] == 0
    if len(found) > 1:
        assert int(found[-1, -1]) == total - 1
        assert int(gaps.min()) >= length
        assert int(gaps.max() - gaps.min()) <= 1


@pytest.mark.parametrize(("length", "count"), [(0, 1), (-1, 1), (4, 0)])
def test_windows_refuses_what_is_not_positive(length: int, count: int) -> None:
    with pytest.raises(CalibrationError, match="positive"):
        windows(torch.arange(10), length=length, count=count)


def test_text_file_is_spread_over(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "calibration.txt"
    path.write_text(words(1, 100))
    found = calibration_sequences(str(path), tokenizer, length=7, count=3)
    assert [ids.tolist() for ids in found] == [list(range(s, s + 7)) for s in (1, 47, 93)]


def test_rows_of_text_are_joined_with_the_end_token(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "rows.jsonl"
    path.write_text("\n".join(json.dumps({"text": words(i, i + 4), "more": 1}) for i in range(1, 90, 4)))
    found = calibration_sequences(str(path), tokenizer, length=5, count=3)
    assert [ids.tolist() for ids in found] == [[1, 2, 3, 4, 0], [5, 6, 7, 8, 0], [9, 10, 11, 12, 0]]


def test_only_the_rows_that_are_needed_are_read(tokenizer: Any) -> None:
    rows = iter([{"text": "w1 w2 w3"}, {"text": "w4 w5 w6"}, {"text": "w7"}])
    sequences_of_rows(rows, tokenizer, length=2, count=3, name="rows")
    assert next(rows) == {"text": "w7"}


def test_rows_of_ids_are_cut_and_counted(tokenizer: Any, tmp_path: Path) -> None:
    rows = [[1, 2, 3], [], [4], [5, 6, 7, 8, 9], [10]]
    datasets.Dataset.from_dict({"input_ids": rows}).save_to_disk(tmp_path / "set")
    found = calibration_sequences(str(tmp_path / "set"), tokenizer, length=4, count=3)
    assert [ids.tolist() for ids in found] == [[1, 2, 3], [4], [5, 6, 7, 8]]
    assert all(ids.dtype == torch.int64 for ids in found)


def test_split_of_a_saved_dataset_dict(tokenizer: Any, tmp_path: Path) -> None:
    parts = {name: datasets.Dataset.from_dict({"input_ids": [[i]]}) for i, name in enumerate(("train", "other"), 1)}
    datasets.DatasetDict(parts).save_to_disk(tmp_path / "set")
    found = calibration_sequences(str(tmp_path / "set"), tokenizer, length=4, count=3, split="other")
    assert [ids.tolist() for ids in found] == [[2]]
    with pytest.raises(CalibrationError, match="'test'"):
        calibration_sequences(str(tmp_path / "set"), tokenizer, length=4, count=3, split="test")


@pytest.mark.parametrize(
    ("rows", "message"),
    [
        ([], "no rows"),
        ([{"words": "w1"}], r"columns \['words'\]"),
        ([{"input_ids": []}], "only empty"),
        ([{"text": "w1"}], "2 tokens"),
    ],
)
def test_unusable_rows_raise(tokenizer: Any, rows: list[dict[str, Any]], message: str) -> None:
    with pytest.raises(CalibrationError, match=message):
        sequences_of_rows(rows, tokenizer, length=4, count=3, name="rows")


def test_missing_source_raises(tokenizer: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(datasets.config, "HF_HUB_OFFLINE", True)
    with pytest.raises(CalibrationError, match="no text file, table, dataset folder"):
        calibration_sequences(str(tmp_path / "absent.txt"), tokenizer, length=4, count=3)


@pytest.mark.parametrize(
    ("argument", "expected"),
    [
        ("dir/book.txt", ("book", "dir/book.txt", 0, None)),
        ("a=dir/book.txt", ("a", "dir/book.txt", 0, None)),
        ("book.txt:10:20", ("book", "book.txt", 10, 20)),
        ("a-b.c=book.txt::20", ("a-b.c", "book.txt", 0, 20)),
        ("book.txt:10:", ("book", "book.txt", 10, None)),
        ("odd:name.txt", ("odd:name", "odd:name.txt", 0, None)),
        ("./x=y.txt:1:2", ("x=y", "./x=y.txt", 1, 2)),
    ],
)
def test_part_of_a_text(argument: str, expected: tuple[str, str, int, int | None]) -> None:
    part = TextPart.parse(argument)
    assert (part.name, part.path, part.first, part.last) == expected
    assert part.whole == (expected[2:] == (0, None))


def test_part_reads_a_range_of_tokens(tokenizer: Any, tmp_path: Path) -> None:
    path = tmp_path / "text.txt"
    path.write_text(words(1, 9))
    assert TextPart("t", str(path), 2, 5).ids(tokenizer).tolist() == [3, 4, 5]
    assert TextPart("t", str(path), 6).ids(tokenizer).tolist() == [7, 8]
    with pytest.raises(CalibrationError, match="found 8 tokens"):
        TextPart("t", str(path), 8).ids(tokenizer)
