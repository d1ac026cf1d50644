"""A YAML file as a tree of keys that keeps every byte that nobody changes.

Room config/ (leaf). The parser is PyYAML's, as hydra's is; its marks say where in the text a key and its value stand.
A round trip through objects (ruamel.yaml's too) writes `True` as `true`, `null` as nothing, and re-indents lists, so
that a migration would drown in its own noise: here keys are moved, renamed and removed as the text that they are, with
the comments above and behind them. May import yaml and omegaconf. Proof: tests/config/migrate/test_tree.py.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import yaml
from omegaconf import OmegaConf
from omegaconf.errors import OmegaConfBaseException

from nxdt_nemo.errors import ConfigError

__all__ = ["Document", "Node", "text_of"]


@dataclass(eq=False)
class Node:
    """One key with what belongs to it.

    key       its name
    column    columns before it
    lead      lines above it: comments and blank lines
    between   from the colon to the value, without either (more than one line for a list below its key)
    value     the value as written, "" for none; None for a section, which has children instead
    post      from the value to the end of its last line: spaces and a comment
    trail     comment lines below its children that are indented as they are
    data      the value as Python reads it (interpolations as text); None for a section
    origin    path in the file that was read, "" for a key that was added
    braces    of a section written `{a: 1}`: its text from the colon on, which stands as long as nothing in it changes
    line      of the file that was read, from 1; 0 for a key that was added
    """

    key: str
    column: int = 0
    lead: list[str] = field(default_factory=list)
    between: str = " "
    value: str | None = ""
    post: str = ""
    trail: list[str] = field(default_factory=list)
    data: Any = None
    origin: str = ""
    written_key: str = ""
    children: list[Node] = field(default_factory=list)
    parent: Node | None = None
    braces: str = ""
    line: int = 0
    _read: tuple[Any, ...] = ()

    def keep_braces(self, text: str) -> None:
        """The section is as it was read from this text."""
        self.braces, self._read = text, self._content()

    def _content(self) -> tuple[Any, ...]:
        return tuple((child.written_key or child.key, child.value, child._content()) for child in self.children)

    @property
    def is_section(self) -> bool:
        """True if the key has keys below it."""
        return self.value is None

    @property
    def path(self) -> str:
        """Dotted path from the top of the document."""
        above = self.parent.path if self.parent is not None else ""
        return f"{above}.{self.key}" if above else self.key

    def set(self, data: Any, text: str | None = None) -> None:
        """Give a leaf another value, keeping the comment behind it."""
        if "\n" in self.between:  # a list below its key: the comment stood behind the colon
            self.post = self.between.split("\n")[0].rstrip()
        elif "\n" in (self.value or ""):
            self.post = ""
        self.between, self.data = " ", data
        self.value = text_of(data) if text is None else text

    def rename(self, key: str) -> None:
        """Give the key another name."""
        self.key = self.written_key = key

    def lines(self, column: int) -> Iterator[str]:
        """The lines of this node and of what is below it, moved so that the key stands at `column`."""
        shift = column - self.column
        yield from (_shifted(line, shift) for line in self.lead)
        tail = "" if self.value is None else f"{self.between}{self.value}"
        tail = tail if self.post else tail.rstrip(" ")
        braces = self.braces if self.braces and self.is_section and self._content() == self._read else ""
        own = f"{' ' * self.column}{self.written_key or self.key}:{braces or tail + self.post}"
        yield from (_shifted(line, shift) for line in own.split("\n"))
        for child in () if braces else self.children:
            yield from child.lines(child.column + shift)
        yield from (_shifted(line, shift) for line in self.trail)


class Document:
    """A YAML file with a mapping at its top.

    Raises ConfigError for text that is no YAML, has a list or a value at its top, or has a key that is no plain text.
    """

    def __init__(self, text: str, place: str = "") -> None:
        self.place = place
        self.root = Node("", column=-2, value=None)
        self._text, self._lines = text, text.split("\n")
        try:
            top = yaml.compose(text, Loader=yaml.SafeLoader)
            data = OmegaConf.to_container(OmegaConf.create(text), resolve=False) if top is not None else {}
        except (yaml.YAMLError, OmegaConfBaseException) as error:
            raise ConfigError(f"not readable as YAML: {' '.join(str(error).split())}", place=place) from None
        if top is not None and (not isinstance(top, yaml.MappingNode) or not isinstance(data, dict)):
            raise ConfigError("is no configuration: its top is not keys and values", place=place)
        last = -1
        if top is not None and top.value and not top.flow_style:
            last = self._read(self.root, top, data if isinstance(data, dict) else {}, 0)
        elif top is not None and top.value:
            raise ConfigError("is written in braces", place=place, fix="write one key a line")
        self.tail = self._lines[last + 1 :]

    def render(self) -> str:
        """The text; equal to what was read as long as nothing was changed."""
        lines = [line for child in self.root.children for line in child.lines(child.column)]
        return "\n".join([*lines, *self.tail])

    # Reading

    def _read(self, parent: Node, mapping: Any, data: Mapping[Any, Any], cursor: int) -> int:
        """Fill parent with a block mapping's keys; returns the line of its last value."""
        for key, value in mapping.value:
            line = key.start_mark.line
            if not isinstance(key, yaml.ScalarNode) or key.end_mark.line != line:
                raise ConfigError(f"line {line + 1}: a key is no plain text", place=self.place)
            node = Node(str(key.value), column=key.start_mark.column, parent=parent, line=line + 1)
            colon = self._lines[line].find(":", key.end_mark.column)
            if colon < 0:
                raise ConfigError(f"line {line + 1}: the colon is not behind its key", place=self.place)
            node.written_key = self._lines[line][key.start_mark.column : colon]
            node.lead = self._lead(parent, cursor, line, node.column)
            parent.children.append(node)
            node.origin = node.path
            node.data = data.get(node.key, data.get(_plain(node.key)))
            alias = value.start_mark.index < key.start_mark.index
            if not alias and isinstance(value, yaml.MappingNode) and value.value:
                inner = node.data if isinstance(node.data, dict) else {}
                node.value, node.data = None, None
                if value.flow_style:
                    cursor = self._braces(node, key, value, inner) + 1
                else:
                    node.post = self._lines[line][colon + 1 :]
                    cursor = self._read(node, value, inner, line + 1) + 1
            else:
                cursor = (self._alias(node, line, colon) if alias else self._leaf(node, value, line, colon)) + 1
        return cursor - 1

    def _leaf(self, node: Node, value: Any, line: int, colon: int) -> int:
        """The text of a leaf; returns its last line."""
        start, end = value.start_mark, value.end_mark
        if start.index == end.index:  # nothing stands there
            rest = self._lines[line][colon + 1 :]
            node.between, node.value, node.post = "", "", rest
            return line
        last, column = int(end.line), end.column
        if _block(value):
            last = int(_last_line(value))
            while last > line and not self._lines[last].strip():
                last -= 1
            column = len(self._lines[last].split(" #")[0].rstrip()) if isinstance(value, yaml.SequenceNode) else None
        first = self._lines[line][colon + 1 :]
        if start.line == line:
            node.between = self._lines[line][colon + 1 : start.column]
            head = self._lines[line][start.column :]
        else:
            node.between = "\n".join(
                [first, *self._lines[line + 1 : start.line], self._lines[start.line][: start.column]]
            )
            head = self._lines[start.line][start.column :]
        if column is None:
            column = len(self._lines[last])
        if last == start.line:
            node.value, node.post = self._lines[last][start.column : column], self._lines[last][column:]
        else:
            body = [head, *self._lines[start.line + 1 : last], self._lines[last][:column]]
            node.value, node.post = "\n".join(body), self._lines[last][column:]
        return last

    def _braces(self, node: Node, key: Any, mapping: Any, data: Mapping[Any, Any]) -> int:
        """A section written `key: {a: 1}`; returns its last line."""
        end, colon = mapping.end_mark, self._text.index(":", key.end_mark.index)
        behind = self._lines[end.line][end.column :]
        above = self._text[colon + 1 : mapping.start_mark.index]
        self._within_braces(node, mapping, data)
        node.children[0].lead[:0] = _comments(above.split("\n"), node.children[0].column)
        node.post += behind
        node.keep_braces(self._text[colon + 1 : end.index] + behind)
        return int(end.line)

    def _within_braces(self, parent: Node, mapping: Any, data: Mapping[Any, Any]) -> None:
        """Fill parent with the keys between braces; comments between them stand above or behind a key."""
        at = self._text.index("{", mapping.start_mark.index) + 1
        anchor = self._text[mapping.start_mark.index : at - 1].strip()
        parent.post = f" {anchor}" if anchor else ""
        for key, value in mapping.value:
            line = int(key.start_mark.line) + 1
            if not isinstance(key, yaml.ScalarNode) or key.end_mark.line + 1 != line:
                raise ConfigError(f"line {line}: a key is no plain text", place=self.place)
            node = Node(str(key.value), column=parent.column + 2, parent=parent, line=line)
            node.written_key = self._text[key.start_mark.index : key.end_mark.index]
            self._comments(parent, node.lead, self._text[at : key.start_mark.index])
            parent.children.append(node)
            node.origin = node.path
            node.data = data.get(node.key, data.get(_plain(node.key)))
            at = self._value_in_braces(node, key, value)
        last = parent.children[-1]
        self._comments(parent, last.trail, self._text[at : mapping.end_mark.index - 1])

    def _comments(self, parent: Node, lead: list[str], gap: str) -> None:
        """Comments of the text between two keys in braces: the first line's is of the key before."""
        first, *later = gap.split("\n")
        if "#" in first and parent.children:
            parent.children[-1].post = f"  {first[first.index('#') :].rstrip()}"
        elif "#" in first:
            later = [first, *later]
        lead += _comments(later, parent.column + 2)

    def _value_in_braces(self, node: Node, key: Any, value: Any) -> int:
        """The text of a value between braces, on one line; returns where it ends."""
        start, end = value.start_mark.index, value.end_mark.index
        if start < key.start_mark.index:
            alias = re.compile(r"\s*:\s*(\*[^\s,}]+)").match(self._text, key.end_mark.index)
            assert alias is not None
            node.value = alias[1]
            return int(alias.end())
        written = self._text[start:end]
        if isinstance(value, yaml.MappingNode) and value.value:
            inner = node.data if isinstance(node.data, dict) else {}
            node.value, node.data = None, None
            self._within_braces(node, value, inner)
            if "\n" not in written:
                node.keep_braces(f" {written}")
        else:
            node.value = text_of(node.data) if "\n" in written else written
        return int(max(end, key.end_mark.index))

    def _alias(self, node: Node, line: int, colon: int) -> int:
        """The text of `*name`, whose marks are those of what it stands for."""
        rest = self._lines[line][colon + 1 :]
        start = len(rest) - len(rest.lstrip())
        node.value = rest[start:].split()[0]
        node.between, node.post = rest[:start], rest[start + len(node.value) :]
        return line

    def _lead(self, parent: Node, cursor: int, line: int, column: int) -> list[str]:
        """The lines above a key, less those that are indented deeper: they end the section before."""
        lead = self._lines[cursor:line]
        deeper = [at for at, text in enumerate(lead) if text.strip() and len(text) - len(text.lstrip()) > column]
        if deeper and parent.children:
            before, first = parent.children[-1], lead[deeper[0]]
            indent = len(first) - len(first.lstrip())
            while before.children and not before.braces and before.children[-1].column <= indent:
                before = before.children[-1]
            before.trail += lead[: deeper[-1] + 1]
            lead = lead[deeper[-1] + 1 :]
        return lead

    # Looking

    def find(self, path: str) -> Node | None:
        """The node at a path, None if there is none."""
        node: Node | None = self.root
        for part in path.split("."):
            node = next((child for child in node.children if child.key == part), None) if node is not None else None
        return node

    def get(self, path: str, default: Any = None) -> Any:
        """The value of a leaf, default if it is absent or null."""
        node = self.find(path)
        return default if node is None or node.data is None else node.data

    def nodes(self, below: Node | None = None) -> Iterator[Node]:
        """Every node, sections before what is in them."""
        for child in (below or self.root).children:
            yield child
            yield from self.nodes(child)

    # Changing

    def section(self, path: str) -> Node:
        """The section at a path, made with all above it if it is not there; a leaf without a value becomes one.

        Raises ConfigError for a leaf that has a value.
        """
        node = self.root
        for part in path.split(".") if path else ():
            found = next((child for child in node.children if child.key == part), None)
            if found is None:
                found = Node(part, self._column(node), value=None, parent=node)
                self._append(node, found)
            elif found.data is not None:
                where = f"line {found.line}: " if found.line else ""
                reason = f"{where}{found.path}={found.value} is no section of keys and values, and {path} has to be one"
                raise ConfigError(reason, place=self.place, fix="write its keys below it")
            elif found.value is not None:
                found.value, found.between, found.data = None, "", None
            node = found
        return node

    def set(self, path: str, data: Any, text: str | None = None, comment: str = "") -> Node:
        """Give a leaf a value; one that is not there is added at the end of its section."""
        node = self.find(path)
        if node is not None:
            if node.is_section:
                node.children, node.trail = [], []
            node.set(data, text)
            return node
        above, _, key = path.rpartition(".")
        parent = self.section(above)
        node = Node(key, self._column(parent), parent=parent)
        node.set(data, text)
        node.post = f"  # {comment}" if comment else ""
        self._append(parent, node)
        return node

    def move(self, node: Node, path: str) -> None:
        """Put a node at another path, at the end of its section; the comments above and behind it go with it."""
        above, _, key = path.rpartition(".")
        self._unlink(node)
        node.rename(key)
        parent = self.section(above)
        column = self._column(parent)
        self._shift(node, column - node.column)
        node.parent = parent
        self._append(parent, node)

    def remove(self, node: Node) -> None:
        """Take a node out. A comment above it stays if it heads the keys after it, which have none of their own."""
        parent = node.parent or self.root
        after = parent.children[parent.children.index(node) + 1 :]
        self._unlink(node)
        if after and not after[0].lead:
            after[0].lead = node.lead

    def prune(self) -> None:
        """Take out the sections that have lost all their keys."""
        for node in reversed(list(self.nodes())):
            if node.is_section and not node.children:
                self.remove(node)

    def _append(self, parent: Node, node: Node) -> None:
        """A value behind the last value, before the sections that follow it; a section behind everything."""
        leaves = [at for at, child in enumerate(parent.children) if not child.is_section]
        at = leaves[-1] + 1 if leaves and not node.is_section else len(parent.children)
        if not parent.children:
            node.lead = node.lead[next((at for at, line in enumerate(node.lead) if line.strip()), len(node.lead)) :]
        elif parent is self.root and node.is_section and not node.lead:
            node.lead = [""]
        parent.children.insert(at, node)
        if parent is self.root and not self.tail:
            self.tail = [""]

    def _unlink(self, node: Node) -> None:
        (node.parent or self.root).children.remove(node)

    def _column(self, parent: Node) -> int:
        if parent.children:
            return parent.children[0].column
        return 0 if parent is self.root else parent.column + 2

    def _shift(self, node: Node, by: int) -> None:
        """Move a node's text sideways, with all below it."""
        node.lead = [_shifted(line, by) for line in node.lead]
        node.trail = [_shifted(line, by) for line in node.trail]
        node.between = _later_lines(node.between, by)
        node.value = None if node.value is None else _later_lines(node.value, by)
        node.braces = _later_lines(node.braces, by)
        node.column += by
        for child in node.children:
            self._shift(child, by)


