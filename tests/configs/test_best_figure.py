import pytest

from configs.best_figure import best_figure
from configs.loading import load_config

RANDOM = "data.datasets.0.mask={random: {box: 1}}"


@pytest.mark.parametrize(
    "overrides, figure",
    [
        ([], "hole_psnr"),
        ([RANDOM, "data.datasets.0.source=null"], "loss"),
        (["checkpoint.keep_best=null"], "hole_psnr"),
        (["checkpoint.keep_best=loss"], "loss"),
        ([RANDOM, "data.datasets.0.source=null", "checkpoint.keep_best=hole_psnr"], "hole_psnr"),
    ],
)
def test_the_best_checkpoint_is_told_by_the_loss_where_masks_are_random(config_file, overrides, figure):
    assert best_figure(load_config(config_file, overrides)) == figure
