"""What hydra will compose for a script, and what is said when it cannot."""

from __future__ import annotations

import shutil
import sys
from pathlib import Path

import pytest
from hydra.core.global_hydra import GlobalHydra
from hydra.core.plugins import Plugins
from hydra.core.singleton import Singleton
from omegaconf import OmegaConf

from nxdt_nemo.config import compose_for, precheck, world_size
from nxdt_nemo.config.compose import RESOLVERS, UNUSED_PLUGIN
from nxdt_nemo.errors import ConfigError

MOCK = "model.data.data_impl=mock"


def said(script, *argv):
    with pytest.raises(ConfigError) as caught:
        compose_for(script, list(argv))
    line = str(caught.value)
    assert "\n" not in line
    return line


def test_overrides_and_nemos_resolvers(script):
    cfg = compose_for(script, ["model.tensor_model_parallel_size=2", "model.pipeline_model_parallel_size=4"])
    assert cfg.exp_manager.checkpoint_callback_params.model_parallel_size == 8
    assert cfg.model.cpu_offloading_num_layers == 3
    assert cfg.model.data.seq_length == 64
    assert "hydra" not in cfg
    assert OmegaConf.is_struct(cfg)


def test_plain_interpolations_stay_interpolations(script):
    cfg = compose_for(script, [])
    cfg.model.encoder_seq_length = 128
    assert cfg.model.max_position_embeddings == 128


def test_config_groups(script):
    cfg = compose_for(script, ["overlap@model.ub_tp_comm_overlap_cfg=buffers"])
    assert cfg.model.ub_tp_comm_overlap_cfg == {"qkv_fprop": {"method": "ring"}}


@pytest.mark.parametrize("option", ["--config-name=other", "-cn=other", "--config-name=other.yaml"])
def test_config_name(script, tmp_path, option):
    conf = shutil.copytree(script.parent / "conf", tmp_path / "conf")
    (conf / "other.yaml").write_text("trainer: {devices: 3}\n")
    copy = shutil.copy(script, tmp_path)
    assert compose_for(Path(copy), [option]) == {"trainer": {"devices": 3}}


def test_config_path_is_relative_to_the_script(script, tmp_path, monkeypatch):
    (tmp_path / "here").mkdir()
    (tmp_path / "here" / "tiny_gpt.yaml").write_text("name: beside\n")
    copy = Path(shutil.copy(script, tmp_path))
    monkeypatch.chdir(tmp_path.parent)
    assert compose_for(copy, ["--config-path=here"]) == {"name": "beside"}
    assert compose_for(copy, ["-cp", str(tmp_path / "here")]) == {"name": "beside"}


def test_config_dir_adds_to_the_search_path(script, tmp_path, monkeypatch):
    (tmp_path / "overlap").mkdir()
    (tmp_path / "overlap" / "mine.yaml").write_text("a: 1\n")
    monkeypatch.chdir(tmp_path)
    for folder in (".", str(tmp_path)):
        cfg = compose_for(script, ["--config-dir", folder, "overlap@model.ub_tp_comm_overlap_cfg=mine"])
        assert cfg.model.ub_tp_comm_overlap_cfg == {"a": 1}


def test_a_linked_script_keeps_its_own_configs(script, tmp_path):
    (tmp_path / "script.py").symlink_to(script)
    assert "linked" not in said(tmp_path / "script.py", "--config-name=none")
    # hydra resolves the folder of the script, not the script itself
    (tmp_path / "folder").symlink_to(script.parent)
    assert compose_for(tmp_path / "folder" / "train.py", []).name == "tiny_gpt"


@pytest.mark.parametrize(
    "source",
    [
        "from nemo.core.config import hydra_runner as runner\n@runner('conf', 'tiny_gpt')\ndef main(cfg): ...",
        "import nemo\n@nemo.core.config.hydra_runner(config_path='conf', config_name='tiny_gpt')\ndef main(cfg): ...",
        "import hydra\n@hydra.main(config_path='conf', config_name='tiny_gpt', version_base=None)\ndef main(cfg): ...",
        "from hydra import main\n@main('conf', 'tiny_gpt', '1.3')\ndef run(cfg): ...",
    ],
)
def test_decorators(script, tmp_path, source):
    (tmp_path / "conf").symlink_to(script.parent / "conf")
    (tmp_path / "a.py").write_text(source)
    assert compose_for(tmp_path / "a.py", []).name == "tiny_gpt"


