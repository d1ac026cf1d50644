"""NxD's converter and loader, unchanged, on what a test laid out: `nxd.py WORK`, run by stubs.py.

WORK has full.pt and config.json of a Llama, and ours/. Writes theirs/NAME from full.pt, read/NAME from ours/NAME.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from neuronx_distributed.scripts.checkpoint_converter import CheckpointConverterBase
from neuronx_distributed.trainer import checkpoint
from neuronx_distributed.trainer.checkpoint_storage import create_checkpoint_storage

work = Path(sys.argv[1])
converter = CheckpointConverterBase()


def run(name: str, tp: int, pp: int, copies: int, hardware: str, source: Path, target: Path, *more: str) -> None:
    given = {
        "--input_dir": source,
        "--output_dir": target / name,
        "--config": work / "config.json",
        "--n_layers": 4,
        "--tp_size": tp,
        "--pp_size": pp,
        "--kv_size_multiplier": copies,
        "--qkv_linear": True,
        "--hw_backend": hardware,
    }
    words = [str(word) for pair in given.items() for word in pair]
    converter.run(converter.get_arg_parser().parse_args([*words, *more]))


full, theirs, ours = work / "full.pt", work / "theirs", work / "ours"
for name, tp, pp, copies, hardware, more in (
    ("trn1", 8, 2, 2, "trn1", ()),
    ("trn2", 8, 2, 2, "trn2", ()),
    ("fused", 4, 1, 1, "trn1", ("--fuse_qkv", "True")),
    ("xser", 4, 1, 1, "trn1", ("--save_xser", "True")),
):
    run(name, tp, pp, copies, hardware, full, theirs, "--convert_from_full_state", *more)
run("trn1", 8, 2, 2, "trn1", ours / "trn1/model", work / "read", "--convert_to_full_state")
run("xser", 4, 2, 1, "trn1", ours / "xser/model", work / "read", "--convert_to_full_state", "--load_xser", "True")

storage = create_checkpoint_storage(str(ours))
assert storage.list_completed_checkpoint_tags() == ["trn1", "xser"], storage.list_completed_checkpoint_tags()
assert storage.is_checkpoint_xser("xser") and not storage.is_checkpoint_xser("trn1")
state = checkpoint._xser_load_data(storage, "xser/model/dp_rank_00_tp_rank_01_pp_rank_01.pt", None)
torch.save(state, work / "read/rank.pt")
