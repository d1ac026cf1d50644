"""The small GPT configuration of data/conf, as the room's tests change it."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest
from nxdt_nemo.config import Report, check, compose_for
from omegaconf import DictConfig

SCRIPT = Path(__file__).parent / "data" / "train.py"


@pytest.fixture
def script() -> Path:
    """A script with NeMo's decorator and the config tiny_gpt.yaml."""
    return SCRIPT


@pytest.fixture
def corpus(tmp_path: Path) -> str:
    """The prefix of a .bin/.idx pair that exists."""
    for ending in (".bin", ".idx"):
        (tmp_path / f"corpus_text_document{ending}").write_bytes(b"x")
    return str(tmp_path / "corpus_text_document")


@pytest.fixture
def gpt(corpus: str) -> Callable[..., DictConfig]:
    """gpt(*overrides) is tiny_gpt.yaml with its data in place and these hydra overrides."""

    def compose(*overrides: str) -> DictConfig:
        cfg = compose_for(SCRIPT, [f"model.data.data_prefix=[{corpus}]", *overrides])
        assert cfg is not None
        return cfg

    return compose


@pytest.fixture
def errors(gpt: Callable[..., DictConfig]) -> Callable[..., list[str]]:
    """errors(*overrides, world_size=None, ...) is what check() calls wrong in gpt(*overrides)."""

    def of(*overrides: str, **options: object) -> list[str]:
        report: Report = check(gpt(*overrides), place="tiny_gpt.yaml", **options)
        return [str(error) for error in report.errors]

    return of
