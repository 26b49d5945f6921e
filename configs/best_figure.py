"""The figure of a validation that says which checkpoint of a run is its best one."""

from typing import Literal

from configs.mask_recipe import recipe_of
from configs.schema import Config


def best_figure(config: Config) -> Literal["hole_psnr", "loss"]:
    """That of checkpoint.keep_best; of auto and null: loss where a dataset's masks are random, else hole_psnr."""
    figure = config.checkpoint.keep_best
    if figure is None or figure == "auto":
        return "loss" if any(recipe_of(dataset).shares for dataset in config.data.datasets) else "hole_psnr"
    return figure
