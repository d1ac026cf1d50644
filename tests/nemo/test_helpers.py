"""NeMo's index builders, found by upstream's own import lines, against upstream's Python; and a missing compiler."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from nxdt_nemo.errors import UserError
from nxdt_nemo.testing.parity import ACTIVE, ACTIVE_ENV

pytestmark = pytest.mark.ranks

SIZES = np.array([7, 30, 3, 12, 1, 25, 64, 5], dtype=np.int32)


def sample_indices(compiling: list[bool]) -> tuple[np.ndarray, np.ndarray]:
    """By the builder, as blendable_dataset.py gets it: some ranks compile, all import; and upstream's Python."""
    import torch.distributed as dist
    from nemo.collections.nlp.data.language_modeling.megatron import gpt_dataset
    from nemo.collections.nlp.data.language_modeling.megatron.dataset_utils import compile_helper

    if compiling[dist.get_rank()]:
        compile_helper()
    dist.barrier()
    from nemo.collections.nlp.data.language_modeling.megatron import helpers

    documents = np.tile(np.arange(len(SIZES), dtype=np.int32), 3)
    arguments = (SIZES, documents, 16, 3, int(SIZES.sum()), True, 1)
    return helpers.build_sample_idx(*arguments), gpt_dataset._build_sample_idx(*arguments)


def test_all_ranks_have_them_when_one_compiles(gloo):
    found = gloo(2, sample_indices, [True, False], init=ACTIVE, env=ACTIVE_ENV)
    for compiled, python in found:
        assert compiled.shape == (28, 2)
        np.testing.assert_array_equal(compiled, python)


def no_compiler(folder: Path, fails: str | None) -> str:
    import os
    from unittest import mock

    from nxdt_nemo.nemo.collections.nlp.data.language_modeling.megatron.helpers import compiled

    with mock.patch.dict(os.environ, {"PATH": str(folder)} | ({"CXX": fails} if fails else {})):
        try:
            compiled(folder / "cache")
        except UserError as error:
            return str(error)
    return "compiled"


def test_without_a_compiler_one_line_says_so(gloo, tmp_path):
    (said,) = gloo(1, no_compiler, tmp_path, None, init=ACTIVE, env=ACTIVE_ENV)
    assert said == "helpers.cpp: no C++ compiler found for NeMo's index builders; install g++"


def test_a_compiler_that_fails_leaves_nothing_behind(gloo, tmp_path):
    failing = tmp_path / "failing"
    failing.write_text("#!/bin/sh\necho 'helpers.cpp:1: error: odd headers' >&2\nexit 1\n")
    failing.chmod(0o755)
    (said,) = gloo(1, no_compiler, tmp_path, str(failing), init=ACTIVE, env=ACTIVE_ENV)
    assert "do not compile: helpers.cpp:1: error: odd headers" in said
    assert not [path for path in (tmp_path / "cache").rglob("*") if path.is_file()]
