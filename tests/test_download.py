"""download.py against a server on this machine that breaks off, cannot resume, and lies; nothing else is asked."""

import io
import re
import subprocess
import sys
import threading
from concurrent.futures import ThreadPoolExecutor, wait
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path

import pytest
import torch
from reference import golden

import download
import runtime.download
from download import DownloadError, download_model, find_model, released_checkpoint
from models import DiT

NAME = "DiT-XL-2-256x256.pt"
small = partial(DiT, input_size=4, hidden_size=8, depth=1, num_heads=2, num_classes=3)


def saved(state):
    buffer = io.BytesIO()
    torch.save(state, buffer)
    return buffer.getvalue()


WEIGHTS = small().state_dict()
BODY = saved(WEIGHTS)


class Handler(BaseHTTPRequestHandler):
    """Serves `server.body` as the attributes that `server` below sets say."""

    def do_GET(self):
        server, asked = self.server, self.headers["Range"]
        server.ranges.append(asked)
        start = int(re.fullmatch(r"bytes=(\d+)-", asked)[1]) if asked and server.can_resume else None
        if self.path != f"/models/{NAME}":
            return self.send_error(404)
        if start is not None and start >= len(server.body):
            return self.send_error(416)
        self.send_response(200 if start is None else 206)
        if start is not None:
            self.send_header("Content-Range", f"bytes {start}-{len(server.body) - 1}/{len(server.body)}")
        rest = server.body[start or 0 :]
        if server.tells_length:
            self.send_header("Content-Length", str(len(rest) + server.length_error))
        self.end_headers()
        self.wfile.write(rest[: server.break_after])

    def log_message(self, *args):
        pass


@pytest.fixture
def server(monkeypatch, tmp_path):
    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    server.body, server.can_resume, server.break_after = BODY, True, None
    server.tells_length, server.length_error = True, 0
    server.ranges = []  # the Range header of every request
    thread = threading.Thread(target=server.serve_forever, args=(0.01,))
    thread.start()
    monkeypatch.setattr(download, "BASE_URL", f"http://127.0.0.1:{server.server_port}/models/")
    monkeypatch.setitem(download.RELEASED, NAME, small)
    monkeypatch.setenv("no_proxy", "127.0.0.1")
    monkeypatch.chdir(tmp_path)
    yield server
    server.shutdown()
    thread.join()
    server.server_close()


@pytest.fixture
def path(tmp_path):
    return tmp_path / "pretrained_models" / NAME


@pytest.fixture
def part(path):
    path.parent.mkdir()
    return path.with_name(f"{NAME}.part")


def assert_whole(path):
    assert path.read_bytes() == BODY
    assert [file.name for file in path.parent.iterdir()] == [NAME], "something was left beside the checkpoint"


def error_of(call, *args):
    """The message of a DownloadError, which is one line and says where a user gets the file by other means."""
    with pytest.raises(DownloadError) as caught:
        call(*args)
    message = str(caught.value)
    assert "\n" not in message
    assert f"download it by hand from {download.BASE_URL}{NAME} to pretrained_models/{NAME}" in message
    return message


def test_names_of_the_released_checkpoints():
    assert [released_checkpoint(256), released_checkpoint(512)] == list(download.RELEASED)
    with pytest.raises(ValueError, match=r"image size 384: only DiT-XL-2-256x256.pt and DiT-XL-2-512x512.pt"):
        released_checkpoint(384)


def test_expected_shapes_are_the_reference_ones():
    with torch.device("meta"):
        shapes = {name: make().state_dict() for name, make in download.RELEASED.items()}
    keys = [f"{key} {tuple(tensor.shape)}" for key, tensor in shapes["DiT-XL-2-256x256.pt"].items()]
    assert keys == list(golden("models")["DiT-XL/2@32:keys"])
    assert shapes["DiT-XL-2-512x512.pt"]["pos_embed"].shape == (1, 1024, 1152)


@pytest.mark.parametrize("state", [WEIGHTS, {"ema": WEIGHTS, "model": small().state_dict()}], ids=["bare", "ema"])
def test_local_files_need_no_server(state, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    (tmp_path / NAME).write_bytes(saved(state))  # a file in the current folder is meant before the released one
    for name in [NAME, tmp_path / NAME]:
        found = find_model(name)
        assert found.keys() == WEIGHTS.keys()
        assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)


@pytest.mark.parametrize("call", [find_model, download_model, download.download])
def test_other_names_are_not_fetched(server, call):
    with pytest.raises(DownloadError, match="^DiT-XL-2-128x128.pt: no such file, nor a released checkpoint; those are DiT"):
        call("DiT-XL-2-128x128.pt")
    assert server.ranges == []


def test_fetches_once_with_a_progress_bar(server, path, capsys):
    rng_state = torch.get_rng_state()
    found = find_model(NAME)
    assert torch.equal(torch.get_rng_state(), rng_state), "a seed would draw other images on the day of the download"
    assert all(torch.equal(found[key], WEIGHTS[key]) for key in WEIGHTS)
    assert_whole(path)
    assert re.search(rf"{NAME}: 100%", capsys.readouterr().err)
    server.body = b""
    find_model(NAME)
    assert len(server.ranges) == 1, "a file that is there must be used without the network"


def test_download_model_gives_the_weights_even_where_a_file_has_the_name(server, path, tmp_path):
    (tmp_path / NAME).write_text("not the released one")
    assert all(torch.equal(tensor, WEIGHTS[key]) for key, tensor in download_model(NAME).items())
    assert_whole(path)


