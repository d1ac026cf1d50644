"""A 1B Llama from Hugging Face to torch_dist at TP 8, PP 2, and back, beside `cp` and fsync of the same bytes.

    python tools/bench/convert.py             # 5 pairs each way, about 9 GB; writes docs/results/convert.md
    python tools/bench/convert.py --pairs 2 --layers 4 --print-only
    python tools/bench/convert.py --peer CHECKOUT     # NeMo v2.4.0's converter beside ours; 13 GB of memory

Weights are random, made once in a temporary folder. Copy and conversion take turns, so that noise meets both; each
begins with the source in the page cache, since what is compared is the work and not the disk's luck. A conversion is a
process of its own, `nxdt-nemo ckpt convert`, timed from its start to its end; `inside` is what it says itself: without
what python takes to load.
RssAnon is the memory that is the process's own: mapped files belong to the page cache. The bytes that come back are
compared with those that went out before anything is printed. The last line is JSON.
"""

from __future__ import annotations

import argparse
import filecmp
import json
import os
import platform
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import date
from importlib.metadata import version
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
PAGE = ROOT / "docs" / "results" / "convert.md"
TIME_LIMIT, MEMORY_SLACK = 1.5, 10**9
CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 2048,
    "intermediate_size": 5632,
    "num_attention_heads": 32,
    "num_key_value_heads": 8,
    "vocab_size": 32768,
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-5,
    "torch_dtype": "bfloat16",
}
# "hf (llama) as torch_dist: 2.1 GB in 1.7 s; ..."
_INSIDE = re.compile(r" in ([\d.]+) s[,;]")

# A tokenizer of as many words as the model has rows, which NeMo's converter wants to see.
TOKENIZER = """
import sys
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast
words = {f"t{number}": number for number in range(int(sys.argv[2]))}
special = ("unk", "bos", "eos", "pad", "sep", "cls", "mask")
made = Tokenizer(models.WordLevel(words, unk_token="t0"))
named = {f"{name}_token": f"t{number}" for number, name in enumerate(special)}
PreTrainedTokenizerFast(tokenizer_object=made, **named).save_pretrained(sys.argv[1])
"""


@dataclass(frozen=True)
class Run:
    """seconds of the process; cpu, user and system; inside, of the conversion in it; rss, peak RssAnon in bytes."""

    seconds: float
    cpu: float
    inside: float
    rss: int


def make(folder: Path, layers: int) -> int:
    """A Hugging Face folder with random weights; the bytes of its largest tensor."""
    import torch

    sys.path.insert(0, str(ROOT))
    from nxdt_nemo.checkpoint.dtypes import BFLOAT16
    from nxdt_nemo.checkpoint.families import by_name
    from nxdt_nemo.checkpoint.formats.hf import whole_model
    from nxdt_nemo.checkpoint.io import safetensors
    from nxdt_nemo.checkpoint.io.torch_zip import raw_bytes

    folder.mkdir()
    config = CONFIG | {"num_hidden_layers": layers}
    (folder / "config.json").write_text(json.dumps(config))
    family = by_name("llama")
    arrays = [(one.key, BFLOAT16, one.shape) for one in whole_model(family, family.from_hf(config))]
    with (folder / "model.safetensors").open("wb") as file:
        file.write(safetensors.header(arrays))
        for _, _, shape in arrays:
            file.write(raw_bytes(torch.randn(shape).bfloat16().view(torch.int16).numpy()))
        os.fsync(file.fileno())
    return 2 * max(torch.Size(shape).numel() for _, _, shape in arrays)


def converted(source: Path, target: Path, to: str, workers: int) -> Run:
    """Convert in a process, and watch its memory."""
    more = {"torch_dist": ["--tp", "8", "--pp", "2"], "nemo": ["--dtype", "fp32"]}.get(to, [])
    given = [str(source), str(target), "--to", to, "--workers", str(workers), *more]
    return watched(["-m", "nxdt_nemo", "ckpt", "convert", *given])


def peer(checkout: Path, source: Path, target: Path) -> Run:
    """NeMo's converter, as it is, on this backend's CPU lane in place of a GPU."""
    script = checkout / "scripts/checkpoint_converters/convert_llama_hf_to_nemo.py"
    config = checkout / "examples/nlp/language_modeling/conf/megatron_llama_config.yaml"
    program = ["-m", "nxdt_nemo", "run", str(Path(__file__).with_name("convert_peer.py")), str(script)]
    given = ["--input_name_or_path", str(source), "--output_path", str(target), "--hparams_file", str(config)]
    return watched([*program, *given, "--precision", "32"], NXDT_NEMO_RUNTIME="cpu")


