"""notebooks/start.ipynb runs from its first cell to its last, and shows pictures; here in few steps."""

from pathlib import Path

import pytest

pytestmark = pytest.mark.slow
nbclient = pytest.importorskip("nbclient", reason="nbclient is not installed: pip install 'diffusers-guidance[docs]'")
pytest.importorskip("ipykernel", reason="ipykernel is not installed: pip install 'diffusers-guidance[docs]'")

NOTEBOOK = Path(__file__).parents[2] / "notebooks" / "start.ipynb"


def test_the_notebook_runs(tmp_path, small):
    import nbformat

    notebook = nbformat.read(NOTEBOOK, as_version=4)
    for cell in notebook.cells:
        cell.source = cell.source.replace("STEPS = 20", "STEPS = 6").replace('"a rocket", "a red apple", ', "")
        cell.source = cell.source.replace("from_pretrained(MODEL,", f"from_pretrained({str(small)!r},")
    nbclient.NotebookClient(
        notebook, timeout=600, kernel_name="python3", resources={"metadata": {"path": str(tmp_path)}}
    ).execute()
    outputs = [output for cell in notebook.cells for output in cell.get("outputs", ())]
    assert not [output for output in outputs if output.output_type == "error"]
    pictures = [output for output in outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 3
    said = "".join(output.text for output in outputs if output.output_type == "stream")
    assert "of the seconds" in said and "NFEs" in said


def test_its_first_code_installs():
    import nbformat

    first = next(cell for cell in nbformat.read(NOTEBOOK, as_version=4).cells if cell.cell_type == "code")
    assert "%pip install" in first.source and "diffusers-guidance" in first.source