def text_of(data: Any, *, inside: bool = False) -> str:
    """A value as NeMo's files write it, on one line. inside: between brackets, where more has to be quoted."""
    if data is None:
        return "null"
    if isinstance(data, bool):
        return str(data)
    if isinstance(data, list):
        return f"[{', '.join(text_of(item, inside=True) for item in data)}]"
    if isinstance(data, str) and data.startswith("${"):
        return data
    if isinstance(data, float):
        return repr(data)
    dumped = yaml.safe_dump([data] if inside else data, default_flow_style=True, width=1 << 20)
    if inside:
        return dumped.strip()[1:-1]
    return dumped.removesuffix("\n").removesuffix("\n...")


def _comments(lines: Iterable[str], column: int) -> list[str]:
    """The comments of lines that have nothing else, at a column."""
    return [f"{' ' * column}{line[line.index('#') :].rstrip()}" for line in lines if "#" in line]


def _plain(key: str) -> Any:
    return int(key) if key.lstrip("-").isdigit() else key


def _block(value: Any) -> bool:
    """True for what ends where its last line ends: a list or a text in block style."""
    if isinstance(value, yaml.ScalarNode):
        return value.style in ("|", ">")
    return not value.flow_style


def _last_line(value: Any) -> int:
    """The last line of a node; PyYAML's mark of a block's end stands where the next token begins."""
    if isinstance(value, yaml.ScalarNode):
        below = value.style in ("|", ">") and value.end_mark.column == 0
        return int(value.end_mark.line) - (1 if below else 0)
    if value.flow_style or not value.value:
        return int(value.end_mark.line)
    last = value.value[-1]
    key, inner = last if isinstance(last, tuple) else (None, last)
    if inner.start_mark.index >= value.start_mark.index:
        return _last_line(inner)
    # An alias, whose marks are those of what it stands for.
    return int(key.end_mark.line if key is not None else value.end_mark.line - (value.end_mark.column == 0))


def _shifted(line: str, by: int) -> str:
    if not line.strip() or by == 0:
        return line
    return " " * by + line if by > 0 else line[min(-by, len(line) - len(line.lstrip())) :]


def _later_lines(text: str, by: int) -> str:
    first, *later = text.split("\n")
    return "\n".join([first, *(_shifted(line, by) if line.strip() else " " * max(0, len(line) + by) for line in later)])
