"""docs/extending.md: every block of code runs as it stands, so that the page cannot go out of date."""

import multiprocessing
import os
import re
import sys
import traceback

import pytest
import torch
from helpers import ROOT

PAGE = (ROOT / "docs/extending.md").read_text()
PARTS = re.split(r"^##+ (.+)$", PAGE, flags=re.M)[1:]  # title, text, title, text, ...
BLOCKS = [
    (title, code)
    for title, text in zip(PARTS[::2], PARTS[1::2], strict=True)
    for code in re.findall(r"```python\n(.*?)```", text, re.S)
]
SEAMS = "block condition autoencoder shape loss sampler data watch feature".split()


def test_every_seam_has_a_block_of_at_most_40_lines():
    titles = [title.lower() for title, _ in BLOCKS]
    assert all(any(seam in title for title in titles) for seam in SEAMS), titles
    for title, code in BLOCKS:
        assert code.count("\n") <= 40, f"{title}: {code.count(chr(10))} lines"


def run(code, folder):
    """In a forked process, because a block adds to the tables."""
    os.chdir(folder)
    os.dup2(os.open("output.txt", os.O_WRONLY | os.O_CREAT), 1)
    os.dup2(1, 2)
    sys.stdout = sys.stderr = open(1, "w", buffering=1, closefd=False)  # noqa: SIM115
    torch.set_num_threads(1)
    try:
        exec(compile(code, "docs/extending.md", "exec"), {"__name__": "__main__"})
    except SystemExit as end:
        os._exit(end.code or 0)
    except BaseException:
        traceback.print_exc()
        os._exit(99)
    os._exit(0)


@pytest.mark.parametrize(("title", "code"), BLOCKS, ids=[title for title, _ in BLOCKS])
def test_the_block_runs(title, code, tmp_path):
    process = multiprocessing.get_context("fork").Process(target=run, args=(code, tmp_path))
    process.start()
    process.join(120)
    process.kill()
    assert process.exitcode == 0, f"{title}:\n{(tmp_path / 'output.txt').read_text()[-3000:]}"