@pytest.mark.parametrize(
    "source",
    [
        "print(1)",
        "def broken(:",
        "@property\ndef main(cfg): ...",
        "from nemo.core.config import hydra_runner\n@hydra_runner(HERE, config_name='a')\ndef main(cfg): ...",
        "from nemo.core.config import hydra_runner\n@hydra_runner(config_name='a', schema=Schema)\ndef main(cfg): ...",
        "from nemo.core.config import hydra_runner\n@hydra_runner(config_path='.')\ndef main(cfg): ...",
    ],
)
def test_scripts_that_do_not_tell(tmp_path, source):
    (tmp_path / "a.py").write_text(source)
    assert compose_for(tmp_path / "a.py", []) is None
    assert precheck(tmp_path / "a.py", [], {}) is None


def test_no_script(tmp_path):
    assert compose_for(None, []) is None
    assert compose_for(tmp_path / "none.py", []) is None


@pytest.mark.parametrize(
    "argv",
    [
        ["--help"],
        ["-h"],
        ["--hydra-help"],
        ["--info"],
        ["--cfg", "job"],
        ["-c", "job"],
        ["--multirun"],
        ["-m"],
        ["--shell-completion"],
        ["--version"],
        ["--no-such-option"],
    ],
)
def test_options_that_do_not_run_the_script_once(script, argv, capsys):
    assert compose_for(script, argv) is None
    assert capsys.readouterr() == ("", "")


@pytest.mark.parametrize(
    ("argv", "line"),
    [
        (
            ["model.seq_len_interpolation_facter=2"],
            "tiny_gpt.yaml: unknown key model.seq_len_interpolation_facter; did you mean seq_len_interpolation_factor?",
        ),
        (["model.num_layer=2"], "tiny_gpt.yaml: unknown key model.num_layer; did you mean model.num_layers?"),
        (["modle.num_layers=2"], "tiny_gpt.yaml: unknown key modle.num_layers; did you mean model.num_layers?"),
        (
            ["model.qqq=2"],
            "tiny_gpt.yaml: unknown key model.qqq; nothing reads it; add a key of your own with +model.qqq=...",
        ),
        (["model.fsdp=True"], "tiny_gpt.yaml: model.fsdp is not in this file; add it with +model.fsdp=..."),
        (["neuron.runtime=cpu"], "tiny_gpt.yaml: neuron.runtime is not in this file; add it with +neuron.runtime=..."),
        (["model.num_layers"], "tiny_gpt.yaml: cannot read the override model.num_layers; write key=value"),
        (["model.num_layers=[1"], "tiny_gpt.yaml: cannot read the override model.num_layers=[1; write key=value"),
        (["~model.optm"], "tiny_gpt.yaml: Could not delete from config. 'model.optm' does not exist."),
    ],
)
def test_a_wrong_override_is_one_line(script, argv, line):
    assert said(script, *argv) == line


def test_a_missing_config_names_the_near_one(script):
    conf = script.parent / "conf"
    assert said(script, "--config-name=tiny_gtp") == (
        f"tiny_gtp.yaml: there is no such file in {conf}; did you mean --config-name=tiny_gpt?"
    )


def test_a_missing_option_of_a_group(script):
    line = said(script, "overlap@model.ub_tp_comm_overlap_cfg=none", "+overlap@x=nope")
    assert line.startswith("tiny_gpt.yaml: ")
    assert "overlap=nope is not there; use" in line
    assert "search path" not in line


def test_a_missing_folder(script):
    home = script.parent
    assert said(script, "--config-path=cnf") == (
        f"train.py: --config-path=cnf: there is no folder {home}/cnf; it is relative to the script"
    )


def test_a_folder_relative_to_the_working_directory(script, tmp_path, monkeypatch):
    (tmp_path / "mine").mkdir()
    monkeypatch.chdir(tmp_path)
    assert said(script, "--config-path=mine").endswith(f"; --config-path={tmp_path}/mine is there")


def test_a_file_as_folder(script):
    assert said(script, "--config-path=conf/tiny_gpt.yaml") == (
        "train.py: --config-path=conf/tiny_gpt.yaml is a file, not a folder; "
        "use --config-path=conf --config-name=tiny_gpt.yaml"
    )


