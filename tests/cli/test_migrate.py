"""`nxdt-nemo migrate` and `nxdt-nemo run --config` as a person types them."""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from nxdt_nemo.cli import main as command
from nxdt_nemo.cli.migrate import job_arguments

NXDT = Path(__file__).parents[1] / "config" / "migrate" / "data" / "small_nxdt.yaml"


@pytest.fixture
def type_(capsys):
    """type_("migrate", ...): (exit code, stdout, stderr)."""

    def run(*words):
        code = 0
        try:
            command.main([str(word) for word in words])
        except SystemExit as left:
            code = left.code or 0
        except IndexError:  # nothing to start: main() starts what a `run` has left
            pass
        out = capsys.readouterr()
        return code, out.out, out.err

    return run


def test_the_yaml_goes_to_stdout_and_the_report_to_stderr(type_):
    code, out, err = type_("migrate", NXDT)
    assert code == 0
    assert out.startswith("# A small configuration")
    assert "mcore_gpt: True" in out
    assert "moved" in err and "-> model.seed" in err
    assert err.splitlines()[-1].startswith("small_nxdt.yaml: nxdt -> nemo 2.4: ")


def test_a_file_is_written_and_not_written_over(type_, tmp_path):
    file = tmp_path / "out.yaml"
    assert type_("migrate", NXDT, "-o", file, "--target", "cpu", "--nodes", "1")[0] == 0
    assert "runtime: cpu" in file.read_text()
    assert type_("migrate", NXDT, "-o", file, "--target", "cpu", "--nodes", "1")[0] == 0  # the same again
    code, _, err = type_("migrate", NXDT, "-o", file)
    assert (code, err) == (2, f"nxdt-nemo: -o {file}: is there already; use --force to write over it\n")
    assert type_("migrate", NXDT, "-o", file, "--force")[0] == 0
    assert "runtime" not in file.read_text()


def test_a_file_that_is_no_text_is_not_written_over(type_, tmp_path):
    file = tmp_path / "out.yaml"
    file.write_bytes(b"\xff")
    code, _, err = type_("migrate", NXDT, "-o", file)
    assert (code, err) == (2, f"nxdt-nemo: -o {file}: is there already; use --force to write over it\n")


def test_check_says_whether_there_is_something_to_do(type_, tmp_path):
    assert type_("migrate", NXDT, "--check")[0] == 1
    file = tmp_path / "out.yaml"
    type_("migrate", NXDT, "-o", file)
    code, out, _ = type_("migrate", file, "--check")
    assert code == 0
    assert out.splitlines()[-1].endswith(" kept")


def test_reports_for_programs_and_pull_requests(type_):
    _, out, _ = type_("migrate", NXDT, "--json")
    assert json.loads(out)["from"] == "nxdt"
    _, out, _ = type_("migrate", NXDT, "--markdown")
    assert "| moved | `seed` → `model.seed` | `1234` |" in out


def test_a_launch_script(type_, tmp_path):
    script = tmp_path / "train.sh"
    script.write_text("#!/bin/bash\nmystery\ntorchrun --nproc-per-node=2 train.py model.seed=1\n")
    code, out, err = type_("migrate", script)
    assert code == 0
    assert "torchrun --nproc-per-node=2 -m nxdt_nemo run train.py" in out
    assert "unknown     mystery" in err


@pytest.mark.parametrize(
    "words, line",
    [
        (["migrate", "none.yaml"], "none.yaml: there is no such file"),
        (["migrate", "."], ".: is a folder; name a YAML file or a launch script"),
        (["migrate", NXDT, "--from", "gpu"], "--from gpu: is no dialect; use auto, nemo, nnm or nxdt"),
        (["migrate", NXDT, "--target", "p5"], "--target p5: is no target; use trn1.32xlarge, trn2.48xlarge or cpu"),
        (["migrate", NXDT, "--train-setup", "no.sh"], "--train-setup no.sh: cannot be read"),
        (["migrate", NXDT, "-o", "/none/x.yaml"], "-o /none/x.yaml: cannot be written"),
        (["run"], "nxdt-nemo run: nothing to run; name a script, or --config FILE"),
        (["run", "--config", NXDT, "fast"], "fast: is no override; write key=value"),
        (["run", "--config", "none.yaml"], "none.yaml: there is no such file"),
        (["run", "-m", "--config", NXDT], "-m: there is no SCRIPT with --config"),
    ],
)
def test_mistakes_are_one_line(type_, words, line):
    code, _, err = type_(*words)
    assert code == 2
    assert err.startswith(f"nxdt-nemo: {line}")
    assert err.count("\n") == 1


