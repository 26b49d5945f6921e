"""A plan for people: the lines add up."""

import re

import pytest

from configs.flux_shape import FluxShape
from configs.gpu_profiles import load_gpu_profile
from configs.loading import load_config
from configs.plan import Cluster, plan_run
from launch.command import REPO_ROOT
from launch.plan.report import engine_lines, place, plan_lines, run_hours


def test_gpus_without_a_sample_are_told():
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml")
    for nodes, told in ((2, False), (4, True)):
        planned = plan_run(config, FluxShape(), Cluster(load_gpu_profile("h100-80gb"), nodes, 8), tokens=4608)
        lines = list(plan_lines(config, FluxShape(), planned, planned.best))
        assert any("Only 16 of 32 GPUs" in line for line in lines) is told


def test_the_parts_of_a_gpu_add_up_to_what_stands_below_them():
    config = load_config(REPO_ROOT / "configs" / "fill_full.yaml")
    planned = plan_run(config, FluxShape(), Cluster(load_gpu_profile("h200"), 2, 8), tokens=4608)
    lines = list(plan_lines(config, FluxShape(), planned, planned.best))
    end = next(number for number, line in enumerate(lines) if "together" in line)
    sizes = [float(line.split()[0]) for line in lines[1 : end + 1]]
    assert sum(sizes[:-1]) == round(sizes[-1], 2) or abs(sum(sizes[:-1]) - sizes[-1]) < 0.05
    hours = run_hours(config, planned.best)
    assert any(f"{hours * 16:,.1f} GPU-hours" in line for line in lines)
    table = list(engine_lines(planned))
    assert len(table) == 10 and sum(bool(re.search("chosen", line)) for line in table) == 1


def test_a_plan_that_stands_below_a_faster_one_is_not_called_the_fastest():
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml", ["train.global_batch_size=32"])
    planned = plan_run(config, FluxShape(), Cluster(load_gpu_profile("h100-80gb"), 4, 8), tokens=4608)
    assert planned.best is not planned.plans[0] and planned.best.time.total > planned.plans[0].time.total
    [line] = [line for line in engine_lines(planned) if "chosen" in line]
    assert line.endswith("chosen: the simplest of the fastest")
    alone = plan_run(config, FluxShape(), Cluster(load_gpu_profile("h100-80gb"), 1, 1), tokens=4608)
    assert next(line for line in engine_lines(alone) if "chosen" in line).endswith("chosen: the fastest that fits")


@pytest.mark.parametrize("gpu, nodes, told", [("l40s", 2, True), ("l40s", 1, False), ("mi300x", 2, False)])
def test_a_network_whose_rate_nobody_named_is_told(gpu, nodes, told):
    """A plan that guesses it does not compare seconds in silence; on one node nothing goes over it."""
    config = load_config(REPO_ROOT / "configs" / "fill_lora.yaml")
    planned = plan_run(config, FluxShape(), Cluster(load_gpu_profile(gpu), nodes, 8), tokens=4608)
    lines = list(plan_lines(config, FluxShape(), planned, planned.best))
    assert any("network's rate is not known" in line for line in lines) is told


@pytest.mark.parametrize(
    "devices, nodes, training, others, said",
    [
        ("[cuda:1]", 1, 1, 1, "1 x 2 x 80 GB GPU, of which 1 trains, cuda:1 encodes"),
        ("[cuda:6, cuda:7]", 1, 6, 2, "1 x 8 x 80 GB GPU, of which 6 train, cuda:6 and cuda:7 encode"),
        ("[cuda:1]", 2, 1, 3, "2 x 4 x 80 GB GPU, of which on each node 1 trains, cuda:1 encodes, 2 do nothing"),
        ("[cuda:0, cuda:1]", 1, 2, 0, "1 x 2 x 80 GB GPU"),
    ],
)
def test_gpus_that_do_not_train_are_named_and_their_hours_count(devices, nodes, training, others, said):
    config = load_config(
        REPO_ROOT / "configs" / "fill_lora.yaml", ["data.mode=online", f"data.encoder_devices={devices}"]
    )
    cluster = Cluster(load_gpu_profile("80gb"), nodes, training, others)
    assert place(config, cluster) == said
    planned = plan_run(config, FluxShape(), cluster, tokens=4608)
    lines = list(plan_lines(config, FluxShape(), planned, planned.best))
    hours = run_hours(config, planned.best) * nodes * (training + others)
    assert any(f"{hours:,.1f} GPU-hours" in line for line in lines)
    assert any(line.startswith("Memory of cuda:") for line in lines) is (others > 0)
