from pathlib import Path

import pytest
from rich.progress import Progress

from data.encoders.model_folder import encoder_fingerprints
from data.preprocessing.job import Job, make_plan


@pytest.fixture
def job_of(demo_config, tmp_path):
    """Makes the job of a config: `job_of("key=value", ...)`."""

    def make(*overrides):
        config = demo_config(tmp_path / "cache", *overrides)
        model = Path(config.model.base)
        return Job(config, model, encoder_fingerprints(model))

    return make


def test_workers_agree_in_what_shapes_the_plan_and_differ_in_the_rest_as_they_like(job_of):
    same = ["data.encoders.t5=cpu", "data.encode_batch_size=3", "data.captions.dropout=0.5", "data.datasets.0.weight=2"]
    assert job_of(*same).settings == job_of().settings
    for other in ("data.resolution=48", "data.captions.trigger=a", "data.encoders.t5_precision=int8"):
        assert job_of(other).settings != job_of().settings, other


def test_the_plan_is_a_function_of_pictures_and_settings(job_of):
    def plan(*overrides):
        return [(shard.path, shard.plan) for shard in make_plan(job_of(*overrides), Progress(disable=True))]

    assert plan() == plan("data.encode_batch_size=3", "data.mode=online")
    shorter = plan("data.captions.text_length=16")
    assert not {made for _, made in shorter} & {made for _, made in plan()}, "every shard is to be made again"
