"""runtime/: files, how processes were started, devices."""

import contextlib
import errno
import fcntl
import functools
import importlib
import io
import os
import pickle
import platform
import re
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from conftest import TINY
from helpers import ROOT, call, paced, wait_for
from tqdm.auto import tqdm

import train
from checkpoint import files as checkpoint_files
from runtime import devices, distributed, download, files, parser
from runtime.errors import OutOfMemoryError, RunError, UserError, about
from runtime.launch import first_node, launched, rendezvous_address
from training.signals import StopSignals


@pytest.fixture
def environment(monkeypatch):
    """Sets the variables of a launcher and unsets all others of launchers."""

    def set_variables(**variables):
        for name in [n for n in os.environ if n.startswith(("SLURM_", "MASTER_"))] + ["RANK", "LOCAL_RANK", "WORLD_SIZE"]:
            monkeypatch.delenv(name, raising=False)
        for name in ("MASTER_ADDR", "MASTER_PORT"):
            monkeypatch.setenv(name, "to be restored")
            monkeypatch.delenv(name)
        for name, value in variables.items():
            monkeypatch.setenv(name, value)

    return set_variables


def test_ranks_come_from_torchrun_or_srun(environment):
    environment()
    assert launched() == (0, 0, 1)
    environment(RANK="3", LOCAL_RANK="1", WORLD_SIZE="4", SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2")
    assert launched() == (3, 1, 4), "torchrun under srun: torchrun's count"
    environment(SLURM_PROCID="3", SLURM_LOCALID="1", SLURM_STEP_NUM_TASKS="4")
    assert launched() == (3, 1, 4), "copies of one model would be trained otherwise"
    environment(SLURM_PROCID="0", SLURM_NTASKS="4")
    assert launched() == (0, 0, 1), "a batch script that asked for four tasks runs as one process"
    environment(RANK="first")
    with pytest.raises(UserError, match="RANK"):
        launched()


def test_processes_without_an_address_to_meet_at_are_refused(environment):
    environment(RANK="0", WORLD_SIZE="2")
    with pytest.raises(UserError, match="RANK is set but not MASTER_ADDR and MASTER_PORT: start with torchrun"):
        rendezvous_address()
    environment(SLURM_PROCID="0", SLURM_STEP_NUM_TASKS="2", SLURM_STEP_NUM_NODES="2")
    with pytest.raises(UserError, match="export MASTER_ADDR"):
        rendezvous_address()
    srun = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "2", "SLURM_JOB_ID": "70123", "SLURM_STEP_ID": "0"}
    srun["SLURM_LAUNCH_NODE_IPADDR"] = "10.0.0.1"  # where srun was started: not always a node of the job
    environment(**srun, SLURM_STEP_NUM_NODES="2", SLURM_STEP_NODELIST="gpu[017-018]")
    rendezvous_address()
    assert (os.environ["MASTER_ADDR"], os.environ["MASTER_PORT"]) == ("gpu017", "20123")
    environment(**srun, SLURM_STEP_NUM_NODES="1", SLURM_STEP_NODELIST="gpu017")
    rendezvous_address()
    assert os.environ["MASTER_ADDR"] == "127.0.0.1", "one node needs no name"
    environment(**srun, MASTER_ADDR="here", SLURM_STEP_NUM_NODES="2", SLURM_STEP_NODELIST="gpu[017-018]")
    rendezvous_address()
    assert os.environ["MASTER_ADDR"] == "here"


@pytest.mark.parametrize(
    ("nodes", "first"),
    [
        ("n1", "n1"),
        ("n1,n2", "n1"),
        ("n[1-2]", "n1"),
        ("gpu[003,007-9],login", "gpu003"),
        ("r[2-3]n[04-05]-ib", "r2n04-ib"),
    ],
)
def test_the_first_node_of_slurms_list(nodes, first):
    assert first_node(nodes) == first


def test_a_restart_meets_no_keys_of_the_start_before():
    """torchrun keeps its store. Its count of restarts, which named the keys before, differs between nodes: two nodes were
    not restarted after a failure on one of them."""
    server = dist.TCPStore("127.0.0.1", 0, is_master=True, wait_for_workers=False)
    names = []
    with ThreadPoolExecutor(3) as pool:
        for _ in range(2):
            found = []
            for rank in (2, 1, 0):  # process 0 comes last: the others find the name of the start before
                client = dist.TCPStore("127.0.0.1", server.port, is_master=False)
                found.append(pool.submit(distributed.agree_on_attempt, client, rank, 3))
                time.sleep(0.1)
            names.append({name.result(20) for name in found})
    assert [len(found) for found in names] == [1, 1]
    assert names[0] != names[1]
    with pytest.raises(dist.DistStoreError, match="no answer from process 0"):
        distributed.agree_on_attempt(server, 1, 2, patience=1)


