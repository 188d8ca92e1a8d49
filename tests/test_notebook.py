"""The notebook runs from its first cell to its last, on less text than it reads by default."""

from pathlib import Path
from typing import Any

import pytest

NOTEBOOK = Path(__file__).parents[1] / "examples" / "quantize_and_compare.ipynb"
SMALL = "CALIBRATION_SEQUENCES, WINDOWS, CONTEXT, NEW_TOKENS = 4, 3, 64, 3\nRECIPES = ('naive', 'quamba-c')"


@pytest.fixture(scope="module")
def notebook() -> Any:
    nbformat = pytest.importorskip("nbformat", reason="notebooks are read with nbformat")
    return nbformat.read(NOTEBOOK, as_version=4)


def test_it_is_kept_without_results(notebook: Any) -> None:
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert all(not cell.outputs and cell.execution_count is None for cell in cells)
    assert max(len(line) for cell in notebook.cells for line in cell.source.splitlines()) <= 120


@pytest.mark.slow
def test_it_runs(notebook: Any) -> None:
    nbclient = pytest.importorskip("nbclient", reason="notebooks are run with nbclient")
    pytest.importorskip("ipykernel", reason="notebooks are run by ipykernel")
    pytest.importorskip("matplotlib", reason="the notebook draws")
    (parameters,) = [cell for cell in notebook.cells if "parameters" in cell.metadata.get("tags", [])]
    parameters.source = SMALL
    nbclient.NotebookClient(
        notebook, timeout=300, kernel_name="python3", resources={"metadata": {"path": str(NOTEBOOK.parent)}}
    ).execute()
    outputs = [output for cell in notebook.cells if cell.cell_type == "code" for output in cell.outputs]
    images = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(images) == 2
    printed = "".join(output.text for output in outputs if output.get("name") == "stdout")
    assert "calibrating on 256 tokens, evaluating on 192 others" in printed
    lines = {line.split()[0]: line.split() for line in printed.splitlines() if line}
    # naive loses more than the default recipe, which takes about half of the float model's 9.11 MB.
    assert float(lines["naive"][5]) > float(lines["quamba-c"][5]) > 0
    assert 4 < float(lines["quamba-c"][6]) < 5
    assert "The captain looked out over the sea, and" in printed
    assert not [output for output in outputs if output.get("name") == "stderr" and "rror" in output.text]
