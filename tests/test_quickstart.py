"""The notebook of the docs runs, with fewer epochs, cell by cell."""

import json
from pathlib import Path

NOTEBOOK = Path(__file__).parent.parent / "docs" / "quickstart.ipynb"


def test_the_notebook_runs(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    cells = ["".join(cell["source"]) for cell in notebook["cells"] if cell["cell_type"] == "code"]
    assert "= 20, 256, 5" in cells[0]
    names: dict = {}
    for cell in cells:
        exec(compile(cell.replace("= 20, 256, 5", "= 0.2, 32, 0.2"), str(NOTEBOOK), "exec"), names)
    assert names["found"].measured["macs_ratio"] <= 0.5
    assert names["trained"].measured["macs_ratio"] <= 0.5
    assert "VisionTransformer" in capsys.readouterr().out
    assert (tmp_path / "quickstart" / "taylor" / "report.html").is_file()


def test_the_notebook_has_no_stored_outputs():
    notebook = json.loads(NOTEBOOK.read_text(encoding="utf-8"))
    assert all(not cell.get("outputs") for cell in notebook["cells"])
