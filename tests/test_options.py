"""What the commands share on their command lines."""

import importlib
import re

import pytest
from conftest import call

COMMANDS = ["train", "sample", "sample_ddp", "evaluate", "likelihood"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_each_default_once(name, capsys):
    assert call(importlib.import_module(name).main, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert not re.search(r"\(default: [^()]*\) \(default", text)
    assert "(default:" in text
