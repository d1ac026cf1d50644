"""A launch script of NeMo, NNM or NxD Training as one that starts this backend: bash in, bash out.

Room config/ (leaf). Line by line: a training command becomes `nxdt-nemo run`, its overrides follow the table of rules;
what Neuron's environment needs is set by that command itself (configs/environment.toml); the rest of the script stays.
No line is lost: what is not understood stays as it is and is listed. Proof: tests/config/migrate/test_launch.py.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from itertools import takewhile
from typing import Literal

from nxdt_nemo.config.environment import refused
from nxdt_nemo.config.keys import load
from nxdt_nemo.config.migrate.rules import rule_for

__all__ = ["Launch", "Line", "translate"]

What = Literal["kept", "translated", "dropped", "unknown"]
ASSIGNMENT = re.compile(r"([A-Za-z_]\w*)\+?=")
DEFAULT = re.compile(r"^:\s+\$\{([A-Za-z_]\w*):?=(.*)\}$")
OVERRIDE = re.compile(r"^[+~]{0,2}[A-Za-z_][\w.@/-]*=(?!=)")
# bash's words: quotes and $(...) hold their spaces together, wherever in a word they stand.
_PARENTHESES = r"\([^()]*\)"
for _ in range(4):  # as deep as anybody nests them
    _PARENTHESES = rf"\((?:[^()]|{_PARENTHESES})*+\)"
_REPLACED = rf"\$?{_PARENTHESES}|\$\{{[^}}]*\}}|`[^`]*`"
WORD = re.compile(rf"""(?:{_REPLACED}|\\.|'[^']*'|"(?:{_REPLACED}|\\.|[^"\\])*+"|[^\s'"\\;|&<>])++""", re.DOTALL)
OPERATOR = re.compile(r"\d*[<>]&\d+|&>>?|\d*(?:>>|<<<?|[<>])|&&|\|[|&]?|;;?|&")
LAUNCHERS = ("torchrun", "torch.distributed.run", "torch.distributed.launch")
STARTERS = ("torchrun", "python", "python3", "srun", "mpirun", "neuron_parallel_compile", "$MAYBE_COMPILE", "nohup")
# Scripts of NNM and NxD Training need their packages: `run --config` stands for them.
THEIRS = re.compile(r"(?:^|/)(training_orchestrator|training|megatron_\w*pretraining|megatron_\w*tuning)\.py$")
SHELL = re.compile(
    r"^(if|then|else|elif|fi|for|do|done|while|case|esac|function|\{|\}|set|ulimit|cd|pushd|popd|mkdir|echo|shift|exit|"
    r"return|trap|unset|local|declare|readonly|source|\.|which|sleep|wait|:)\b|^[:{}]$|^(\[\[?|;;|\w+\)|\w+\(\))"
)
NVIDIA = ("NCCL_", "CUDA_", "NVTE_", "UB_")
SETUP = ("wrap_with_zero", "zero_use_master_weight", "zero_use_fp32_grad_accum", "megatron_amp_O2", "OPTIM_NAME")


@dataclass(frozen=True)
class Line:
    """A line of the script, or a part of it. number: its first line, counted from 1; now: what stands for it."""

    number: int
    what: What
    text: str
    now: str = ""
    why: str = ""


@dataclass
class Launch:
    """The script that starts us, and what happened to each line that is not kept."""

    place: str
    text: str = ""
    dialect: str = "nemo"
    lines: list[Line] = field(default_factory=list)

    @property
    def unknown(self) -> list[Line]:
        """Lines that stayed because nobody here understands them."""
        return [line for line in self.lines if line.what == "unknown"]

    def summary(self) -> str:
        """The counts in one line."""
        counts = {what: sum(line.what == what for line in self.lines) for what in ("translated", "dropped", "unknown")}
        words = ", ".join(f"{number} {what}" for what, number in counts.items() if number)
        return f"{self.place}: launch script of {self.dialect}: {words or 'nothing to translate'}"

    def show(self, form: str) -> str:
        """The report as text, json or markdown."""
        changed = [line for line in self.lines if line.what != "kept" or line.why]
        if form == "json":
            whole = {"file": self.place, "from": self.dialect, "lines": [asdict(line) for line in changed]}
            return json.dumps(whole | {"text": self.text}, indent=2)
        if form == "markdown":
            rows = [f"| {x.number} | {x.what} | `{_cell(x.text)}` | {_cell(x.why)} |" for x in changed]
            return "\n".join(
                [f"**{self.summary()}**", "", "| Line | What | Text | Because |", "|---|---|---|---|", *rows]
            )
        rows = [f"{x.number:4}  {x.what:10}  {x.text}{f'  -> {x.now}' if x.now else ''}  ({x.why})" for x in changed]
        return "\n".join([*rows, self.summary()])


