"""`nxdt-nemo ckpt`, as a user meets it, and what a conversion's process loads."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

import nxdt_nemo
from nxdt_nemo.cli import in_place
from nxdt_nemo.cli.main import main
from nxdt_nemo.errors import UserError

ROOT = Path(nxdt_nemo.__file__).parent.parent
Unpacked = Callable[[str], Path]


def run(*arguments: str | Path) -> int:
    """The exit code of `nxdt-nemo ckpt ...`, in this process."""
    with pytest.raises(SystemExit) as ended:
        main(["ckpt", *map(str, arguments)])
    code = ended.value.code
    return code if isinstance(code, int) else int(code is not None)


def test_inspect(unpacked: Unpacked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", unpacked("ll_torch_tp2pp2_do")) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].endswith("torch, llama, 840,256 parameters")
    assert "layout     TP 2, PP 2" in lines
    assert "progress   iteration 2, 8 samples" in lines
    assert "optimizer  exp_avg, exp_avg_sq, fp32_param, step 2.0" in lines
    assert any(line.startswith("note") and "differ in the last bits" in line for line in lines)


def test_inspect_as_json(unpacked: Unpacked, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("inspect", unpacked("ll_td_tp2pp2"), "--json") == 0
    found = json.loads(capsys.readouterr().out)
    assert (found["format"], found["family"], found["optimizer"]["step"]) == ("torch_dist", "llama", 2.0)
    assert len(found["tensors"]) == 156 and found["arguments"]["hidden_size"] == 64
    q = next(tensor for tensor in found["tensors"] if tensor["name"] == "layers.3.attention.q.weight")
    assert q["shape"] == [64, 64] and q["dtype"] == "BF16"
    assert set(q["where"]) <= set(found["files"]) and len(q["where"]) == 2


def test_convert_in_a_process_without_upstream(unpacked: Unpacked, tmp_path: Path) -> None:
    """tools/convert_checkpoint.py, with modules that must not be imported forbidden."""
    (tmp_path / "sitecustomize.py").write_text(
        "import sys\n"
        "for name in ('torch_xla', 'nemo', 'megatron', 'transformers', 'lightning', 'apex'):\n"
        "    sys.modules[name] = None\n"
    )
    options = "--to torch --tp 4 --pp 2 --vpp 2 --with-optimizer".split()
    done = subprocess.run(
        [sys.executable, ROOT / "tools/convert_checkpoint.py", unpacked("ll_td_tp2pp2"), tmp_path / "out", *options],
        env={**os.environ, "PYTHONPATH": f"{tmp_path}{os.pathsep}{ROOT}"},
        capture_output=True,
        text=True,
        timeout=300,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("torch_dist (llama) as torch: ")
    assert len(list((tmp_path / "out/iter_0000002").iterdir())) == 8


@pytest.mark.parametrize(
    "arguments, said",
    [
        (["--dtype", "int4"], "--dtype: 'int4' is not known; use bfloat16 or float16 or float32"),
        (["--stages", "a,b"], "--stages: 'a,b' is no list of numbers; write it as 5,6,6,5"),
        (["--spec", "apex"], "--spec: 'apex' is not known; use local or te or legacy"),
        (["--workers", "0"], "--workers: 0 is not positive"),
        (["--family", "bloom"], "--family: there is no family bloom; use one of t5, llama,"),
        (["--from", "onnx"], "--from: there is no format onnx; use one of hf,"),
        (["--vocab-size", "9999"], "a vocabulary of 9999"),
    ],
)
def test_wrong_options(
    arguments: list[str], said: str, unpacked: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("convert", unpacked("ll_td_tp2pp2"), tmp_path / "out", "--to", "hf", *arguments) == 2
    error = capsys.readouterr().err
    assert said in error and "Traceback" not in error and error.count("\n") == 1
    assert not (tmp_path / "out").exists()


def test_overwrite(unpacked: Unpacked, tmp_path: Path) -> None:
    command = ("convert", unpacked("hf_llama_tiny"), tmp_path / "out", "--to", "torch")
    assert run(*command) == 0
    assert run(*command) == 2
    assert run(*command, "--overwrite", "--tp", "2") == 0
    assert len(list((tmp_path / "out/release").iterdir())) == 2
    assert sorted(at.name for at in tmp_path.iterdir()) == ["out"]


@pytest.mark.slow
@pytest.mark.parametrize(
    "name, to",
    [("hf_llama_tiny", to) for to in ("torch_dist", "hf", "nemo", "nemo2", "nemo_dist")]
    + [("hf_mixtral_tiny", "torch")],
)
def test_verify(name: str, to: str, unpacked: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layout = ["--tp", "2", "--pp", "2"] if to != "hf" else []
    assert run("convert", unpacked(name), tmp_path / "out", "--to", to, *layout, "--verify") == 0
    out = capsys.readouterr().out
    assert "digests  ok" in out and "equal to the bit" in out and "logits   ok: transformers against" in out


@pytest.mark.slow
@pytest.mark.parametrize("to", ["torch_dist", "torch"])
@pytest.mark.parametrize("model", ["gpt2", "qwen2", "qwen2 tied", "qwen3", "mistral"])
def test_logits_of_other_families(
    model: str, to: str, hf_model: Callable[[str], Path], tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """transformers and stock megatron-core, in float32: TP 2, PP 2, and virtual stages in the format that has them."""
    layout = ["--tp", "2", "--pp", "2", *(["--vpp", "2"] if to == "torch" else [])]
    assert run("convert", hf_model(model), tmp_path / "out", "--to", to, *layout, "--verify") == 0
    said = "logits   ok: transformers against megatron-core: worst difference "
    _, _, rest = capsys.readouterr().out.partition(said)
    assert float(rest.split(",")[0]) <= 1e-5


PARTITIONS = """raise SystemExit("never executed")
parser.add_argument("--target_tensor_model_parallel_size", type=int)
os.environ[NEMO_MEGATRON_MODEL_PARALLEL_APPSTATE_OVERRIDE] = "true"
"""


def test_the_script_that_changes_partitions(
    unpacked: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """`nxdt-nemo run megatron_change_num_partitions.py` is the converter's work: the words are upstream's."""
    script, source = tmp_path / "megatron_change_num_partitions.py", tmp_path / "source.nemo"
    script.write_text(PARTITIONS)
    assert run("convert", unpacked("hf_llama_tiny"), source, "--to", "nemo") == 0

    def change(*words: str | Path) -> None:
        in_place.run(script, script.read_bytes(), ("--model_file", str(source), *map(str, words)))

    target = tmp_path / "new" / "target.nemo"
    sizes = ("--target_tensor_model_parallel_size=2", "--target_pipeline_model_parallel_size", "2")
    for precision, dtype in (("bf16", "BF16"), ("16", "F16"), ("32", "F32")):  # the second and third replace the first
        with pytest.raises(SystemExit, match="0"):
            change("--target_file", target, *sizes, "--precision", precision, "--num_gpu_per_node", "1")
        assert "is answered by: nxdt-nemo ckpt convert" in capsys.readouterr().err
        assert run("inspect", target, "--json") == 0
        found = json.loads(capsys.readouterr().out)
        assert ((found["layout"]["tp"], found["layout"]["pp"]), found["dtypes"]) == ((2, 2), [dtype])

    other = tmp_path / "other.model"
    other.write_text("another")
    for words, said in (
        (("--tokenizer_model_path", other), "is not the one in"),
        (("--megatron_legacy",), "--megatron_legacy: is not taken here"),
        (("--tp_conversion_only",), "drop --tp_conversion_only"),
    ):
        with pytest.raises(UserError, match=said):
            change("--target_file", tmp_path / "none.nemo", *sizes, *words)
    assert not (tmp_path / "none.nemo").exists()


def test_a_closed_pipe_is_no_fault_of_ours(unpacked: Unpacked) -> None:
    """`| head` that is gone: an exit code, and not a word."""
    reader, writer = os.pipe()
    os.close(reader)
    command = [sys.executable, "-m", "nxdt_nemo", "ckpt", "inspect", str(unpacked("hf_llama_tiny"))]
    done = subprocess.run(command, stdout=writer, stderr=subprocess.PIPE, text=True)
    os.close(writer)
    assert (done.returncode, done.stderr) == (1, "")


def test_verify_compares_what_was_written(
    unpacked: Unpacked, tmp_path: Path, capsys: pytest.CaptureFixture[str]
) -> None:
    """To float32 with its optimizer, a bfloat16 checkpoint's main parameters become the weights."""
    options = ("--dtype", "fp32", "--with-optimizer", "--verify")
    assert run("convert", unpacked("ll_torch_tp2pp2_do"), tmp_path / "out", "--to", "torch_dist", *options) == 0
    out = capsys.readouterr().out
    assert "tensors  ok" in out and "equal to the bit" in out and "WRONG" not in out
