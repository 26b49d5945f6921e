"""Manifests against the classes that Kubeflow makes of JobSet's and Kubernetes' own schemas; those of the PyTorchJob
itself, of which there are none, by the fields that its documentation asks for."""

import re
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import yaml
from kubeflow_trainer_api.models.io_k8s_api_core_v1_pod_template_spec import IoK8sApiCoreV1PodTemplateSpec
from kubeflow_trainer_api.models.jobset_v1alpha2_job_set import JobsetV1alpha2JobSet

from configs.errors import InputError
from launch.render.kubernetes import Pods, render_jobset, render_pytorchjob

NO_TEXT = ["y", "1e3", "012", "no"]  # unless quoted: Kubernetes takes them for numbers and truth values
ODD = [*NO_TEXT, 'it\'s "quoted"', "$(HOME) $$ $", "a: b # c", "- x", "two\nlines", "&anchor *alias", "é"]
PODS = Pods(
    name="Sofa_removal.v2",
    nodes=2,
    gpus_per_node=8,
    processes_per_node=8,
    image="registry/fluxfill:1",
    command=["fluxfill", "train", "my.yaml", *ODD],
    folder=Path("/work dir"),
    claims=[("data", "/data"), ("runs", "/runs")],
)


def expand(word: str, variables: dict[str, str]) -> str:
    """A word of a container's command as Kubernetes hands it to the container."""
    return re.sub(
        r"\$(\$|\((\w+)\))", lambda found: "$" if found[1] == "$" else variables.get(found[2], found[0]), word
    )


def same_but_for_defaults(given: Any, parsed: Any) -> bool:
    """Whether all that was given has come through a schema's class: what it does not know it drops."""
    if isinstance(given, dict):
        return isinstance(parsed, dict) and all(
            name in parsed and same_but_for_defaults(value, parsed[name]) for name, value in given.items()
        )
    if isinstance(given, list):
        return len(given) == len(parsed) and all(map(same_but_for_defaults, given, parsed))
    return given == parsed


def test_a_jobset_is_of_the_schema_and_restarts_as_a_whole() -> None:
    manifest = yaml.safe_load(render_jobset(PODS))
    parsed = JobsetV1alpha2JobSet.from_dict(manifest)
    assert parsed is not None and same_but_for_defaults(manifest, parsed.to_dict())
    [group] = manifest["spec"]["replicatedJobs"]
    job = group["template"]["spec"]
    assert (job["parallelism"], job["completions"], job["completionMode"], job["backoffLimit"]) == (2, 2, "Indexed", 0)
    [rule] = job["podFailurePolicy"]["rules"]
    container = job["template"]["spec"]["containers"][0]
    assert (rule["action"], rule["onExitCodes"]["values"]) == ("FailJob", [2, 3])
    assert rule["onExitCodes"]["containerName"] == container["name"]
    assert job["template"]["spec"]["restartPolicy"] == "Never", "podFailurePolicy asks for it"
    assert manifest["spec"]["failurePolicy"]["rules"][0]["action"] == "FailJobSet"


def test_the_pods_of_a_jobset_meet_at_the_first_one() -> None:
    manifest = yaml.safe_load(render_jobset(PODS))
    [group] = manifest["spec"]["replicatedJobs"]
    command = group["template"]["spec"]["template"]["spec"]["containers"][0]["command"]
    name = manifest["metadata"]["name"]
    assert name == "sofa-removal-v2"
    assert command[command.index("--head") + 1] == f"{name}-{group['name']}-0-0.{name}"
    rank = command[command.index("--node-rank") + 1]
    assert expand(rank, {"JOB_COMPLETION_INDEX": "1"}) == "1"


@pytest.mark.parametrize("nodes, roles", [(1, {"Master": 1}), (4, {"Master": 1, "Worker": 3})])
def test_a_pytorchjob_has_what_its_operator_asks_for(nodes: int, roles: dict[str, int]) -> None:
    manifest = yaml.safe_load(render_pytorchjob(replace(PODS, nodes=nodes)))
    assert (manifest["apiVersion"], manifest["kind"]) == ("kubeflow.org/v1", "PyTorchJob")
    replicas = manifest["spec"]["pytorchReplicaSpecs"]
    assert {role: spec["replicas"] for role, spec in replicas.items()} == roles
    for spec in replicas.values():
        assert spec["restartPolicy"] in ("Always", "OnFailure", "Never", "ExitCode")
        parsed = IoK8sApiCoreV1PodTemplateSpec.from_dict(spec["template"])
        assert parsed is not None and same_but_for_defaults(spec["template"], parsed.to_dict())
        [container] = spec["template"]["spec"]["containers"]
        assert container["name"] == "pytorch", "the operator looks for this name"
        words = [expand(word, {"RANK": "2", "MASTER_ADDR": "h", "MASTER_PORT": "1"}) for word in container["command"]]
        assert words[-8:] == ["--nodes", str(nodes), "--node-rank", "2", "--head", "h", "--port", "1"]


@pytest.mark.parametrize("render", [render_jobset, render_pytorchjob])
def test_odd_words_reach_the_container_as_they_are(render: Any) -> None:
    text = render(PODS)
    assert "&id" not in text
    [found] = {
        tuple(match["command"]) for match in _dicts(yaml.safe_load(text)) if "command" in match and "image" in match
    }
    assert [expand(word, {"HOME": "/root"}) for word in found[3 : 3 + len(ODD)]] == ODD
    for word in NO_TEXT:
        assert re.search(f"- (['\"]){word}\\1\n", text)


def _dicts(value: Any) -> list[dict]:
    if isinstance(value, list):
        return [found for item in value for found in _dicts(item)]
    if isinstance(value, dict):
        return [value, *(found for item in value.values() for found in _dicts(item))]
    return []


def test_a_node_gets_its_gpus_shared_memory_and_claims() -> None:
    spec = yaml.safe_load(render_pytorchjob(PODS))["spec"]["pytorchReplicaSpecs"]["Master"]["template"]["spec"]
    [container] = spec["containers"]
    assert container["resources"]["limits"] == {"nvidia.com/gpu": "8"}
    mounted = {mount["mountPath"]: mount["name"] for mount in container["volumeMounts"]}
    volumes = {volume["name"]: volume for volume in spec["volumes"]}
    assert volumes[mounted["/dev/shm"]]["emptyDir"] == {"medium": "Memory"}
    assert volumes[mounted["/data"]]["persistentVolumeClaim"]["claimName"] == "data"
    assert spec["terminationGracePeriodSeconds"] >= 600, "a save must fit"


@pytest.mark.parametrize("name", ["a" * 41, "___"])
def test_a_name_that_kubernetes_cannot_have_is_refused(name: str) -> None:
    with pytest.raises(InputError, match="Kubernetes needs a name of 1 to 40"):
        render_jobset(replace(PODS, name=name))


def test_a_name_that_begins_with_a_digit_is_made_to_fit() -> None:
    assert yaml.safe_load(render_jobset(replace(PODS, name="2nd try")))["metadata"]["name"] == "run-2nd-try"