def translate(text: str, *, place: str = "") -> Launch:
    """The launch for us of a bash script."""
    launch = Launch(place, dialect=_dialect(text))
    out: list[str] = []
    for number, raw in _logical(text):
        out += _line(launch, number, raw)
    launch.text = "\n".join(out) + ("\n" if out else "")
    return launch


def _dialect(text: str) -> str:
    if "training_orchestrator.py" in text or "CONF_FILE" in text:
        return "nxdt"
    ours = ("train_setup.sh", "wrap_with_zero", "zero_use_", "save_xser", "neuron_parallel_compile", "./test")
    return "nnm" if any(word in text for word in ours) else "nemo"


def _logical(text: str) -> list[tuple[int, str]]:
    """Lines with their continuations: (number of the first, text with its line breaks)."""
    found: list[tuple[int, str]] = []
    lines, at = text.split("\n"), 0
    if lines and not lines[-1]:
        lines.pop()
    while at < len(lines):
        start = at
        while lines[at].rstrip().endswith("\\") and not lines[at].lstrip().startswith("#") and at + 1 < len(lines):
            at += 1
        found.append((start + 1, "\n".join(lines[start : at + 1])))
        at += 1
    return found


def _line(launch: Launch, number: int, raw: str) -> list[str]:
    """What stands in the new script for one logical line."""
    bare = raw.strip()
    if not bare or bare.startswith("#"):
        return raw.split("\n")
    words = _words(raw)
    if words and _target(_command_of(words)) is not None:
        return _command(launch, number, raw, words)
    if found := DEFAULT.match(bare):
        return _assignments(launch, number, raw, [[bare]], found[1])
    if groups := _assigned(words):
        return _assignments(launch, number, raw, groups)
    if words is None and ASSIGNMENT.match(bare.removeprefix("export ")):  # a text that goes on below
        return raw.split("\n")
    if re.match(r"^(source|\.)\s+\S*train_setup\.sh", bare):
        why = "nxdt-nemo run sets Neuron's environment; where the nodes are is said below"
        launch.lines.append(Line(number, "translated", bare, "the lines of PRELUDE", why))
        return PRELUDE.split("\n")
    if bare.startswith("sudo "):
        launch.lines.append(Line(number, "dropped", bare, why="nothing here needs root"))
        return [f"# {bare}"]
    if bare.startswith(("sbatch", "scontrol", "srun")) or SHELL.match(bare) or re.match(r"^\./\S+\.sh", bare):
        other = re.match(r"^((sbatch|srun)\s.*)?(?<!\S)\S+\.(sh|slurm)\b", bare)
        launch.lines.append(Line(number, "kept", bare, why="a script of its own: migrate it too" if other else ""))
        return raw.split("\n")
    launch.lines.append(
        Line(number, "unknown", " ".join(bare.split()), why="stays as it is: look whether it is needed")
    )
    return raw.split("\n")


PRELUDE = """
# Where the nodes are: SLURM's or MPI's answer, else this machine. Neuron's environment is nxdt-nemo's business.
: ${NTASKS:=${SLURM_NNODES:-${OMPI_COMM_WORLD_SIZE:-1}}}
: ${NODEID:=${SLURM_NODEID:-${OMPI_COMM_WORLD_RANK:-0}}}
if [ -z "${MASTER_ADDR:-}" ] && [ -n "${SLURM_JOB_NODELIST:-}" ]; then
    MASTER_ADDR=$(scontrol show hostnames "$SLURM_JOB_NODELIST" | head -n1)
fi
: ${MASTER_ADDR:=localhost} ${MASTER_PORT:=41000} ${PROCESSES_PER_NODE:=32}
: ${LOG_PATH:=nemo_experiments/logs/$NODEID} ${EXPLICIT_LOGDIR:=null}
: ${CREATE_TB_LOGGER:=True} ${CHECKPOINT_CALLBACK:=True}
mkdir -p "$LOG_PATH"
DISTRIBUTED_ARGS="--nproc_per_node $PROCESSES_PER_NODE --nnodes $NTASKS --node_rank $NODEID"
DISTRIBUTED_ARGS="$DISTRIBUTED_ARGS --master_addr $MASTER_ADDR --master_port $MASTER_PORT"
""".strip()


