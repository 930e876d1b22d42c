"""run_dit.ipynb: it runs from the first cell to the last, and the repository keeps one picture of it."""

import os
import re
import shlex
from pathlib import Path

import pytest

nbformat = pytest.importorskip("nbformat", reason="the package nbformat is not installed")
ROOT = Path(__file__).parents[1]


@pytest.fixture
def notebook():
    return nbformat.read(ROOT / "run_dit.ipynb", as_version=4)


def code(notebook):
    return [cell for cell in notebook.cells if cell.cell_type == "code"]


def test_outputs_are_stripped_but_one_picture(notebook):
    nbformat.validate(notebook)
    outputs = [output for cell in code(notebook) for output in cell.outputs]
    assert [set(output.data) for output in outputs] == [{"image/png", "text/plain"}]
    assert {cell.execution_count for cell in code(notebook)} == {None}


def test_it_starts_with_the_model_of_the_repository(notebook):
    ckpt = re.search(r'^ckpt = "(.*)"$', code(notebook)[0].source, re.M)[1]
    assert (ROOT / ckpt).is_file()


def test_the_training_is_that_of_the_demo(notebook):
    """All but the folder and the number of steps, which are the notebook's parameters with the demo's defaults."""
    makefile = (ROOT / "Makefile").read_text().replace("\\\n", " ")
    last = code(notebook)[-1].source
    source = "\n".join(cell.source for cell in code(notebook)).replace("\\\n", " ")
    demo, ours = (shlex.split(re.search(r"train\.py (--.*)", text)[1]) for text in (makefile, source))
    parameters = {"{run_dir}": "demo/run", "{max_steps}": "2400"}
    assert [parameters.get(word, word) for word in ours] == demo
    assert 'get("DIT_RUN_DIR", "demo/run")' in last
    assert 'get("DIT_MAX_STEPS", 2400)' in last


@pytest.mark.slow
def test_every_cell_runs(notebook, tmp_path, monkeypatch):
    nbclient = pytest.importorskip("nbclient", reason="the package nbclient is not installed")
    pytest.importorskip("ipykernel", reason="the package ipykernel is not installed")
    monkeypatch.setenv("DIT_RUN_DIR", str(tmp_path / "run"))
    monkeypatch.setenv("DIT_MAX_STEPS", "3")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("IPYTHONDIR", str(tmp_path / "ipython"))
    client = nbclient.NotebookClient(notebook, timeout=300, resources={"metadata": {"path": str(ROOT)}})
    client.execute()
    assert os.listdir(tmp_path / "run/checkpoints") == ["0000003.pt"]
    pictures = [output for cell in code(notebook) for output in cell.outputs if "image/png" in output.get("data", {})]
    assert len(pictures) == 5
