"""What a run is: every section, key, default and limit of a config. Frozen once validated."""

from pathlib import Path
from typing import Annotated, Any, Literal

from pydantic import BaseModel, BeforeValidator, ConfigDict, Field, PlainValidator, ValidationInfo, field_validator

from configs.errors import InputError
from configs.urls import is_url, problem_with_url

Count = Annotated[int, Field(strict=True, ge=0)]
PositiveInt = Annotated[int, Field(strict=True, gt=0)]
PositiveFloat = Annotated[float, Field(strict=True, gt=0)]
NonNegativeFloat = Annotated[float, Field(strict=True, ge=0)]
Fraction = Annotated[float, Field(strict=True, ge=0, le=1)]
Side = Annotated[int, Field(strict=True, ge=32, le=4096, multiple_of=16)]


def _refuse_empty(value: object) -> object:
    if value == "":
        raise ValueError("must not be empty: give a path")
    return value


def _list_of_one(value: object) -> object:
    return [value] if isinstance(value, int) else value


def _path_or_url(value: object) -> Path | str:
    if not isinstance(value, str | Path) or value == "":
        raise ValueError("must be a path or a URL, and not empty")
    if not is_url(value):
        return Path(value)
    if problem := problem_with_url(str(value)):
        raise ValueError(problem)
    if "?" in str(value) or "#" in str(value):
        raise ValueError(
            "it has a ? or #, and the names of files could not be put behind it: give the folder's URL alone"
        )
    return str(value).rstrip("/")


FolderOrUrl = Annotated[
    Path | str, PlainValidator(_path_or_url, json_schema_input_type=Annotated[str, Field(min_length=1)])
]


def _list_of_word(value: object) -> object:
    return [value] if isinstance(value, str) else value


Device = Annotated[str, Field(pattern=r"^(auto|cpu|cuda|cuda:\d+)$", examples=["cuda:1"])]
PathText = Annotated[Path, BeforeValidator(_refuse_empty), Field(json_schema_extra={"minLength": 1})]
Word = Annotated[str, Field(min_length=1)]
Suffix = Annotated[str, Field(pattern=r"^[a-z0-9_-]+(\.[a-z0-9_-]+)*$")]
Names = Annotated[
    list[Suffix],
    BeforeValidator(_list_of_word, json_schema_input_type=Suffix | list[Suffix]),
    Field(min_length=1),
]


class Section(BaseModel):
    """A part of the config: unknown keys are errors, nothing changes after loading, text is never taken for a number.

    A check that needs two keys is a field validator of the later one, so it still runs when a third key is wrong. Its
    message ends the sentence "<key> is <value>, but ...".
    """

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        validate_default=True,
        allow_inf_nan=False,
        use_attribute_docstrings=True,
        serialize_by_alias=True,  # one key is a word of Python
    )


class RunConfig(Section):
    """Name, place and seed of the run."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9][A-Za-z0-9._-]*$", examples=["sofa-removal"])]
    """The run's folder under `dir`: letters, digits, dots, underscores and hyphens."""

    dir: PathText = Path("runs")
    """Folder that holds the runs."""

    seed: Annotated[int, Field(strict=True, ge=0, lt=2**63)] = 42
    """Of everything random: order of the samples, noise, new weights."""

    @property
    def folder(self) -> Path:
        """Where this run writes: dir / name."""
        return self.dir / self.name


class ModelConfig(Section):
    """The model that training starts from."""

    base: Annotated[str, Field(min_length=1, examples=["black-forest-labs/FLUX.1-Fill-dev"])]
    """Hub id, or folder in diffusers' layout. FLUX.1-Fill-dev; or FLUX.1-dev, expanded from 64 to 384 inputs."""

    precision: Literal["auto", "fp32", "bf16", "int8", "nf4", "fp8"] = "auto"
    """Of the transformer's weights and arithmetic. auto: bf16 on a GPU, fp32 on a CPU. int8, nf4 and fp8 keep the
    frozen weights in 8 or 4 bits and compute in bf16: less memory, not more speed. Which go with which method and
    engine: docs/combinations.md."""


