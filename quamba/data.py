"""Calibration data: every documented form of it becomes a stream of batches of token ids."""

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from quamba.errors import CalibrationError

# Enough tokens to keep two cores busy, few enough that a layer's activations stay small.
_GROUP_TOKENS = 4096
_VOCABULARY_ROW = 512
_FORMS = (
    "expected an iterable of input_ids (tensors (B, L) or (L,), or lists of ints), of dicts with 'input_ids' and "
    "perhaps 'attention_mask', a DataLoader of either, or a datasets.Dataset with an 'input_ids' column"
)


@dataclass(frozen=True)
class Batch:
    """Token ids to run together.

    Attributes:
        input_ids: int64 (B, L).
        mask: bool (B, L), False at padding, or None where there is none. Every row has a token.
    """

    input_ids: Tensor
    mask: Tensor | None

    @property
    def rows(self) -> int:
        """The number of sequences."""
        return self.input_ids.shape[0]

    @property
    def tokens(self) -> int:
        """The number of tokens that are not padding."""
        return self.input_ids.numel() if self.mask is None else int(self.mask.sum())

    def head(self, rows: int) -> "Batch":
        """The first so many sequences."""
        return self.slice(0, rows)

    def slice(self, first: int, last: int) -> "Batch":
        """The sequences from `first` to before `last`."""
        return Batch(self.input_ids[first:last], None if self.mask is None else self.mask[first:last])

    def to(self, device: torch.device | str) -> "Batch":
        """The same batch on a device."""
        return Batch(self.input_ids.to(device), None if self.mask is None else self.mask.to(device))


def batches(
    calib_data: Iterable[Any],
    *,
    samples: int | None,
    device: torch.device | str,
    vocab_size: int | None = None,
) -> Iterator[Batch]:
    """Read calibration data as a stream; nothing is taken from it before it is needed, or beyond `samples`.

    Args:
        calib_data: an iterable of input_ids tensors (B, L) or (L,) or lists of ints, of dicts (BatchEncoding) with
            input_ids and perhaps attention_mask, a DataLoader of either, or a datasets.Dataset with an input_ids
            column. One tensor or one dict is one batch.
        samples: how many sequences (rows) to take; the last batch is cut to fit. None takes all.
        device: where the batches go.
        vocab_size: the model's, to tell ids of another tokenizer, or None.

    Raises:
        CalibrationError: data of another form, dtype or shape, ids out of range, a sequence without a token, or no
            data at all; raised when the stream gets there.
    """
    if samples is not None and samples < 1:
        raise CalibrationError(f"found samples {samples!r}; expected at least 1, or None for all of the data")
    left = samples
    taken = 0
    for number, item in enumerate(_items(calib_data)):
        batch = _batch(item, where=f"calibration item {number}", vocab_size=vocab_size)
        if left is not None:
            batch = batch.head(left)
            left -= batch.rows
        taken += batch.rows
        yield batch.to(device)
        if left == 0:
            return
    if not taken:
        raise CalibrationError(
            "found calibration data without a single sequence; expected at least one "
            "(a generator that has been used up yields nothing: make a new one)"
        )


