"""Signals that ask a run to stop. Light to import, so that signals are caught before PyTorch is loaded."""

import os
import signal
import time

from runtime.parser import interrupt


class StopSignals:
    """SIGTERM and SIGUSR1, which schedulers send, SIGHUP, which a closed terminal sends, and Ctrl-C ask for a stop after
    the current step. SIGHUP stays ignored where it is at the start, as under nohup.

    A second Ctrl-C stops at once (not one within a second, since a launcher repeats what the terminal has already sent).
    The end of torchrun asks for a stop too: a signal that torchrun does not handle, or a kill, would otherwise leave its
    workers running. interrupted: whether Ctrl-C was pressed."""

    def __init__(self):
        self.interrupted = self._signalled = False
        self._first = None
        self._launcher = os.getppid() if "TORCHELASTIC_RUN_ID" in os.environ else None
        for name in ("SIGTERM", "SIGUSR1", "SIGINT", "SIGHUP"):
            number = getattr(signal, name, None)  # Windows has no SIGUSR1 and no SIGHUP
            if number is not None and (name != "SIGHUP" or signal.getsignal(number) != signal.SIG_IGN):
                signal.signal(number, self._handle)

    @property
    def requested(self):
        return self._signalled or self._launcher not in (None, os.getppid())

    def _handle(self, number, frame):
        if number == signal.SIGINT:
            now = time.monotonic()
            if self.interrupted and now - self._first > 1:
                interrupt(number, frame)
            self.interrupted, self._first = True, self._first or now
        self._signalled = True
