"""NeMo's scripts that only rewrite a checkpoint: `nxdt-nemo run` answers their command line with the converter.

Room cli/. Imports no torch. megatron_change_num_partitions.py stands for one rank after another in a single process,
which process groups that are real cannot; what it makes is `nxdt-nemo ckpt convert`'s work, without the models.
Proof: tests/checkpoint/test_cli.py.
"""

from __future__ import annotations

import argparse
import shlex
from collections.abc import Sequence
from pathlib import Path

from nxdt_nemo import console
from nxdt_nemo.cli.unsupported import PRETENDED_RANKS, refused
from nxdt_nemo.errors import UserError

__all__ = ["run"]

_OPTION = b"--target_tensor_model_parallel_size"
_DTYPES = {"16": "fp16", "16-mixed": "fp16", "bf16": "bf16", "bf16-mixed": "bf16"}  # all others are float32 upstream
# What upstream reads for models of old kinds, or for virtual stages, which it refuses itself.
_NOT_TAKEN = ("megatron_legacy", "virtual_pipeline_model_parallel_size", "tokenizer_vocab_file")


def run(script: Path, text: bytes, arguments: Sequence[str]) -> None:
    """Do what megatron_change_num_partitions.py would; for any other script, nothing.

    text  the script's
    Ends with SystemExit when it is done, or with UserError.
    """
    if _OPTION not in text or refused(text) is not PRETENDED_RANKS:
        return
    words = _words(script.name, arguments)
    if console.is_rank_zero():
        from nxdt_nemo.cli import ckpt

        console.notice(f"{script.name} is answered by: nxdt-nemo {shlex.join(['ckpt', *words])}")
        Path(words[2]).absolute().parent.mkdir(parents=True, exist_ok=True)
        ckpt.main(words)
    raise SystemExit(0)


def _words(name: str, arguments: Sequence[str]) -> list[str]:
    """The same as a command of `nxdt-nemo ckpt`: convert SOURCE TARGET ..."""
    given = _parser(name).parse_args(arguments)
    for option in _NOT_TAKEN:
        if getattr(given, option):
            raise UserError("is not taken here", place=f"{name} --{option}", fix="leave it out")
    source = given.model_file or given.model_extracted_dir
    if source is None:
        raise UserError("is missing", place=f"{name} --model_file", fix="name the .nemo to read")
    tp, pp = given.target_tensor_model_parallel_size, given.target_pipeline_model_parallel_size
    if given.tp_conversion_only and pp > 1:
        raise UserError(
            f"{pp} stages", place=f"{name} --target_pipeline_model_parallel_size", fix="drop --tp_conversion_only"
        )
    if given.tokenizer_model_path is not None:
        _same_tokenizer(source, given.tokenizer_model_path, f"{name} --tokenizer_model_path")
    words = ["convert", str(source), str(given.target_file), "--to", "nemo", "--tp", str(tp), "--pp", str(pp)]
    words += ["--dtype", _DTYPES.get(given.precision, "fp32")]
    return [*words, "--overwrite"] if given.target_file.is_file() else words


def _parser(name: str) -> argparse.ArgumentParser:
    """Upstream's options."""
    parser = argparse.ArgumentParser(prog=name)
    add = parser.add_argument
    add("--model_file", type=Path)
    add("--target_file", type=Path, required=True)
    add("--target_tensor_model_parallel_size", type=int, required=True)
    add("--target_pipeline_model_parallel_size", type=int, required=True)
    add("--precision", default="16", help="of the weights that are written; 16 by default, as upstream")
    add("--tp_conversion_only", action="store_true")
    add("--model_extracted_dir", type=Path)
    add("--tokenizer_model_path", type=Path)
    for option in _NOT_TAKEN:
        add(f"--{option}", action="store_true") if option == "megatron_legacy" else add(f"--{option}")
    said = "read from the checkpoint itself"
    for option in ("tensor_model_parallel_size", "pipeline_model_parallel_size", "model_class", "hparams_file"):
        add(f"--{option}", help=said)
    for option in ("target_pipeline_model_parallel_split_rank", "ckpt_name", "num_gpu_per_node"):
        add(f"--{option}", help="without effect here")
    return parser


def _same_tokenizer(source: Path, tokenizer: Path, place: str) -> None:
    """Raises UserError for a tokenizer that is not the one in a .nemo: the converter keeps that."""
    if not tokenizer.is_file():
        raise UserError("no such file", place=f"{place} {tokenizer}")
    from nxdt_nemo.checkpoint.io.tar import Tree

    wanted = tokenizer.read_bytes()
    found = any(member.size == len(wanted) and member.bytes() == wanted for member in Tree.of(source).members.values())
    if not found:
        raise UserError(f"{tokenizer} is not the one in {source}, which is kept", place=place, fix="leave it out")