def test_a_missing_config_dir(script, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    assert said(script, "--config-dir=none") == f"--config-dir=none: there is no folder {tmp_path}/none"


def test_broken_yaml(script):
    assert said(script, "--config-name=broken").startswith("broken.yaml: not readable as YAML: ")


def test_nothing_is_left_behind(script):
    def state():
        resolvers = {name for name in RESOLVERS if OmegaConf.has_resolver(name)}
        kept = {kind: Singleton._instances.get(kind) for kind in (GlobalHydra, Plugins)}
        return resolvers, kept, sys.modules.get(UNUSED_PLUGIN, "not imported")

    def upstream():  # other tests of this process may have loaded some
        return {name for name in sys.modules if name == "nemo" or name.startswith("nemo.")}

    loaded = upstream()
    GlobalHydra.instance().clear()
    Singleton._instances.pop(GlobalHydra)
    before = state()
    assert (before[0], before[1][GlobalHydra]) == (set(), None)
    compose_for(script, [])
    assert state() == before
    said(script, "model.no_such_key=1")
    assert state() == before
    assert upstream() == loaded


def test_resolvers_of_others_stay(script):
    OmegaConf.register_new_resolver("multiply", lambda x, y: 77)
    try:
        cfg = compose_for(script, [])
        assert cfg.exp_manager.checkpoint_callback_params.model_parallel_size == 77
        assert OmegaConf.has_resolver("multiply")
    finally:
        OmegaConf.clear_resolver("multiply")


def test_precheck_names_the_file_and_finds_without_changing(script):
    report = precheck(script, ["model.tensor_model_parallel_size=3", "trainer.devices=3", MOCK], {})
    assert [str(error) for error in report.errors] == [
        "tiny_gpt.yaml: model.tensor_model_parallel_size=3 does not divide model.num_attention_heads=8; "
        "use 1, 2, 4 or 8",
    ]
    assert report.changes


def test_precheck_knows_the_keys_that_the_script_reads(script):
    report = precheck(script, ["+my_own_key=1", "+my_other_key=1", MOCK], {})
    assert [key.path for key in report.unknown] == ["my_other_key"]


def test_precheck_uses_the_launchers_ranks(script):
    torchrun = {"TORCHELASTIC_RUN_ID": "x", "WORLD_SIZE": "2", "LOCAL_WORLD_SIZE": "2", "LOCAL_RANK": "0"}
    assert precheck(script, ["trainer.devices=2", MOCK], torchrun).errors == []
    assert [str(error) for error in precheck(script, [MOCK], torchrun).errors] == [
        "tiny_gpt.yaml: trainer.devices x trainer.num_nodes = 1, but torchrun started 2 ranks; use trainer.devices=2"
    ]
    assert precheck(script, [MOCK, "trainer.accelerator=cpu"], torchrun).errors == []


def test_precheck_finds_a_wrong_section_of_ours(script):
    with pytest.raises(ConfigError, match=r"tiny_gpt.yaml: neuron.runtime=gpu is not a lane"):
        precheck(script, ["+neuron.runtime=gpu"], {})
    assert precheck(script, ["+neuron.runtime=cpu", MOCK], {}).neuron.runtime == "cpu"


@pytest.mark.parametrize(
    ("trainer", "environ", "ranks"),
    [
        ({"devices": 2}, {}, 2),
        ({"devices": 2, "num_nodes": 4}, {}, 8),
        ({"devices": "2"}, {}, 2),
        ({"devices": [0, 1, 2]}, {}, 3),
        ({"devices": "auto"}, {}, None),
        ({"devices": -1}, {}, None),
        ({}, {}, None),
        ({"devices": 2}, {"WORLD_SIZE": "8", "LOCAL_RANK": "0"}, 8),
        ({"devices": 2}, {"WORLD_SIZE": "8"}, 2),  # some schedulers count nodes there
        ({"devices": "auto"}, {"WORLD_SIZE": "8"}, 8),
        ({"devices": -1}, {"SLURM_NTASKS": "64"}, 64),
        ({"devices": 2}, {"SLURM_NTASKS": "64"}, 2),
    ],
)
def test_world_size(trainer, environ, ranks):
    assert world_size(OmegaConf.create({"trainer": trainer}), environ) == ranks
