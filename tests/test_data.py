"""Calibration data: every documented form, and every malformed one."""

import itertools
from collections.abc import Iterator
from typing import Any

import datasets
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from torch import Tensor
from torch.utils.data import DataLoader, TensorDataset
from transformers import BatchEncoding

from quamba.data import Batch, KeptBatches, batches, regroup, vocabulary
from quamba.errors import CalibrationError

IDS = torch.arange(1, 25).reshape(4, 6)


def read(calib_data: Any, samples: int | None = None, **options: Any) -> list[Batch]:
    return list(batches(calib_data, samples=samples, device="cpu", **options))


def rows_of(found: list[Batch]) -> list[list[int]]:
    """Every sequence without its padding."""
    rows = []
    for batch in found:
        masks = torch.ones_like(batch.input_ids, dtype=torch.bool) if batch.mask is None else batch.mask
        rows += [row[mask].tolist() for row, mask in zip(batch.input_ids, masks, strict=True)]
    return rows


class Rows(torch.utils.data.Dataset[dict[str, Tensor]]):
    def __len__(self) -> int:
        return 4

    def __getitem__(self, index: int) -> dict[str, Tensor]:
        return {"input_ids": IDS[index], "attention_mask": torch.ones(6, dtype=torch.int64)}


FORMS: dict[str, Any] = {
    "one tensor": lambda: IDS,
    "one dict": lambda: {"input_ids": IDS},
    "one BatchEncoding": lambda: BatchEncoding({"input_ids": IDS, "attention_mask": torch.ones_like(IDS)}),
    "list of (B, L)": lambda: [IDS[:3], IDS[3:]],
    "list of (L,)": lambda: list(IDS),
    "tuple of int32": lambda: tuple(IDS.to(torch.int32)),
    "uint8": lambda: [IDS.to(torch.uint8)],
    "lists of ints": lambda: IDS.tolist(),
    "lists of lists of ints": lambda: [IDS[:2].tolist(), IDS[2:].tolist()],
    "NumPy arrays": lambda: [row.numpy() for row in IDS],
    "generator of tensors": lambda: (row for row in IDS),
    "list of dicts": lambda: [{"input_ids": row, "labels": row} for row in IDS],
    "dicts of lists": lambda: [{"input_ids": row, "attention_mask": [1] * 6} for row in IDS.tolist()],
    "list of BatchEncodings": lambda: [BatchEncoding({"input_ids": IDS[:1]}), BatchEncoding({"input_ids": IDS[1:]})],
    "DataLoader of dicts": lambda: DataLoader(Rows(), batch_size=3),
    "DataLoader of tensors": lambda: DataLoader(list(IDS), batch_size=2),
    "DataLoader of a TensorDataset": lambda: DataLoader(TensorDataset(IDS), batch_size=2),
    "datasets.Dataset": lambda: datasets.Dataset.from_dict({"text": list("abcd"), "input_ids": IDS.tolist()}),
    "datasets.Dataset of tensors": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}).with_format("torch"),
    "datasets.IterableDataset": lambda: datasets.Dataset.from_dict({"input_ids": IDS.tolist()}).to_iterable_dataset(),
}


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("samples", [None, 1, 3, 4, 100])
def test_every_form_gives_the_same_sequences(form: str, samples: int | None) -> None:
    found = read(FORMS[form](), samples)
    assert rows_of(found) == IDS[: samples or 4].tolist()
    assert all(batch.input_ids.dtype == torch.int64 and batch.input_ids.dim() == 2 for batch in found)
    assert all(batch.mask is None for batch in found)


def padded(side: str) -> tuple[Tensor, Tensor]:
    lengths = torch.tensor([6, 2, 1, 5])
    places = torch.arange(6)
    mask = places >= 6 - lengths[:, None] if side == "left" else places < lengths[:, None]
    return torch.where(mask, IDS, 0), mask


@pytest.mark.parametrize("side", ["left", "right"])
@pytest.mark.parametrize("dtype", [torch.int64, torch.bool, torch.float32, torch.uint8])
def test_padding_is_masked(side: str, dtype: torch.dtype) -> None:
    ids, mask = padded(side)
    for data in (
        [{"input_ids": ids, "attention_mask": mask.to(dtype)}],
        [{"input_ids": i, "attention_mask": m.to(dtype)} for i, m in zip(ids, mask, strict=True)],
    ):
        found = read(data)
        assert rows_of(found) == [i[m].tolist() for i, m in zip(ids, mask, strict=True)]
        assert sum(batch.tokens for batch in found) == 14
        assert all(batch.mask is None or batch.mask.dtype == torch.bool for batch in found)


