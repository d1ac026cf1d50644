"""The errors a user may meet; shared by all rooms, imports nothing of ours.

NxdtError
+-- UserError          the user can fix it: one line, exit code 2, no traceback
|   +-- ConfigError    a key or value in a YAML file or an override
|   |   +-- HereError      fine in itself, and not on this machine: a file, a package
|   +-- LaneError      a runtime lane that cannot be used on this machine
|   +-- CudaError      a CUDA device, asked for where CUDA's names do not mean this backend's
|   +-- LayoutError    a parallel layout that the ranks or the instance cannot take
+-- PatchError         an upstream target moved, or two records claim it: fails closed
+-- NotOnNeuron        upstream code asked for something that this backend does not have
"""

from __future__ import annotations

__all__ = [
    "ConfigError",
    "CudaError",
    "HereError",
    "LaneError",
    "LayoutError",
    "NotOnNeuron",
    "NxdtError",
    "PatchError",
    "UserError",
    "one_line",
]


class NxdtError(Exception):
    """Base of all errors that this package raises on purpose."""


class UserError(NxdtError):
    """A mistake that the user can fix.

    place   the file, key or option to look at ("" when there is none)
    reason  what is wrong there, with the value
    fix     what to do instead ("" when the reason says it)
    Printed as one line, `place: reason; fix`, with exit code 2.
    """

    exit_code = 2

    def __init__(self, reason: str, *, place: str = "", fix: str = "") -> None:
        self.place, self.reason, self.fix = place, reason, fix
        line = f"{place}: {reason}" if place else reason
        super().__init__(f"{line}; {fix}" if fix else line)


class ConfigError(UserError):
    """A key or value of a configuration that cannot run."""


class HereError(ConfigError):
    """A file or package that the configuration names and this machine does not have."""


class LaneError(UserError):
    """A lane that was asked for and cannot be used here."""


class CudaError(UserError, RuntimeError):
    """A CUDA device that the user's code asks torch itself for. A RuntimeError, as torch's own."""


class LayoutError(UserError):
    """A parallel layout that the ranks cannot be divided into, or the instance cannot place."""


class PatchError(NxdtError):
    """An upstream target does not look as its record says."""


class NotOnNeuron(NxdtError, NotImplementedError):
    """A CUDA, Apex or TransformerEngine feature with no counterpart on this backend."""


def one_line(error: BaseException) -> str:
    """What another package's exception says, for a `reason`: one line, 200 characters at most, or its class."""
    return " ".join(str(error).split())[:200] or type(error).__name__
