import shlex
from pathlib import Path

import pytest
import yaml

from configs.loading import load_config
from launch.render.accelerate import render_lines

RECIPE = str(Path(__file__).resolve().parents[3] / "configs" / "fill_lora.yaml")


def lines(*overrides: str, nodes: int = 3) -> list[list[str]]:
    rendered = render_lines(
        load_config(RECIPE, overrides),
        RECIPE,
        overrides,
        nodes=nodes,
        processes_per_node=8,
        head="10.0.0.1",
        port=29500,
        cores_per_node=64,
    )
    return [shlex.split(line) for line in rendered]


def test_the_lines_differ_in_the_nodes_rank_alone() -> None:
    found = lines()
    place = [words[words.index("--machine_rank") + 1] for words in found]
    assert place == ["0", "1", "2"]
    for words, rank in zip(found, place, strict=True):
        words[words.index("--machine_rank") + 1] = "R"
        assert words == found[0], rank
    assert {"PET_SIGNALS_TO_HANDLE=SIGTERM,SIGINT,SIGUSR1,SIGUSR2", "OMP_NUM_THREADS=8"} <= set(found[0])
    for option, value in (("--num_processes", "24"), ("--num_machines", "3"), ("--main_process_ip", "10.0.0.1")):
        assert found[0][found[0].index(option) + 1] == value


@pytest.mark.parametrize("engine", ["zero1", "zero2", "zero3", "zero3-offload"])
def test_under_zero_each_line_starts_its_own_node(engine: str) -> None:
    [words, _] = lines(f"parallel.engine={engine}", "model.precision=bf16", nodes=2)
    path = Path(words[words.index("--config_file") + 1])
    assert yaml.safe_load(path.read_text())["deepspeed_config"]["deepspeed_multinode_launcher"] == "standard"


@pytest.mark.parametrize("folder", ["/it's $(rm -rf x) `y` \\ z", '/a "b"; exit', "/$HOME/*"])
def test_odd_names_reach_the_trainer_as_they_are(folder: str) -> None:
    for words in lines(f"run.dir={folder}"):
        assert words[-1] == f"run.dir={folder}"
        assert f"FLUXFILL_OUTCOME={folder}/fill-lora/outcome.json" in words