def test_dataset_with_rows_of_different_length_and_masks() -> None:
    rows = [[5, 6, 7], [8], [9, 10]]
    plain = datasets.Dataset.from_dict({"input_ids": rows})
    assert rows_of(read(plain)) == rows
    masked = datasets.Dataset.from_dict({"input_ids": rows, "attention_mask": [[0, 1, 1], [1], [1, 1]]})
    assert rows_of(read(masked)) == [[6, 7], [8], [9, 10]]
    assert rows_of(read(masked, 2)) == [[6, 7], [8]]


def test_the_last_batch_is_cut_with_its_mask() -> None:
    ids, mask = padded("left")
    found = read([{"input_ids": ids, "attention_mask": mask}] * 3, samples=6)
    assert [batch.rows for batch in found] == [4, 2]
    assert found[1].mask is not None
    assert torch.equal(found[1].mask, mask[:2])


def counted() -> tuple[Iterator[Tensor], list[int]]:
    taken: list[int] = []

    def generate() -> Iterator[Tensor]:
        for number in itertools.count():
            taken.append(number)
            yield IDS[:2] + number

    return generate(), taken


def test_a_stream_is_read_no_further_than_needed() -> None:
    generator, taken = counted()
    stream = batches(generator, samples=5, device="cpu")
    assert taken == []
    next(stream)
    assert taken == [0]
    assert sum(batch.rows for batch in stream) == 3
    assert taken == [0, 1, 2]


def test_kept_batches_pass_over_a_generator_again() -> None:
    generator, taken = counted()
    kept = KeptBatches(generator, samples=5, device="cpu")
    assert taken == []
    first = rows_of(list(kept))
    assert len(first) == 5
    assert rows_of(list(kept)) == first
    assert taken == [0, 1, 2]


def test_kept_batches_keep_the_order_of_a_shuffled_loader() -> None:
    kept = KeptBatches(DataLoader(list(IDS), batch_size=1, shuffle=True), samples=3, device="cpu")
    first = rows_of(list(kept))
    assert all(rows_of(list(kept)) == first for _ in range(4))
    assert len(first) == 3


def test_kept_batches_interleave_passes() -> None:
    kept = KeptBatches(iter(IDS), samples=None, device="cpu")
    left, right = iter(kept), iter(kept)
    next(left, None)
    assert rows_of(list(right)) == IDS.tolist()
    assert rows_of(list(kept)) == IDS.tolist()


@settings(deadline=None, max_examples=40)
@given(
    lengths=st.lists(st.integers(1, 9), min_size=1, max_size=12),
    samples=st.integers(1, 14) | st.none(),
)
def test_kept_batches_hold_every_sequence_in_order(lengths: list[int], samples: int | None) -> None:
    data = [torch.randint(0, 50, (length,)) for length in lengths]
    kept = KeptBatches(data, samples=samples, device="cpu")
    assert rows_of(list(kept)) == [row.tolist() for row in data[:samples]]


