"""The one place where upstream's names are changed.

Room patching/, a leaf: imports nxdt_nemo.errors and nxdt_nemo.console, never torch, NeMo or Megatron.
    records      patches/*.toml as data, checked when read
    fingerprint  where upstream's source is, and what it hashes to
    stubs        modules and symbols that import and raise when used
    patcher      checks a live module against its records, installs, rebinds, undoes
    verify       the same checks over what is installed, without and with importing it
Proof: tests/patching/.
"""

from nxdt_nemo.patching.patcher import Patcher
from nxdt_nemo.patching.records import Record, load

__all__ = ["Patcher", "Record", "load"]