class _AdapterSection(Section):
    """What all adapters have in common; the base's weights stay as they are."""

    rank: PositiveInt = 32
    """Width of the adapter's two factors."""

    alpha: PositiveFloat = 32.0
    """The adapter's output is scaled by alpha / rank."""

    targets: (
        Literal["attention", "attention+mlp"]
        | Annotated[list[Annotated[str, Field(min_length=1)]], Field(min_length=1)]
    ) = "attention+mlp"
    """Which linear layers get an adapter: those of the attention, also those of the feed-forward parts, or a list of
    module names as peft takes them."""

    init_from: PathText | None = None
    """Adapter of the same type to start from, as .safetensors. null: start at the base's output."""


class LoraConfig(_AdapterSection):
    """Train a low-rank adapter; the base's weights stay as they are."""

    type: Literal["lora"]
    """lora: train a low-rank adapter."""


class DoraConfig(_AdapterSection):
    """Train a low-rank adapter and the length of every row of the weights it adapts."""

    type: Literal["dora"]
    """dora: train a low-rank adapter, and the lengths of the weights' rows beside it."""


class LokrConfig(_AdapterSection):
    """Train an adapter that is a Kronecker product, as LyCORIS' LoKr."""

    type: Literal["lokr"]
    """lokr: train a Kronecker product of a small and a larger matrix."""

    factor: Annotated[int, Field(strict=True, ge=2)] | Literal["auto"] = "auto"
    """Side of the small matrix; the larger one has the layer's sides divided by it, and is whole where `rank` is at
    least half of them. auto: about the square root of the layer's sides (LyCORIS' factor -1)."""


class FullConfig(Section):
    """Train every weight of the transformer."""

    type: Literal["full"]
    """full: train every weight of the transformer."""


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


