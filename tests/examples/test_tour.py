"""examples/tour.ipynb runs from top to bottom, and shows what it says that it shows."""

import json
from pathlib import Path

import nbclient
import nbformat
import pytest

TOUR = Path(__file__).parents[2] / "examples" / "tour.ipynb"


def shown(notebook) -> list[list[str]]:
    """Of each cell with code the kinds of what it shows."""
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    return [
        sorted(kind for out in cell.outputs for kind in out.get("data", [out.output_type]))
        for cell in cells
    ]


def test_it_was_executed_and_is_small():
    notebook = nbformat.read(TOUR, as_version=4)
    assert all(shown(notebook)) and TOUR.stat().st_size < 400_000
    assert str(Path.home()) not in TOUR.read_text(encoding="utf-8")


@pytest.mark.filterwarnings("ignore")  # of the kernel, which is another program
def test_it_runs(tmp_path):
    notebook = nbformat.read(TOUR, as_version=4)
    before = shown(notebook)
    where = {"metadata": {"path": str(tmp_path)}}
    done = nbclient.NotebookClient(notebook, timeout=900, resources=where).execute()
    assert shown(done) == before
    said = json.dumps(done.cells)
    for text in ("gold reward", "penalty-too-weak", "over-optimisation", "descends nothing"):
        assert text in said, text
