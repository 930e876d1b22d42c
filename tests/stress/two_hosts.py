"""Two hosts on one machine: the commands for several nodes, and what happens when a process, a host or the network fails.

    OMP_NUM_THREADS=1 python tests/stress/two_hosts.py --json two_hosts.json     # Linux, as root; about 15 minutes

A host is a network namespace with an address, a name and a hosts file of its own; a virtual cable joins the two. Training,
sampling and evaluation run with the same torchrun command on both, as in docs/many_gpus.md. Then training is disturbed in
several ways and started again: its end has to equal that of an undisturbed run, bit for bit. The exit status is 1 if
anything differs. Nothing outside the two namespaces is reached, and all is removed at the end.
"""

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

sys.path.insert(0, str(Path(__file__).parents[1]))  # torch-fidelity installs a package named tests
sys.path.insert(0, str(Path(__file__).parents[2]))
from helpers import assert_same_state, latest, metrics, without_timings

from benchmarks.timing import table
from checkpoint import files
from runtime.config import Config, option
from runtime.errors import RunError, UserError
from runtime.files import write_json
from runtime.parser import Parser

ROOT = Path(__file__).parents[2]
TINY = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 --patch-size 2 "
    "--global-batch-size 12 --device cpu --num-workers 0 --log-every 1 --ckpt-every 50"
).split()
WIDE = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --model DiT-S/8 --depth 4 --global-batch-size 4 "
    "--device cpu --num-workers 0 --log-every 5 --max-steps 15"
).split()
SAMPLES = "--num-fid-samples 24 --per-proc-batch-size 4 --num-sampling-steps 5 --device cpu --folder set".split()
LIMIT = 330  # seconds that any one run may take
RATES = "speed of the network"
FAULT_STEP = 120  # the disturbance comes after this step


@dataclass(frozen=True)
class TwoHostsConfig(Config):
    """Options of two_hosts.py."""

    timeout: float = option(30.0, "--timeout of the training runs, in seconds", above=0, high=60)
    only: tuple[str, ...] | None = option(None, "disturbances to try, by their names in the table (default: all)")
    inception_weights: str | None = option(None, "weights of the Inception network; evaluate.py is left out without "
        "(default: none)", metavar="FILE")  # fmt: skip
    json: str | None = option(None, "also write the numbers to this file", metavar="FILE", path="output")


def main(argv=None):
    parser = Parser(TwoHostsConfig, __doc__)
    config = parser.parse(argv)
    with parser.report_errors():
        if unknown := set(config.only or ()) - {*DISTURBANCES, RATES}:
            raise UserError(f"--only {min(unknown)}: is none of {', '.join([*DISTURBANCES, RATES])}")
        if reason := why_not():
            print(f"skipped: {reason}")
            result = {"skipped": reason}
        else:
            result = measure(config)
            for title, rows in result.items():
                print(f"\n{title}\n\n{table(rows)}")
        if config.json:
            write_json(config.json, result)
        rows = [row for part in result.values() if isinstance(part, list) for row in part]
        if any("no" in (row.get("same result"), row.get("same as on one host")) for row in rows):
            raise RunError("the results differ, see the tables")


def why_not():
    """Why there can be no virtual hosts here, or None."""
    missing = [name for name in ("ip", "tc", "unshare") if not shutil.which(name)]
    if not sys.platform.startswith("linux") or missing:
        return f"needs Linux with the commands ip, tc (iproute2) and unshare; missing: {', '.join(missing) or 'Linux'}"
    if os.geteuid() != 0:
        return "only root can make network namespaces"
    name = f"dit{os.getpid()}"
    made = subprocess.run(["ip", "netns", "add", name], capture_output=True, text=True, timeout=10)
    subprocess.run(["ip", "netns", "del", name], capture_output=True, timeout=10)
    return f"this system makes no network namespaces ({made.stderr.strip()})" if made.returncode else None


# ----------------------------------------------------------------------------------------------------------------------
# Hosts and the cable between them


def system(*command):
    subprocess.run(command, check=True, capture_output=True, timeout=20)


