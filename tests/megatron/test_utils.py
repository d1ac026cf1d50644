"""Helpers of megatron-core that expect another installation: TransformerEngine's version, a compiler for data sets."""

from __future__ import annotations

import sys
from importlib.machinery import EXTENSION_SUFFIXES
from types import ModuleType
from unittest.mock import patch

import pytest

from nxdt_nemo.megatron.datasets.utils import compile_helpers, lend_compiled


def versions() -> tuple[bool, bool]:
    from megatron.core.utils import is_te_min_version

    return is_te_min_version("0.0.1"), is_te_min_version("99", check_equality=False)


def test_without_transformer_engine_no_version_is_reached(active):
    assert active(versions) == (False, False)


def helpers() -> str:
    from megatron.core.datasets.utils import compile_helpers

    compile_helpers()
    import megatron.core.datasets.helpers_cpp as compiled

    return compiled.__name__


def test_what_is_compiled_is_not_compiled_again(active):
    assert active(helpers) == "megatron.core.datasets.helpers_cpp"


def test_what_is_not_is_left_to_upstream():
    called = []
    with (
        patch.dict(sys.modules, {"megatron.core.datasets.helpers_cpp": None}),
        patch("importlib.util.find_spec", lambda name: None),
    ):
        compile_helpers(lambda: called.append(True))
    assert called == [True]


BUILT = [(".cpython-27-other.so", False), (EXTENSION_SUFFIXES[0], True)]  # what a checkout has, is it this Python's


@pytest.mark.parametrize("ending, has_its_own", BUILT)
def test_a_checkout_is_lent_what_the_wheel_has_compiled(tmp_path, ending, has_its_own):
    pytest.importorskip("megatron.core", reason="needs the extra: pip install nxdt-nemo[nemo]")
    (tmp_path / f"helpers_cpp{ending}").touch()
    checkout = ModuleType("megatron.core.datasets")
    checkout.__path__ = [str(tmp_path)]
    take_back = lend_compiled(checkout, None)
    lent = checkout.__path__[1:]
    assert [folder.endswith("megatron/core/datasets") for folder in lent] == [True] * (not has_its_own)
    take_back()
    assert checkout.__path__ == [str(tmp_path)]
