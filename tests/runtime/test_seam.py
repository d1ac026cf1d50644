"""Only runtime/ knows a device: a lint over the package's syntax trees, with its own controls.

Comments and docstrings may name anything. Code may not use torch.cuda, xm, torch_xla, torch_neuronx or a
backend's name, nor ask which lane it is on.
"""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator
from pathlib import Path

import pytest

PACKAGE = Path(__file__).parents[2] / "nxdt_nemo"
FORBIDDEN_NAME = re.compile(r"(torch\.cuda|torch_xla|torch_neuronx|xm)(\.\w+)*")
# A string that is a dotted name or a backend's name, not a sentence: strings escape other linters.
FORBIDDEN_STRING = re.compile(r"(torch\.cuda|torch_xla|torch_neuronx)(\.\w+)*|(cpu:)?gloo|nccl|xla:gloo")
ALLOWED = {  # file: (what it may use, why)
    "audit/doctor/probes.py": ("torch_xla", "imports it in a process of its own, to see whether it can be"),
    "testing/upstream.py": (r"torch\.cuda(\..*)?", "finds the mocks that a test puts into torch"),
    "testing/rank.py": ("gloo", "a rank of the pool runs without any lane, so that stock code can be tested in it"),
    "testing/pytest_plugin.py": ("gloo", "the name of the fixture"),
    "testing/reference.py": (r"torch\.cuda(\.random)?(\..*)?", "stock megatron-core as the reference, no lane in it"),
    **dict.fromkeys(
        ["testing/neuron_standin/__init__.py"]
        + [f"testing/neuron_standin/torch_neuronx/{name}.py" for name in ("__init__", "neuron", "process_group")],
        (r"torch_neuronx(\..*)?", "the stand-in for the package of that name"),
    ),
    "cli/early.py": ("asks for the lane", "tells of Trainium's variables where they are not for a rehearsal"),
    "audit/logits/megatron.py": (r"torch\.cuda(\..*)?|gloo", "upstream's own code on a checkpoint, no lane in it"),
    "checkpoint/formats/nxdt.py": (r"torch_xla\.utils\.serialization", "a class's name in files, never imported"),
    "testing/moe_layer.py": (r"torch\.cuda(\..*)?", "stock layers of experts as the reference, no lane in it"),
}


def dotted(node: ast.AST) -> str:
    if isinstance(node, ast.Name):
        return node.id
    return f"{dotted(node.value)}.{node.attr}" if isinstance(node, ast.Attribute) else "?"


def docstrings(tree: ast.AST) -> set[int]:
    """Ids of the values that stand alone as a statement."""
    return {id(node.value) for node in ast.walk(tree) if isinstance(node, ast.Expr)}


def named(node: ast.AST) -> Iterator[str]:
    """The modules that a node brings in or reaches into."""
    if isinstance(node, ast.Import):
        yield from (alias.name for alias in node.names)
    elif isinstance(node, ast.ImportFrom):
        yield node.module or ""
        yield from (f"{node.module}.{alias.name}" for alias in node.names)
    elif isinstance(node, ast.Attribute | ast.Name):
        yield dotted(node)


def asks_for_lane(node: ast.AST) -> bool:
    """`lane.name == ..`, `current().name in ..`, or a match on it."""
    if isinstance(node, ast.Match):
        sides = [node.subject]
    elif isinstance(node, ast.Compare):
        sides = [node.left, *node.comparators]
    else:
        return False
    for side in sides:
        if isinstance(side, ast.Attribute) and side.attr in ("name", "backend"):
            owner = side.value.func if isinstance(side.value, ast.Call) else side.value
            if re.search(r"(^|[._])(lane|runtime|current)$", dotted(owner)):
                return True
    return False


def findings(source: str) -> list[tuple[int, str]]:
    """(line, what) of everything that belongs into runtime/."""
    tree = ast.parse(source)
    prose = docstrings(tree)
    found = set()
    for node in ast.walk(tree):
        line = getattr(node, "lineno", 0)
        found |= {(line, name) for name in named(node) if FORBIDDEN_NAME.fullmatch(name)}
        text = str(node.value) if isinstance(node, ast.Constant) and id(node) not in prose else ""
        if FORBIDDEN_STRING.fullmatch(text):
            found.add((line, text))
        if asks_for_lane(node):
            found.add((line, "asks for the lane"))
    return sorted(found)


def files() -> list[str]:
    paths = (path.relative_to(PACKAGE) for path in PACKAGE.rglob("*.py"))
    return sorted(str(path) for path in paths if path.parts[0] != "runtime")


@pytest.mark.parametrize("file", files())
def test_no_device_outside_runtime(file: str) -> None:
    allowed, _ = ALLOWED.get(file, ("", ""))
    found = findings((PACKAGE / file).read_text())
    assert [finding for finding in found if not re.fullmatch(allowed, finding[1])] == []


@pytest.mark.parametrize("file", ALLOWED)
def test_an_exception_is_still_needed(file: str) -> None:
    found = findings((PACKAGE / file).read_text())
    assert any(re.fullmatch(ALLOWED[file][0], what) for _, what in found)


CAUGHT = [
    "import torch\ntorch.cuda.synchronize()",
    "x = torch.cuda",
    "from torch import cuda",
    "import torch.cuda.amp",
    "from torch.cuda import amp",
    "import torch_xla.core.xla_model as xm",
    "from torch_xla import runtime",
    "xm.mark_step()",
    "import_module('torch_xla.core')",
    "name = 'torch.cuda.FloatTensor'",
    "init_process_group('gloo')",
    "init_process_group(backend='cpu:gloo')",
    "if lane.name == 'cpu': pass",
    "if self.lane.name in ('cpu', 'xla'): pass",
    "if current().name != 'cpu': pass",
    "match lane.name:\n    case 'cpu': pass",
]
FREE = [
    "'''torch.cuda is spoken of'''",
    "# torch.cuda.synchronize()",
    "def f():\n    'gloo'\n    return 1",
    "error = 'torch.cuda has no counterpart here'",
    "print(lane.name)",
    "if record.name == 'cpu': pass",
    "cuda.synchronize()",
    "import torch.distributed",
]


@pytest.mark.parametrize("source", CAUGHT)
def test_the_lint_catches(source: str) -> None:
    assert findings(source)


@pytest.mark.parametrize("source", FREE)
def test_the_lint_lets_pass(source: str) -> None:
    assert findings(source) == []


def test_the_lint_sees_the_package() -> None:
    assert len(files()) > 10
    assert any(findings(path.read_text()) for path in (PACKAGE / "runtime").glob("*.py"))
