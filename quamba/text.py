"""Text to token ids, and token ids to the windows that calibration runs on."""

import re
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CalibrationError

# [NAME=]FILE[:FIRST:LAST]
_PART = re.compile(r"(?:([\w.-]+)=)?(.*?)(?::(\d*):(\d*))?", re.DOTALL)
# What datasets calls the reader of each kind of file; every other file is read as text.
_TABLES = {".jsonl": "json", ".json": "json", ".csv": "csv", ".parquet": "parquet"}


def encode(tokenizer: Any, text: str) -> Tensor:
    """Token ids int64 (T,) of a text, without special tokens added.

    Args:
        tokenizer: a tokenizer of transformers.
        text: the text.
    """
    # Not verbose: a text longer than the model's usual input is the normal case here.
    ids = tokenizer(text, add_special_tokens=False, verbose=False)["input_ids"]
    return torch.tensor(ids, dtype=torch.int64)


def read_ids(tokenizer: Any, path: str | Path) -> Tensor:
    """Token ids int64 (T,) of a UTF-8 text file.

    Raises:
        CalibrationError: the file is not UTF-8 text.
        OSError: it cannot be read.
    """
    try:
        return encode(tokenizer, Path(path).read_text(encoding="utf-8"))
    except UnicodeDecodeError as error:
        raise CalibrationError(f"found {error} in {str(path)!r}; expected UTF-8 text") from error


@dataclass(frozen=True)
class TextPart:
    """A text file, or a range of its tokens.

    Attributes:
        name: in results.
        path: of the file.
        first, last: the range, last None for the end.
    """

    name: str
    path: str
    first: int = 0
    last: int | None = None

    @classmethod
    def parse(cls, argument: str) -> "TextPart":
        """From [NAME=]FILE[:FIRST:LAST], where either end may be left out; the file's stem is the name by default."""
        name, path, first, last = _PART.fullmatch(argument).groups()  # type: ignore[union-attr]
        return cls(name or Path(path).stem, path, int(first or 0), int(last) if last else None)

    @property
    def whole(self) -> bool:
        """True without a range."""
        return self.first == 0 and self.last is None

    def ids(self, tokenizer: Any) -> Tensor:
        """Token ids int64 (T,).

        Raises:
            CalibrationError: the file is not UTF-8 text, or has no token in the range.
            OSError: it cannot be read.
        """
        ids = read_ids(tokenizer, self.path)
        if not ids[self.first : self.last].shape[0]:
            raise CalibrationError(f"found {ids.shape[0]} tokens in {self.path!r}; expected some from {self.first} on")
        return ids[self.first : self.last]


def windows(ids: Tensor, *, length: int, count: int | None = None) -> Tensor:
    """Windows of a token stream that do not overlap, evenly spaced from its first token to its last.

    Args:
        ids: int64 (T,).
        length: tokens per window.
        count: at most how many windows; None for as many as there are.

    Returns:
        int64 (W, length), W = min(count, T // length).

    Raises:
        CalibrationError: the stream is shorter than one window, or length or count is not positive.
    """
    if length < 1 or (count is not None and count < 1):
        raise CalibrationError(f"found length {length} and count {count}; expected positive numbers")
    total = ids.shape[0]
    wanted = total // length if count is None else min(count, total // length)
    if wanted == 0:
        raise CalibrationError(
            f"found {total} tokens; expected at least one window of {length}: give more text or a smaller length"
        )
    starts = torch.arange(wanted) * (total - length) // max(wanted - 1, 1)
    return ids[starts[:, None] + torch.arange(length)]


def calibration_sequences(
    source: str,
    tokenizer: Any,
    *,
    length: int,
    count: int,
    subset: str | None = None,
    split: str = "train",
) -> list[Tensor]:
    """Sequences for calibration from a text file, a table or a dataset.

    A text file gives windows spread over the whole file. The rows of a table (JSON lines, CSV, Parquet), of a folder
    in the form of `datasets`, or of a hub dataset are taken in order: a column "input_ids" gives a sequence a row, a
    column "text" is joined to one stream, with the end-of-text token between rows, and cut into windows.

    Args:
        source: path or hub name.
        tokenizer: a tokenizer of transformers.
        length: the most tokens per sequence.
        count: the most sequences.
        subset: configuration of a hub dataset.
        split: of a dataset.

    Returns:
        int64 tensors (L,), L = length, or less in rows of "input_ids" that are shorter.

    Raises:
        CalibrationError: there is no such source, it has neither column, or it holds too few tokens.
    """
    path = Path(source)
    if path.is_file() and path.suffix not in _TABLES:
        return list(windows(read_ids(tokenizer, path), length=length, count=count))
    return sequences_of_rows(
        _rows(source, subset=subset, split=split), tokenizer, length=length, count=count, name=source
    )


def sequences_of_rows(
    rows: Iterable[Mapping[str, Any]], tokenizer: Any, *, length: int, count: int, name: str
) -> list[Tensor]:
    """Sequences of rows that have "input_ids" or "text"; see `calibration_sequences`."""
    found = iter(rows)
    first = next(found, None)
    if first is None:
        raise CalibrationError(f"found no rows in {name!r}; expected at least one")

    def rest() -> Iterable[Mapping[str, Any]]:
        yield first
        yield from found

    if "input_ids" in first:
        tensors = (torch.as_tensor(row["input_ids"], dtype=torch.int64).flatten()[:length] for row in rest())
        sequences = list(islice((ids for ids in tensors if ids.numel()), count))
        if not sequences:
            raise CalibrationError(f"found only empty input_ids in {name!r}; expected token ids")
        return sequences
    if "text" not in first:
        raise CalibrationError(f"found the columns {sorted(first)} in {name!r}; expected 'text' or 'input_ids'")
    end = [] if tokenizer.eos_token_id is None else [torch.tensor([tokenizer.eos_token_id])]
    parts: list[Tensor] = []
    total = 0
    for row in rest():
        parts += [encode(tokenizer, row["text"]), *end]
        total += parts[-1 - len(end)].shape[0] + len(end)
        if total >= length * count:
            break
    return list(windows(torch.cat(parts), length=length, count=count))


def _rows(source: str, *, subset: str | None, split: str) -> Iterable[Mapping[str, Any]]:
    import datasets

    path = Path(source)
    rows: Iterable[Mapping[str, Any]]
    try:
        if path.is_file():
            rows = datasets.load_dataset(_TABLES[path.suffix], data_files=str(path), split="train", streaming=True)
        elif (path / "state.json").is_file():
            rows = datasets.load_from_disk(source)
        elif (path / "dataset_dict.json").is_file():
            rows = datasets.load_from_disk(source)[split]
        else:
            rows = datasets.load_dataset(source, subset, split=split, streaming=True)
        return iter(rows)
    except (OSError, ValueError, KeyError) as error:
        reason = str(error).partition("\n")[0]
        raise CalibrationError(
            f"found no text file, table, dataset folder or reachable hub dataset at {source!r} ({reason}); expected one"
        ) from error
