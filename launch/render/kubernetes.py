"""A run on Kubernetes: a JobSet, or a PyTorchJob of Kubeflow's training operator, as a manifest.

The manifest is plain data, written by a YAML library, so no name can break out of its place. Kubernetes replaces
$(NAME) in commands; of what a user has given every $ is doubled, which it turns back into one.
"""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

from configs.errors import InputError
from configs.supervision import ALREADY_RUNNING, BAD_INPUT
from launch.command import SHUTDOWN_SECONDS

_PORT = 29500
_RESTARTS = 10
_LONGEST_NAME = 40  # Kubernetes adds the names of job, pod and node, to 63


@dataclass(frozen=True)
class Pods:
    """What each node's pod is made of.  processes_per_node: that train, fewer than the GPUs where some of those encode.
    command: `fluxfill train` with its config and overrides.  folder: where it runs.  claims: (name of a
    PersistentVolumeClaim, where it is mounted).  resource: Kubernetes' name for such GPUs, by its maker's plugin."""

    name: str
    nodes: int
    gpus_per_node: int
    processes_per_node: int
    image: str
    command: Sequence[str]
    folder: Path
    claims: Sequence[tuple[str, str]] = ()
    resource: str = "nvidia.com/gpu"


def render_jobset(pods: Pods) -> str:
    """A JobSet: the pods of one indexed job. One that fails takes the others along, and all start again; bad input ends
    the set for good."""
    name = _object_name(pods.name)
    head = f"{name}-node-0-0.{name}"  # JobSet's name for the first pod of job 0 of "node"
    codes = {"containerName": "train", "operator": "In", "values": [BAD_INPUT, ALREADY_RUNNING]}
    template = _pod(pods, "train", "$(JOB_COMPLETION_INDEX)", head, str(_PORT))
    job = {
        "parallelism": pods.nodes,
        "completions": pods.nodes,
        "completionMode": "Indexed",
        "backoffLimit": 0,
        "podFailurePolicy": {"rules": [{"action": "FailJob", "onExitCodes": codes}]},
        "template": template | {"spec": template["spec"] | {"restartPolicy": "Never"}},
    }
    bad_input = {"name": "badInput", "action": "FailJobSet", "onJobFailureReasons": ["PodFailurePolicy"]}
    manifest = {
        "apiVersion": "jobset.x-k8s.io/v1alpha2",
        "kind": "JobSet",
        "metadata": {"name": name},
        "spec": {
            "network": {"enableDNSHostnames": True, "publishNotReadyAddresses": True},
            "failurePolicy": {"maxRestarts": _RESTARTS, "rules": [bad_input]},
            "replicatedJobs": [{"name": "node", "replicas": 1, "template": {"spec": job}}],
        },
    }
    return _dump(manifest)


def render_pytorchjob(pods: Pods) -> str:
    """A PyTorchJob. It has no rule for exit codes that fits: bad input, too, is tried again."""
    # The operator tells pods apart by RANK, and all of them where the first is.
    template = _pod(pods, "pytorch", "$(RANK)", "$(MASTER_ADDR)", "$(MASTER_PORT)")
    replicas = {"Master": 1, "Worker": pods.nodes - 1}
    manifest = {
        "apiVersion": "kubeflow.org/v1",
        "kind": "PyTorchJob",
        "metadata": {"name": _object_name(pods.name)},
        "spec": {
            "runPolicy": {"backoffLimit": _RESTARTS, "cleanPodPolicy": "Running"},
            "pytorchReplicaSpecs": {
                role: {"replicas": count, "restartPolicy": "OnFailure", "template": template}
                for role, count in replicas.items()
                if count
            },
        },
    }
    return _dump(manifest)


def _pod(pods: Pods, container: str, node_rank: str, head: str, port: str) -> dict[str, Any]:
    """The template of a pod.  node_rank, head, port: text in which Kubernetes replaces $(NAME)."""
    given = [word.replace("$", "$$") for word in pods.command]
    place = ["--nodes", str(pods.nodes), "--node-rank", node_rank, "--head", head, "--port", port]
    processes = ["--num-processes", str(pods.processes_per_node)]
    # torch and NCCL hand data between a node's processes through /dev/shm, of which a container has 64 MiB.
    volumes: list[dict] = [{"name": "shm", "emptyDir": {"medium": "Memory"}}]
    mounts = [{"name": "shm", "mountPath": "/dev/shm"}]
    for number, (claim, place_in_pod) in enumerate(pods.claims):
        volumes.append({"name": f"claim-{number}", "persistentVolumeClaim": {"claimName": claim}})
        mounts.append({"name": f"claim-{number}", "mountPath": place_in_pod})
    return {
        "spec": {
            "terminationGracePeriodSeconds": SHUTDOWN_SECONDS,
            "containers": [
                {
                    "name": container,
                    "image": pods.image,
                    "workingDir": str(pods.folder),
                    "command": [*given, *processes, *place],
                    "env": [{"name": "HF_HUB_OFFLINE", "value": "1"}],
                    "resources": {"limits": {pods.resource: str(pods.gpus_per_node)}},
                    "volumeMounts": mounts,
                }
            ],
            "volumes": volumes,
        }
    }


def _object_name(run: str) -> str:
    """A run's name as Kubernetes allows it: lower case, digits and "-". Raises InputError if that is too long."""
    name = re.sub(r"[^a-z0-9]+", "-", run.lower()).strip("-")
    if name and not name[0].isalpha():
        name = f"run-{name}"
    if not 0 < len(name) <= _LONGEST_NAME:
        raise InputError(
            f"run.name {run}: Kubernetes needs a name of 1 to {_LONGEST_NAME} letters and digits. Set run.name."
        )
    return name


class _Dumper(yaml.SafeDumper):
    """Quotes all but plain words: Kubernetes takes more texts for numbers and truth values than PyYAML (1e3, y)."""

    def ignore_aliases(self, data: Any) -> bool:
        return True


def _represent_text(dumper: _Dumper, text: str) -> yaml.Node:
    is_word = re.fullmatch(r"[A-Za-z][A-Za-z0-9_./-]+", text)
    return dumper.represent_scalar("tag:yaml.org,2002:str", text, None if is_word else '"')


_Dumper.add_representer(str, _represent_text)


def _dump(manifest: dict) -> str:
    return yaml.dump(manifest, Dumper=_Dumper, sort_keys=False, width=100)
