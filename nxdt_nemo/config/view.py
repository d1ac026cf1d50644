"""A configuration as the rules read it: plain values by dotted path.

Room config/ (leaf). Stands in for nothing upstream. May import omegaconf and nxdt_nemo.errors.
Proof: tests/config/test_view.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterator
from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import MissingMandatoryValue, OmegaConfBaseException

from nxdt_nemo.errors import ConfigError, HereError

__all__ = ["MISSING", "View"]

MISSING = "???"
_REFERENCE = re.compile(r"\$\{(\w+(?:\.\w+)*)\}")
_ELSEWHERE = object()


class View:
    """Plain values of a DictConfig, interpolations resolved where they can be.

    section      path of cfg within the whole config: "" for all of it, "model" for the model's own section
    place        the file that an error names
    world_size   ranks of the run, None if unknown
    training     whether the run trains

    A value that is `???`, null, or an interpolation that cannot be resolved reads as absent.
    """

    def __init__(
        self,
        cfg: DictConfig,
        *,
        section: str = "",
        place: str = "",
        world_size: int | None = None,
        training: bool = True,
    ) -> None:
        self.cfg, self.section, self.place = cfg, section, place
        self.world_size, self.training = world_size, training
        self.interpolated: set[str] = set()
        self.forgotten: set[str] = set()
        self._values: dict[str, Any] = {}
        self._dangling: dict[str, str] = {}
        self._written: dict[str, Any] = {}
        raw: Any = OmegaConf.to_container(cfg, resolve=False)
        self.plain: dict[str, Any] = raw  # as written
        if section:
            self._values[section] = raw
        self._walk(raw, section)

    def _walk(self, node: Any, path: str) -> None:
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if "${" in str(value) and not isinstance(value, dict):
                self.interpolated.add(inner)
                self._written[inner] = value
                value = self._resolve(inner, value)
            self._values[inner] = value
            if isinstance(value, dict):
                self._walk(value, inner)

    def _resolve(self, path: str, written: Any) -> Any:
        found = self._plain(written)
        if found is not _ELSEWHERE:
            return found
        try:
            value = OmegaConf.select(self.cfg, self.local(path))
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except MissingMandatoryValue:
            return None
        except OmegaConfBaseException as error:
            # An interpolation of a key that is still to be given is not wrong.
            if not isinstance(error.__cause__, MissingMandatoryValue) and "mandatory value" not in str(error):
                self._dangling[path] = " ".join(str(error).split(" full_key")[0].split())
            return None

    def _plain(self, written: Any) -> Any:
        """What `${a.b}` stands for, where that is a plain value: omegaconf's grammar takes a hundred times as long."""
        reference = _REFERENCE.fullmatch(written) if isinstance(written, str) and not self.section else None
        node: Any = self.plain if reference else None
        for name in reference[1].split(".") if reference else ():
            if not isinstance(node, dict) or name not in node:
                return _ELSEWHERE
            node = node[name]
        if node is None or isinstance(node, dict | list) or node == MISSING:
            return _ELSEWHERE
        return self._plain(node) if isinstance(node, str) and "${" in node else node

    @property
    def preferences(self) -> tuple[str, ...]:
        """The methods of `neuron.alignment` that train with pairs of answers, of those that have a section."""
        methods = self.get("neuron.alignment", {})
        found = methods if isinstance(methods, dict) else {}
        return tuple(name for name in ("dpo", "orpo") if found.get(name) is not None)

    def items(self) -> Iterator[tuple[str, Any]]:
        """Every path with its value, `???` included; sections too, as plain dictionaries."""
        return iter(self._values.items())

    def forget(self, path: str) -> None:
        """From here on the key reads as absent: its value is not one that a rule can take."""
        self._values[path] = None
        self.forgotten.add(path)

    def written(self, path: str) -> Any:
        """The value as the file has it, interpolation unresolved."""
        return self._written.get(path)

    def unresolved(self, path: str) -> str:
        """Why an interpolation of this key has no value; "" if it has one, or is none."""
        return self._dangling.get(path, "")

    @property
    def dangling(self) -> dict[str, str]:
        """Keys whose interpolation has no value, and why."""
        return self._dangling

    def local(self, path: str) -> str:
        """A path of the whole config as a path within cfg."""
        return path.removeprefix(f"{self.section}.") if self.section else path

    def has(self, path: str) -> bool:
        """True if the key is written in the config, whatever its value."""
        return path in self._values

    def raw(self, path: str) -> Any:
        """The value as written, `???` included; None if the key is absent."""
        return self._values.get(path)

    def get(self, path: str, default: Any = None) -> Any:
        """The value, or default when it is absent, null or `???`."""
        value = self._values.get(path)
        return default if value is None or value == MISSING else value

    def number(self, path: str, default: int | None = None) -> int | None:
        """The value as a whole number, else default."""
        value = self.get(path)
        if isinstance(value, str) and value.lstrip("-").isdigit():
            return int(value)
        return value if isinstance(value, int) and not isinstance(value, bool) else default

    def size(self, path: str) -> int:
        """A degree of parallelism: 1 when it is absent or not a positive number (another rule reports that)."""
        return max(1, self.number(path) or 1)

    def error(self, reason: str, fix: str = "") -> ConfigError:
        """A ConfigError at this config's place."""
        return ConfigError(reason, place=self.place, fix=fix)

    def here(self, reason: str, fix: str = "") -> ConfigError:
        """An error of this machine, which may not be the one that trains."""
        return HereError(reason, place=self.place, fix=fix)
