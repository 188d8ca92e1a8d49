"""What the tests of the commands share."""

from collections.abc import Iterator
from pathlib import Path

import pytest
from transformers.utils import logging

from tests.shipped import save_small_model, text_of


@pytest.fixture(autouse=True)
def verbosity() -> Iterator[None]:
    """The commands quieten the libraries for their process; here that is the test's."""
    before = logging.get_verbosity()
    yield
    logging.set_verbosity(before)
    logging.enable_progress_bar()


@pytest.fixture(scope="module")
def text(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("text") / "text.txt"
    path.write_text(text_of(3000), encoding="utf-8")
    return path


@pytest.fixture(scope="module")
def model(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return save_small_model(tmp_path_factory.mktemp("models") / "float")
