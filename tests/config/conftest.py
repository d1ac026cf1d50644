"""The small GPT configuration of data/conf, as the room's tests change it."""

from __future__ import annotations

import copy
from collections.abc import Callable
from functools import cache
from pathlib import Path

import pytest
from omegaconf import DictConfig

from nxdt_nemo.config import Report, check, compose_for

SCRIPT = Path(__file__).parent / "data" / "train.py"


@pytest.fixture
def script() -> Path:
    """A script with NeMo's decorator and the config tiny_gpt.yaml."""
    return SCRIPT


@pytest.fixture(scope="session")
def corpus(tmp_path_factory: pytest.TempPathFactory) -> str:
    """The prefix of a .bin/.idx pair that exists."""
    folder = tmp_path_factory.mktemp("corpus")
    for ending in (".bin", ".idx"):
        (folder / f"corpus_text_document{ending}").write_bytes(b"x")
    return str(folder / "corpus_text_document")


@pytest.fixture(scope="session")
def gpt(corpus: str) -> Callable[..., DictConfig]:
    """gpt(*overrides) is tiny_gpt.yaml with its data in place and these hydra overrides."""

    @cache
    def composed(overrides: tuple[str, ...]) -> DictConfig | None:
        data = [] if "data_prefix=" in "".join(overrides) else [f"model.data.data_prefix=[{corpus}]"]
        return compose_for(SCRIPT, [*data, *overrides])

    def compose(*overrides: str) -> DictConfig:
        cfg = composed(overrides)
        assert cfg is not None
        return copy.deepcopy(cfg)

    return compose


@pytest.fixture
def errors(gpt: Callable[..., DictConfig]) -> Callable[..., list[str]]:
    """errors(*overrides, world_size=None, ...) is what check() calls wrong in gpt(*overrides)."""

    def of(*overrides: str, **options: object) -> list[str]:
        report: Report = check(gpt(*overrides), place="tiny_gpt.yaml", **options)
        return [str(error) for error in report.errors]

    return of
