"""A configuration as the rules read it: plain values by dotted path.

Room config/ (leaf). Stands in for nothing upstream. May import omegaconf and nxdt_nemo.errors.
Proof: tests/config/test_view.py.
"""

from __future__ import annotations

from typing import Any

from omegaconf import DictConfig, OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_nemo.errors import ConfigError

__all__ = ["MISSING", "View"]

MISSING = "???"


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
        self._values: dict[str, Any] = {}
        raw = OmegaConf.to_container(cfg, resolve=False)
        if section:
            self._values[section] = raw
        self._walk(raw, section)

    def _walk(self, node: Any, path: str) -> None:
        for key, value in node.items():
            inner = f"{path}.{key}" if path else str(key)
            if "${" in str(value) and not isinstance(value, dict):
                self.interpolated.add(inner)
                value = self._resolve(inner)
            self._values[inner] = value
            if isinstance(value, dict):
                self._walk(value, inner)

    def _resolve(self, path: str) -> Any:
        try:
            value = OmegaConf.select(self.cfg, self.local(path))
            return OmegaConf.to_container(value, resolve=True) if OmegaConf.is_config(value) else value
        except OmegaConfBaseException:
            return None

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