class Host:
    def __init__(self, name, address):
        self.name, self.address, self.settings = name, address, Path("/etc/netns", name)

    @contextmanager
    def made(self):
        system("ip", "netns", "add", self.name)
        try:
            system("ip", "-n", self.name, "link", "set", "lo", "up")
            self.settings.mkdir(parents=True)
            yield self
        finally:
            self.kill()
            shutil.rmtree(self.settings, ignore_errors=True)
            with suppress(OSError):
                self.settings.parent.rmdir()
            system("ip", "netns", "del", self.name)

    def name_hosts(self, hosts, own_address=None):
        """Write the hosts file. own_address: the address of this host's own name, where it is not the true one."""
        lines = [f"{own_address if own_address and h is self else h.address} {h.name}\n" for h in hosts]
        (self.settings / "hosts").write_text("127.0.0.1 localhost\n" + "".join(lines))

    def start(self, command, output, **environment):
        shell = 'echo $0 > /proc/sys/kernel/hostname; exec "$@"'  # in the process's own UTS namespace
        inside = ["ip", "netns", "exec", self.name, "unshare", "--uts", "sh", "-c", shell, self.name]
        environment = {**os.environ, "OMP_NUM_THREADS": "1", **environment}
        with open(output, "w") as file:
            return subprocess.Popen([*inside, *command], cwd=ROOT, env=environment, stdout=file, stderr=file)

    def processes(self, kind=""):
        """Ids of the host's processes. kind: "worker" and "torchrun" for those alone."""
        namespace = Path("/run/netns", self.name).stat().st_ino
        return [pid for pid in pids() if namespace_of(pid) == namespace and (not kind or kind_of(pid) == kind)]

    def kill(self, kind=""):
        for pid in self.processes(kind):
            with suppress(ProcessLookupError):
                os.kill(pid, signal.SIGKILL)

    def link(self, state):
        system("ip", "-n", self.name, "link", "set", "cable", state)

    def limit_rate(self, rate):
        system(*f"ip netns exec {self.name} tc qdisc add dev cable root tbf rate {rate} burst 1mb latency 100ms".split())

    def unlimit_rate(self):
        system(*f"ip netns exec {self.name} tc qdisc del dev cable root".split())


def pids():
    return [int(name) for name in os.listdir("/proc") if name.isdecimal()]


def namespace_of(pid):
    try:
        return os.stat(f"/proc/{pid}/ns/net").st_ino
    except OSError:  # ended in the meantime
        return None


def kind_of(pid):
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")
    except OSError:
        return None
    return "torchrun" if b"torch.distributed.run" in words else "worker" if b"python" in words[0] else None


@contextmanager
def two_hosts():
    number = os.getpid()
    first, second = hosts = [Host(f"dit{number}a", "10.213.7.1"), Host(f"dit{number}b", "10.213.7.2")]
    with first.made(), second.made():
        ends = ["ip", "link", "add", "cable", "netns", first.name, "type", "veth", "peer", "name", "cable"]
        system(*ends, "netns", second.name)
        for host in hosts:
            system("ip", "-n", host.name, "addr", "add", f"{host.address}/24", "dev", "cable")
            host.link("up")
            host.name_hosts(hosts)
        yield hosts


# ----------------------------------------------------------------------------------------------------------------------
# One command on both hosts


class Job:
    """torchrun on each of the hosts, which meet at the first."""

    def __init__(self, hosts, folder, script, options, launch=(), **environment):
        self.hosts, self.folder = hosts, folder
        number = len(list(folder.glob("output*")))
        self.outputs = [folder / f"output{number}.{host.name[-1]}" for host in hosts]
        launcher = [sys.executable, "-m", "torch.distributed.run", f"--nnodes={len(hosts)}", "--rdzv-backend=c10d"]
        launcher += [f"--rdzv-endpoint={hosts[0].name}:29500", *launch]
        if not any(word.startswith("--nproc") for word in launch):
            launcher.append("--nproc_per_node=1")
        command = [*launcher, script, *map(str, options)]
        self.launchers = [
            host.start(command, output, **environment) for host, output in zip(hosts, self.outputs, strict=True)
        ]

    def wait(self, since=None, poll=lambda: None):
        """Seconds from `since` until the workers and the torchrun of each host ended: {(kind, host): seconds}, None for one
        that still ran after LIMIT seconds, and was killed then. Calls poll() all the while."""
        since, ended = since or time.monotonic(), {}
        kinds = [(kind, host) for host in self.hosts for kind in ("worker", "torchrun")]
        while len(ended) < len(kinds) and time.monotonic() < since + LIMIT:
            for host, launcher in zip(self.hosts, self.launchers, strict=True):
                alive = {"torchrun": launcher.poll() is None, "worker": bool(host.processes("worker"))}
                for kind in alive:
                    if not alive[kind]:
                        ended.setdefault((kind, host), time.monotonic() - since)
                    else:  # torchrun has started the worker, perhaps again
                        ended.pop((kind, host), None)
            poll()
            time.sleep(0.1)
        for host, launcher in zip(self.hosts, self.launchers, strict=True):
            host.kill()
            launcher.wait(20)
        return {key: ended.get(key) for key in kinds}

    def text(self):
        return "\n".join(output.read_text() for output in self.outputs)

    def finish(self):
        """Seconds that the command took. Raises RunError where it fails."""
        start = time.monotonic()
        self.wait()
        if any(launcher.returncode for launcher in self.launchers):
            raise RunError(f"a command failed:\n{self.text()[-4000:]}")
        return time.monotonic() - start