def test_systems_without_file_locks_can_download():
    """Windows has no fcntl."""
    code = "import sys; sys.modules['fcntl'] = None; from runtime import download, files; assert download.fcntl is None"
    subprocess.run([sys.executable, "-c", code], cwd=Path(download.__file__).parent, check=True)
    assert "fcntl" not in Path(download.__file__).read_text()


@pytest.mark.parametrize("can_resume", [True, False])
@pytest.mark.parametrize("tells_length", [True, False])
@pytest.mark.parametrize("sent", [0, 1, len(BODY) // 2, len(BODY) - 1])
def test_continues_a_broken_download(server, path, sent, can_resume, tells_length):
    server.can_resume, server.tells_length, server.break_after = can_resume, tells_length, sent
    message = error_of(find_model, NAME)
    if tells_length:
        assert f"broke off after {sent:,} of {len(BODY):,} bytes" in message
        assert path.with_name(f"{NAME}.part").read_bytes() == BODY[:sent]
    assert not path.exists()
    server.break_after = None
    find_model(NAME)
    assert_whole(path)
    kept = sent if tells_length else 0  # without a length it is a file that cannot be opened, to be fetched anew
    assert server.ranges[1:] == [f"bytes={max(0, kept - 1)}-"]


def test_continues_in_many_pieces(server, path):
    server.break_after = len(BODY) // 5
    for _ in range(5):
        error_of(find_model, NAME)
    find_model(NAME)
    assert_whole(path)


@pytest.mark.parametrize("excess", [b"", b"x", b"xyz"], ids=len)
def test_part_that_is_complete_or_too_long(server, path, part, excess):
    part.write_bytes(BODY + excess)
    find_model(NAME)
    assert_whole(path)


@pytest.mark.parametrize("error", [-1000, 1000])
def test_wrong_length_is_noticed(server, path, error):
    server.length_error = error
    message = error_of(find_model, NAME)
    assert ("the downloaded file is unusable" if error < 0 else "broke off") in message
    assert not path.exists()
    server.length_error = 0
    find_model(NAME)
    assert_whole(path)


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"<html>Log in to the network first</html>", f"{NAME}.part"),
        (b"", f"{NAME}.part"),
        (BODY[:-500], f"{NAME}.part"),
        (saved(small(num_classes=7).state_dict()), r"y_embedder.embedding_table.weight is \(8, 8\), must be \(4, 8\)"),
        (saved(small(depth=2).state_dict()), r"blocks.1.attn.qkv.weight is \(24, 8\), must be absent"),
        (saved({k: v for k, v in WEIGHTS.items() if k != "pos_embed"}), r"pos_embed is missing, must be \(1, 4, 8\)"),
    ],
    ids=["page", "empty", "truncated", "classes", "depth", "key"],
)
def test_wrong_content_never_gets_the_name(server, path, body, what):
    server.body = body
    assert re.search(f"the downloaded file is unusable: .*{what}", error_of(find_model, NAME))
    assert not path.exists()
    server.body = BODY
    find_model(NAME)
    assert server.ranges[-1] == "bytes=0-", "what is unusable must not be resumed"
    assert_whole(path)


def test_errors_of_the_network_name_the_way_out(server, path, monkeypatch):
    monkeypatch.setattr(download, "BASE_URL", download.BASE_URL + "elsewhere/")
    assert "404" in error_of(find_model, NAME)
    monkeypatch.setattr(download, "BASE_URL", "http://127.0.0.1:1/")  # nobody listens
    assert "refused" in error_of(find_model, NAME)
    assert not path.exists()


def test_errors_of_the_disk_name_the_folder(server, path):
    path.parent.write_text("a file where the folder should be")
    assert "exists: 'pretrained_models'" in error_of(find_model, NAME)


def test_many_at_once_fetch_one_file(server, path):
    with ThreadPoolExecutor(8) as pool:  # the lock belongs to an open file, so threads exclude each other as processes do
        found = list(pool.map(lambda _: download.download(NAME).read_bytes(), range(8)))
    assert found == [BODY] * 8
    assert len(server.ranges) == 1
    assert_whole(path)


def test_waits_for_another_process_and_continues_its_part_when_it_dies(server, path, part, capsys):
    part.write_bytes(BODY[:1000])
    hold = "import fcntl, sys; f = open(sys.argv[1]); fcntl.flock(f, fcntl.LOCK_EX); print('held', flush=True); input()"
    other = subprocess.Popen([sys.executable, "-c", hold, part], stdin=subprocess.PIPE, stdout=subprocess.PIPE)
    assert other.stdout.readline() == b"held\n"
    with ThreadPoolExecutor(1) as pool:
        waiting = pool.submit(find_model, NAME)
        wait([waiting], timeout=0.3)
        ended, asked = waiting.done(), list(server.ranges)
        other.kill()  # before any assertion, which would wait for the thread, and that for the lock
        other.communicate()
        waiting.result(timeout=10)
    assert not ended
    assert asked == []
    assert "waiting for another process" in capsys.readouterr().err
    assert server.ranges == ["bytes=999-"]
    assert_whole(path)


def test_another_process_finishes_while_this_one_waits(server, path, monkeypatch):
    monkeypatch.setattr(runtime.download, "lock", lambda file: path.write_bytes(BODY))
    find_model(NAME)
    assert server.ranges == []
    assert_whole(path)