def blocks_in_blocks(argv):
    """A process whose blocks of together() fail at the place that argv names, on rank 1 or 0 alone."""
    where, failing = argv[0], int(argv[1])
    with distributed.processes("cpu", timeout=20) as context:

        def fail(place):
            if where == place and context.rank == failing:
                raise UserError(f"--report-to {place}", "not installed here", "install it")

        def inner():
            fail("listing")
            return context.rank

        def outer():
            fail("before")
            with context.together():
                fail("inside")
            assert context.on_main(inner) == 0
            fail("after")

        try:
            with about("--tracker"), context.together():
                outer()
        except UserError as error:
            print(error, error.of_one_rank)
        assert context.all_gather(context.rank) == [0, 1], "still in step after the error"
        assert context.any([context.rank == 1]) == [True]
        if where == "nowhere":
            with pytest.raises(AssertionError, match="nothing may be exchanged"), context.together():
                context.barrier()


@pytest.mark.parametrize(("place", "rank"), [("before", 1), ("inside", 0), ("listing", 0), ("after", 1), ("nowhere", 0)])
def test_an_error_of_one_rank_ends_blocks_inside_of_blocks_on_all(place, rank, ranks):
    """A tracker's package that was missing on another node ended as "lost the connection", and nobody said which."""
    run = ranks(blocks_in_blocks, [place, rank], 2)
    assert run.wait() == [0, 0], run.text() + run.text(1)
    line = "" if place == "nowhere" else f"--tracker {place}: not installed here; install it False\n"
    assert [run.text(0), run.text(1)] == [line, line]


def test_an_error_of_pytorch_is_told_in_one_line():
    error = RuntimeError("[/pytorch/gloo/transport/tcp/pair.cc:545] Connection closed by peer [10.0.0.2]:345. This may\nbe")
    assert distributed.first_sentence(error) == "Connection closed by peer [10.0.0.2]:345"
    assert distributed.first_sentence(ValueError()) == "ValueError"


def test_a_lost_process_is_one_line(monkeypatch):
    monkeypatch.setenv("RANK", "3")
    closed = "[/src/gloo/transport/tcp/pair.cc:561] Connection closed by peer [10.0.0.2]:345. Check the logs.\nGLHF"
    for error in (RuntimeError(closed), dist.DistNetworkError("Connection closed by peer [10.0.0.2]:345")):
        with pytest.raises(distributed.LostProcessError) as told, distributed.processes("cpu"):
            raise error
        assert str(told.value).startswith(
            "process 3 lost the connection to another (Connection closed by peer [10.0.0.2]:345); a process, a host"
        )
    with pytest.raises(RuntimeError, match="must match"), distributed.processes("cpu"):
        torch.empty(2) + torch.empty(3)  # other errors stay what they are


def test_processes_that_cannot_connect_get_one_line(environment, monkeypatch):
    environment(RANK="1", WORLD_SIZE="2", MASTER_ADDR="name.invalid", MASTER_PORT="2950")
    lost = dist.DistNetworkError("The client socket has failed to connect to any address of (name.invalid, 2950). Why")
    monkeypatch.setattr(dist, "rendezvous", mock.Mock(side_effect=lost))
    with pytest.raises(distributed.LostProcessError, match="cannot connect to the others .*2950.*GLOO_SOCKET_IFNAME"):
        distributed.setup("cpu")


@pytest.mark.parametrize(("variables", "gpu"), [({"RANK": "1", "LOCAL_RANK": "1", "WORLD_SIZE": "2"}, None),
    ({"SLURM_PROCID": "1", "SLURM_LOCALID": "1", "SLURM_STEP_NUM_TASKS": "2"}, 0)])  # fmt: skip
