"""`fluxfill plan` as a user types it."""

import json
import re
import shutil

import pytest
from typer.testing import CliRunner

from configs.errors import InputError
from configs.fit import named_fit
from configs.flux_shape import FluxShape
from configs.loading import load_config
from launch.cli import app
from launch.command import REPO_ROOT

CONFIGS = REPO_ROOT / "configs"


def plan(*arguments: str):
    return CliRunner().invoke(app, ["plan", *map(str, arguments)])


def test_it_names_each_engine_and_every_part():
    made = plan(CONFIGS / "fill_lora.yaml", "--gpu", "h100-80gb", "--nodes", "4")
    assert made.exit_code == 0, made.output
    for said in ("chosen: the simplest of the fastest", "zero2", "fsdp2", "not here: it is one process", "activations"):
        assert said in made.output
    for said in ("Host memory", "TFLOP", "over the network", "GPU-hours", "at 512 px", "measured on a GPU"):
        assert said in made.output


def test_a_gpu_that_encodes_for_the_others_is_asked_for_and_not_planned_to_train():
    online = ("data.mode=online", "data.encoder_devices=[cuda:1]")
    made = plan(CONFIGS / "fill_lora.yaml", *online, "--gpu", "80gb", "--gpus-per-node", "2")
    assert "single" in made.stdout and "one GPU trains, and there is nothing to share" in made.stdout
    assert "on 1 x 2 x 80 GB GPU, of which 1 trains, cuda:1 encodes\n" in made.stdout
    told = json.loads(plan(CONFIGS / "fill_lora.yaml", *online, "--gpus-per-node", "2", "--json").stdout)
    assert (told["gpus_per_node"], told["training_gpus_per_node"]) == (2, 1)
    assert told["best"]["gpu_hours"] == 2 * told["best"]["hours"] and told["encoding"]["gpu"] == "cuda:1"
    cached = json.loads(plan(CONFIGS / "fill_lora.yaml", "--gpus-per-node", "2", "--json").stdout)
    assert cached["encoding"] is None and cached["training_gpus_per_node"] == 2


def test_encoders_that_their_own_gpu_does_not_hold_are_refused_with_what_it_does():
    online = ("data.mode=online", "data.encoder_devices=[cuda:3]", "model.precision=nf4", "--gpu", "24gb")
    made = plan(CONFIGS / "fill_lora.yaml", *online, "--gpus-per-node", "4")
    assert made.exit_code == 2
    said = re.search(
        r"cuda:3, which .* takes ([\d.]+) GiB, and 21.6 may be filled. Set (.*), with which it", made.stderr
    )
    assert float(said[1]) == pytest.approx(3 * (0.31 + 2 * 2.53 + 9.10 + 1.5), abs=0.1)
    assert plan(CONFIGS / "fill_lora.yaml", *online, *said[2].split(), "--gpus-per-node", "4").exit_code == 0


def test_an_encoder_on_a_gpu_that_is_not_there_is_refused():
    online = ("data.mode=online", "data.encoder_devices=[cuda:9]")
    made = plan(CONFIGS / "fill_lora.yaml", *online, "--gpus-per-node", "1")
    assert made.exit_code == 2
    assert "data.encoder_devices names cuda:9, but on a machine of this run cuda:0 is the only GPU" in made.stderr


def test_what_one_gpu_waits_for_is_no_other_gpu():
    """Its weights cross from the host's memory under an offload engine."""
    made = plan(CONFIGS / "fill_full.yaml", "--gpu", "80gb", "--gpus-per-node", "1", "parallel.engine=fsdp2-offload")
    assert " waiting for transfers, " in made.stdout and "waiting for others" not in made.stdout
    assert "gets 0.00 GB a step from the others of its node" in made.stdout


def test_a_gpu_without_a_name_is_refused_with_those_that_there_are():
    made = plan(CONFIGS / "fill_lora.yaml", "--gpu", "")
    assert made.exit_code == 2 or isinstance(made.exception, InputError)
    assert "there is no such GPU. Known: 24gb, " in f"{made.output}{made.exception}"


def test_json_holds_the_same():
    made = plan(CONFIGS / "fill_full.yaml", "--gpu", "b200-180gb", "--nodes", "2", "--json")
    found = json.loads(made.stdout)
    assert found["measured"] is False and found["best"]["fits"] and found["best"]["hours"] > 0
    assert found["best"]["gpu_bytes"] == pytest.approx(sum(part["bytes"] for part in found["best"]["memory"]))
    assert len(found["others"]) == 8


