"""AWS ParallelCluster 3: the cluster's configuration, and the SLURM job for it.

Room config/ (leaf). The cluster's schema: https://docs.aws.amazon.com/parallelcluster/latest/ug/
cluster-configuration-file-v3.html. What only the owner of an account knows stands as REPLACE.
Proof: tests/config/test_launch.py.
"""

from __future__ import annotations

from typing import Any

from nxdt_nemo.config.launch import shell
from nxdt_nemo.config.launch.plan import Launch
from nxdt_nemo.config.launch.slurm import batch

__all__ = ["cluster", "files"]

SHARED = "/fsx"


def files(launch: Launch) -> dict[str, str]:
    """`NAME.sbatch` and `cluster.yaml`."""
    import yaml

    usage = (
        "Replace what says REPLACE, then",
        f"  pcluster create-cluster --cluster-name {launch.name} --cluster-configuration cluster.yaml",
        f"{SHARED} is shared by all nodes: the configuration, data, compiled graphs and results belong there.",
    )
    text = "\n".join(shell.heading(launch, *usage)) + "\n" + yaml.safe_dump(cluster(launch), sort_keys=False)
    return {f"{launch.name}.sbatch": batch(launch), "cluster.yaml": text}


def cluster(launch: Launch) -> dict[str, Any]:
    """The cluster's configuration."""
    assert launch.instance is not None
    kind = launch.instance
    queue: dict[str, Any] = {
        "Name": "trainium",
        "CapacityType": "ONDEMAND",
        "Networking": {"SubnetIds": ["subnet-00000000REPLACE"], "PlacementGroup": {"Enabled": launch.nodes > 1}},
        "ComputeResources": [
            {
                "Name": kind.name.split(".")[0],
                "InstanceType": kind.name,
                "MinCount": 0,
                "MaxCount": launch.nodes,
                "Efa": {"Enabled": bool(kind.efa_devices)},
            }
        ],
    }
    return {
        "Region": "us-west-2",
        "Image": {"Os": "ubuntu2204"},
        "HeadNode": {
            "InstanceType": "c5.4xlarge",
            "Networking": {"SubnetId": "subnet-00000000REPLACE"},
            "Ssh": {"KeyName": "REPLACE"},
            "LocalStorage": {"RootVolume": {"Size": 256}},
        },
        "Scheduling": {"Scheduler": "slurm", "SlurmQueues": [queue]},
        "SharedStorage": [
            {
                "Name": "fsx",
                "StorageType": "FsxLustre",
                "MountDir": SHARED,
                "FsxLustreSettings": {"StorageCapacity": 4800, "DeploymentType": "SCRATCH_2"},
            }
        ],
    }
