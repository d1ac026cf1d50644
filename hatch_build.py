"""Build hook: what an editable install carries beside the path to the source.

A wheel carries patches/ and configs/ as package data. In an editable install nxdt_nemo reads the
repository's own folders, and copies in site-packages would go stale, so only the .pth file is installed.
Proof: tests/packaging/test_install.py.
"""

from __future__ import annotations

from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

PTH = "nxdt_nemo_activate.pth"


class CustomBuildHook(BuildHookInterface):
    """Named CustomBuildHook because hatchling looks for that name."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        if version == "editable":
            build_data["force_include_editable"] = {PTH: PTH}
