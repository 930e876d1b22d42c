"""What the commands share on their command lines."""

import importlib
import re

import pytest
from conftest import call

from cli import options
from runtime.errors import UserError

COMMANDS = ["train", "extract_latents", "sample", "sample_ddp", "evaluate", "likelihood"]


@pytest.mark.parametrize("name", COMMANDS)
def test_help_tells_each_default_once(name, capsys):
    assert call(importlib.import_module(name).main, "--help") == 0
    text = " ".join(capsys.readouterr().out.split())
    assert "(default: None)" not in text
    assert not re.search(r"\(default: [^()]*\) \(default", text)
    assert "(default:" in text


def test_compilation_without_a_compiler_is_refused_at_once(monkeypatch):
    monkeypatch.setenv("CXX", "no-such-compiler")
    with pytest.raises(UserError, match="--compile: needs a C\\+\\+ compiler, and there is no no-such-compiler"):
        options.check_compile("inductor", "cpu")
    options.check_compile("aot_eager", "cpu")
    options.check_compile(None, "cpu")