def steps(run):
    """The last step in metrics.jsonl, 0 where there is none."""
    try:
        return metrics(run)[-1]["step"]
    except (OSError, IndexError, ValueError):  # not there yet; the last line may be half written
        return 0


def wait_for_step(job, run, step):
    deadline = time.monotonic() + LIMIT
    while time.monotonic() < deadline:
        if steps(run) >= step:
            return
        if all(launcher.poll() is not None for launcher in job.launchers):
            break
        time.sleep(0.02)
    raise RunError(f"the run did not reach step {step}:\n{job.text()[-4000:]}")


# ----------------------------------------------------------------------------------------------------------------------
# What is tried


def measure(config):
    with ExitStack() as stack:
        before = signal.signal(signal.SIGTERM, lambda *_: sys.exit(143))  # so that SIGTERM, too, removes the namespaces
        stack.callback(signal.signal, signal.SIGTERM, before)
        folder = Path(stack.enter_context(tempfile.TemporaryDirectory()))
        hosts = stack.enter_context(two_hosts())
        commands = try_commands(config, hosts, folder)
        chosen = {name: act for name, act in DISTURBANCES.items() if not config.only or name in config.only}
        rows = [disturb(config, hosts, folder, name, act) for name, act in chosen.items()]
        result = {"commands on two hosts": commands, "disturbances": rows}
        if not config.only or RATES in config.only:
            result[RATES] = try_rates(hosts, folder)
        return result


def try_commands(config, hosts, folder):
    """Train, resume, sample and evaluate on both hosts, and compare with two processes on one."""
    rows, one, two, together = [], folder / "one", folder / "two", ["--nproc_per_node=2"]

    def row(what, seconds, same):
        rows.append({"command": what, "seconds": round(seconds, 1), "same as on one host": same})
        print(rows[-1], flush=True)

    def train(run, steps=400, where=hosts, launch=(), **environment):
        return Job(where, folder, "train.py", [*TINY, "--max-steps", steps, "--run-dir", run], launch, **environment)

    train(one, where=hosts[:1], launch=together).finish()
    row("train.py, 200 steps", train(two, 200).finish(), "")
    row("train.py, resumed, to 400", train(two).finish(), same(one, two))
    for host in hosts:
        host.name_hosts(hosts, own_address="127.0.1.1")
    refused = train(folder / "refused", 200)
    seconds = refused.wait()["worker", hosts[0]]
    told = "one line" if "GLOO_SOCKET_IFNAME" in refused.outputs[0].read_text() else "no"
    row("train.py, hosts named 127.0.1.1: refused", seconds or LIMIT, told)
    seconds = train(folder / "named", GLOO_SOCKET_IFNAME="cable").finish()
    row("the same, GLOO_SOCKET_IFNAME=cable", seconds, same(one, folder / "named"))
    for host in hosts:
        host.name_hosts(hosts)
    sets, reports = [folder / name / "set.npz" for name in ("samples-one", "samples-two")], []
    weights = config.inception_weights and ["--inception-weights", Path(config.inception_weights).resolve()]
    for path, where, launch in zip(sets, (hosts[:1], hosts), (together, []), strict=True):
        options = ["--ckpt", one / "checkpoints/0000400.pt", *SAMPLES, "--sample-dir", path.parent]
        seconds = Job(where, folder, "sample_ddp.py", options, launch).finish()
    row("sample_ddp.py, 24 images", seconds, "yes" if sets[0].read_bytes() == sets[1].read_bytes() else "no")
    for where, launch in ((hosts[:1], together), (hosts, [])) if weights else ():
        options = [*sets, *weights, "--device", "cpu", "--batch-size", 4]
        seconds = Job(where, folder, "evaluate.py", options, launch).finish()
        report = json.loads(sets[1].with_name("set.npz.metrics.json").read_text())
        reports.append({k: v for k, v in report.items() if isinstance(v, float)})
    if weights:
        row("evaluate.py, 24 images", seconds, "yes" if reports[0] == reports[1] else "no")
    return rows


