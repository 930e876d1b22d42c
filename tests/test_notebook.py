"""run_dit.ipynb: it runs from the first cell to the last, and the repository keeps one picture of it."""

import os
import re
import shlex
import sys
from pathlib import Path

import pytest
from helpers import call
from PIL import Image

import train

nbformat = pytest.importorskip("nbformat", reason="the package nbformat is not installed")
shells = pytest.importorskip("IPython.core.interactiveshell", reason="the package ipython is not installed")
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


def run_cells(argv):
    """Prints what the last expression of each cell is. Forked, with all imports made; train.py runs here too."""
    (folder,) = argv
    os.environ |= {"DIT_RUN_DIR": f"{folder}/run", "DIT_MAX_STEPS": "3", "IPYTHONDIR": f"{folder}/ipython"}
    os.chdir(ROOT)
    shell = shells.InteractiveShell.instance()

    def run_command(text):
        python, script, *words = shlex.split(shell.var_expand(text, depth=0).replace("\\\n", " "))
        assert (python, script, call(train.main, *words)) == (sys.executable, "train.py", 0)

    shell.system = run_command  # of the lines that begin with "!"
    for cell in code(nbformat.read("run_dit.ipynb", as_version=4)):
        found = shell.run_cell(cell.source)
        found.raise_error()
        print("picture" if isinstance(found.result, Image.Image) else found.result)


@pytest.mark.slow
def test_every_cell_runs(tmp_path, ranks):
    run = ranks(run_cells, [tmp_path])
    assert run.wait(timeout=300) == [0], run.text()
    assert os.listdir(tmp_path / "run/checkpoints") == ["0000003.pt"]
    assert len(re.findall(r"^picture$", run.text(), re.M)) == 5