def test_a_process_of_srun_may_see_its_own_gpu_alone(variables, gpu, environment, monkeypatch):
    """srun --gpus-per-task=1 shows each process one GPU, whose number is 0 for all of them."""
    environment(**variables, MASTER_ADDR="127.0.0.1", MASTER_PORT="1")
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 1)
    chosen = []
    monkeypatch.setattr(torch.cuda, "set_device", chosen.append)
    monkeypatch.setattr(dist, "rendezvous", mock.Mock(side_effect=ZeroDivisionError("zero")))  # far enough
    with pytest.raises(ZeroDivisionError if gpu == 0 else UserError, match="zero|no GPU: there are 1; start no more"):
        distributed.setup("cuda")
    assert chosen == ([torch.device("cuda", gpu)] if gpu == 0 else [])


@pytest.mark.parametrize("command", ["train", "sample_ddp"])
def test_a_rank_without_an_address_gets_one_line(command, environment, tmp_path, monkeypatch, capfd):
    argv = {"train": ["--data-path", "digits", "--vae", "none", "--image-size", "8"], "sample_ddp": []}[command]
    environment(RANK="0", WORLD_SIZE="2")
    monkeypatch.chdir(tmp_path)
    assert call(importlib.import_module(command).main, *argv) == 2
    error = capfd.readouterr().err
    assert "MASTER_ADDR" in error
    assert "Traceback" not in error


def test_one_setting_of_precision_sets_products_and_convolutions(monkeypatch):
    """cuDNN has a switch of its own, which is on by default: "fp32" used to leave it on."""
    monkeypatch.setattr(torch, "autocast", lambda *args, **kwargs: None)
    before = torch.get_float32_matmul_precision(), torch.backends.cudnn.allow_tf32
    try:
        for precision, tf32 in (("tf32", True), ("fp32", False), ("bf16", True)):
            devices.set_precision(precision, torch.device("cuda"))
            assert torch.backends.cudnn.allow_tf32 == tf32, precision
            assert torch.get_float32_matmul_precision() == ("high" if tf32 else "highest"), precision
    finally:
        torch.set_float32_matmul_precision(before[0])
        torch.backends.cudnn.allow_tf32 = before[1]


def test_out_of_memory_is_one_line_with_advice():
    for allocate in (lambda: torch.empty(2**45), lambda: bytearray(2**62)):
        with pytest.raises(OutOfMemoryError) as error, devices.explain_out_of_memory("lower --batch"):
            allocate()
        assert str(error.value).startswith("out of memory")
        assert str(error.value).endswith("; lower --batch")
        assert "\n" not in str(error.value)
    with pytest.raises(RuntimeError, match="must match"), devices.explain_out_of_memory("lower --batch"):
        torch.empty(2) + torch.empty(3)  # other errors stay what they are


@pytest.mark.parametrize(
    ("error", "line"),
    [
        (UserError("--vae", "is missing", "name one"), "--vae: is missing; name one"),
        (UserError("--vae: is missing; name one"), "--vae: is missing; name one"),
        (UserError("no device"), "no device"),
        (RunError("--vae a\nb", "is missing"), "--vae a\\nb: is missing"),
    ],
)
def test_an_error_is_one_line_also_in_another_process(error, line):
    copy = pickle.loads(pickle.dumps(error))
    assert (str(error), str(copy), type(copy), copy.where) == (line, line, type(error), error.where)


@pytest.mark.parametrize(
    ("error", "names", "line"),
    [
        (UserError("--labels 7: there are 3"), ("--keep-classes",), "--keep-classes 7: there are 3"),
        (UserError("--vae", "has 3 channels"), ("x.pt's autoencoder",), "x.pt's autoencoder: has 3 channels"),
        (UserError("--vae X: has 3 channels"), ("--val-path", "--path"), "--vae X: has 3 channels"),
        (UserError("--path X: bad; see --path"), ("--val-path", "--path"), "--val-path X: bad; see --val-path"),
        (UserError("--path-b: bad"), ("--val-path", "--path"), "--path-b: bad"),
        (UserError("x.png: bad"), ("--path",), "x.png: bad"),
    ],
)
def test_an_error_names_the_option_that_was_given(error, names, line):
    with pytest.raises(UserError) as found, about(*names):
        raise error
    assert (str(found.value), found.value) == (line, error)