@pytest.mark.parametrize(
    "recipe, overrides, gpu, named",
    [
        pytest.param("fill_full", ["parallel.engine=ddp"], "h100-80gb", "ddp, micro-batches of 1", id="engine"),
        pytest.param("fill_full", ["parallel.engine=single"], "24GB", "single, micro-batches of 1", id="full on 24 GB"),
        pytest.param("fill_full", [], "24GB", "fsdp2, and one GPU trains, and there is nothing to share", id="one GPU"),
        pytest.param(
            "fill_lora", ["parallel.engine=single"], "h100-80gb", "single, and it is one process", id="single"
        ),
        pytest.param("fill_lora", ["parallel.engine=hsdp"], "h100-80gb", "hsdp, and it needs two nodes", id="one node"),
        pytest.param(
            "fill_lora",
            ["train.global_batch_size=256", "train.micro_batch_size=32"],
            "h100-80gb",
            "micro-batches of 32",
            id="micro",
        ),
        pytest.param(
            "fill_lora", ["train.activation_checkpointing=false"], "a100-40gb", "no checkpointing", id="checkpointing"
        ),
        pytest.param("fill_lora", [], "24GB", "single, micro-batches of 1, 56 of 57", id="the engine of auto"),
    ],
)
def test_a_config_that_is_started_with_what_does_not_fit_is_refused_with_the_nearest(
    recipe, overrides, gpu, named, tmp_path
):
    """And with --write the file becomes that nearest, which is then taken."""
    own = recipe == "fill_full" or any("engine" in override for override in overrides)
    said = "it names " if own else "parallel.engine is auto: `fluxfill train` takes "
    config = shutil.copy(CONFIGS / f"{recipe}.yaml", tmp_path / "mine.yaml")
    made = plan(config, *overrides, "--gpu", gpu)
    assert made.exit_code == 2
    assert said in made.stderr.replace(str(config), "it") and named in made.stderr and "--write" in made.stderr
    nearest = re.search(
        r"Nearest that fits: ([\w-]+), micro-batches of (\d+), (?:(\d+) of (\d+) blocks|no) check", made.stderr
    )
    assert plan(config, *overrides, "--gpu", gpu, "--write").exit_code == 0
    written = load_config(config)
    assert (written.parallel.engine, written.train.micro_batch_size) == (nearest[1], int(nearest[2]))
    checkpointed, blocks = (int(number or 0) for number in nearest.groups()[2:])
    assert written.train.activation_checkpointing == (checkpointed == blocks > 0 or checkpointed)
    assert plan(config, "--gpu", gpu).exit_code == 0


@pytest.mark.parametrize(
    "gpu, overrides, taken",
    [
        ("40GB", [], "parallel.engine is auto: `fluxfill train` takes ddp, micro-batches of 1, "),
        ("40GB", ["parallel.engine=ddp"], f"{CONFIGS / 'fill_lora.yaml'} names ddp, micro-batches of 1, "),
        pytest.param(
            "h100-80gb",
            ["parallel.engine=ddp", "train.activation_checkpointing=true"],
            f"{CONFIGS / 'fill_lora.yaml'} names ddp, micro-batches of 2, 57 of 57 blocks checkpointed, ",
            id="checkpointed blocks alone",
        ),
        pytest.param(
            "h100-80gb",
            ["train.micro_batch_size=1", "train.global_batch_size=256", "data.resolution=256"],
            "parallel.engine is auto: `fluxfill train` takes ddp, micro-batches of 1, no checkpointing, ",
            id="micro-batch alone",
        ),
    ],
)
def test_a_run_that_fits_and_is_not_the_chosen_one_is_told_with_what_it_takes(gpu, overrides, taken):
    made = plan(CONFIGS / "fill_lora.yaml", *overrides, "--gpu", gpu, "--json")
    assert made.exit_code == 0
    best, written = (json.loads(made.stdout)[name] for name in ("best", "as_written"))
    takes = f"{written['gpu_bytes'] / 2**30:.1f} GiB a GPU, {written['time']['total']:.2f} s a step"
    theirs, ours = made.stderr.split("; the plan, which --write sets: ")
    rest = theirs.removeprefix(taken)
    assert rest.endswith(takes) and len(rest) < 60 and theirs.startswith(taken), made.stderr
    assert ours.startswith(f"{best['engine']}, micro-batches of {best['micro_batch_size']}, ")
    assert ours.endswith(f", {best['gpu_bytes'] / 2**30:.1f} GiB a GPU, {best['time']['total']:.2f} s\n")
    assert "--write" not in plan(CONFIGS / "fill_lora.yaml", f"parallel.engine={best['engine']}", "--gpu", gpu).output


def test_a_run_as_fast_as_the_chosen_one_is_told_apart_by_what_both_take():
    config = CONFIGS / "dev_to_fill_full.yaml"
    made = plan(config, "train.micro_batch_size=1", "--gpu", "h200-141gb", "--gpus-per-node", "8", "--json")
    assert made.exit_code == 0
    best, written = (json.loads(made.stdout)[name] for name in ("best", "as_written"))
    assert f"{best['time']['total']:.2f}" == f"{written['time']['total']:.2f}"
    assert made.stderr == (
        f"{config} names fsdp2, micro-batches of 1, no checkpointing, 54.5 GiB a GPU; "
        "the plan, which --write sets: fsdp2, micro-batches of 2, no checkpointing, 84.8 GiB a GPU\n"
    )


