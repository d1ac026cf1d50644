"""Time from the command to the first step, and where it goes, beside the same imports in plain Python.

    python tools/bench/startup.py [--pairs 3]

Both variants are run in turn, so that noise meets both; the figures are medians, and the last line is JSON.
"plain" imports the modules that the script imports and everything they pull in, with none of ours; stock NeMo
cannot go further on a machine without CUDA.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
IMPORTS = """
import torch.multiprocessing
from nemo.collections.nlp.models.language_modeling.megatron_gpt_model import MegatronGPTModel
from nemo.collections.nlp.parts.megatron_trainer_builder import MegatronTrainerBuilder
from nemo.core.config import hydra_runner
from nemo.utils.exp_manager import exp_manager
"""
SCRIPT = (
    """
import os, sys, time
start = float(os.environ["BENCH_START"])
marks = {"python and backend": time.time() - start}
"""
    + IMPORTS
    + """
marks["imports"] = time.time() - start
from lightning.pytorch import Callback

class FirstStep(Callback):
    def on_train_batch_end(self, trainer, *rest):
        if trainer.global_step == 1:
            marks["first step"] = time.time() - start
            import json
            with open(os.environ["BENCH_MARKS"], "w") as file:
                json.dump(marks, file)

@hydra_runner(config_path=".", config_name="none")
def main(cfg):
    marks["configuration"] = time.time() - start
    trainer = MegatronTrainerBuilder(cfg).create_trainer([FirstStep()])
    exp_manager(trainer, cfg.exp_manager)
    marks["trainer"] = time.time() - start
    model = MegatronGPTModel(cfg.model, trainer)
    marks["model"] = time.time() - start
    trainer.fit(model)

main()
"""
)


def plain() -> float:
    """Seconds of the script's imports in plain Python."""
    start = time.perf_counter()
    environment = os.environ | {"NXDT_NEMO": ""}
    subprocess.run([sys.executable, "-c", IMPORTS], check=True, env=environment, capture_output=True)
    return time.perf_counter() - start


def ours(folder: Path, corpus: Path) -> dict[str, float]:
    """Seconds from the command to each mark of the run."""
    script = folder / "script.py"
    script.write_text(SCRIPT)
    run = folder / f"run_{time.time_ns()}"
    arguments = [
        f"--config-path={ROOT / 'configs'}",
        "--config-name=demo_llama",
        f"exp_manager.explicit_log_dir={run}",
        f"model.tokenizer.model={corpus / 'tokenizer.model'}",
        f"model.data.data_prefix=[1.0,{corpus / 'corpus_text_document'}]",
        f"model.data.index_mapping_dir={folder / 'index'}",
        "trainer.devices=1",
        "model.tensor_model_parallel_size=1",
        "trainer.max_steps=1",
        "trainer.val_check_interval=1",
        "trainer.limit_val_batches=1",
        "exp_manager.create_checkpoint_callback=false",
    ]
    marks = folder / "marks.json"
    marks.unlink(missing_ok=True)
    named = {"BENCH_START": repr(time.time()), "BENCH_MARKS": str(marks), "HF_HUB_OFFLINE": "1"}
    done = subprocess.run(
        [sys.executable, "-m", "nxdt_nemo", "run", str(script), *arguments],
        env=os.environ | named,
        capture_output=True,
        text=True,
    )
    if not marks.exists():
        raise SystemExit(done.stdout[-2000:] + done.stderr[-2000:])
    return dict(json.loads(marks.read_text()))


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    pairs = parser.parse_args().pairs
    sys.path.insert(0, str(ROOT / "tools"))
    from demo_lib.corpus import write_corpus
    from demo_lib.tokens import index_corpus, train_tokenizer

    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        write_corpus(folder / "corpus.jsonl")
        train_tokenizer(folder / "corpus.jsonl", folder / "tokenizer.model")
        index_corpus(folder / "corpus.jsonl", folder / "tokenizer.model", folder / "corpus_text_document")
        ours(folder, folder)  # builds the data index once, and warms the file cache for both
        plains, runs = [], []
        for _ in range(pairs):
            plains.append(plain())
            runs.append(ours(folder, folder))
    marks = {key: statistics.median(run[key] for run in runs) for key in runs[0]}
    imports = statistics.median(plains)
    before = 0.0
    print(f"{'imports in plain Python':28}{imports:8.1f} s")
    for key, value in marks.items():
        print(f"{'to ' + key:28}{value:8.1f} s   (+{value - before:.1f})")
        before = value
    ratio = statistics.median(run["first step"] / one for run, one in zip(runs, plains, strict=True))
    print(f"first step / plain imports: {ratio:.2f} ({pairs} pairs)")
    print(json.dumps({"plain_imports_s": imports, "marks_s": marks, "ratio": ratio, "pairs": pairs}))


if __name__ == "__main__":
    main()
