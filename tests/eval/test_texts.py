"""Texts in windows."""

from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor
from transformers import AutoTokenizer

from quamba.eval import measure_text, perplexity
from quamba.text import TextPart
from tests.shipped import EXAMPLES, text_of
from tests.tiny import make_model


@pytest.fixture(scope="module")
def tokenizer() -> Any:
    return AutoTokenizer.from_pretrained(EXAMPLES / "mamba-books")


@pytest.fixture
def part(tmp_path: Path) -> TextPart:
    (tmp_path / "text.txt").write_text(text_of(1500), encoding="utf-8")
    return TextPart("mine", str(tmp_path / "text.txt"), 10)


def test_measure_text_is_the_perplexity(tokenizer: Any, part: TextPart) -> None:
    model = make_model("mamba", vocab_size=4096)
    ids = part.ids(tokenizer)
    found = measure_text(model, tokenizer, part, context=40, stride=15, limit=3)
    expected = perplexity(model, ids[:70], context=40, stride=15)
    assert found.perplexity.window_nll.tolist() == expected.window_nll.tolist()
    assert (found.name, found.context, found.stride, found.batch_size) == ("mine", 40, 15, 8)
    assert found.to_dict()["windows"] == 3
    assert found.to_dict()["perplexity_stderr"] == pytest.approx(expected.perplexity * expected.nll_stderr)
    whole = measure_text(model, tokenizer, part, context=40, batch_size=3)
    assert (whole.stride, whole.batch_size, whole.perplexity.tokens) == (40, 3, len(ids) - -(-len(ids) // 40))


def test_the_batch_is_halved_where_memory_does_not_suffice(tokenizer: Any, part: TextPart) -> None:
    model = make_model("mamba", vocab_size=4096)
    expected = measure_text(model, tokenizer, part, context=20)

    def scarce(module: Any, arguments: tuple[Tensor, ...]) -> None:
        if arguments[0].shape[0] > 3:
            raise torch.OutOfMemoryError("CUDA out of memory.")

    model.register_forward_pre_hook(scarce)
    found = measure_text(model, tokenizer, part, context=20)
    assert (expected.batch_size, found.batch_size) == (8, 2)
    assert found.perplexity.nll == pytest.approx(expected.perplexity.nll, rel=1e-6)
    with pytest.raises(torch.OutOfMemoryError):
        measure_text(model, tokenizer, part, context=20, batch_size=8)