def test_where_nothing_fits_the_nearest_is_a_change_of_config_or_gpus():
    made = plan(CONFIGS / "fill_lora.yaml", "train.optimizer=prodigy", "train.lr=1.0", "--gpu", "24GB")
    assert made.exit_code == 2
    assert "It does not fit: single" in made.stderr and "Nearest that fits: model.precision=int8: " in made.stderr


def test_write_sets_three_keys_and_leaves_every_other_line(tmp_path):
    config = tmp_path / "mine.yaml"
    # One without a section for the engine, one with; of no block, and of some.
    for recipe, gpu in (("fill_lora", "h100-80gb"), ("fill_full", "h100-80gb"), ("fill_lora", "rtx4090-24gb")):
        shutil.copy(CONFIGS / f"{recipe}.yaml", config)
        before = config.read_text().splitlines()
        made = plan(config, "--gpu", gpu, "--nodes", "2", "--write", "--json")
        assert made.exit_code == 0, made.output
        best = json.loads(made.stdout)["best"]
        after = config.read_text().splitlines()
        changed = ("engine:", "activation_checkpointing:", "micro_batch_size:", "parallel:")
        assert [line for line in before if line.strip() and not line.lstrip().startswith(changed)] == [
            line for line in after if line.strip() and not line.lstrip().startswith(changed)
        ]
        written = load_config(config)
        assert written.parallel.engine != "auto" and written.train.micro_batch_size != "auto"
        assert named_fit(written, FluxShape()) == (best["micro_batch_size"], best["checkpointed"])
        assert (written.train.activation_checkpointing is False) == (gpu == "h100-80gb")
        assert plan(config, "--gpu", gpu, "--nodes", "2").exit_code == 0  # and is what is planned now


def test_write_puts_the_overrides_into_the_file_too_and_says_so(tmp_path):
    config = shutil.copy(CONFIGS / "fill_full.yaml", tmp_path / "mine.yaml")
    made = plan(config, "train.optimizer=adamw", "train.ema_decay=null", "--gpu", "h100-80gb", "--write")
    assert made.exit_code == 0 and "and train.optimizer=adamw train.ema_decay=null written" in made.stdout
    assert load_config(config).train.optimizer == "adamw" and load_config(config).train.ema_decay is None


def test_write_does_not_tell_of_keys_that_the_plan_replaced(tmp_path):
    config = shutil.copy(CONFIGS / "fill_full.yaml", tmp_path / "mine.yaml")
    replaced = ("parallel.engine=ddp", "train.micro_batch_size=7", "train.activation_checkpointing=false")
    made = plan(config, *replaced, "train.lr=3e-5", "--gpu", "80GB", "--write")
    assert made.exit_code == 0 and made.stdout.endswith(" GiB a GPU, and train.lr=3e-5 written\n")
    assert load_config(config).parallel.engine == "fsdp2" and load_config(config).train.lr == 3e-5
    alone = plan(config, *replaced, "--gpu", "80GB", "--write")
    assert alone.exit_code == 0 and alone.stdout.endswith(" GiB a GPU written\n")


def test_the_section_slurm_says_where_to_plan_for_and_options_go_before_it(tmp_path):
    config = tmp_path / "mine.yaml"
    text = (CONFIGS / "fill_lora.yaml").read_text()
    config.write_text(text + "\nslurm:\n  gpu: h200-141gb\n  nodes: 2\n  gpus_per_node: 4\n")
    made = plan(config)
    assert made.exit_code == 0 and "2 x 4 x NVIDIA H200" in made.stdout
    assert f"From {config}: slurm.gpu h200-141gb, slurm.nodes 2, slurm.gpus_per_node 4" in made.stdout
    other = plan(config, "--gpu", "a100-80gb", "--nodes", "1", "--gpus-per-node", "8")
    assert "1 x 8 x NVIDIA A100 80GB" in other.stdout and "From " not in other.stdout
    some = plan(config, "--nodes", "3", "slurm.gpus_per_node=null", "--json")
    assert (json.loads(some.stdout)["nodes"], json.loads(some.stdout)["gpus_per_node"]) == (3, 8)
    assert some.stderr == f"From {config}: slurm.gpu h200-141gb\n"
    assert "80 GB GPU" in plan(CONFIGS / "fill_lora.yaml").stdout  # where neither says


def test_a_simulation_says_what_the_table_says(monkeypatch):
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)  # by which GPUs are hidden from tests
    made = plan(CONFIGS / "fill_lora.yaml", "data.resolution=256", "--gpu", "h100-80gb", "--simulate")
    assert made.exit_code == 0, made.output
    assert "Simulated: activations of" in made.output