def watched(program: list[str], **variables: str) -> Run:
    """A python process to its end, and the seconds that it says it took inside."""
    environment = {**os.environ, "PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1", **variables}
    with tempfile.TemporaryFile("w+") as said:
        started, peak = time.monotonic(), 0
        process = subprocess.Popen([sys.executable, *program], env=environment, stdout=said, stderr=said)
        ended, status, used = os.wait4(process.pid, os.WNOHANG)
        while not ended:
            peak = max(peak, _rss(process.pid))
            time.sleep(0.005)
            ended, status, used = os.wait4(process.pid, os.WNOHANG)
        seconds = time.monotonic() - started
        process.returncode = os.waitstatus_to_exitcode(status)
        said.seek(0)
        output = said.read()
    if process.returncode:
        raise SystemExit(f"ended with {process.returncode}: {output[-2000:]}")
    said_inside = _INSIDE.search(output)
    inside = float(said_inside[1]) if said_inside else 0.0
    return Run(seconds, used.ru_utime + used.ru_stime, inside, peak)


def _rss(pid: int) -> int:
    try:
        for line in Path(f"/proc/{pid}/status").read_text().splitlines():
            if line.startswith("RssAnon:"):
                return int(line.split()[1]) * 1024
    except OSError:
        pass
    return 0


def copied(source: Path, target: Path) -> float:
    """cp -r and an fsync of each file, in seconds."""
    started = time.monotonic()
    subprocess.run(["cp", "-r", str(source), str(target)], check=True)
    for file in _files(target):
        descriptor = os.open(file, os.O_RDONLY)
        os.fsync(descriptor)
        os.close(descriptor)
    return time.monotonic() - started


def _files(folder: Path) -> Iterator[Path]:
    return (at for at in sorted(folder.rglob("*")) if at.is_file())


def warm(folder: Path) -> None:
    """Read it all, so that it is in the page cache."""
    for file in _files(folder):
        with file.open("rb") as data:
            while data.read(1 << 24):
                pass


def beside(checkout: Path, place: Path, pairs: int, layers: int, workers: int) -> dict[str, dict[str, float]]:
    """NeMo's converter and ours by turns: Hugging Face to a float32 `.nemo`, and that the weights in both are equal."""
    source = place / "peer"
    make(source, layers)
    vocab = str(CONFIG["vocab_size"])
    subprocess.run(
        [sys.executable, "-c", TOKENIZER, str(source), vocab], check=True, env={**os.environ, "NXDT_NEMO": "0"}
    )
    theirs, ours = place / "theirs.nemo", place / "ours.nemo"
    runs: dict[str, list[Run]] = {"theirs": [], "ours": []}
    for number in range(pairs):
        for path in (theirs, ours):
            path.unlink(missing_ok=True)
        warm(source)
        runs["theirs"].append(peer(checkout, source, theirs))
        warm(source)
        runs["ours"].append(converted(source, ours, "nemo", workers))
        print(f"peer {number}: {runs['theirs'][-1].seconds:.1f} s, ours {runs['ours'][-1].seconds:.1f} s", flush=True)
    for path in (theirs, ours):
        converted(path, place / f"{path.stem}_back", "hf", workers)
    one, other = (place / f"{path.stem}_back" / "model.safetensors" for path in (theirs, ours))
    if not filecmp.cmp(one, other, shallow=False):
        raise SystemExit("the two converters' weights differ")
    size = (source / "model.safetensors").stat().st_size
    return {
        name: {
            "bytes": size,
            "seconds": statistics.median(run.seconds for run in made),
            "cpu": statistics.median(run.cpu for run in made),
            "rss": max(run.rss for run in made),
        }
        for name, made in runs.items()
    }


def measure(place: Path, pairs: int, layers: int, workers: int) -> dict[str, object]:
    """The table's numbers."""
    source, dist, back, copy = (place / name for name in ("hf", "dist", "back", "copy"))
    load = os.getloadavg()[0]
    largest = make(source, layers)
    rows = {}
    for name, origin, target, to in (("there", source, dist, "torch_dist"), ("back", dist, back, "hf")):
        runs: list[tuple[float, Run]] = []
        for number in range(pairs):
            warm(origin)
            seconds = copied(origin, copy)
            shutil.rmtree(copy)
            shutil.rmtree(target, ignore_errors=True)
            warm(origin)
            run = converted(origin, target, to, workers)
            runs.append((seconds, run))
            print(f"{name} {number}: cp {seconds:.2f} s, {run.seconds:.2f} s ({run.inside:.2f} s inside)", flush=True)
        rows[name] = {
            "cp": statistics.median(seconds for seconds, _ in runs),
            "seconds": statistics.median(run.seconds for _, run in runs),
            "inside": statistics.median(run.inside for _, run in runs),
            "cpu": statistics.median(run.cpu for _, run in runs),
            "ratio": statistics.median(run.seconds / seconds for seconds, run in runs),
            "ratio_inside": statistics.median(run.inside / seconds for seconds, run in runs),
            "rss": max(run.rss for _, run in runs),
        }
    if not filecmp.cmp(source / "model.safetensors", back / "model.safetensors", shallow=False):
        raise SystemExit("what came back is not what went out")
    size = (source / "model.safetensors").stat().st_size
    return {"bytes": size, "largest": largest, "pairs": pairs, "workers": workers, "load": load, **rows}


