"""NeMo's own YAMLs, where NXDT_NEMO_CHECKOUT names a checkout of tag v2.4.0: no false alarm."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import compose_for, precheck, sanitise

VARIABLE = "NXDT_NEMO_CHECKOUT"
EXAMPLES = Path(os.environ.get(VARIABLE, "/nonexistent")) / "examples" / "nlp" / "language_modeling"
STOCK = sorted([*EXAMPLES.glob("conf/*.yaml"), *EXAMPLES.glob("tuning/conf/*.yaml")])
# Parts that other YAMLs include under a section; alone they are no config of a run.
FRAGMENTS = {"megatron_hiddens_base_config", "megatron_model_base_config"}
PRETRAINING = EXAMPLES / "megatron_gpt_pretraining.py"

pytestmark = [
    pytest.mark.upstream,
    pytest.mark.skipif(not STOCK, reason=f"{VARIABLE} names no NeMo checkout with examples/nlp/language_modeling"),
]


def script_of(yaml: Path) -> Path:
    """A script whose config folder is that of the YAML."""
    return PRETRAINING if yaml.parent.parent == EXAMPLES else EXAMPLES / "tuning" / "megatron_gpt_finetuning.py"


def test_all_are_there():
    assert len(STOCK) == 58


@pytest.mark.parametrize("yaml", STOCK, ids=lambda path: path.stem)
def test_a_stock_config_composes_and_has_no_unknown_key(yaml, tmp_path):
    # The names that the script itself uses must not be what makes a key known here.
    script = tmp_path / "script.py"
    script.write_text(
        "from nemo.core.config import hydra_runner\n"
        f"@hydra_runner(config_path={str(yaml.parent)!r}, config_name={yaml.stem!r})\ndef main(cfg): ...\n"
    )
    report = precheck(script, [], {})
    if yaml.stem not in FRAGMENTS:
        assert [str(key) for key in report.unknown] == []
    assert all("\n" not in str(error) for error in report.errors)


@pytest.mark.parametrize("yaml", STOCK, ids=lambda path: path.stem)
def test_a_stock_config_composes_from_its_folder(yaml):
    assert compose_for(script_of(yaml), [f"--config-name={yaml.stem}"]) is not None


SENSIBLE = [
    "trainer.devices=2",
    "trainer.precision=bf16",
    "model.tensor_model_parallel_size=2",
    "trainer.accelerator=neuron",
]


@pytest.mark.parametrize("name", ["megatron_gpt_config", "megatron_llama_config"])
@pytest.mark.parametrize("more", [[], ["model.sequence_parallel=True"], ["trainer.precision=32"]], ids=" ".join)
def test_gpt_and_llama_run_with_overrides_only(name, more, corpus):
    data = f"{'' if name == 'megatron_gpt_config' else '+'}model.data.data_prefix=[1.0,{corpus}]"
    argv = [f"--config-name={name}", *SENSIBLE, data, *more]
    report = precheck(PRETRAINING, argv, {})
    assert [str(error) for error in report.errors] == []
    assert report.unknown == []
    assert report.warnings == []
    assert report.ignored == []
    cfg = compose_for(PRETRAINING, argv)
    changed = {change.key for change in sanitise(cfg, world_size=2).changes}
    assert "model.grad_div_ar_fusion" in changed
    assert not cfg.model.get("transformer_engine")
    assert sanitise(cfg, world_size=2).changes == []
    assert OmegaConf.is_struct(cfg)
