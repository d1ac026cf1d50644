"""A launch script of NeMo, NNM or NxD Training as one that starts this backend: bash in, bash out.

Room config/ (leaf). Line by line: a training command becomes `nxdt-nemo run`, its overrides follow the table of rules;
what Neuron's environment needs is set by that command itself (configs/environment.toml); the rest of the script stays.
No line is lost: what is not understood stays as it is and is listed. Proof: tests/config/migrate/test_launch.py.
"""

from __future__ import annotations

import json
import re
import shlex
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from typing import Literal

from nxdt_nemo.config.environment import refused
from nxdt_nemo.config.keys import load
from nxdt_nemo.config.migrate.rules import rule_for

__all__ = ["Launch", "Line", "translate"]

What = Literal["kept", "translated", "dropped", "unknown"]
ASSIGNMENT = re.compile(r"^(?:export\s+)?([A-Za-z_]\w*)=(.*)$|^:\s+\$\{([A-Za-z_]\w*):?=(.*)\}$")
OVERRIDE = re.compile(r"^[+~]{0,2}[A-Za-z_][\w.@/-]*=")
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
    if words is not None and _starts_training(words):
        return _command(launch, number, raw, words)
    if found := ASSIGNMENT.match(bare):
        return _assignment(launch, number, raw, found[1] or found[3])
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


def _assignment(launch: Launch, number: int, raw: str, name: str) -> list[str]:
    bare = " ".join(raw.split())
    not_here = {one.name: one.reason for one in refused()}
    if name in not_here:
        launch.lines.append(Line(number, "dropped", bare, why=not_here[name]))
        return [f"# {raw.strip()}"]
    if name.startswith(NVIDIA):
        launch.lines.append(Line(number, "dropped", bare, why="of NVIDIA's libraries, which are not here"))
        return [f"# {raw.strip()}"]
    launch.lines.append(Line(number, "kept", bare))
    return raw.split("\n")


def _words(raw: str) -> list[str] | None:
    """The words of a command with quotes as written; None where bash's rules go beyond a list of words."""
    text = re.sub(r"\\\n\s*", " ", raw)
    try:
        lexer = shlex.shlex(text, posix=False, punctuation_chars=False)
        lexer.whitespace_split, lexer.commenters = True, "#"
        return list(lexer)
    except ValueError:
        return None


def _starts_training(words: list[str]) -> bool:
    head = words[0].strip("\"'")
    return (head in STARTERS and any(word.strip("\"'").endswith(".py") for word in words)) or _is_module(words)


def _is_module(words: list[str]) -> bool:
    return (
        words[0] in ("torchrun", "python", "python3") and "-m" in words and any(OVERRIDE.match(word) for word in words)
    )


def _command(launch: Launch, number: int, raw: str, words: list[str]) -> list[str]:
    """A training command: the launcher stays, the script becomes `nxdt-nemo run`, the overrides follow the rules."""
    script = next(at for at, word in enumerate(words) if word.strip("\"'").endswith(".py"))
    launcher, path, rest = words[:script], words[script], words[script + 1 :]
    for wrapper in ("neuron_parallel_compile", "$MAYBE_COMPILE"):
        if wrapper in launcher:
            launcher.remove(wrapper)
            launch.lines.append(
                Line(number, "dropped", wrapper, "nxdt-nemo compile CONFIG", "compiling is a command of its own")
            )
    tail = next((at for at, word in enumerate(rest) if word in ("|", "&", "&&", ";", ">", ">>", "2>&1")), len(rest))
    arguments, after = rest[:tail], rest[tail:]
    theirs = launch.dialect in ("nnm", "nxdt") and THEIRS.search(path.strip("\"'"))
    start = _starter(launcher)
    target = [path]
    if theirs:
        target, arguments = _config(launch, number, arguments)
    made = [word for argument in arguments for word in _override(launch, number, argument, keep_derived=bool(theirs))]
    if not theirs and not any("trainer.accelerator=" in word for word in made):
        made.append("trainer.accelerator=neuron")
    shown = " ".join([*start, *target])
    launch.lines.append(Line(number, "translated", " ".join([*launcher, path]), shown, "with the backend active"))
    indent = raw[: len(raw) - len(raw.lstrip())]
    body = [f"{indent}{shown}", *(f"{indent}    {word}" for word in made)]
    if after:
        body[-1] += f" {' '.join(after)}"
    return [f"{line} \\" if at < len(body) - 1 else line for at, line in enumerate(body)]


def _starter(launcher: list[str]) -> list[str]:
    """`torchrun ARGS` goes on with `-m nxdt_nemo run`, `python` becomes `nxdt-nemo run`; srun stays before it."""
    for name in ("torchrun", "torch.distributed.run", "torch.distributed.launch"):
        if name in launcher:
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