def page(found: dict[str, object]) -> str:
    """The page of results."""
    largest = int(str(found["largest"]))
    limit = 2 * largest + MEMORY_SLACK
    lines = [
        "# Conversion of a 1B Llama, beside `cp` and fsync",
        "",
        f"`python tools/bench/convert.py --pairs {found['pairs']}{' --peer CHECKOUT' if 'peer' in found else ''}`, "
        f"{date.today()}, {platform.machine()}, "
        f"{os.cpu_count()} cores, {found['workers']} writers.",
        f"Python {platform.python_version()}, torch {version('torch')}; load average before it {found['load']:.1f}.",
        "",
        f"{int(str(found['bytes'])) / 1e9:.2f} GB of bfloat16, the largest tensor {largest / 1e6:.0f} MB.",
        f"Medians of {found['pairs']} interleaved pairs. `inside` is what the command says itself, without loading.",
        f"Limits: {TIME_LIMIT} times `cp` and fsync; RssAnon of twice the largest tensor and 1 GB,",
        f"{limit / 1e6:.0f} MB. What came back is what went out, byte for byte.",
        "",
        "| Way | cp + fsync, s | Process, s | its CPU, s | inside, s | Process / cp | limit | inside / cp | limit |"
        " RssAnon, MB | limit |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    names = {"there": "hf to torch_dist, TP 8, PP 2", "back": "torch_dist to hf"}
    for key, name in names.items():
        row = found[key]
        assert isinstance(row, dict)
        fits = _met(row["rss"] <= limit)
        cells = [name, *(f"{row[name]:.2f}" for name in ("cp", "seconds", "cpu", "inside"))]
        for ratio in ("ratio", "ratio_inside"):
            cells += [f"{row[ratio]:.2f}", _met(row[ratio] <= TIME_LIMIT)]
        cells += [f"{row['rss'] / 1e6:.0f}", fits]
        lines.append(f"| {' | '.join(cells)} |")
    both = found.get("peer")
    if isinstance(both, dict):
        theirs, ours = both["theirs"], both["ours"]
        lines += [
            "",
            "NeMo v2.4.0's `convert_llama_hf_to_nemo.py --precision 32`, on this backend's CPU lane, and",
            f"`ckpt convert --to nemo --dtype fp32`, from {theirs['bytes'] / 1e9:.2f} GB of bfloat16.",
            "The same weights in both, bit for bit. Whole processes, by turns.",
            "",
            "| | s | CPU, s | RssAnon, MB |",
            "|---|---|---|---|",
        ]
        for name, row in (("NeMo", theirs), ("this package", ours)):
            lines.append(f"| {name} | {row['seconds']:.1f} | {row['cpu']:.1f} | {row['rss'] / 1e6:.0f} |")
        ratios = (theirs[key] / ours[key] for key in ("seconds", "cpu", "rss"))
        lines.append(f"| ratio | {' | '.join(f'{ratio:.1f}' for ratio in ratios)} |")
    return "\n".join(lines) + "\n"


def _met(good: bool) -> str:
    return "met" if good else "missed"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0] if __doc__ else "")
    parser.add_argument("--pairs", type=int, default=5)
    parser.add_argument("--layers", type=int, default=20, help="20 make a billion parameters")
    parser.add_argument("--workers", type=int, default=4)
    parser.add_argument("--peer", type=Path, help="a checkout of NeMo v2.4.0, whose converter runs beside ours")
    parser.add_argument("--peer-pairs", type=int, default=3)
    parser.add_argument("--peer-layers", type=int, default=20, help="NeMo's wants 14 bytes a parameter")
    parser.add_argument("--place", type=Path, help="where the files are made; a temporary folder by default")
    parser.add_argument("--print-only", action="store_true")
    given = parser.parse_args()
    with tempfile.TemporaryDirectory(dir=given.place) as place:
        found = measure(Path(place), given.pairs, given.layers, given.workers)
        if given.peer:
            found["peer"] = beside(given.peer, Path(place), given.peer_pairs, given.peer_layers, given.workers)
    text = page(found)
    print(text)
    if not given.print_only:
        PAGE.write_text(text)
    print(json.dumps(found))


if __name__ == "__main__":
    main()
