"""runtime/: files, how processes were started, devices."""

import importlib
import os
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from unittest import mock

import pytest
import torch
import torch.distributed as dist
from helpers import call

from runtime import devices, distributed, files
from runtime.errors import OutOfMemoryError, UserError
from runtime.launch import first_node, launched, rendezvous_address

ROOT = Path(__file__).parents[1]


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


def test_the_message_of_a_user_error_is_one_line_whatever_it_quotes():
    assert str(UserError("--vae a\nb: is missing")) == "--vae a\\nb: is missing"


def test_outputs_that_cannot_be_written_are_refused_before_work(tmp_path):
    files.check_output(tmp_path / "new.json", "--output")
    with pytest.raises(UserError, match="--output .*: is a folder"):
        files.check_output(tmp_path, "--output")
    with pytest.raises(UserError, match="--output .*: its folder does not exist"):
        files.check_output(tmp_path / "missing/new.json", "--output")


def test_json_that_is_damaged_or_of_another_kind_is_none(tmp_path):
    path = tmp_path / "x.json"
    for content in ("", "{", "[1]", "[" * 100_000, "\x00"):
        path.write_text(content)
        assert files.read_json(path) is None, content[:5]
    files.write_json(path, {"a": [1, 2]})
    assert files.read_json(path) == {"a": [1, 2]}
    assert files.read_json(tmp_path / "absent.json") is None
    assert files.read_json(tmp_path) is None


WITHOUT_UNIX = """
import sys
for name in ("fcntl", "resource"):
    sys.modules[name] = None  # what Windows lacks
import signal
for name in ("SIGUSR1", "SIGCHLD"):
    delattr(signal, name)
import torch
import train, sample, sample_ddp
digits = "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2"
for main, argv in (
    (train.main, f"{digits} --global-batch-size 4 --max-steps 2 --log-every 1 --device cpu --run-dir run"),
    (sample.main, "--ckpt run/checkpoints/0000002.pt --num-sampling-steps 2 --labels 1 --device cpu"),
    (sample_ddp.main, "--ckpt run/checkpoints/0000002.pt --num-sampling-steps 2 --num-fid-samples 2 --device cpu"),
):
    try:
        main(argv.split())
    except SystemExit as end:
        assert not end.code, end.code
"""


def test_commands_run_without_what_windows_lacks(tmp_path):
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}
    run = subprocess.run(
        [sys.executable, "-c", WITHOUT_UNIX], cwd=tmp_path, env=environment, capture_output=True, text=True, timeout=120
    )
    assert run.returncode == 0, run.stderr
    assert (tmp_path / "sample.png").is_file()
    assert list((tmp_path / "samples").glob("*.npz"))
