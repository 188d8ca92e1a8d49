"""The folder: self-contained, complete, and replaced as a whole."""

import json
import re
import sys
from itertools import islice
from pathlib import Path

import numpy as np
import pytest

from quamba.analysis import report
from quamba.analysis.report import sections
from quamba.errors import QuambaError
from tests.analysis import results

pytest.importorskip("matplotlib", reason="the report needs matplotlib")


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("report") / "new" / "out"
    report.write(results.make_analysis(), out, title="a <model>")
    return out


def test_the_report_needs_nothing_else(folder: Path) -> None:
    text = (folder / report.REPORT).read_text(encoding="utf-8")
    images = re.findall(r'<img alt="([^"]+)" src="([^"]{0,40})', text)
    assert len(images) == len(list(folder.glob("*.png"))) == 10
    assert all(alt and source.startswith("data:image/png;base64,iVBOR") for alt, source in images)
    assert not re.search(r"https?://|<script|<link", text)
    # What comes from outside is text, not markup.
    for escaped in ("a &lt;model&gt;", "cpu: &lt;none&gt;", "mine &amp; &lt;others&gt;"):
        assert escaped in text
    for expected in ("1.23 million parameters", "2026-01-02", "<td>the whole recipe</td>", "+11.000 ± 0.020%"):
        assert expected in text


def test_the_summary_and_the_arrays(folder: Path) -> None:
    found = results.make_analysis()
    content = json.loads((folder / report.SUMMARY).read_text(encoding="utf-8"))
    assert (content["format"], content["title"]) == ("quamba-analysis-1", "a <model>")
    assert content["costs"][2]["increase_percent"] == found.costs[2].increase_percent
    (_, other) = content["errors"]
    assert other["nmse_out"]["dt"] == [None, None, None]
    assert other["nmse_out"]["x"] == found.errors[1].nmse("out")[found.errors[1].names.index("x")].tolist()
    assert content["outliers"]["g"]["peak_over_rms"] == found.outliers["g"].peak().tolist()
    with np.load(folder / report.ARRAYS) as arrays:
        np.testing.assert_array_equal(arrays["errors/naive/out_noise"], found.errors[0].out_noise.numpy())
        assert list(arrays["errors/naive/names"]) == list(found.errors[0].names)
        for name in ("positions/kl", "decay/largest", "bounds/LegS/running", "outliers/H g/absmax"):
            assert arrays[name].dtype == np.float64


@pytest.fixture
def one_figure(monkeypatch: pytest.MonkeyPatch) -> None:
    """Drawing all of them takes seconds."""
    monkeypatch.setattr(report, "sections", lambda found: islice(sections(found), 1))


@pytest.mark.usefixtures("one_figure")
def test_another_report_replaces_it_and_keeps_other_files(tmp_path: Path) -> None:
    report.write(results.make_analysis(), tmp_path / "out", title="one")
    (tmp_path / "out" / "mine.txt").write_text("kept")
    report.write(results.make_analysis(), tmp_path / "out", title="two")
    assert "Quantization analysis: two" in (tmp_path / "out" / report.REPORT).read_text()
    assert (tmp_path / "out" / "mine.txt").read_text() == "kept"
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.usefixtures("one_figure")
def test_nothing_is_written_where_it_fails(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    report.write(results.make_analysis(), tmp_path / "out", title="one")
    before = {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()}
    monkeypatch.setattr(np, "savez_compressed", fail)
    with pytest.raises(OSError, match="full"):
        report.write(results.make_analysis(), tmp_path / "out", title="two")
    assert {file.name: file.read_bytes() for file in (tmp_path / "out").iterdir()} == before
    assert [path.name for path in tmp_path.iterdir()] == ["out"]


def fail(*args: object, **kwargs: object) -> None:
    raise OSError("disk full")


def test_without_matplotlib(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib", None)
    with pytest.raises(QuambaError, match="matplotlib"):
        report.write(results.make_analysis(), tmp_path / "out", title="one")
    assert not (tmp_path / "out").exists()
