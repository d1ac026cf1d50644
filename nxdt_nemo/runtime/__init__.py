"""Room runtime/: the one seam to a device. Nothing above this room asks which lane it is on.

`current()` gives the lane of this process, chosen once by `select()`. Importing this package imports no torch;
its modules collectives, rng and torch_view do. May import nothing of ours but errors and console.
"""

from nxdt_nemo.runtime.groups import Group
from nxdt_nemo.runtime.lane import Lane, MemoryFigures, Verdict
from nxdt_nemo.runtime.select import current, select

__all__ = ["Group", "Lane", "MemoryFigures", "Verdict", "current", "select"]
