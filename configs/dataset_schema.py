"""One set of pictures: where they come from, and how their masks are made."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.section import (
    ANOTHER_RUN,
    NO_MATTER,
    Count,
    Fraction,
    Names,
    NonNegativeFloat,
    PathText,
    PlaceText,
    PositiveFloat,
    Section,
    Shapes,
    Word,
    list_of_word,
)
from configs.urls import is_url, problem_with_url, shown


class RandomMasks(Section):
    """Kinds of random holes and their shares; 0 or left out: none of it. Shares are relative to each other."""

    brush: NonNegativeFloat = 0.0
    """Free-form brush strokes."""

    box: NonNegativeFloat = 0.0
    """One to three upright boxes."""

    polygon: NonNegativeFloat = 0.0
    """A polygon of 4 to 10 corners."""

    half_plane: NonNegativeFloat = 0.0
    """All to one side of a straight line."""

    outpaint: NonNegativeFloat = 0.0
    """A border on one to four sides, for outpainting."""

    full: NonNegativeFloat = 0.0
    """The whole picture, which is then painted from its caption alone."""


Label = Annotated[int, Field(strict=True, ge=0, le=65535)] | Annotated[str, Field(pattern=r"^#[0-9a-f]{6}$")]


class MaskConfig(Section):
    """How a dataset's masks are made: random holes, or its own masks, grown. Masks hang on the picture's content and
    the variant's number alone."""

    random: RandomMasks | None = None
    """Random holes in the place of masks, of these kinds and shares."""

    folder: PathText | None = None
    """Folder of the dataset's own masks, where its target is a folder."""

    label: Annotated[Label | None, Field(examples=[1])] = None
    """Which value of its own masks' pixels is the hole, where they hold labels: a grey level or an index into a palette
    (1), or a colour ("#ff0000"). null: they are black and white, and white is the hole."""

    dilate: Annotated[list[Count] | None, Field(examples=[[0, 24]])] = None
    """Grow its own masks by a number of pixels from and to these, at the size that is trained; drawn for each variant.
    null: they stay as they are."""

    area: Annotated[
        Annotated[list[Fraction], Field(min_length=2, max_length=2)] | None, Field(examples=[[0.01, 0.5]])
    ] = None
    """Share of the picture that random brush strokes, boxes and polygons cover, from and to; log-uniform, so that small
    holes, as retouching has them, come as often as large ones. null: about 10 to 50 %, evenly."""

    variants: Annotated[int, Field(strict=True, ge=1, le=64)] = 1
    """Masks per picture. Each costs a masked picture's latents in the cache; training chooses one of them."""

    @field_validator("random")
    @classmethod
    def _something_is_drawn(cls, random: RandomMasks | None) -> RandomMasks | None:
        if random is not None and not any(share for _, share in random):
            raise ValueError("one of its kinds must be above 0: {brush: 0.6, box: 0.2, outpaint: 0.2}")
        return random

    @field_validator("folder")
    @classmethod
    def _random_needs_no_folder(cls, folder: Path | None, info: ValidationInfo) -> Path | None:
        if folder is not None and info.data.get("random") is not None:
            raise ValueError("random draws holes that need no masks: remove folder, or random")
        return folder

    @field_validator("label")
    @classmethod
    def _random_has_no_labels(cls, label: Label | None, info: ValidationInfo) -> Label | None:
        if label is not None and info.data.get("random") is not None:
            raise ValueError("only a dataset's own masks have labels: remove label, or random")
        return label

    @field_validator("dilate")
    @classmethod
    def _own_masks_grow(cls, dilate: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if dilate is not None and info.data.get("random") is not None:
            raise ValueError("only a dataset's own masks grow: remove dilate, or random")
        if dilate is not None and not (len(dilate) == 2 and dilate[0] <= dilate[1] <= 512):
            raise ValueError("must be the least and the most pixels, at most 512: [0, 24]")
        return dilate

    @field_validator("area")
    @classmethod
    def _drawn_holes_have_an_area(cls, area: list[float] | None, info: ValidationInfo) -> list[float] | None:
        if area is None or "random" not in info.data:
            return area
        random = info.data["random"]
        if random is None or not (random.brush or random.box or random.polygon):
            raise ValueError("it is that of random brush, box and polygon, and none of them is drawn: remove area")
        if not 0.001 <= area[0] <= area[1] <= 0.6:
            raise ValueError("must be the least and the most, from 0.001 to 0.6: [0.01, 0.5]")
        return area

    @field_validator("variants")
    @classmethod
    def _variants_differ(cls, variants: int, info: ValidationInfo) -> int:
        if variants > 1 and info.data.get("random", 0) is None and info.data.get("dilate", 0) is None:
            raise ValueError("without random or dilate all variants would be the same mask: give one of them, or 1")
        return variants


class MembersConfig(Section):
    """What the members of a sample are called in tars: the part of a name behind its first dot, in lower case. Of a
    list the first that a sample has is read."""

    target: Names = ["target.png", "target.jpg", "target.jpeg", "target.webp", "jpg", "jpeg", "png", "webp"]
    """The picture to learn."""

    mask: Names = ["mask.png", "mask.webp", "mask.jpg", "mask.jpeg"]
    """Its mask: white is painted, black is kept. Not read when masks are random."""

    source: Names | None = None
    """What the model sees in the place of the target, as in object removal. null: the target itself."""

    caption: Names = ["txt", "caption", "json"]
    """The caption: text, or the entry `caption` or `text` of a JSON object. An empty one is none."""


class ColumnsConfig(Section):
    """What the columns of a table are called."""

    target: Word = "target"
    """The picture to learn: a path relative to the table, a URL, or (Parquet, Arrow) the picture itself."""

    mask: Word = "mask"
    """Its mask: white is painted, black is kept. Not read when masks are random."""

    source: Word | None = None
    """What the model sees in the place of the target, as in object removal. null: the target itself."""

    caption: Word = "caption"
    """The caption; a row without one has the default. Where it is not named here, text is read too."""

    name: Word | None = None
    """A name of its own for every row. null: the target's path, with #2, #3 and so on where it is in several rows."""


class DatasetConfig(Section):
    """One set of triples. Its pictures come from folders (target, mask, source), from WebDataset tars (tars), or from a
    list of pictures (table)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", examples=["removal"]), Shapes.SAMPLES]
    """The dataset's folder in the cache: letters, digits, underscores and hyphens."""

    tars: Annotated[
        Annotated[list[PlaceText], Field(min_length=1)] | None,
        BeforeValidator(
            list_of_word, json_schema_input_type=PlaceText | Annotated[list[PlaceText], Field(min_length=1)] | None
        ),
        Shapes.PICTURES,
    ] = None
    """WebDataset tars of pictures: paths or URLs (https, s3, gs), one or several, with braces as in
    s3://bucket/photos-{000000..000127}.tar; paths also with *, or a folder of tars."""

    table: Annotated[Annotated[PlaceText, Field(examples=["/data/pictures.jsonl"])] | None, Shapes.PICTURES] = None
    """A list of pictures, one row each: a .jsonl, .csv or .parquet file (path or URL), or a folder as Hugging Face's
    datasets writes it (metadata.jsonl beside pictures, .parquet or .arrow files)."""

    target: Annotated[Annotated[PathText, Field(examples=["/data/after"])] | None, Shapes.PICTURES] = None
    """Folder of the pictures to learn, and of their captions as .txt or .caption beside them."""

    members: Annotated[MembersConfig, Shapes.PICTURES] = MembersConfig()
    """What the members of a sample are called in tars."""

    columns: Annotated[ColumnsConfig, Shapes.PICTURES] = ColumnsConfig()
    """What the columns of a table are called."""

    mask: Annotated[Annotated[PathText, Field(examples=["/data/mask"])] | MaskConfig | None, Shapes.SAMPLES] = None
    """Folder of the masks, where target is a folder: white is painted, black is kept. Or how masks are made, as in
    {random: {brush: 0.6, box: 0.4}, variants: 4}. null: those of the tars or the table."""

    source: Annotated[PathText | None, Shapes.PICTURES] = None
    """Folder of what the model sees in the place of the target, as in object removal. null: the target itself."""

    check_masks: Annotated[Literal["error", "warn", "off"], Shapes.NOTHING, NO_MATTER] = "error"
    """What becomes of masks that are seen to be wrong: photographs, gradients; and, where there is a source, masks that
    are inverted or lie elsewhere, a source that is the target, another picture or turned, and the two swapped. error:
    refused, the latter where it is more than one pair in twenty; warn: named; off: not looked for."""

    flip: Annotated[bool, Field(strict=True), Shapes.SAMPLES] = False
    """Train on every picture's mirror image too, with its masks mirrored and the caption as it is. Not for pictures
    with writing, or captions that say left and right."""

    weight: Annotated[PositiveFloat, Shapes.NOTHING, ANOTHER_RUN] = 1.0
    """Share of this dataset in the mix, relative to the others."""

    @field_validator("tars")
    @classmethod
    def _tars_may_be_read(cls, tars: list[str] | None) -> list[str] | None:
        for tar in tars or []:
            _refuse_url(tar)
        return tars

    @field_validator("table")
    @classmethod
    def _table_may_be_read(cls, table: str | None, info: ValidationInfo) -> str | None:
        if table is not None:
            _refuse_url(table)
            if info.data.get("tars") is not None:
                raise ValueError("the pictures come from tars already: make two datasets of them")
        return table

    @field_validator("target")
    @classmethod
    def _pictures_come_from_one_place(cls, target: Path | None, info: ValidationInfo) -> Path | None:
        place = _place_of_pictures(info)
        if target is None and place == "target":
            raise ValueError("must be given: the folder of the pictures, or in its place tars or table")
        if target is not None and place == "tars":
            raise ValueError("the pictures come from tars: say in members.target which they are, and remove target")
        if target is not None and place == "table":
            raise ValueError("the pictures come from a table: say in columns.target which they are, and remove target")
        return target

    @field_validator("members")
    @classmethod
    def _members_are_of_tars(cls, members: MembersConfig, info: ValidationInfo) -> MembersConfig:
        if members != MembersConfig() and "tars" in info.data and info.data["tars"] is None:
            raise ValueError("only tars have members: give tars, or remove members")
        return members

    @field_validator("columns")
    @classmethod
    def _columns_are_of_a_table(cls, columns: ColumnsConfig, info: ValidationInfo) -> ColumnsConfig:
        if columns != ColumnsConfig() and "table" in info.data and info.data["table"] is None:
            raise ValueError("only a table has columns: give table, or remove columns")
        return columns

    @field_validator("mask")
    @classmethod
    def _masks_come_from_one_place(cls, mask: Path | MaskConfig | None, info: ValidationInfo) -> Any:
        place = _place_of_pictures(info)
        random = isinstance(mask, MaskConfig) and mask.random is not None
        folder = mask.folder if isinstance(mask, MaskConfig) else mask
        if place == "target" and folder is None and not random:
            raise ValueError(
                "must be given: the folder of the masks, or {random: {brush: 0.6, box: 0.4}}, or {folder: MASKS, "
                "dilate: [0, 24]}"
            )
        if place in _NAMES_OF and folder is not None:
            raise ValueError(
                f"a folder of masks goes with a folder of targets: say in {_NAMES_OF[place]}.mask which they are"
            )
        if place in _NAMES_OF and random and (names := info.data.get(_NAMES_OF[place])):
            if names.mask != type(names)().mask:
                raise ValueError(f"random holes need no masks: remove {_NAMES_OF[place]}.mask, or random")
            if names.source is not None:
                raise ValueError(_NO_RANDOM_SOURCE.format(f"{_NAMES_OF[place]}.source"))
        return mask

    @field_validator("source")
    @classmethod
    def _sources_are_folders(cls, source: Path | None, info: ValidationInfo) -> Path | None:
        place, mask = _place_of_pictures(info), info.data.get("mask")
        if source is not None and place in _NAMES_OF:
            raise ValueError(
                f"a folder of sources goes with a folder of targets: say in {_NAMES_OF[place]}.source which they are"
            )
        if source is not None and isinstance(mask, MaskConfig) and mask.random is not None:
            raise ValueError(_NO_RANDOM_SOURCE.format("source"))
        return source


_NO_RANDOM_SOURCE = "random holes do not know where target and source differ: remove {}, or give masks"


_NAMES_OF = {"tars": "members", "table": "columns"}  # the key that says which of them is what


def _place_of_pictures(info: ValidationInfo) -> str | None:
    """Which key of a dataset says where its pictures are: tars, table or target. None if one of them is wrong."""
    if not {"tars", "table"} <= info.data.keys():
        return None
    return next((key for key in ("tars", "table") if info.data[key] is not None), "target")


def _refuse_url(place: str) -> None:
    if is_url(place) and (problem := problem_with_url(place)):
        raise ValueError(f"of {shown(place)}, {problem}")
