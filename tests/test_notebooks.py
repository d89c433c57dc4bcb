"""Notebooks run top to bottom on the bundled model, and are stored without outputs."""

import json

import pytest
from conftest import HERE

NOTEBOOKS = sorted((HERE.parent / "notebooks").glob("*.ipynb"))


@pytest.mark.parametrize("path", NOTEBOOKS, ids=lambda p: p.stem)
def test_stored_without_outputs(path):
    cells = json.loads(path.read_text())["cells"]
    assert not [c for c in cells if c.get("outputs") or c.get("execution_count")]


@pytest.mark.filterwarnings("default")  # those of the notebook machinery
@pytest.mark.parametrize(
    "path", [NOTEBOOKS[0], *(pytest.param(p, marks=pytest.mark.slow) for p in NOTEBOOKS[1:])], ids=lambda p: p.stem
)
def test_runs_to_the_end(path, tmp_path, monkeypatch):
    """Its own asserts check the conclusions."""
    import nbformat
    from nbclient import NotebookClient

    monkeypatch.delenv("MPLBACKEND")  # the kernel draws inline
    notebook = nbformat.read(path, as_version=4)
    NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(tmp_path)}}).execute()
    images = [o for c in notebook.cells if c.cell_type == "code" for o in c.outputs if "image/png" in o.get("data", {})]
    assert images
