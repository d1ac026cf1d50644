"""The image for clusters, against the table of docs/trainium.md. Nothing is built."""

from __future__ import annotations

import re
from pathlib import Path

ROOT = Path(__file__).parents[2]
COLUMNS = {  # the table's, by the image's argument
    "TORCH_NEURONX": "torch-neuronx",
    "NEURONX_CC": "neuronx-cc",
    "LIBNEURONXLA": "libneuronxla",
    "NEURON_RUNTIME": "runtime library",
    "NEURON_COLLECTIVES": "collectives",
}


def table() -> list[dict[str, str]]:
    """The rows of the table of Neuron SDKs, the newest last."""
    page = (ROOT / "docs" / "trainium.md").read_text(encoding="utf-8")
    lines = [line.strip("| ").split(" | ") for line in page.partition("| SDK |")[2].partition("\n\n")[0].splitlines()]
    return [dict(zip(["SDK", *lines[0]], row, strict=True)) for row in lines[2:]]


def test_the_image_has_one_sdks_versions() -> None:
    text = (ROOT / "Dockerfile").read_text(encoding="utf-8")
    assert dict(re.findall(r"^ARG (\w+)=(\S+)$", text, re.MULTILINE)) == {
        argument: table()[-1][column] for argument, column in COLUMNS.items()
    }
    assert [name for name in COLUMNS if f"=${{{name}}}" not in text] == []


def test_wheels_of_aws_move_no_locked_version() -> None:
    for name in ("Dockerfile", "docs/trainium.md"):
        text = (ROOT / name).read_text(encoding="utf-8").replace("\\\n", "")
        lines = [line for line in text.splitlines() if "--extra-index-url" in line]
        assert lines
        assert all(re.search(r"(-c|--constraints) requirements.lock", line) for line in lines), name