def test_what_run_config_starts(capsys):
    words = ["trainer.devices=1", "data.micro_batch_size=1", "+trainer.max_time=null", "hydra.run.dir=/x"]
    script, arguments = job_arguments(NXDT, words, "auto", None, None)
    assert script.endswith("nxdt_nemo/nemo/examples/megatron_pretraining.py")
    folder, name, *rest = arguments
    written = Path(folder.removeprefix("--config-path=")) / NXDT.name
    assert name == "--config-name=small_nxdt"
    assert "micro_batch_size: 1" in written.read_text()
    assert "devices: 1" in written.read_text()
    assert rest == ["++trainer.max_time=null", "hydra.run.dir=/x"]
    assert "small_nxdt.yaml: nxdt -> nemo 2.4" in capsys.readouterr().err


TUNING = ("model_alignment_strategy.sft.packing=False", "model_alignment_strategy.peft.lora_rank=8")


@pytest.mark.parametrize("config, words", [(NXDT, TUNING[:1]), (NXDT, TUNING), (Path("train"), ("workflow=lora",))])
def test_run_config_starts_tuning_where_there_is_a_train_ds(config, words):
    data = ("data.train_dir=/x/train.jsonl", "data.val_dir=/x/held.jsonl") if config == NXDT else ()
    script, _ = job_arguments(config, [*words, *data], "auto", None, None)
    assert script.endswith("nxdt_nemo/nemo/examples/megatron_finetuning.py")


@pytest.mark.parametrize("config", [NXDT, Path("train")])
def test_run_config_starts_preference_training(config):
    theirs = ("model_alignment_strategy.dpo.kl_beta=0.1", "data.train_dir=/x/train.jsonl", "data.val_dir=null")
    script, _ = job_arguments(config, theirs if config == NXDT else ("workflow=orpo",), "auto", None, None)
    assert script.endswith("nxdt_nemo/nemo/examples/megatron_alignment.py")


def test_run_config_takes_our_compositions(caplog):
    from nxdt_nemo.config.compose import compose_for

    words = ["model=bert", "target=cpu", "model.num_layers=3"]
    script, arguments = job_arguments(Path("train"), words, "auto", None, None)
    cfg = compose_for(Path(script), list(arguments))
    assert (cfg.model.mcore_bert, cfg.model.num_layers, cfg.trainer.devices) == (True, 3, 2)
    assert caplog.records == []  # a plugin of hydra's logs a traceback when it looks for files


def test_hydra_finds_what_the_file_includes(tmp_path):
    from nxdt_nemo.config.compose import compose_for

    (tmp_path / "base.yaml").write_text("num_layers: 7\n")
    main = tmp_path / "main.yaml"
    main.write_text("defaults:\n  - .@model: base\n\nmodel:\n  wrap_with_zero: False\n  optim:\n    name: adamw\n")
    script, arguments = job_arguments(main, ["+model.seed=3"], "auto", None, None)
    cfg = compose_for(Path(script), list(arguments))
    assert (cfg.model.num_layers, cfg.model.seed, cfg.model.optim.name) == (7, 3, "adamw")
    assert "wrap_with_zero" not in cfg.model


@pytest.mark.parametrize("name", ["main.yml", "main"])
def test_run_config_reads_the_file_that_is_named(tmp_path, name):
    from nxdt_nemo.config.compose import compose_for
    from nxdt_nemo.config.validate import read

    (tmp_path / "main.yaml").write_text("model:\n  num_layers: 1\n")
    (tmp_path / "base.yaml").write_text("hidden_size: 64\n")
    main = tmp_path / name
    main.write_text("defaults:\n  - .@model: base\n\nmodel:\n  num_layers: 7\n  seed: 0\n")
    script, arguments = job_arguments(main, ["model.seed=3"], "auto", None, None)
    for cfg in (compose_for(Path(script), list(arguments)), read(main, ["model.seed=3"])):
        assert (cfg.model.num_layers, cfg.model.hidden_size, cfg.model.seed) == (7, 64, 3)


def test_the_word_defaults_in_a_comment_is_nothing_to_compose(tmp_path):
    main = tmp_path / "main.yaml"
    main.write_text(f"# the defaults of ours\n{NXDT.read_text()}")
    words = [*TUNING[:1], "data.train_dir=/x/train.jsonl", "data.val_dir=/x/held.jsonl"]
    script, arguments = job_arguments(main, words, "auto", None, None)
    assert script.endswith("megatron_finetuning.py")
    assert not any(word.startswith("--config-dir") for word in arguments)


def test_an_error_ends_the_run_before_it_starts(type_, tmp_path):
    file = tmp_path / "x.yaml"
    file.write_text("distributed_strategy:\n  zero1: True\nprecision:\n  type: fast\n")
    code, _, err = type_("run", "--config", file)
    assert code == 2
    assert "x.yaml: precision.type=fast: is no precision of NxD Training" in err