def same(one, two):
    try:
        assert_same_state(latest(one), latest(two))
        assert without_timings(one) == without_timings(two)
    except AssertionError as error:
        print(f"{two}: {error}", file=sys.stderr)
        return "no"
    return "yes"


def cut(seconds):
    def act(hosts):
        hosts[1].link("down")
        if seconds:
            time.sleep(seconds)
            hosts[1].link("up")

    return act


DISTURBANCES = {
    "a worker of the second host killed": lambda hosts: hosts[1].kill("worker"),
    "a worker of the first host killed": lambda hosts: hosts[0].kill("worker"),
    "a worker killed, --max-restarts=1": lambda hosts: hosts[1].kill("worker"),
    "torchrun of the second host killed": lambda hosts: hosts[1].kill("torchrun"),
    "torchrun of the first host killed": lambda hosts: hosts[0].kill("torchrun"),
    "all processes of the second host killed": lambda hosts: hosts[1].kill(),
    "all processes of the first host killed": lambda hosts: hosts[0].kill(),
    "network cut for 5 s": cut(5),
    "network cut for good": cut(None),
}


def disturb(config, hosts, folder, name, act):
    """Disturb a run, give the same command again, and compare the end with that of an undisturbed run."""
    run = folder / re.sub(r"\W+", "-", name)
    options = [*TINY, "--max-steps", 400, "--run-dir", run, "--timeout", config.timeout]
    launch = re.findall(r"--\S+", name)
    job = Job(hosts, folder, "train.py", options, launch)
    wait_for_step(job, run, FAULT_STEP)
    moment = time.monotonic()
    act(hosts)
    disturbed_at, next_step = steps(run), []
    ended = job.wait(
        moment, lambda: next_step or (steps(run) > disturbed_at and next_step.append(time.monotonic() - moment))
    )
    went_on = not any(launcher.returncode for launcher in job.launchers)
    reached, saved = steps(run), int(files.newest_first(run / "checkpoints")[0].stem)
    status = json.loads((run / "status.json").read_text())["state"]
    hosts[1].link("up")
    errors = set(re.findall(r"train\.py: error: (.*)", job.text()))
    again = Job(hosts, folder, "train.py", options)
    again.finish()
    row = {"what happened": name}
    for kind in ("worker", "torchrun"):
        row[f"{kind}s ended after, s"] = ", ".join(seconds_of(ended[kind, host]) for host in hosts)
    row["exit statuses"] = ", ".join(str(launcher.returncode) for launcher in job.launchers)
    row["went on after, s"] = seconds_of(next_step[0]) if went_on and next_step else ""
    row |= {"status.json": status, "trained to step": reached, "saved": saved, "steps lost": reached - saved}
    row["same result"] = same(folder / "two", run)
    print({**row, "errors": sorted(errors)}, flush=True)
    return row


def seconds_of(value):
    return "never" if value is None else f"{value:.1f}"


def try_rates(hosts, folder):
    """Seconds a step of a larger model, with the cable as fast as it is and at 1 Gbit/s."""
    rows, run = [], folder / "rates"
    for rate in ("not limited", "1 Gbit/s", "100 Mbit/s"):
        with ExitStack() as stack:
            for host in hosts if rate != "not limited" else ():
                host.limit_rate(rate.replace(" ", "").removesuffix("/s").lower())
                stack.callback(host.unlimit_rate)
            Job(hosts, folder, "train.py", [*WIDE, "--run-dir", run]).finish()
        parameters = re.search(r"([\d,]+) trainable", (run / "log.txt").read_text())[1]
        seconds = round(1 / metrics(run)[-1]["steps_per_second"], 3)
        rows.append({"network": rate, "trainable parameters": parameters, "seconds a step": seconds})
        print(rows[-1], flush=True)
        shutil.rmtree(run)
    return rows


if __name__ == "__main__":
    main()
