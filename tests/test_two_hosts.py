"""tests/stress/two_hosts.py: what can be tested in a second; the measurement takes a quarter of an hour, and root."""

import json
import os
import signal
import sys
import time
from pathlib import Path

import pytest
from helpers import call
from stress import two_hosts


@pytest.fixture
def hosts():
    if reason := two_hosts.why_not():  # network namespaces are Linux's and need root: nothing stands in for them
        pytest.skip(reason)
    with two_hosts.two_hosts() as hosts:
        yield hosts
    assert not [host.name for host in hosts if host.settings.exists() or Path("/run/netns", host.name).exists()]


def test_it_is_skipped_with_a_reason_where_there_can_be_no_namespaces(monkeypatch, tmp_path, capsys):
    monkeypatch.setattr(two_hosts.shutil, "which", lambda name: f"/sbin/{name}")
    monkeypatch.setattr(two_hosts.sys, "platform", "linux")
    monkeypatch.setattr(os, "geteuid", lambda: 1000)
    assert call(two_hosts.main, "--json", tmp_path / "rows.json") == 0
    assert "skipped: only root can make network namespaces" in capsys.readouterr().out
    assert json.loads((tmp_path / "rows.json").read_text()) == {"skipped": "only root can make network namespaces"}
    monkeypatch.setattr(two_hosts.shutil, "which", lambda name: None)
    assert "missing: ip, tc, unshare" in two_hosts.why_not()


@pytest.mark.parametrize(
    ("argv", "words"), [(["--timeout", "0"], "--timeout"), (["--json", "missing/rows.json"], "its folder"),
        (["--only", "rain"], "--only rain: is none of")]
)  # fmt: skip
def test_a_mistake_is_one_line(argv, words, capsys):
    assert call(two_hosts.main, *argv) == 2
    assert words in capsys.readouterr().err


def test_a_result_that_differs_is_a_failure(monkeypatch, capsys):
    monkeypatch.setattr(two_hosts, "why_not", lambda: None)
    rows = {
        "disturbances": [{"what happened": "rain", "same result": "yes"}, {"what happened": "hail", "same result": "no"}]
    }
    monkeypatch.setattr(two_hosts, "measure", lambda config: rows)
    assert call(two_hosts.main) == 1
    output = capsys.readouterr()
    assert "| hail | no |" in output.out
    assert "the results differ" in output.err


def test_sigterm_removes_the_hosts(monkeypatch):
    if reason := two_hosts.why_not():  # as for `hosts`
        pytest.skip(reason)

    def terminate(config, hosts, folder):
        assert all(Path("/run/netns", host.name).exists() and host.settings.exists() for host in hosts)
        made.extend(hosts)
        os.kill(os.getpid(), signal.SIGTERM)
        time.sleep(20)

    made, before = [], signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(two_hosts, "try_commands", terminate)
    assert call(two_hosts.main) == 143
    assert len(made) == 2
    assert not any(Path("/run/netns", host.name).exists() or host.settings.exists() for host in made)
    assert signal.getsignal(signal.SIGTERM) == before


ASK = "import socket; print(socket.gethostname(), socket.create_connection(('{}', 2950), 2).recv(9).decode())"
ANSWER = "import socket; s = socket.create_server(('', 2950)); c, _ = s.accept(); c.send(b'{}'); c.close()"


def test_the_hosts_reach_each_other_until_the_cable_is_cut_and_leave_nothing(hosts, tmp_path):
    first, second = hosts
    server = first.start([sys.executable, "-c", ANSWER.format("from " + first.name[-1])], tmp_path / "server")
    deadline = time.monotonic() + 20
    while not (ask := _ask(second, first, tmp_path))[0] and time.monotonic() < deadline:
        time.sleep(0.1)
    assert ask == (True, f"{second.name} from a\n")
    assert server.wait(20) == 0
    waiting = first.start([sys.executable, "-c", ANSWER.format("x")], tmp_path / "server")
    second.link("down")
    assert not _ask(second, first, tmp_path)[0]
    assert first.processes() == [waiting.pid]
    assert first.processes("worker") == [waiting.pid]
    assert second.processes() == []
    first.kill()
    assert waiting.wait(20) == -9


def _ask(host, other, folder):
    command = [sys.executable, "-c", ASK.format(other.name)]
    return host.start(command, folder / "answer").wait(20) == 0, (folder / "answer").read_text()
