"""NeMo's scripts that cannot run here are refused by name, with what to do instead, before anything is imported."""

from __future__ import annotations

import pytest

from nxdt_nemo.cli.run import _check_script
from nxdt_nemo.cli.unsupported import REFUSALS, refused
from nxdt_nemo.errors import UserError

LINES = (  # in the order of REFUSALS: what stands in such a script
    "from nemo.collections.nlp.models.language_modeling.megatron_mamba_sft_model import MegatronMambaSFTModel",
    'os.environ["NEMO_MEGATRON_MODEL_PARALLEL_APPSTATE_OVERRIDE"] = "true"',
    "from nemo.collections.nlp.models.language_modeling.megatron_griffin_sft_model import MegatronGriffinSFTModel",
    "from nemo.collections.nlp.models.language_modeling.megatron_retro_model import MegatronRetroModel",
    "    model = MegatronRetrievalModel(cfg.model, trainer)",
    "from nemo.collections.nlp.models.language_modeling import BERTLMModel",
    "    NLPPrecisionPlugin,",
    "from megatron.core.inference.inference_model_wrappers.gpt.gpt_inference_wrapper import GPTInferenceWrapper",
    "import modelopt.torch.distill as mtd",
    "from nemo.export.quantize import Quantizer",
    "            onnx_opset_version=cfg.export_options.onnx_opset,",
)


@pytest.mark.parametrize("refusal, line", zip(REFUSALS, LINES, strict=True))
def test_each_is_refused_by_its_own_reason(refusal, line, tmp_path):
    script = tmp_path / "script.py"
    script.write_text(f"import os\n{line}\n")
    with pytest.raises(UserError) as found:
        _check_script(script)
    assert (found.value.place, found.value.reason, found.value.fix) == (str(script), refusal.reason, refusal.fix)
    assert refusal.fix


def test_a_model_that_a_script_could_load_as_one_of_many_is_no_reason():
    assert refused(b"        model = MegatronRetrievalModel.load_from_checkpoint(path)\n") is None
    assert refused(b"import modelopt.torch.opt as mto\n") is None
