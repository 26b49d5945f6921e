import pytest

from launch.check.situation import load_situation
from launch.gpus import Gpu

CARDS = tuple(Gpu(index, "NVIDIA H200", 140.0, 0.0, "580.1", (9, 0)) for index in range(3))


def test_engine_and_processes_are_those_of_train(situate):
    alone, cards = situate(), situate(gpus=CARDS)
    assert (alone.engine, alone.processes) == ("single", 1)
    assert (cards.engine, cards.processes) == ("ddp", 3)
    encoding = situate("data.mode=online", "data.encoder_devices=[cuda:2]", gpus=CARDS)
    assert encoding.processes == 2
    assert situate("parallel.engine=fsdp2", processes=8).processes == 8


def test_every_problem_of_a_config_is_a_line_with_its_cure(config_file):
    situation, checks = load_situation(str(config_file), ("train.stps=3", "train.lr=fast"), None, ())
    assert situation is None and [made.state for made in checks] == ["error", "error"]
    assert any("train.stps is 3" in made.what and "train.steps" in made.cure for made in checks)
    assert all(made.what and made.cure for made in checks)


def test_what_ends_a_sentence_in_a_value_or_a_path_does_not_end_the_problem(config_file, tmp_path):
    named = tmp_path / "my. config.yaml"
    named.write_text(config_file.read_text(encoding="utf-8"), encoding="utf-8")
    twins = "{name: k, target: to. be. kept, mask: masks. new/1}, {name: k, target: x, mask: dataset/mask}"
    _, made = load_situation(str(named), ('run.name="x. y"', f"data.datasets=[{twins}]", "train.stps=3"), None, ())
    checks = {check.what.partition(" is ")[0].rpartition(" ")[2]: check for check in made}
    assert checks["run.name"].what.startswith('command line: run.name is "x. y", but must be text that matches ')
    assert checks["run.name"].cure == "For example: sofa-removal"
    assert " ... " in checks["data.datasets"].what and checks["data.datasets"].cure == ""
    assert checks["data.datasets"].what.endswith("each needs a name of its own: rename all but one of those called k")
    assert checks["train.stps"].cure == "Did you mean train.steps?"
    _, (missing,) = load_situation(str(tmp_path / "no. such.yaml"), (), None, ())
    assert missing.what == f"{tmp_path}/no. such.yaml: there is no such file"
    assert missing.cure == "Give the path of a config, such as a copy of a recipe."


def test_an_engine_that_auto_becomes_is_held_against_the_rest(config_file):
    """Of engine auto the loader knows only that some engine would do."""
    overrides = ("train.compile=regional", "parallel.engine=zero2")
    situation, (made,) = load_situation(str(config_file), overrides, 2, ())
    assert situation is None and "do not go together" in made.what
    assert made.cure == "Nearest that works: train.compile=off."


@pytest.mark.parametrize(
    "overrides, gpus, words",
    [
        (
            ["data.encoder_devices=[cuda:9]"],
            CARDS,
            "data.encoder_devices names cuda:9, but on a machine of this run there",
        ),
        (["data.encoder_devices=[cuda:3]", "slurm.gpus_per_node=2"], (), "there are 2 GPUs, from cuda:0 on"),
        (["data.encoder_devices=[cuda:8]", "slurm.gpu=h100-80gb"], (), "there are 8 GPUs, from cuda:0 on"),
        (["data.encoders.t5=cuda:3"], CARDS, "data.encoders.t5 names cuda:3"),
        (["slurm.gpu=foo", "slurm.gpus_per_node=2"], (), "slurm.gpu: foo: there is no such GPU"),
        (["data.encoder_devices=[cuda:7]", "slurm.gpus_per_node=8"], CARDS, None),  # checked elsewhere
        (["data.encoder_devices=[cuda:2]"], CARDS, None),
        (["data.encoder_devices=[cuda:9]"], (), None),  # nobody knows
    ],
)
def test_gpus_that_are_not_there_are_an_error_with_the_ways_out(overrides, gpus, words, config_file):
    situation, (made,) = load_situation(str(config_file), ("data.mode=online", *overrides), None, gpus)
    assert (situation is None) is (words is not None) and (words or "run ") in made.what
    assert made.state == ("ok" if words is None else "error") and (made.cure or words is None)
