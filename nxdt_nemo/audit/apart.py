"""What may end its process without a word, in a child.

Room audit/. Standard library only. torch_xla crashes where something needs the contents of a tensor that has none: an
operation that falls off XLA is computed on the host, in C++, where nobody is asked first.
Proof: tests/audit/test_apart.py.
"""

from __future__ import annotations

import ctypes
import faulthandler
import os
import re
import signal
import sys
import tempfile
from typing import IO

from nxdt_nemo.errors import UserError

__all__ = ["go_on_in_a_child"]

_FRAME = re.compile(r'File "([^"]+)", line (\d+)')


def go_on_in_a_child() -> None:
    """Return in a child process. The parent ends as the child does: with its exit code or, if a signal ended it, with a
    UserError that names the signal and the line. A parent that is killed takes the child along. Of a process with one
    thread."""
    sys.stdout.flush()
    sys.stderr.flush()
    parent = os.getpid()
    with tempfile.TemporaryFile("w+") as stack:
        child = os.fork()
        if child == 0:
            _end_with(parent)
            # The file stays open for as long as faulthandler has it.
            faulthandler.enable(os.dup(stack.fileno()))
            return
        status = os.waitpid(child, 0)[1]
        if not os.WIFSIGNALED(status):
            raise SystemExit(os.WEXITSTATUS(status))
        raise _ended(signal.Signals(os.WTERMSIG(status)), stack)


_PR_SET_PDEATHSIG = 1


def _end_with(parent: int) -> None:
    """Linux ends this process when its parent ends, even one that was killed and could hand nothing on."""
    if sys.platform == "linux":
        ctypes.CDLL(None).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    if os.getppid() != parent:  # it had ended before
        os._exit(1)


def _ended(by: signal.Signals, stack: IO[str]) -> UserError:
    stack.seek(0)
    told = stack.read()
    # XLA's own threads have no frames: the main one, which is the last, waits for them.
    told = told.partition("Current thread")[2].partition("\n\n")[0] or told.rpartition("Thread 0x")[2]
    frames = [found for found in _FRAME.findall(told) if not re.search("/(torch|torch_xla)/", found[0])]
    place = f"{frames[0][0].rpartition('site-packages/')[2]}:{frames[0][1]}" if frames else ""
    if by != signal.SIGSEGV:
        return UserError(f"the process that lowers the step was ended by {by.name}", place=place)
    reason = "an operation there falls off XLA, or reads a tensor of the device, whose contents an audit does not have"
    return UserError(f"{reason} ({by.name})", place=place, fix="write it in operations that XLA has")
