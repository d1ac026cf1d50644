"""NeMo's convert_llama_hf_to_nemo.py on a CPU: `python -m nxdt_nemo run convert_peer.py SCRIPT --arguments of its own`.

The script is run as it is. It writes TransformerEngine's names of the norms, and without TransformerEngine the model
has others: they are renamed where it hands its tensors over.
"""

from __future__ import annotations

import runpy
import sys
from typing import Any

from nemo.collections.nlp.parts import utils_funcs

NAMES = {
    "self_attention.linear_qkv.layer_norm_weight": "input_layernorm.weight",
    "mlp.linear_fc1.layer_norm_weight": "pre_mlp_layernorm.weight",
}
stock = utils_funcs.load_state_dict_helper


def load(cls: Any, config: Any, trainer: Any, state: dict[str, Any]) -> Any:
    """As upstream, with the local layers' names."""
    renamed = {}
    for key, tensor in state.items():
        for theirs, local in NAMES.items():
            key = key.replace(theirs, local)
        renamed[key] = tensor
    return stock(cls, config, trainer, renamed)


utils_funcs.load_state_dict_helper = load
sys.argv = sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")
