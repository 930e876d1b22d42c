"""How the tests run, and the tiny model that many of them train. The fixtures are in shared_fixtures.py."""

import gc
import os
import signal

os.environ["HF_HUB_OFFLINE"] = "1"  # a test that would reach for a network fails at once; read when the hub is imported
os.environ["OMP_NUM_THREADS"] = "1"  # of the commands that tests start: several tests run at a time, each on small numbers

for name, handler in (("SIGINT", signal.default_int_handler), ("SIGHUP", signal.SIG_DFL)):
    if hasattr(signal, name):  # ignored under nohup, and by a job in the background; commands of tests inherit it
        signal.signal(getattr(signal, name), handler)
gc.set_threshold(50_000)  # as commands have it, see runtime/parser.py


def pytest_configure(config):
    """The process of `make test` that only hands out the tests to others need not import PyTorch."""
    if not getattr(config.option, "numprocesses", None):
        config.pluginmanager.import_plugin("shared_fixtures")


def pytest_collection_finish():
    """What is imported by now stays. Looking through it again takes a third of a second each time, and in a forked process
    copies its pages too."""
    gc.collect()
    gc.freeze()


def pytest_sessionfinish():
    gc.unfreeze()  # else libraries report at exit what they still hold


# A DiT of 30 thousand parameters on the digits, a few steps long
TINY = (
    "--data-path digits --vae none --image-size 8 --num-classes 10 --hidden-size 16 --depth 1 --num-heads 2 "
    "--patch-size 2 --global-batch-size 12 --lr 1e-3 --device cpu --log-every 2 --num-workers 0"
).split()
