"""model.data.data_prefix in its three forms: missing, mistaken, and as NeMo wants it."""

from __future__ import annotations

from pathlib import Path

import pytest
from omegaconf import OmegaConf

from nxdt_nemo.config import check, sanitise

KEY = "model.data.data_prefix"
HOW = f"give the path of a .bin/.idx pair without its ending: {KEY}=[/data/corpus_text_document]"


@pytest.mark.parametrize("override", [f"{KEY}=???", f"{KEY}=null", f"{KEY}=[]", f"~{KEY}"])
def test_missing(errors, override):
    assert errors(override) == [f"tiny_gpt.yaml: {KEY} is not set; {HOW}, or model.data.data_impl=mock"]


def test_mock_data_needs_none(gpt):
    cfg = gpt("model.data.data_impl=mock", f"{KEY}=???")
    assert sanitise(cfg).errors == []
    assert cfg.model.data.data_prefix is None  # NeMo reads the key all the same


@pytest.mark.parametrize("form", ["[{}]", "[0.7,{},0.3,{}]", "[{0},{0}]", "[30,{},'70',{}]"])
def test_lists_are_right(errors, corpus, form):
    assert errors(f"{KEY}={form.format(corpus, corpus)}") == []


@pytest.mark.parametrize("text", ["{}", "0.5 {} 0.5 {}"])
def test_text_becomes_the_list_that_nemo_needs(gpt, corpus, text):
    written = text.format(corpus, corpus)
    cfg = gpt(f"{KEY}='{written}'")
    assert sanitise(cfg).errors == []
    assert OmegaConf.to_container(cfg.model.data.data_prefix) == written.split()


def test_splits(gpt, corpus):
    cfg = gpt(f"{KEY}={{train:[1.0,{corpus}],validation:{corpus},test:[{corpus}]}}")
    assert sanitise(cfg).errors == []
    assert OmegaConf.to_container(cfg.model.data.data_prefix) == {
        "train": [1.0, corpus],
        "validation": [corpus],
        "test": [corpus],
    }


def test_a_split_is_missing(errors, corpus):
    assert errors(f"{KEY}={{train:[{corpus}]}}") == [
        f"tiny_gpt.yaml: {KEY} has no validation and no test; name train, validation and test"
    ]


@pytest.mark.parametrize("blend", ["0.5,/a,/b", "/a,0.5", "0.5,0.5"])
def test_weights_and_paths_alternate(errors, blend):
    assert errors(f"{KEY}=[{blend}]") == [
        f"tiny_gpt.yaml: {KEY}=[{blend}] does not alternate weights and paths; write {KEY}=[0.7,/a,0.3,/b]"
    ]


def test_files_that_do_not_exist(errors, tmp_path):
    assert errors(f"{KEY}=[{tmp_path}/other]") == [f"tiny_gpt.yaml: {KEY}: {tmp_path}/other.bin does not exist; {HOW}"]


def test_half_a_pair(errors, tmp_path):
    (tmp_path / "half.bin").touch()
    assert errors(f"{KEY}=[{tmp_path}/half]") == [f"tiny_gpt.yaml: {KEY}: {tmp_path}/half.idx does not exist; {HOW}"]


@pytest.mark.parametrize(
    ("written", "fix"),
    [("corpus_text_document.bin", "leave the ending off: {}"), ("corpus", "did you mean {}?")],
)
def test_a_near_miss_is_told(errors, corpus, written, fix):
    (line,) = errors(f"{KEY}=[{Path(corpus).parent}/{written}]")
    assert line.endswith(f"; {fix.format(corpus)}")


def test_remote_data_and_other_formats_are_not_looked_at(errors):
    assert errors(f"{KEY}=['s3://bucket/corpus']") == []
    assert errors(f"{KEY}=[/nowhere]", "model.data.data_impl=text_mmap") == []


def test_finetuning_data_has_no_prefix(gpt, corpus):
    cfg = gpt("~model.data", "+model.data.train_ds.file_names=[a.jsonl]")
    assert check(cfg).errors == []


ROWS = "model.data.data_impl=arrow"
ALONE = "trainer.limit_val_batches=0.0"


def test_folders_of_rows(errors, tmp_path):
    assert errors(ROWS, ALONE, f"{KEY}={{train:[{tmp_path}]}}") == []
    assert errors(ROWS, f"{KEY}={{train:[{tmp_path}],validation:{tmp_path}}}") == []


FOLDERS = [  # what is given, what is said of it
    ("null", ".train is not set"),
    ("[1.0,/a]", ".train is not set"),
    ("{train:[/nowhere]}", ".train: /nowhere is no folder"),
    ("{train:[0.5,/a,0.5,/b]}", ".train=[0.5, '/a', 0.5, '/b'] is not one folder"),
]


@pytest.mark.parametrize("given, said", FOLDERS)
def test_what_is_no_folder_of_rows(errors, given, said):
    (line,) = errors(ROWS, ALONE, f"{KEY}={given}")
    assert line.startswith(f"tiny_gpt.yaml: {KEY}{said}; ")


@pytest.mark.parametrize("key", ["model.mcore_bert", "model.mcore_t5"])
def test_rows_are_of_gpt(errors, key, tmp_path):
    said = errors(ROWS, ALONE, f"++{key}=True", f"{KEY}={{train:[{tmp_path}]}}")
    assert f"tiny_gpt.yaml: model.data.data_impl=arrow is of GPT, and {key} is set; give a .bin/.idx corpus" in said


def test_rows_to_validate_with(errors, tmp_path):
    (line,) = errors(ROWS, "trainer.limit_val_batches=3", f"{KEY}={{train:[{tmp_path}]}}")
    assert f"{KEY}.validation is not set, and trainer.limit_val_batches=3; name a folder" in line
