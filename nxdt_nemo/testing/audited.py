"""The audit of a tiny job, as a function of a rank on the xla lane.

Room testing/. Runs in the one process of a pool with TRACED_ENV, init=nxdt_nemo:activate and group=False, which lowers
any ranks of any world. Proof: tests/audit/test_audit.py.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nxdt_nemo.config.instances import instance

__all__ = ["TINY", "audited"]

TINY = [
    "model=llama3_8b",
    "target=trn2",
    "model.encoder_seq_length=64",
    "model.max_position_embeddings=64",
    "model.hidden_size=64",
    "model.ffn_hidden_size=96",
    "model.num_attention_heads=8",
    "model.num_query_groups=2",
    "model.num_layers=6",
    "model.micro_batch_size=1",
    "neuron.vocab_size=512",
    "model.make_vocab_size_divisible_by=8",
]
"""A Llama of configs/model, cut down."""


def audited(
    overrides: Sequence[str],
    world: int,
    *,
    on: Mapping[int, Sequence[str]] | None = None,
    **more: Any,
) -> dict[str, Any]:
    """What an audit for trn2.48xlarge finds, as JSON has it.

    overrides  of TINY
    on         overrides of ranks that were started otherwise
    more       further arguments of nxdt_nemo.audit.summary.audit
    """
    from nxdt_nemo.audit.summary import audit
    from nxdt_nemo.config.validate import read

    elsewhere = {rank: read(Path("train.yaml"), [*TINY, *overrides, *said]) for rank, said in (on or {}).items()}
    config = read(Path("train.yaml"), [*TINY, *overrides])
    chip = instance("trn2.48xlarge", place="--target")
    found = audit(config, world, target=chip, elsewhere=elsewhere, **more).as_json()
    return json.loads(json.dumps(found))  # type: ignore[no-any-return]
