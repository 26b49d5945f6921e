"""The mask recipe of a dataset: how its masks are made, as its config says it."""

from dataclasses import dataclass
from pathlib import Path

from configs.dataset_schema import DatasetConfig, Label


@dataclass(frozen=True)
class MaskRecipe:
    """How a dataset's masks are made.

    shares: of the kinds that are drawn, in this order; empty = each picture has a mask of its own.
    dilate: pixels by which that one grows, from and to.  variants: masks per picture.  label: the value of its pixels
    that is the hole; None = white.  area: least and most share of the picture that brush, box and polygon cover,
    log-uniform; None = as each kind has it.
    """

    shares: tuple[tuple[str, float], ...] = ()
    dilate: tuple[int, int] = (0, 0)
    variants: int = 1
    label: Label | None = None
    area: tuple[float, float] | None = None

    def __str__(self) -> str:
        """As the manifest says it: "random brush 0.6, box 0.4; 4 variants", or "own"."""
        kinds = ", ".join(f"{kind} {share:g}" for kind, share in self.shares)
        grown = ", grown by {} to {} pixels".format(*self.dilate) if any(self.dilate) else ""
        variants = f"; {self.variants} variants" if self.variants > 1 else ""
        label = "" if self.label is None else f", label {self.label}"
        area = "" if self.area is None else ", area {:g} to {:g}".format(*self.area)
        return (f"random {kinds}{area}" if kinds else f"own{label}{grown}") + variants

    @property
    def hashed(self) -> dict[str, object]:
        """What shards are hashed by. A key that format 1 did not begin with is left out at its default: shards that
        were made before it stay good."""
        return {key: value for key, value in vars(self).items() if key not in ("label", "area") or value is not None}


OWN_MASKS = MaskRecipe()  # one mask a picture, as it is


def recipe_of(dataset: DatasetConfig) -> MaskRecipe:
    """A dataset's recipe, whichever way its config says it."""
    mask = dataset.mask
    if mask is None or isinstance(mask, Path):
        return OWN_MASKS
    shares = tuple((kind, float(share)) for kind, share in mask.random if share > 0) if mask.random else ()
    low, high = mask.dilate or (0, 0)
    area = None if mask.area is None else (float(mask.area[0]), float(mask.area[1]))
    return MaskRecipe(shares, (low, high), mask.variants, mask.label, area)


def mask_folder(dataset: DatasetConfig) -> Path | None:
    """The folder of a dataset's own masks, whichever way its config says it; None where masks are random."""
    return dataset.mask if dataset.mask is None or isinstance(dataset.mask, Path) else dataset.mask.folder