@settings(deadline=None, max_examples=60)
@given(
    shapes=st.lists(st.tuples(st.integers(1, 5), st.integers(1, 9), st.booleans()), min_size=1, max_size=12),
    tokens=st.integers(1, 40),
)
def test_regroup_keeps_sequences_and_bounds_batches(shapes: list[tuple[int, int, bool]], tokens: int) -> None:
    data = []
    for number, (rows, length, padded_rows) in enumerate(shapes):
        mask = torch.arange(length).expand(rows, length) >= (length // 2 if padded_rows else 0)
        data.append(
            Batch(torch.arange(rows * length).reshape(rows, length) + 100 * number, mask if padded_rows else None)
        )
    found = list(regroup(data, tokens=tokens))
    assert rows_of(found) == rows_of(data)
    assert all(batch.rows == 1 or batch.input_ids.numel() <= tokens for batch in found)


def test_rows_of_one_length_run_together() -> None:
    assert [batch.rows for batch in regroup(read(list(IDS)), tokens=12)] == [2, 2]
    assert [batch.rows for batch in regroup(read(IDS), tokens=18)] == [3, 1]
    assert [batch.rows for batch in regroup(read(IDS), tokens=1)] == [1, 1, 1, 1]


def test_kept_batches_give_their_first_rows_and_total() -> None:
    kept = KeptBatches(iter(IDS), samples=None, device="cpu")
    assert kept.total is None
    assert rows_of(kept.first(3)) == IDS[:3].tolist()
    assert rows_of(kept.first(99)) == IDS.tolist()
    assert kept.total == len(list(kept))


def test_a_mask_travels_through_kept_batches() -> None:
    ids, mask = padded("left")
    data = [{"input_ids": ids[:1], "attention_mask": mask[:1]}, {"input_ids": ids[1:], "attention_mask": mask[1:]}]
    assert rows_of(list(KeptBatches(data, samples=None, device="cpu"))) == rows_of(read(data))


MALFORMED: dict[str, tuple[Any, str]] = {
    "text": ("some text", "tokenize it first"),
    "bytes": (b"some text", "tokenize it first"),
    "list of text": (["a line", "another"], "item 0: found text .*tokenize it first"),
    "list of lists of text": ([["a line"]], "tokenize it first"),
    "text in a dict": ([{"input_ids": "a line"}], "tokenize it first"),
    "an int": (5, "calib_data of type int; expected an iterable"),
    "None": (None, "calib_data of type NoneType; expected an iterable"),
    "a flat list": ([1, 2, 3], r"shape \(\); expected \(B, L\) or \(L,\)"),
    "floats": ([IDS[0], IDS.float()], "item 1: found input_ids of torch.float32; expected integers"),
    "bools": ([IDS > 3], "found input_ids of torch.bool; expected integers"),
    "three dimensions": ([IDS[None]], r"shape \(1, 4, 6\); expected \(B, L\)"),
    "ragged": ([[[1, 2], [3]]], "pad the rows and give an attention_mask, or pass them one by one"),
    "None inside": ([None], "item 0: found input_ids that do not make a tensor"),
    "a dict without ids": ([{"ids": IDS, "labels": IDS}], r"keys \['ids', 'labels'\]; expected"),
    "a DatasetDict": (
        datasets.DatasetDict({"train": datasets.Dataset.from_dict({"input_ids": IDS.tolist()})}),
        r"keys \['train'\]; expected",
    ),
    "a Dataset without ids": (datasets.Dataset.from_dict({"text": ["a"]}), r"keys \['text'\]; expected"),
    "a mask of another shape": (
        [{"input_ids": IDS, "attention_mask": torch.ones(4, 5)}],
        r"attention_mask of shape \(4, 5\) with input_ids of shape \(4, 6\)",
    ),
    "a mask of other values": ([{"input_ids": IDS, "attention_mask": IDS}], "values other than 0 and 1"),
    "rows of padding": (
        [{"input_ids": IDS, "attention_mask": (IDS < 13).long()}],
        r"nothing but padding in rows \[2, 3\]",
    ),
    "an empty row": ([[4, 5], []], r"item 1: found input_ids of shape \(1, 0\); leave empty"),
    "labels": ([torch.tensor([[-100, 4]])], "token ids from -100 to 4; expected ids from 0"),
    "nothing": ([], "without a single sequence"),
    "a used-up generator": (iter(()), "without a single sequence"),
}


@pytest.mark.parametrize("case", MALFORMED)
def test_malformed_data_raises(case: str) -> None:
    data, message = MALFORMED[case]
    with pytest.raises(CalibrationError, match=message):
        read(data)


@pytest.mark.parametrize("samples", [0, -3])
def test_samples_below_one_raise(samples: int) -> None:
    with pytest.raises(CalibrationError, match=f"found samples {samples}; expected at least 1"):
        read(IDS, samples)


def test_ids_beyond_the_vocabulary_raise() -> None:
    assert len(read(IDS, vocab_size=25)) == 1
    with pytest.raises(CalibrationError, match=r"from 1 to 24; expected ids from 0 and below .* of 24"):
        read(IDS, vocab_size=24)


@pytest.mark.parametrize("size", [1, 97, 511, 512, 513, 4096, 9001])
def test_the_vocabulary_is_every_token_once_in_an_order_of_its_own(size: int) -> None:
    found = vocabulary(size, device="cpu")
    ids = [token for batch in found for token in batch.input_ids.flatten().tolist()]
    assert sorted(ids) == list(range(size))
    assert size < 97 or ids != list(range(size))
    assert all(batch.mask is None and batch.input_ids.shape[1] <= 512 and batch.tokens <= 4096 for batch in found)
    assert all(batch.input_ids.shape[1] == 512 for batch in found[:-1])
    for one, other in zip(found, vocabulary(size, device="cpu"), strict=True):
        assert torch.equal(one.input_ids, other.input_ids)