def _refusal(name: str) -> str:
    """Why a variable has no place in a launch of this backend, "" for one that has."""
    not_here = {one.name: one.reason for one in refused()}
    return not_here.get(name, "of NVIDIA's libraries, which are not here" if name.startswith(NVIDIA) else "")


def _assigned(words: list[str] | None) -> list[list[str]]:
    """`A=1`, `export A=1 B=2; C=3`: the words between semicolons; nothing if something else is done there too."""
    groups: list[list[str]] = [[]]
    for word in words or ():
        if word == ";":
            groups.append([])
        else:
            groups[-1].append(word)
    groups = [group for group in groups if group]
    plain = all(ASSIGNMENT.match(word) for group in groups for word in (group[1:] if group[0] == "export" else group))
    return groups if plain and all(group != ["export"] for group in groups) else []


def _assignments(launch: Launch, number: int, raw: str, groups: list[list[str]], name: str = "") -> list[str]:
    """A line that only sets variables, without those that are not wanted. name: of the only one."""
    bare = " ".join(raw.split())
    left = [[word for word in group if not _unwanted(launch, number, word, name)] for group in groups]
    if left == groups:
        launch.lines.append(Line(number, "kept", bare))
        return raw.split("\n")
    rest = [" ".join(group) for group in left if group and group != ["export"]]
    indent = raw[: len(raw) - len(raw.lstrip())]
    return [f"# {line}" for line in raw.strip().split("\n")] if not rest else [indent + "; ".join(rest)]


def _unwanted(launch: Launch, number: int, word: str, name: str = "") -> bool:
    """True for an assignment that has no place here, which is reported."""
    found = ASSIGNMENT.match(word)
    why = _refusal(name or (found[1] if found else ""))
    if why:
        launch.lines.append(Line(number, "dropped", word, why=why))
    return bool(why)


def _words(raw: str) -> list[str] | None:
    """The words and operators of a line with quotes as written; None where a quote goes on below it."""
    text, found, at = re.sub(r"\\\n\s*", " ", raw), [], 0
    while (at := at + len(text[at:]) - len(text[at:].lstrip())) < len(text) and text[at] != "#":
        word = OPERATOR.match(text, at) or WORD.match(text, at)
        if word is None:
            return None
        found.append(word[0])
        at = word.end()
    return found


def _command_of(words: list[str]) -> list[str]:
    """The command without the variables that are set for it alone."""
    return words[len(list(takewhile(ASSIGNMENT.match, words))) :]


def _target(command: list[str]) -> tuple[int, int] | None:
    """From where to where the script or `-m MODULE` stands that a command trains with; None for any other command."""
    if not command or command[0].strip("\"'") not in STARTERS:
        return None
    for at, word in enumerate(command):
        if OPERATOR.fullmatch(word):
            return None
        if word.strip("\"'").endswith(".py") and not OVERRIDE.match(word):
            return at, at + 1
        if word == "-m" and at + 1 < len(command) and command[at + 1] not in LAUNCHERS:
            return (at, at + 2) if any(OVERRIDE.match(later) for later in command[at + 2 :]) else None
    return None


