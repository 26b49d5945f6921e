import pytest

from configs.errors import InputError
from configs.slurm_schema import ContainerConfig, SlurmConfig
from launch.slurm.allocation import Allocation
from launch.slurm.step import render_step, render_step_environment

TWO_NODES = Allocation("77", num_nodes=2, gpus_per_node=8, cpus_per_node=64, nodelist="n[0-1]")


def step(container: ContainerConfig | None = None) -> list[str]:
    return render_step(TWO_NODES, container, "/v/bin/python", "/my work", ["launch.slurm.node", "train", "a b.yaml"])


def test_one_task_on_each_node_gets_all_of_its_cores_and_gpus() -> None:
    line = step()
    assert line[0] == "srun" and line[-6:] == ["/v/bin/python", "-P", "-m", "launch.slurm.node", "train", "a b.yaml"]
    assert {"--nodes=2", "--ntasks=2", "--ntasks-per-node=1", "--cpus-per-task=64", "--gpus-per-node=8"} <= set(line)


def test_a_step_neither_loses_variables_nor_kills_ranks_that_still_save() -> None:
    assert {"--export=ALL", "--input=none", "--kill-on-bad-exit=0", "--wait=0"} <= set(step())


def test_a_node_without_gpus_is_asked_for_none() -> None:
    line = render_step(Allocation("77", 1, 0, 4, "n0"), None, "python", "/", ["a"])
    assert not any(word.startswith("--gpus") for word in line)


def test_containers_run_the_nodes_program_with_the_folder_mounted() -> None:
    pyxis = step(ContainerConfig(runtime="pyxis", image="/i.sqsh", mounts=["/data:/data"]))
    assert {"--container-image=/i.sqsh", "--container-mounts=/my work:/my work,/data:/data"} <= set(pyxis)
    assert "--container-workdir=/my work" in pyxis
    assert pyxis[-6:-3] == ["python3", "-P", "-m"]
    apptainer = step(ContainerConfig(runtime="apptainer", image="/i.sif", mounts=["/data"], python="/opt/python"))
    begin = apptainer.index("apptainer")
    assert apptainer[begin:-3] == (
        [
            "apptainer",
            "exec",
            "--nv",
            "--bind",
            "/my work,/data",
            "--pwd",
            "/my work",
            "/i.sif",
            "/opt/python",
            "-P",
            "-m",
        ]
    )


@pytest.mark.parametrize("folder", ["/work/a,b", "/work/a:b"])
def test_a_folder_that_a_container_would_mount_as_two_is_refused(folder: str) -> None:
    for runtime in ("pyxis", "apptainer"):
        with pytest.raises(InputError, match="separates the mounts"):
            render_step(TWO_NODES, ContainerConfig(runtime=runtime, image="i"), "python", folder, [])


def test_steps_are_offline_and_use_the_interface_that_was_named(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    assert render_step_environment(SlurmConfig()) == {"HF_HUB_OFFLINE": "1"}
    named = render_step_environment(
        SlurmConfig(interface="ib0", env={"NCCL_DEBUG": "INFO", "GLOO_SOCKET_IFNAME": "eth1"})
    )
    assert named["NCCL_SOCKET_IFNAME"] == "=ib0" and named["NCCL_DEBUG"] == "INFO"
    assert named["GLOO_SOCKET_IFNAME"] == "eth1", "the config has the last word"
