"""A child process on a pseudo-terminal, as a person at a keyboard would have it."""

import contextlib
import fcntl
import os
import pty
import select
import signal
import struct
import subprocess
import sys
import termios
import time
from collections.abc import Iterator, Sequence

# Makes the terminal on stdin the child's own, so that ctrl-C reaches it, and becomes the command.
_TAKE_TERMINAL = """
import fcntl, os, sys, termios
fcntl.ioctl(0, termios.TIOCSCTTY, 0)
os.execvp(sys.argv[1], sys.argv[1:])
"""


class Terminal:
    """The far end of a child's terminal.

    Attributes:
      process: the child.
      screen: everything it has written so far.
    """

    def __init__(self, process: subprocess.Popen, descriptor: int) -> None:
        self.process = process
        self.screen = ""
        self._descriptor = descriptor

    def type(self, text: str) -> None:
        """Types `text`; control characters work as they do at a keyboard."""
        os.write(self._descriptor, text.encode())

    def wait_for(self, text: str, since: int = 0, timeout_s: float = 120) -> int:
        """Waits until `text` has been written at or after position `since`; returns where it ends."""
        deadline = time.monotonic() + timeout_s
        while (at := self.screen.find(text, since)) < 0:
            if not self._read(deadline):
                raise AssertionError(f"{text!r} did not appear; the screen is {self.screen!r}")
        return at + len(text)

    def wait(self, timeout_s: float = 120) -> int:
        """Waits for the end of the child; returns its exit status."""
        deadline = time.monotonic() + timeout_s
        while self._read(deadline):
            pass
        return self.process.wait(timeout=max(deadline - time.monotonic(), 1))

    def _read(self, deadline: float) -> bool:
        """Reads some more, unless the child is gone or time is up."""
        ready, _, _ = select.select([self._descriptor], [], [], max(deadline - time.monotonic(), 0))
        if not ready:
            return False
        try:
            some = os.read(self._descriptor, 65536)
        except OSError:  # how Linux tells that the other side was closed
            return False
        self.screen += some.decode("utf-8", errors="replace")
        return bool(some)


@contextlib.contextmanager
def open_terminal(
    command: Sequence[str], rows: int = 24, columns: int = 100, **environment: str
) -> Iterator[Terminal]:
    """Runs `command` on a terminal of its own; it is killed at the end if it still runs."""
    ours, theirs = pty.openpty()
    fcntl.ioctl(theirs, termios.TIOCSWINSZ, struct.pack("HHHH", rows, columns, 0, 0))
    process = subprocess.Popen(
        [sys.executable, "-c", _TAKE_TERMINAL, *command],
        stdin=theirs,
        stdout=theirs,
        stderr=theirs,
        start_new_session=True,
        env={**os.environ, "TERM": "xterm", **environment},
    )
    os.close(theirs)
    try:
        yield Terminal(process, ours)
    finally:
        if process.poll() is None:
            process.send_signal(signal.SIGKILL)
            process.wait()
        os.close(ours)
