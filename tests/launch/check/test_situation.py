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


def test_an_engine_that_auto_becomes_is_held_against_the_rest(config_file):
    """Of engine auto the loader knows only that some engine would do."""
    overrides = ("train.compile=regional", "parallel.engine=zero2")
    situation, (made,) = load_situation(str(config_file), overrides, 2, ())
    assert situation is None and "do not go together" in made.what