def regroup(stream: Iterable[Batch], *, tokens: int = _GROUP_TOKENS) -> Iterator[Batch]:
    """Join neighbouring batches of one length, and cut large ones, to about so many tokens each.

    Sequences keep their order; rows given one by one then run together, and the memory of a pass does not depend on
    how the caller cut the data.
    """
    waiting: list[Batch] = []
    for batch in stream:
        for start in range(0, batch.rows, limit := max(1, tokens // batch.input_ids.shape[1])):
            piece = batch.slice(start, start + limit)
            rows = piece.rows + sum(b.rows for b in waiting)
            if waiting and (waiting[0].input_ids.shape[1] != piece.input_ids.shape[1] or rows > limit):
                yield _joined(waiting)
                waiting = []
            waiting.append(piece)
    if waiting:
        yield _joined(waiting)


def _joined(parts: list[Batch]) -> Batch:
    if len(parts) == 1:
        return parts[0]
    masks = [torch.ones_like(b.input_ids, dtype=torch.bool) if b.mask is None else b.mask for b in parts]
    padded = any(b.mask is not None for b in parts)
    return Batch(torch.cat([b.input_ids for b in parts]), torch.cat(masks) if padded else None)


class KeptBatches:
    """Regrouped batches that can be passed over again, whatever they come from: the token ids are kept on the CPU.

    The first pass takes them from the source one at a time; later passes see the same batches, also where the source
    is a generator or is shuffled.
    """

    def __init__(
        self,
        calib_data: Iterable[Any],
        *,
        samples: int | None,
        device: torch.device | str,
        vocab_size: int | None = None,
    ) -> None:
        """Take the arguments of `batches`."""
        self._source = regroup(batches(calib_data, samples=samples, device="cpu", vocab_size=vocab_size))
        self._device = device
        self._kept: list[Batch] = []

    def __iter__(self) -> Iterator[Batch]:
        position = 0
        while True:
            if position == len(self._kept):
                batch = next(self._source, None)
                if batch is None:
                    return
                self._kept.append(batch)
            yield self._kept[position].to(self._device)
            position += 1

    @property
    def total(self) -> int | None:
        """How many batches there are, once a pass has gone through them; None before."""
        return len(self._kept) or None

    def first(self, rows: int) -> list[Batch]:
        """The first so many sequences."""
        found: list[Batch] = []
        for batch in self:
            found.append(batch.head(rows - sum(b.rows for b in found)))
            if sum(b.rows for b in found) >= rows:
                break
        return found


def vocabulary(size: int, *, device: torch.device | str) -> list[Batch]:
    """Every token of a vocabulary of that size once, in an order that is random but always the same: rows of 512."""
    ids = torch.randperm(size, generator=torch.Generator().manual_seed(0)).to(device)
    whole = size // _VOCABULARY_ROW * _VOCABULARY_ROW
    rows, rest = ids[:whole].view(-1, _VOCABULARY_ROW), ids[None, whole:]
    together = _GROUP_TOKENS // _VOCABULARY_ROW
    parts = [*(rows[first : first + together] for first in range(0, len(rows), together)), rest]
    return [Batch(part, None) for part in parts if part.numel()]


def _items(calib_data: Iterable[Any]) -> Iterator[Any]:
    if isinstance(calib_data, (Tensor, Mapping)):
        return iter([calib_data])
    _not_text(calib_data, where="calib_data")
    try:
        return iter(calib_data)
    except TypeError:
        raise CalibrationError(f"found calib_data of type {type(calib_data).__name__}; {_FORMS}") from None


def _not_text(value: Any, *, where: str) -> None:
    if isinstance(value, (str, bytes)):
        raise CalibrationError(
            f"{where}: found text ({value[:40]!r}); expected token ids: tokenize it first, for example "
            'tokenizer(text, return_tensors="pt")'
        )


def _batch(item: Any, *, where: str, vocab_size: int | None) -> Batch:
    mask = None
    if isinstance(item, Mapping):
        if "input_ids" not in item:
            raise CalibrationError(f"{where}: found a dict with the keys {sorted(map(str, item))}; {_FORMS}")
        item, mask = item["input_ids"], item.get("attention_mask")
    elif isinstance(item, (list, tuple)) and len(item) == 1 and isinstance(item[0], Tensor):
        item = item[0]  # what a DataLoader over a TensorDataset yields
    ids = _tensor(item, where=where, what="input_ids")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise CalibrationError(f"{where}: found input_ids of {ids.dtype}; expected integers")
    low, high = int(ids.min()), int(ids.max())
    if low < 0 or (vocab_size is not None and high >= vocab_size):
        limit = "" if vocab_size is None else f" and below the model's vocabulary of {vocab_size}"
        raise CalibrationError(
            f"{where}: found token ids from {low} to {high}; expected ids from 0{limit}: "
            "was the text tokenized for another model, or are these labels with -100?"
        )
    return Batch(ids.to(torch.int64), None if mask is None else _mask(mask, ids, where=where))


def _tensor(value: Any, *, where: str, what: str) -> Tensor:
    """(B, L), from a tensor, an array or lists of numbers, (B, L) or (L,); neither may be 0."""
    _not_text(value, where=where)
    try:
        tensor = torch.as_tensor(value)
    except (TypeError, ValueError, RuntimeError) as error:
        if isinstance(value, (list, tuple)) and value and isinstance(value[0], (str, bytes)):
            _not_text(value[0], where=where)
        raise CalibrationError(
            f"{where}: found {what} that do not make a tensor ({type(value).__name__}: {error}); expected a rectangle "
            "of integers (B, L): pad the rows and give an attention_mask, or pass them one by one"
        ) from error
    tensor = tensor.detach().to("cpu")
    if tensor.dim() == 1:
        tensor = tensor[None]
    if tensor.dim() != 2:
        raise CalibrationError(
            f"{where}: found {what} of shape {tuple(tensor.shape)}; expected (B, L) or (L,); {_FORMS}"
        )
    if not tensor.numel():
        raise CalibrationError(f"{where}: found {what} of shape {tuple(tensor.shape)}; leave empty sequences out")
    return tensor


def _mask(value: Any, ids: Tensor, *, where: str) -> Tensor | None:
    """bool (B, L), or None where nothing is padding."""
    mask = _tensor(value, where=where, what="attention_mask")
    if mask.shape != ids.shape:
        raise CalibrationError(
            f"{where}: found an attention_mask of shape {tuple(mask.shape)} with input_ids of shape "
            f"{tuple(ids.shape)}; expected the same shape"
        )
    kept = mask == 1
    if not bool((kept | (mask == 0)).all()):
        raise CalibrationError(
            f"{where}: found attention_mask values other than 0 and 1; expected 1 at tokens, 0 at padding"
        )
    empty = (~kept.any(dim=1)).nonzero().flatten().tolist()
    if empty:
        raise CalibrationError(f"{where}: found nothing but padding in rows {empty[:8]}; leave empty sequences out")
    return None if bool(kept.all()) else kept
