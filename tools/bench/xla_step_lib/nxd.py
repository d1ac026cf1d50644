"""NxD Core's Llama on XLA:CPU: AWS's example model and its library from a checkout, as they are.

Their imports of Neuron's compiler and kernels, which are not on a machine without Neuron's packages and which nothing
of a float32 step with plain attention calls, are answered by modules of names that do nothing.
"""

from __future__ import annotations

import importlib.abc
import importlib.machinery
import logging
import sys
from pathlib import Path
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from nxdt_nemo.testing.recipe import Recipe

ABSENT = {
    "neuronxcc", "torch_neuronx", "nki", "nkilib", "libneuronxla", "tenacity", "boto3", "botocore", "awscrt",
}  # fmt: skip


class _Names(type):
    def __getattr__(cls, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        return _nothing(name)


def _nothing(name: str) -> Any:
    """A class that can be subclassed, called, subscripted and used as a decorator."""

    def new(cls: Any, *args: Any, **named: Any) -> Any:
        return args[0] if len(args) == 1 and callable(args[0]) and not named else object.__new__(cls)

    def attribute(self: Any, asked: str) -> Any:
        if asked.startswith("__"):
            raise AttributeError(asked)
        return _nothing(asked)()

    return _Names(
        name,
        (),
        {
            "__new__": new,
            "__init__": lambda self, *_, **__: None,
            "__call__": lambda self, *args, **_: args[0] if len(args) == 1 and callable(args[0]) else None,
            "__getattr__": attribute,
            "__getitem__": lambda self, _: [],
            "__class_getitem__": classmethod(lambda cls, _: cls),
        },
    )


class _Empty(ModuleType):
    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(name)
        if self.__name__ == "torch_neuronx.utils" and name == "get_platform_target":
            return lambda: "trn1"
        made = _nothing(name)
        setattr(self, name, made)
        return made


class _Finder(importlib.abc.MetaPathFinder, importlib.abc.Loader):
    def find_spec(self, name: str, path: Any = None, target: Any = None) -> Any:
        return importlib.machinery.ModuleSpec(name, self, is_package=True) if name.partition(".")[0] in ABSENT else None

    def create_module(self, spec: Any) -> ModuleType:
        made = _Empty(spec.name)
        made.__path__ = []
        return made

    def exec_module(self, module: ModuleType) -> None:
        """Nothing to run."""


def load(checkout: Path) -> Any:
    """The module with the example's model; its group of tensor-parallel ranks is this process."""
    import torch
    import torch_xla.distributed.xla_backend  # noqa: F401 - before libneuronxla can be found

    logging.disable(logging.INFO)
    sys.meta_path.insert(0, _Finder())
    torch.classes.neuron = _Empty("neuron")
    sys.path[:0] = [str(checkout / "src"), str(checkout / "examples" / "training" / "llama")]
    torch.distributed.init_process_group("xla", store=torch.distributed.HashStore(), rank=0, world_size=1)
    import modeling_llama_nxd
    from neuronx_distributed.parallel_layers import parallel_state

    parallel_state.initialize_model_parallel(tensor_model_parallel_size=1)
    return modeling_llama_nxd


def model(module: Any, recipe: Recipe, weights: dict[str, Any]) -> Any:
    """The recipe's Llama with these weights, on XLA:CPU."""
    import torch_xla

    from nxdt_nemo.testing.hugging_face import llama_config, llama_weights

    config = llama_config(recipe, head_dim=recipe.hidden // recipe.heads)
    plain = {
        "kv_shared_group_size": 1, "qkv_linear": False, "fuse_qkv": False, "separate_qkv": True,
        "use_flash_attention": 0,
        "sequence_parallel_enabled": False, "selective_checkpoint_enabled": False, "transpose_nki_inputs": False,
        "use_ring_attention": False, "pretraining_tp": 1,
    }  # fmt: skip
    for name, value in plain.items():
        setattr(config, name, value)
    made = module.LlamaForCausalLM(config)
    named = dict(llama_weights(weights, recipe))
    for index in range(recipe.layers):
        place = f"model.layers.{index}.mlp."
        named[f"{place}gate_up_proj.weight"] = weights[f"decoder.layers.{index}.mlp.linear_fc1.weight"]
        del named[f"{place}gate_proj.weight"], named[f"{place}up_proj.weight"]
    made.load_state_dict(named)
    return made.train().to(torch_xla.device())