def test_paths_that_cannot_be_used_are_refused_before_work(tmp_path):
    (tmp_path / "file").touch()
    (tmp_path / "link").symlink_to("gone")
    files.check_output(tmp_path / "new.json", "--x")
    files.check_input(tmp_path / "file", "--x", "file")
    files.check_input(tmp_path, "--x", "folder")
    for check, line in (
        (lambda: files.check_output(tmp_path, "--x"), "is a folder; name a file"),
        (
            lambda: files.check_output(tmp_path / "a/b", "--x"),
            f"its folder does not exist; make {tmp_path}/a, or",
        ),
        (lambda: files.check_input(tmp_path, "--x", "file"), "is a folder; name a file"),
        (lambda: files.check_input(tmp_path / "file", "--x", "folder"), "is a file; name a folder"),
        (lambda: files.check_input(tmp_path / "a", "--x", "folder"), f"no such folder; check the path {tmp_path}/a"),
        (lambda: files.check_input(tmp_path / "link", "--x", "file"), "no such file (a link to what does not exist); "),
        (lambda: files.check_input(tmp_path / "file/a", "--x", "file"), "cannot be read (Not a directory); name another"),
        (lambda: files.check_input("a\0", "--x", "file"), "cannot be read ("),  # Python's words differ
    ):
        with pytest.raises(UserError) as error:
            check()
        assert re.fullmatch(r"--x [^:]*", error.value.where)
        assert str(error.value).partition(": ")[2].startswith(line)


def test_json_that_is_damaged_or_of_another_kind_is_none(tmp_path):
    path = tmp_path / "x.json"
    for content in ("", "{", "[1]", "[" * 100_000, "\x00"):
        path.write_text(content)
        assert files.read_json(path) is None, content[:5]
    files.write_json(path, {"a": [1, 2]})
    assert files.read_json(path) == {"a": [1, 2]}
    assert files.read_json(tmp_path / "absent.json") is None
    assert files.read_json(tmp_path) is None


@pytest.mark.parametrize("code", [errno.ENOLCK, errno.ENOSYS, errno.ENOTSUP])
def test_a_file_system_without_locks_or_flushes_can_be_written_to(code, tmp_path, monkeypatch, capfd):
    """NFS, Lustre, SMB and FUSE lack some of these calls."""
    lack = mock.Mock(side_effect=OSError(code, os.strerror(code)))
    for module, call_of_it in ((fcntl, "lockf"), (fcntl, "flock"), (os, "fsync")):
        monkeypatch.setattr(module, call_of_it, lack)
    files.lock_folder(tmp_path).close()
    with open(tmp_path / "part", "wb") as part:
        download.lock(part)
    for text in (b"old", b"new"):
        files.replace_file(tmp_path / "x", lambda file, text=text: file.write(text))
    assert (tmp_path / "x").read_bytes() == b"new"
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(set(lines)) == 4, "each once"
    assert all(f"({os.strerror(code)})" in line for line in lines)
    assert lack.call_count == 6
    assert call(train.main, *TINY, "--max-steps", 1, "--run-dir", tmp_path / "run") == 0
    checkpoint_files.verify(tmp_path / "run/checkpoints/0000001.pt")
    error = capfd.readouterr().err
    assert f"{tmp_path}/run: its file system has no locks; start no second command that writes there" in error
    assert f"{tmp_path}/run/checkpoints: its file system cannot flush files to the disk" in error


def test_words_about_a_failed_write_are_true(tmp_path, monkeypatch, capfd):
    path, fsync = tmp_path / "x", os.fsync
    path.write_bytes(b"old")

    def fail(number):
        if stat.S_ISDIR(os.fstat(number).st_mode) == (failing == "folder"):
            raise OSError(errno.EIO, "Input/output error")
        fsync(number)

    monkeypatch.setattr(os, "fsync", fail)
    failing = "file"
    with pytest.raises(OSError, match="Input/output"):
        files.replace_file(path, lambda file: file.write(b"new"))
    assert [p.read_bytes() for p in tmp_path.iterdir()] == [b"old"]
    failing = "folder"  # the file has its new contents by then
    files.replace_file(path, lambda file: file.write(b"new"))
    assert path.read_bytes() == b"new"
    assert "a power failure may undo what was written last (Input/output error)" in capfd.readouterr().err


SHELL = {"SLURM_PROCID": "0", "SLURM_STEP_NUM_TASKS": "4", "SLURM_STEP_NUM_NODES": "1", "SLURM_JOB_ID": "1234"}


def in_a_shell_of_srun(job, argv):
    """A plain `python train.py` in the shell of `srun --ntasks-per-node=4 --pty bash`, the first of four. The port
    is made of the job's number."""
    for name in ("RANK", "LOCAL_RANK", "WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT"):
        del os.environ[name]
    os.environ |= SHELL | {"SLURM_JOB_ID": str(job)}
    distributed.wait_for_others = functools.partial(distributed.wait_for_others, after=0.1)
    train.main(argv)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM, signal.SIGHUP])