class MaskConfig(Section):
    """How a dataset's masks are made: random holes, or its own masks, grown. Masks hang on the picture's content and
    the variant's number alone."""

    random: RandomMasks | None = None
    """Random holes in the place of masks, of these kinds and shares."""

    folder: PathText | None = None
    """Folder of the dataset's own masks, where its target is a folder."""

    dilate: Annotated[list[Count] | None, Field(examples=[[0, 24]])] = None
    """Grow its own masks by a number of pixels from and to these, at the size that is trained; drawn for each variant.
    null: they stay as they are."""

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

    @field_validator("dilate")
    @classmethod
    def _own_masks_grow(cls, dilate: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if dilate is not None and info.data.get("random") is not None:
            raise ValueError("only a dataset's own masks grow: remove dilate, or random")
        if dilate is not None and not (len(dilate) == 2 and dilate[0] <= dilate[1] <= 512):
            raise ValueError("must be the least and the most pixels, at most 512: [0, 24]")
        return dilate

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

    caption: Names = ["txt", "json"]
    """The caption: text, or the entry `caption` of a JSON object."""


class ColumnsConfig(Section):
    """What the columns of a table are called."""

    target: Word = "target"
    """The picture to learn: a path relative to the table, a URL, or (Parquet, Arrow) the picture itself."""

    mask: Word = "mask"
    """Its mask: white is painted, black is kept. Not read when masks are random."""

    source: Word | None = None
    """What the model sees in the place of the target, as in object removal. null: the target itself."""

    caption: Word = "caption"
    """The caption; a row without one has the default."""

    name: Word | None = None
    """A name of its own for every row, for tables with a target in several rows. null: the target's path."""


class DatasetConfig(Section):
    """One set of triples. Its pictures come from folders (target, mask, source), from WebDataset tars (tars), or from a
    list of pictures (table)."""

    name: Annotated[str, Field(pattern=r"^[A-Za-z0-9_-]+$", examples=["removal"])]
    """The dataset's folder in the cache: letters, digits, underscores and hyphens."""

    tars: Annotated[
        Annotated[list[Word], Field(min_length=1)] | None,
        BeforeValidator(_list_of_word, json_schema_input_type=Word | Annotated[list[Word], Field(min_length=1)] | None),
    ] = None
    """WebDataset tars of pictures: paths or URLs (https, s3, gs), one or several, with braces as in
    s3://bucket/photos-{000000..000127}.tar."""

    table: Annotated[str, Field(min_length=1, examples=["/data/pictures.jsonl"])] | None = None
    """A list of pictures, one row each: a .jsonl or .parquet file (path or URL), or a folder as Hugging Face's datasets
    writes it (metadata.jsonl beside pictures, .parquet or .arrow files)."""

    target: Annotated[PathText, Field(examples=["/data/after"])] | None = None
    """Folder of the pictures to learn, and of their captions as .txt beside them."""

    members: MembersConfig = MembersConfig()
    """What the members of a sample are called in tars."""

    columns: ColumnsConfig = ColumnsConfig()
    """What the columns of a table are called."""

    mask: Annotated[PathText, Field(examples=["/data/mask"])] | MaskConfig | None = None
    """Folder of the masks, where target is a folder: white is painted, black is kept. Or how masks are made, as in
    {random: {brush: 0.6, box: 0.4}, variants: 4}. null: those of the tars or the table."""

    source: PathText | None = None
    """Folder of what the model sees in the place of the target, as in object removal. null: the target itself."""

    flip: Annotated[bool, Field(strict=True)] = False
    """Train on every picture's mirror image too, with its masks mirrored and the caption as it is. Not for pictures
    with writing, or captions that say left and right."""

    weight: PositiveFloat = 1.0
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
        raise ValueError(f"of {place}, {problem}")


class CaptionsConfig(Section):
    """The text that goes with a picture."""

    default: str = ""
    """Caption of a picture without a .txt file."""

    trigger: Annotated[str, Field(min_length=1)] | None = None
    """Put in front of every caption that does not hold it already."""

    dropout: Fraction = 0.1
    """Share of the samples that are trained with an empty caption."""

    text_length: Annotated[int, Field(strict=True, ge=16, le=512)] = 512
    """Tokens of T5's text; longer captions are cut, shorter ones padded."""

    text_dtype: Literal["bf16", "int8"] = "bf16"
    """How the cache stores T5's text. int8: half the bytes, with a scale per token; what that does to the trained model
    has not been measured."""


class EncodersConfig(Section):
    """Where preprocessing runs the VAE and the text encoders: all on one device, or spread."""

    vae: Device = "auto"
    """Device of the VAE. auto: the process's own GPU (cpu if there is none); or cpu, cuda:0, cuda:1, ..."""

    clip: Device = "auto"
    """Device of CLIP. auto: as for the VAE."""

    t5: Device = "auto"
    """Device of T5, which takes 9.5 GB in bf16. auto: as for the VAE."""

    t5_precision: Literal["auto", "int8"] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. int8: weights in 8 bits (bitsandbytes), for GPUs that hold no more; the text
    tensors differ from those of bf16, so the cache says that it was so, and all workers must agree."""


class DataConfig(Section):
    """The pictures, and the cache of encoded samples that is made from them."""

    cache: Annotated[FolderOrUrl, Field(examples=["/data/cache/removal"])]
    """Folder of the encoded samples: written by `fluxfill preprocess`, read by the trainer. For training also an
    https://, s3:// or gs:// URL of such a folder."""

    local_cache: PathText | None = None
    """With a URL as `cache`: folder on each node that shards are copied to, shared by the node's processes."""

    local_cache_gib: PositiveFloat = 100.0
    """What the copies in `local_cache` may take, in GiB; those that were not used for the longest time go first."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)]
    """The sets of triples, each with a name of its own."""

    resolution: Annotated[
        list[Side],
        BeforeValidator(_list_of_one, json_schema_input_type=Side | list[Side]),
        Field(min_length=1, validate_default=True),
    ] = [1024]
    """Side in pixels of a square picture; others get a bucket of about the same area. One number or several."""

    resolution_policy: Literal["one", "each"] = "one"
    """With several resolutions. one: each picture in the bucket that suits it best; each: once per resolution."""

    captions: CaptionsConfig = CaptionsConfig()
    """The text that goes with a picture."""

    mask_choice: Literal["random", "cycle", "first"] = "random"
    """Where samples have several masks. random: one drawn each time; cycle: each in turn, one an epoch; first: always
    the first."""

    mask_dropout: Fraction = 0.0
    """Share of the samples that are trained with a hole as large as the picture."""

    holdout: Count = 64
    """Pictures kept out of training for validation, chosen by a stable hash of the target's content."""

    shard_size_mib: PositiveInt = 256
    """A shard is closed once its samples reach this size, in MiB."""

    max_megapixels: PositiveFloat = 64.0
    """Pictures of more megapixels are refused, not decoded."""

    copies_gib: NonNegativeFloat = 100.0
    """Room beside the cache, in GiB, for copies of remote pictures until they are encoded; those beyond it are fetched
    twice."""

    encode_batch_size: PositiveInt = 8
    """Pictures that go through the VAE at once, and captions through T5."""

    encoders: EncodersConfig = EncodersConfig()
    """Where preprocessing runs the VAE and the text encoders: all on one device, or spread."""

    reader_threads: PositiveInt = 2
    """Threads that read samples, in each training process."""

    streams: PositiveInt = 1
    """Shares that the shards of each bucket are dealt to; each global batch takes as many samples from one as from the
    other. One per node lets a node fetch only its own share from remote storage; 1 mixes best. A run keeps the number
    that it began with."""

    @property
    def cache_folder(self) -> Path:
        """`cache`, for whoever writes it. Raises InputError if it is a URL."""
        if isinstance(self.cache, Path):
            return self.cache
        raise InputError(
            f"data.cache is {self.cache}, but a cache is made in a folder. Set data.cache to one, and copy it to the "
            "URL when it is finished."
        )

    @field_validator("local_cache")
    @classmethod
    def _copies_have_a_place(cls, local_cache: Path | None, info: ValidationInfo) -> Path | None:
        cache = info.data.get("cache")
        if local_cache is None and isinstance(cache, str):
            raise ValueError(f"data.cache is {cache}: give a folder on each node's own disk for copies of its shards")
        return local_cache

    @field_validator("datasets")
    @classmethod
    def _names_are_unique(cls, datasets: list[DatasetConfig]) -> list[DatasetConfig]:
        names = [dataset.name for dataset in datasets]
        repeated = sorted({name for name in names if names.count(name) > 1})
        if repeated:
            raise ValueError(f"each needs a name of its own: rename all but one of those called {', '.join(repeated)}")
        return datasets

    @field_validator("resolution")
    @classmethod
    def _resolutions_differ(cls, resolution: list[int]) -> list[int]:
        repeated = sorted({side for side in resolution if resolution.count(side) > 1})
        if repeated:
            raise ValueError(f"no number may stand there twice: keep one {', one '.join(map(str, repeated))}")
        return resolution


class TrainConfig(Section):
    """Steps, batches and optimizer."""

    steps: Annotated[PositiveInt, Field(examples=[4000])]
    """Optimizer updates in the whole run."""

    global_batch_size: Annotated[PositiveInt, Field(examples=[16])]
    """Samples per update, over all GPUs."""

    micro_batch_size: PositiveInt | Literal["auto"] = "auto"
    """Samples per GPU and forward pass, at the largest bucket. auto: decided at start."""

    lr: Annotated[PositiveFloat, Field(examples=[1e-4])]
    """Highest learning rate, reached after the warm-up."""

    lr_schedule: Literal["constant", "linear", "cosine"] = "cosine"
    """How the learning rate falls after the warm-up."""

    lr_final_fraction: Fraction = 0.0
    """Learning rate at the last step, as a fraction of `lr`. A constant schedule does not fall."""

    warmup_steps: Count = 100
    """Steps in which the learning rate rises from zero to `lr`."""

    optimizer: Literal["adamw", "adamw8bit", "adafactor", "prodigy"] = "adamw8bit"
    """adamw8bit keeps its two moments in 8 bits (bitsandbytes); adafactor keeps one, as a row and a column per weight;
    prodigy finds the step size itself, which lr then multiplies: set it to 1. Which engines take which:
    docs/combinations.md."""

    weight_decay: NonNegativeFloat = 0.01
    """Decoupled weight decay, per step and times the learning rate."""

    max_grad_norm: PositiveFloat | None = 1.0
    """Gradients of a larger norm are scaled down to it. null: never."""

    ema_decay: Annotated[float, Field(strict=True, gt=0, lt=1)] | None = None
    """Per step, of the moving average of the weights that is kept beside them. null: none is kept."""

    weights: Literal["fp32_master", "bf16_stochastic"] = "fp32_master"
    """How full fine-tuning keeps weights and moments. fp32_master: in fp32, 16 bytes a weight with its gradient;
    bf16_stochastic: in bf16 alone, 8 bytes, rounded up or down at random so that small updates count on average."""

    activation_checkpointing: Literal["auto"] | Annotated[bool, Field(strict=True)] = "auto"
    """Compute activations again in the backward pass to save memory. auto: decided at start."""

    compile: Literal["regional", "off"] = "off"
    """regional: torch.compile of the blocks, one graph for all of a kind and for every size of picture; it costs a
    minute or more at start. What it gains has not been measured on a GPU yet, so it is off unless asked for."""

    @field_validator("micro_batch_size")
    @classmethod
    def _micro_batch_fits(cls, micro: int | Literal["auto"], info: ValidationInfo) -> int | Literal["auto"]:
        total = info.data.get("global_batch_size")
        if micro != "auto" and total is not None and micro > total:
            raise ValueError(
                f"must not be above train.global_batch_size, {total}: lower it, or raise the global batch size"
            )
        return micro

    @field_validator("optimizer")
    @classmethod
    def _prodigy_has_a_rate_of_its_own(cls, optimizer: str, info: ValidationInfo) -> str:
        lr = info.data.get("lr")
        if optimizer == "prodigy" and lr is not None and lr < 0.1:
            raise ValueError(f"multiplies the step size that it finds by train.lr, {lr:g}: set train.lr=1")
        return optimizer

    @field_validator("warmup_steps")
    @classmethod
    def _warmup_ends(cls, warmup_steps: int, info: ValidationInfo) -> int:
        steps = info.data.get("steps")
        if steps is not None and warmup_steps >= steps:
            raise ValueError(f"must be below train.steps, {steps}: lower it, or raise the steps")
        return warmup_steps


class FlowConfig(Section):
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    timestep_sampling: Literal["logit_normal", "uniform"] = "logit_normal"
    """How sigma is drawn, before the shift."""

    shift: Literal["dynamic", "none"] | PositiveFloat = "dynamic"
    """Moves sigma towards noise. dynamic: by the bucket's number of tokens, as FLUX.1 samples; a number: by that factor
    at every size."""

    guidance: Annotated[float, Field(strict=True, ge=0, le=100)] = 30.0
    """Guidance that the model is told in training; 30 is what FLUX.1-Fill is sampled with."""

    hole_weight: NonNegativeFloat = 1.0
    """Weight of the loss inside the hole, normalised per sample."""

    keep_weight: NonNegativeFloat = 1.0
    """Weight of the loss outside the hole, normalised per sample."""

    @field_validator("keep_weight")
    @classmethod
    def _something_is_trained(cls, keep_weight: float, info: ValidationInfo) -> float:
        if keep_weight == 0 and info.data.get("hole_weight") == 0:
            raise ValueError("must be above 0 when flow.hole_weight is 0: raise one of the two")
        return keep_weight


class ParallelConfig(Section):
    """How the work is spread over GPUs."""

    engine: Literal[
        "auto", "single", "ddp", "fsdp2", "fsdp2-offload", "hsdp", "zero1", "zero2", "zero3", "zero3-offload"
    ] = "auto"
    """single: one process; ddp: a copy of the model on each GPU; fsdp2: sharded over all GPUs; hsdp: sharded within a
    node, copied across; zero1, zero2, zero3: DeepSpeed. auto: ddp when there is more than one GPU."""


class ValidationConfig(Section):
    """Pictures sampled with the live weights, and their figures."""

    every_steps: PositiveInt | None = 250
    """Validate every so many steps, and at the end. null: never."""

    images: PositiveInt = 8
    """Pictures sampled each time, of the held-out ones and as many of the training ones."""

    sampler_steps: PositiveInt = 28
    """Steps of the sampler per picture."""


class CheckpointConfig(Section):
    """What a stopped run goes on from."""

    every_steps: PositiveInt | None = 250
    """Save every so many steps, and at the end. null: only at the end, and by the clock."""

    every_minutes: PositiveFloat | None = None
    """Save when so many minutes have passed since the last save, too. null: by steps alone."""

    keep_last: PositiveInt | None = 3
    """Older checkpoints are removed, once the new one is whole. null: keep all."""

    keep_best: Literal["hole_psnr", "loss"] | None = "hole_psnr"
    """Never remove the best one so far, by this figure of validations at the steps that were saved: hole_psnr, or loss
    (the mean over noise levels); of held-out pictures if there are any. null: it is removed like the others."""

    requantize: Annotated[bool, Field(strict=True)] = False
    """8-bit optimizer state fits the engine and the number of processes that saved it. true: on others it is quantized
    anew, which changes it a little; false: they are refused."""

    asynchronous: Annotated[bool, Field(strict=True, alias="async")] = True
    """Write checkpoints while training goes on, from a copy in the host's memory (as large as the checkpoint)."""


class GuardConfig(Section):
    """What a run survives before it stops."""

    max_bad_samples: Count = 16
    """Damaged samples that are replaced by the next whole one of their shard; with more the run stops."""


class LoggingConfig(Section):
    """Where figures go beside metrics.jsonl."""

    trackers: list[Literal["tensorboard"]] = ["tensorboard"]
    """An empty list: metrics.jsonl alone."""


class Config(Section):
    """One run of fluxfill."""

    version: Literal[1] = 1
    """Of the config's format."""

    run: RunConfig
    """Name, place and seed of the run."""

    model: ModelConfig
    """The model that training starts from."""

    method: Annotated[LoraConfig | DoraConfig | LokrConfig | FullConfig, Field(discriminator="type")]
    """What is trained: an adapter, or every weight."""

    data: DataConfig
    """The pictures, and the cache of encoded samples that is made from them."""

    train: TrainConfig
    """Steps, batches and optimizer."""

    flow: FlowConfig = FlowConfig()
    """Flow matching: which noise levels are trained, and how the loss weighs the picture."""

    parallel: ParallelConfig = ParallelConfig()
    """How the work is spread over GPUs."""

    validation: ValidationConfig = ValidationConfig()
    """Pictures sampled with the live weights, and their figures."""

    checkpoint: CheckpointConfig = CheckpointConfig()
    """What a stopped run goes on from."""

    guard: GuardConfig = GuardConfig()
    """What a run survives before it stops."""

    logging: LoggingConfig = LoggingConfig()
    """Where figures go beside metrics.jsonl."""
