"""Imports what a pretraining script imports, then the importers named, and tells what is loaded and bound, as JSON.

test_lazy.py runs it twice: through the backend, and in plain Python. Each name's description is the same in both.
"""

import gc
import importlib
import json
import sys
from types import ModuleType

import torch.multiprocessing as mp  # noqa: F401
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel  # noqa: F401
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder  # noqa: F401
from nemo.core.config import hydra_runner  # noqa: F401
from nemo.utils.exp_manager import exp_manager  # noqa: F401

loaded = [name for name, module in sys.modules.items() if module is not None]


def waiting(module):
    """The names that wait in it; none in plain Python."""
    return getattr(module.__builtins__, "waits", {})


def left_behind(modules):
    """Who else holds a stand-in though its module is complete: a container, a default, an annotation."""
    stand_ins = [one for one in gc.get_objects() if type(one).__name__ == "Waiting"]
    fair = {id(waiting(module)) for module in modules} | {id(stand_ins)}
    holders = gc.get_referrers(*stand_ins) if stand_ins else []
    return [f"{type(one).__name__} {one!s:.200}" for one in holders if id(one) not in fair]


def describe(value):
    """What a value is, and whether it is the one that its own module has under its name."""
    if isinstance(value, ModuleType):
        return f"module {value.__name__}"
    home, name = getattr(value, "__module__", None), getattr(value, "__qualname__", None)
    if not isinstance(home, str) or not isinstance(name, str):
        return type(value).__name__
    found = sys.modules.get(home)
    for part in name.split("."):
        found = getattr(found, part, None)
    return f"{type(value).__name__} {home}.{name} {found is value}"


asked = json.load(sys.stdin)  # names by importer; those that are not there go by dir()
importers = [importlib.import_module(name) for name in sys.argv[1:]]
gc.collect()
waits = {module.__name__: sorted(waiting(module)) for module in importers}
left = left_behind(importers)
names = {}
for module in importers:
    public = asked.get(module.__name__) or [name for name in dir(module) if not name.startswith("_")]
    names[module.__name__] = {name: describe(getattr(module, name)) for name in public if hasattr(module, name)}
print("RESULT " + json.dumps({"loaded": loaded, "waits": waits, "left": left, "names": names}))
