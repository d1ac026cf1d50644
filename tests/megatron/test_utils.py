"""Helpers of megatron-core that expect another installation: TransformerEngine's version, a compiler for data sets."""

from __future__ import annotations

import sys
from unittest.mock import patch

from nxdt_nemo.megatron.datasets.utils import compile_helpers


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