def _command(launch: Launch, number: int, raw: str, words: list[str]) -> list[str]:
    """A training command: the launcher stays, the script becomes `nxdt-nemo run`, the overrides follow the rules."""
    command = _command_of(words)
    first, behind = _target(command) or (0, 0)
    launcher, target, rest = command[:first], command[first:behind], command[behind:]
    variables = words[: len(words) - len(command)]
    kept = [word for word in variables if not _unwanted(launch, number, word)]
    for wrapper in ("neuron_parallel_compile", "$MAYBE_COMPILE"):
        if wrapper in launcher:
            launcher.remove(wrapper)
            launch.lines.append(
                Line(number, "dropped", wrapper, "nxdt-nemo compile CONFIG", "compiling is a command of its own")
            )
    tail = next((at for at, word in enumerate(rest) if OPERATOR.fullmatch(word)), len(rest))
    arguments, after = rest[:tail], rest[tail:]
    theirs = launch.dialect in ("nnm", "nxdt") and THEIRS.search(target[0].strip("\"'"))
    said = " ".join([*launcher, *target])
    start = [*kept, *_starter(launcher)]
    if theirs:
        target, arguments = _config(launch, number, arguments)
    made = [word for argument in arguments for word in _override(launch, number, argument, keep_derived=bool(theirs))]
    if not theirs and not any("trainer.accelerator=" in word for word in made):
        made.append("trainer.accelerator=neuron")
    shown = " ".join([*start, *target])
    launch.lines.append(Line(number, "translated", said, shown, "with the backend active"))
    indent = raw[: len(raw) - len(raw.lstrip())]
    body = [f"{indent}{shown}", *(f"{indent}    {word}" for word in made)]
    if after:
        body[-1] += f" {' '.join(after)}"
    return [f"{line} \\" if at < len(body) - 1 else line for at, line in enumerate(body)]


def _starter(launcher: list[str]) -> list[str]:
    """`torchrun ARGS` goes on with `-m nxdt_nemo run`, `python` becomes `nxdt-nemo run`; srun stays before it."""
    if any(name in launcher for name in LAUNCHERS):
        return [*launcher, "-m", "nxdt_nemo", "run"]
    kept = [word for word in launcher if word not in ("python", "python3", "-u")]
    return [*kept, "nxdt-nemo", "run"]


def _config(launch: Launch, number: int, arguments: list[str]) -> tuple[list[str], list[str]]:
    """--config-path and --config-name as one --config; NNM's precision by its train_setup.sh."""
    folder, name, rest = "conf", "megatron_gpt_config", []
    for argument in arguments:
        if argument.startswith("--config-path="):
            folder = argument.partition("=")[2]
        elif argument.startswith("--config-name="):
            name = argument.partition("=")[2]
        else:
            rest.append(argument)
    suffix = "" if name.endswith((".yaml", ".yml")) else ".yaml"
    made = ["--config", f"{folder}/{name}{suffix}"]
    if launch.dialect == "nnm":
        made += ["--train-setup", "train_setup.sh"]
    return made, rest


def _override(launch: Launch, number: int, word: str, *, keep_derived: bool) -> list[str]:
    """An override by the table of rules."""
    note: Callable[[What, str, str], None] = lambda what, now, why: launch.lines.append(  # noqa: E731
        Line(number, what, word, now, why)
    )
    if not OVERRIDE.match(word):
        if not word.startswith("-"):
            note("unknown", "", "is no override")
        return [word]
    key, _, value = word.lstrip("+~").partition("=")
    used = re.fullmatch(r"[\"']?\$\{?(\w+)\}?[\"']?", value)
    if used and used[1] in SETUP:
        note("dropped", "", "a variable of train_setup.sh, which --train-setup reads")
        return []
    rule = rule_for(key, _plain(value), launch.dialect, load().knows(key))
    prefix = word[: len(word) - len(word.lstrip("+~"))]
    if rule is None:
        note("unknown", word, "no rule for this key")
        return [word]
    if rule.action == "drop":
        note("dropped", "", rule.why)
        return []
    if (rule.action == "derive" and keep_derived) or rule.action in ("keep", "warn", "error"):
        if rule.action in ("warn", "error"):
            note("unknown", word, rule.why)
        return [word]
    target, new = rule.target(key), rule.mapped(_plain(value))
    made = f"{prefix or ('++' if target != key else '')}{target}={value if new == _plain(value) else _shown(new)}"
    if made != word:
        note("translated", made, rule.why)
    return [made]


def _plain(value: str) -> object:
    """A value as the rules compare it."""
    bare = value.strip("\"'")
    if re.fullmatch(r"-?\d+", bare):
        return int(bare)
    return {"true": True, "false": False, "null": None}.get(bare.lower(), bare)


def _shown(value: object) -> str:
    return "null" if value is None else str(value)


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")
