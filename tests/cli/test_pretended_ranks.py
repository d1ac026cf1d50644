"""NeMo's scripts that stand for one rank after another are refused by name, with what to do instead."""

from __future__ import annotations

import pytest

from nxdt_nemo.cli.run import _check_script
from nxdt_nemo.errors import UserError


def test_a_script_that_pretends_to_be_several_ranks(tmp_path):
    script = tmp_path / "megatron_change_num_partitions.py"
    script.write_text('import os\nos.environ["NEMO_MEGATRON_MODEL_PARALLEL_APPSTATE_OVERRIDE"] = "true"\n')
    with pytest.raises(UserError, match=r"nxdt-nemo ckpt convert MODEL .* --to nemo --tp N --pp M") as found:
        _check_script(script)
    assert found.value.place == str(script)
    script.write_text("import os\n")
    _check_script(script)
