"""The compiled helpers of NeMo's own data sets, which its wheel does not bring."""

from __future__ import annotations

import pytest

PROBE = """
import nxdt_nemo
nxdt_nemo.activate("cpu")
from nemo.collections.nlp.data.language_modeling.megatron import dataset_utils, helpers
from megatron.core.datasets import helpers_cpp
dataset_utils.compile_helper()
assert helpers is helpers_cpp
print("the same")
"""


@pytest.mark.slow
def test_bert_and_t5_find_them(tmp_path):
    import os
    import subprocess
    import sys

    env = os.environ | {"NXDT_NEMO": "", "NXDT_NEMO_RUNTIME": "cpu"}
    done = subprocess.run(
        [sys.executable, "-c", PROBE], cwd=tmp_path, env=env, capture_output=True, text=True, timeout=500
    )
    assert "the same" in done.stdout, done.stderr[-2000:]
