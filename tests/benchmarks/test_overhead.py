import pytest
import torch
from rich.console import Console

from benchmarks.mid_size import make_config, make_inputs
from benchmarks.overhead import measure, read_batches
from data.preprocessing.run import preprocess


def test_the_bare_loop_has_the_trainers_tensors_in_memory_of_their_own(tmp_path):
    make_inputs(tmp_path, tiny=True)
    preprocess(make_config(tmp_path, side=64), Console(quiet=True))
    batches = read_batches(tmp_path, 64)
    assert len(batches) == 16 and sorted(int(rows.position) for rows in batches) == list(range(16))
    assert len({rows.noise.data_ptr() for rows in batches}) == 16
    assert not torch.equal(batches[0].latents, batches[1].latents)


@pytest.mark.slow
def test_every_phase_of_the_trainers_step_has_its_share(tmp_path):
    line = measure(tmp_path, tiny=True, steps=2)
    phases = line["percent_of_step"]
    assert phases.keys() >= {"data", "forward pass", "backward pass", "clipping and update", "logs", "saves"}
    assert phases["forward pass"] > 0 and phases["backward pass"] > 0