def test_a_process_that_waits_for_others_says_so_and_can_be_stopped(number, environment, ranks, tmp_path):
    run = ranks(functools.partial(in_a_shell_of_srun, 1234 + number), [*TINY, "--max-steps", 1, "--run-dir", tmp_path])
    wait_for(lambda: "one process alone\n" in run.text())
    text = run.text()
    assert text.startswith("process 0 of 4 waits for the other 3 to start, for up to 0:10:00; start all of them")
    os.kill(run.processes[0].pid, number)
    assert run.wait(timeout=10) == [130]
    assert run.text().count("\n") == 2
    way_out = re.search(r"set (\w+)=(\d) for one process alone", text)
    environment(**SHELL | {way_out[1]: way_out[2]})
    assert launched() == (0, 0, 1), "the advice has to work"


def test_a_second_command_in_the_shell_of_srun_is_told_that_the_port_is_taken(environment, ranks, tmp_path):
    """The first of it waits at the port that is made of the job's number, for processes that nobody starts."""
    runs = [[*TINY, "--max-steps", 1, "--run-dir", tmp_path / name] for name in "ab"]
    first = ranks(functools.partial(in_a_shell_of_srun, 1300), runs[0])
    wait_for(lambda: "waits for the other 3" in first.text())
    second = ranks(functools.partial(in_a_shell_of_srun, 1300), runs[1])
    assert second.wait() == [1]
    line = second.text().splitlines()[-1]
    assert "another process has port 21300" in line
    way_out = re.search(r"set (SLURM_\w+)=(\d) for one process alone, or set MASTER_PORT", line)
    environment(**SHELL | {way_out[1]: way_out[2]})
    assert launched() == (0, 0, 1), "the advice has to work"


def test_output_that_nobody_reads_is_no_error(capfd):
    reading, writing = os.pipe()
    os.close(reading)
    closed = io.StringIO()
    closed.close()
    with contextlib.suppress(BrokenPipeError), open(writing, "w") as gone:  # which fails at the end of the block
        for stream in (gone, closed, None):
            output = parser.Output(stream)
            print("text", file=output, flush=True)
            for _ in tqdm(range(3), file=output):
                pass
    assert "Traceback" not in capfd.readouterr().err


def test_threads_wait_with_a_short_spin_unless_the_user_says_how(monkeypatch):
    for name in ("GOMP_SPINCOUNT", "OMP_WAIT_POLICY", "OMP_PROC_BIND", "GOMP_CPU_AFFINITY"):
        monkeypatch.delenv(name, raising=False)
    with monkeypatch.context() as patch:
        patch.setenv("OMP_WAIT_POLICY", "active")
        parser.spin_briefly()
        assert "GOMP_SPINCOUNT" not in os.environ
    monkeypatch.setenv("GOMP_SPINCOUNT", "")  # so that what is set next is undone
    monkeypatch.delenv("GOMP_SPINCOUNT")
    parser.spin_briefly()
    assert int(os.environ["GOMP_SPINCOUNT"]) > 0


def test_a_file_that_a_library_puts_in_place_is_flushed_and_readable_as_others_are(tmp_path, monkeypatch):
    """As safetensors 0.8 does. Otherwise latents on a cluster are their writer's alone, and a power failure loses them."""
    flushed, fsync = [], os.fsync

    def write(file):
        (tmp_path / "own").write_bytes(b"weights")
        (tmp_path / "own").chmod(0o600)
        os.replace(tmp_path / "own", file.name)

    def remember(number):
        flushed.append(os.fstat(number).st_ino)
        fsync(number)

    monkeypatch.setattr(os, "fsync", remember)
    (tmp_path / "usual").touch()
    files.replace_file(tmp_path / "x", write)
    assert (tmp_path / "x").read_bytes() == b"weights"
    assert (tmp_path / "x").stat().st_ino in flushed
    assert (tmp_path / "x").stat().st_mode == (tmp_path / "usual").stat().st_mode


