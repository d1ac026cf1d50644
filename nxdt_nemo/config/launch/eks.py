"""Kubernetes on EKS: a PyTorchJob of the Kubeflow Training Operator, and the ConfigMap that it reads.

Room config/ (leaf). Stands in for NNM's k8s/. Needs the operator (v1), AWS's Neuron device plugin and, for several
nodes, its EFA device plugin. Proof: tests/config/test_launch.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.config.launch import shell
from nxdt_nemo.config.launch.plan import PORT, Launch

__all__ = ["IMAGE", "files", "manifests"]

IMAGE = "ACCOUNT.dkr.ecr.REGION.amazonaws.com/nxdt-nemo:REPLACE"
FOLDER = "/etc/nxdt-nemo"
SHARED = "/shared"
# Memory that the host keeps for itself, in GiB, and huge pages for EFA, in MiB.
HOST, PAGES = 64, 5120


def files(launch: Launch) -> dict[str, str]:
    """`NAME.yaml`, two documents."""
    import yaml

    usage = [
        "Build the image from this project's Dockerfile (target trainium), push it, then",
        f"  kubectl apply -f {launch.name}.yaml",
    ]
    if not launch.claim:
        usage.append(f"Without --claim nothing is mounted at {SHARED}: results stay in the pods.")
    dumper = _dumper(yaml)
    parts = [yaml.dump(one, Dumper=dumper, sort_keys=False, width=1 << 20) for one in manifests(launch)]
    return {f"{launch.name}.yaml": "\n".join(shell.heading(launch, *usage)) + "\n" + "---\n".join(parts)}


def _dumper(yaml: Any) -> Any:
    """PyYAML's, with text of several lines as a block that can be read."""

    class Dumper(yaml.SafeDumper):
        pass

    def text(dumper: Any, value: str) -> Any:
        return dumper.represent_scalar("tag:yaml.org,2002:str", value, style="|" if "\n" in value else None)

    Dumper.add_representer(str, text)
    return Dumper


def script(launch: Launch) -> str:
    """What a pod runs."""
    command = shell.torchrun(launch, node='"$RANK"', composed=f"{FOLDER}/{launch.config.name}")
    lines = [
        "#!/usr/bin/env bash",
        "# MASTER_ADDR and RANK are the operator's: the first pod's name and this pod's number.",
        "set -euo pipefail",
        "",
        f'export MASTER_PORT="${{MASTER_PORT:-{PORT}}}"',
        "",
        *shell.limits(),
        "",
        *shell.environment(launch),
        "",
        f"exec {command[0]}",
        *command[1:],
    ]
    return "\n".join(lines) + "\n"


def manifests(launch: Launch) -> list[dict[str, Any]]:
    """The ConfigMap with the composed configuration and the script, and the PyTorchJob."""
    config = {
        "apiVersion": "v1",
        "kind": "ConfigMap",
        "metadata": {"name": launch.name},
        "data": {"run.sh": script(launch), launch.config.name: launch.text},
    }
    roles = {"Master": 1, "Worker": launch.nodes - 1}
    job = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": launch.name},
        "spec": {
            "nprocPerNode": str(launch.ranks),
            "runPolicy": {"backoffLimit": 10, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                role: {"replicas": number, "restartPolicy": "OnFailure", "template": _pod(launch)}
                for role, number in roles.items()
                if number
            },
        },
    }
    return [config, job]


def _pod(launch: Launch) -> dict[str, Any]:
    volumes: list[dict[str, Any]] = [
        {"name": "configuration", "configMap": {"name": launch.name}},
        {"name": "memory", "emptyDir": {"medium": "Memory"}},
    ]
    mounts = [{"name": "configuration", "mountPath": FOLDER}, {"name": "memory", "mountPath": "/dev/shm"}]
    if launch.claim:
        volumes.append({"name": "shared", "persistentVolumeClaim": {"claimName": launch.claim}})
        mounts.append({"name": "shared", "mountPath": SHARED})
    container: dict[str, Any] = {
        "name": "pytorch",  # the operator looks for this name
        "image": launch.image or IMAGE,
        "command": ["bash", f"{FOLDER}/run.sh"],
        "workingDir": SHARED if launch.claim else "/tmp",
        "volumeMounts": mounts,
    }
    spec: dict[str, Any] = {"containers": [container], "volumes": volumes}
    if launch.instance is not None:
        wanted = _resources(launch)
        container["resources"] = {"requests": wanted, "limits": dict(wanted)}
        spec["nodeSelector"] = {"node.kubernetes.io/instance-type": launch.instance.name}
        spec["tolerations"] = [{"key": "aws.amazon.com/neuron", "operator": "Exists", "effect": "NoSchedule"}]
    return {"spec": spec}


def _resources(launch: Launch) -> dict[str, str]:
    """The whole node: its chips, and for several nodes all its EFA interfaces with the huge pages that these need."""
    assert launch.instance is not None
    kind = launch.instance
    memory = kind.host_memory // 2**30
    wanted = {"aws.amazon.com/neuron": str(kind.chips), "memory": f"{memory - min(HOST, memory // 4)}Gi"}
    if launch.nodes > 1:
        wanted |= {"vpc.amazonaws.com/efa": str(kind.efa_devices), "hugepages-2Mi": f"{PAGES}Mi"}
    return wanted
