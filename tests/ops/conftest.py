"""Every test of an op runs twice: with the native CPU library, and with torch in its place."""

from collections.abc import Iterator

import pytest

from quamba.ops import native


@pytest.fixture(autouse=True, params=["native", "torch"])
def implementation(request: pytest.FixtureRequest) -> Iterator[str]:
    """Which implementation the CPU ops take in this test."""
    if request.param == "torch":
        with native.disabled():
            yield request.param
        return
    if not native.available():
        pytest.skip(f"the native library is missing: {native.description()}")
    yield request.param