@pytest.mark.skipif(platform.libc_ver()[0] != "glibc", reason="of glibc's malloc")
def test_memory_that_was_freed_is_used_again_unless_the_user_says_how(monkeypatch):
    """Counted in pages that the kernel had to fill: eight strings of 16,384 pages, one after the other."""
    for name in [name for name in os.environ if name.startswith(("MALLOC_", "GLIBC_TUNABLES"))]:
        monkeypatch.delenv(name)
    code = """
import resource
from runtime.parser import keep_freed_memory
keep_freed_memory()
before = resource.getrusage(resource.RUSAGE_SELF).ru_minflt
for _ in range(8):
    bytes(1) * (1 << 26)
print(resource.getrusage(resource.RUSAGE_SELF).ru_minflt - before)
"""

    def filled():
        return int(subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout)

    assert filled() < 30_000
    monkeypatch.setenv("MALLOC_ARENA_MAX", "2")
    assert filled() > 100_000


def train_into_a_closed_pipe(argv):
    """train.py ... 2>&1 | head -n 0"""
    reading, writing = os.pipe()
    os.close(reading)
    for number in (1, 2):
        os.dup2(writing, number)
    sys.stdout, sys.stderr = os.fdopen(1, "w", closefd=False), os.fdopen(2, "w", closefd=False)
    paced(argv)


def test_a_run_outlives_its_output_and_saves_when_the_terminal_is_closed(ranks, tmp_path):
    run = ranks(train_into_a_closed_pipe, [*TINY, "--max-steps", 10**6, "--run-dir", tmp_path / "run"])
    wait_for(lambda: (tmp_path / "run/metrics.jsonl").read_text().count("\n") > 1, 120)
    os.kill(run.processes[0].pid, signal.SIGHUP)
    assert run.wait() == [0]
    status = files.read_json(tmp_path / "run/status.json")
    assert status["state"] == "preempted"
    assert (tmp_path / f"run/checkpoints/{status['step']:07d}.pt").exists()


def test_a_hang_up_that_nohup_ignores_stays_ignored():
    names = (signal.SIGTERM, signal.SIGUSR1, signal.SIGINT, signal.SIGHUP)
    before = [signal.getsignal(name) for name in names]
    try:
        signal.signal(signal.SIGHUP, signal.SIG_IGN)
        StopSignals()
        assert signal.getsignal(signal.SIGHUP) == signal.SIG_IGN
    finally:
        for name, handler in zip(names, before, strict=True):
            signal.signal(name, handler)


def without_unix(argv):
    """What a user of Windows starts. The modules that this process has are read again, without what Windows lacks."""
    for name, module in [*sys.modules.items()]:
        file = Path(getattr(module, "__file__", None) or "/")
        if file.is_relative_to(ROOT) and not {"tests", "site-packages"}.intersection(file.parts):  # .venv is below ROOT
            del sys.modules[name]
    sys.modules |= dict.fromkeys(("fcntl", "resource"))
    for name in ("SIGUSR1", "SIGCHLD", "SIGHUP"):
        delattr(signal, name)
    os.chdir(argv[0])
    draw = "--ckpt run/checkpoints/0000002.pt --num-sampling-steps 2 --device cpu"
    for command, words in (
        ("train", [*TINY, "--max-steps", "2", "--run-dir", "run"]), ("sample", [*draw.split(), "--labels", "1"]),
        ("sample_ddp", [*draw.split(), "--num-fid-samples", "2"]),
    ):  # fmt: skip
        with contextlib.suppress(SystemExit):
            importlib.import_module(command).main(words)


def test_commands_run_without_what_windows_lacks(tmp_path, ranks):
    run = ranks(without_unix, [tmp_path])
    assert run.wait() == [0], run.text()
    assert (tmp_path / "sample.png").is_file()
    assert list((tmp_path / "samples").glob("*.npz"))


class Quota(io.RawIOBase):
    """A file that takes 64 bytes, and then fails as where a quota is used up."""

    def __init__(self):
        self.left = 64

    def writable(self):
        return True

    def write(self, content):
        self.left -= len(content)
        if self.left < 0:
            raise OSError(errno.EDQUOT, os.strerror(errno.EDQUOT))
        return len(content)


def test_a_quota_is_named_by_the_system_and_not_by_the_archive_writer(tmp_path):
    (tmp_path / "features.pt").write_bytes(b"before")
    with pytest.raises(OSError, match="Disk quota exceeded"):  # as evaluate.py --cache and tools/convert.py catch it
        files.replace_file(tmp_path / "features.pt", lambda file: torch.save({"w": torch.zeros(100_000)}, Quota()))
    assert [path.read_bytes() for path in tmp_path.iterdir()] == [b"before"]
