"""The section `data` of a config: the pictures, the encoders, and the cache of encoded samples.

A dataset's own keys are in configs/dataset_schema.py.
"""

from pathlib import Path
from typing import Annotated, Literal

from pydantic import BeforeValidator, Field, ValidationInfo, field_validator

from configs.dataset_schema import DatasetConfig
from configs.errors import InputError
from configs.section import (
    NO_MATTER,
    Count,
    Device,
    FolderOrUrl,
    Fraction,
    NamedDevice,
    NonNegativeFloat,
    PathText,
    PositiveFloat,
    PositiveInt,
    Section,
    Shapes,
    Side,
    in_force,
    list_of_one,
    list_of_word,
)


class CaptionsConfig(Section):
    """The text that goes with a picture."""

    default: Annotated[str, Shapes.SAMPLES] = ""
    """Caption of a picture without one of its own, or with an empty one."""

    trigger: Annotated[Annotated[str, Field(min_length=1)] | None, Shapes.SAMPLES] = None
    """Put in front of every caption that does not hold it already."""

    dropout: Annotated[Fraction, Shapes.NOTHING, in_force("which samples lose their caption")] = 0.1
    """Share of the samples that are trained with an empty caption."""

    text_length: Annotated[int, Field(strict=True, ge=16, le=512), Shapes.TENSORS] = 512
    """Tokens of T5's text; longer captions are cut, shorter ones padded."""

    text_dtype: Annotated[Literal["bf16", "int8"], Shapes.TENSORS] = "bf16"
    """How the cache stores T5's text. int8: half the bytes, with a scale per token; what that does to the trained model
    has not been measured."""


class EncodersConfig(Section):
    """Where the VAE and the text encoders run: all on one device, or spread."""

    vae: Annotated[Device, Shapes.NOTHING, NO_MATTER] = "auto"
    """Device of the VAE. auto: in preprocessing the process's own GPU (cpu if there is none), with mode online one of
    encoder_devices. cuda: the process's own GPU, with mode online the one that it trains on. Or cpu, cuda:0, ..."""

    clip: Annotated[Device, Shapes.NOTHING, NO_MATTER] = "auto"
    """Device of CLIP. auto, cuda: as for the VAE."""

    t5: Annotated[Device, Shapes.NOTHING, NO_MATTER] = "auto"
    """Device of T5, which takes 9.5 GB in bf16. auto, cuda: as for the VAE."""

    t5_precision: Annotated[Literal["auto", "int8"], Shapes.TENSORS] = "auto"
    """auto: bf16 on a GPU, fp32 on a CPU. int8: weights in 8 bits (bitsandbytes), for GPUs that hold no more; the text
    tensors differ from those of bf16, so the cache says that it was so, and all workers must agree."""


class DataConfig(Section):
    """The pictures, and the cache of encoded samples that is made from them."""

    mode: Annotated[Literal["cached", "online"], Shapes.NOTHING, NO_MATTER] = "cached"
    """cached: train from what `fluxfill preprocess` encoded. online: encode pictures and captions while training, with
    the same outcome; nothing has to be preprocessed. Shards that are finished in `cache` are read, so that `fluxfill
    preprocess` may run before or beside it; without them every epoch encodes again."""

    preprocess: Annotated[Literal["auto", "never"], Shapes.NOTHING, NO_MATTER] = "auto"
    """With mode cached, what `fluxfill train` does first. auto: what `fluxfill preprocess` does, on the GPUs that are
    to train, so a cache that is missing or behind its pictures is brought up to date; a run that goes on keeps the
    pictures that it began with. never: the cache is taken as it is, and one that is missing is an error; for clusters,
    where preprocessing is a job of its own."""

    encoder_devices: Annotated[
        Annotated[list[NamedDevice], Field(min_length=1)] | None,
        BeforeValidator(
            list_of_word, json_schema_input_type=NamedDevice | Annotated[list[NamedDevice], Field(min_length=1)] | None
        ),
        Shapes.NOTHING,
        NO_MATTER,
    ] = None
    """With mode online: devices of the encoders, dealt to the training processes of a machine in turn. `fluxfill
    train` trains on the GPUs before the first of them: cuda:0 where it is [cuda:1]. null: each process encodes on the
    GPU that it trains on."""

    cache: Annotated[FolderOrUrl, Field(examples=["/data/cache/removal"]), Shapes.NOTHING, NO_MATTER]
    """Folder of the encoded samples: written by `fluxfill preprocess`, read by the trainer. For training also an
    https://, s3:// or gs:// URL of such a folder. A run with mode online keeps there what it found out about the
    pictures, and writes no shards."""

    local_cache: Annotated[PathText | None, Shapes.NOTHING, NO_MATTER] = None
    """With a URL as `cache`: folder on each node that shards are copied to, shared by the node's processes."""

    local_cache_gib: Annotated[PositiveFloat, Shapes.NOTHING, NO_MATTER] = 100.0
    """What the copies in `local_cache` may take, in GiB; those that were not used for the longest time go first."""

    datasets: Annotated[list[DatasetConfig], Field(min_length=1)]
    """The sets of triples, each with a name of its own."""

    resolution: Annotated[
        list[Side],
        BeforeValidator(list_of_one, json_schema_input_type=Side | list[Side]),
        Field(min_length=1, validate_default=True),
        Shapes.SAMPLES,
    ] = [1024]
    """Side in pixels of a square picture; others get a bucket of about the same area. One number or several."""

    resolution_policy: Annotated[Literal["one", "each"], Shapes.SAMPLES] = "one"
    """With several resolutions. one: each picture in the bucket that suits it best; each: once per resolution."""

    captions: CaptionsConfig = CaptionsConfig()
    """The text that goes with a picture."""

    mask_choice: Annotated[
        Literal["random", "cycle", "first"], Shapes.NOTHING, in_force("which of its masks a sample is trained with")
    ] = "random"
    """Where samples have several masks. random: one drawn each time; cycle: each in turn, one an epoch; first: always
    the first."""

    mask_dropout: Annotated[Fraction, Shapes.NOTHING, in_force("which samples are all hole")] = 0.0
    """Share of the samples that are trained with a hole as large as the picture."""

    holdout: Annotated[Count, Shapes.SAMPLES] = 64
    """Pictures kept out of training for validation, chosen by a stable hash of the target's content."""

    shard_size_mib: Annotated[PositiveInt, Shapes.PLAN] = 256
    """A shard is closed once its samples reach this size, in MiB."""

    max_megapixels: Annotated[PositiveFloat, Shapes.PLAN] = 64.0
    """Pictures of more megapixels are refused, not decoded."""

    min_side: Annotated[PositiveInt | None, Shapes.SAMPLES] = None
    """Pictures whose shorter side has fewer pixels are left out. null: none is."""

    max_enlarge: Annotated[Annotated[float, Field(strict=True, ge=1)] | None, Shapes.SAMPLES] = None
    """Pictures that would be enlarged by more than this to fill their bucket are left out. null: none is."""

    copies_gib: Annotated[NonNegativeFloat, Shapes.NOTHING, NO_MATTER] = 100.0
    """Room beside the cache, in GiB, for copies of remote pictures until they are encoded; those beyond it are fetched
    twice."""

    encode_batch_size: Annotated[PositiveInt, Shapes.NOTHING, NO_MATTER] = 8
    """Captions that go through T5 at once, and pictures of 512 x 512 through the VAE; of larger ones fewer, by their
    pixels (of 8, two of 1024 x 1024), which keep a GPU as busy."""

    encoders: EncodersConfig = EncodersConfig()
    """Where the VAE and the text encoders run: all on one device, or spread."""

    reader_threads: Annotated[PositiveInt, Shapes.NOTHING, NO_MATTER] = 2
    """Threads that read samples, in each training process."""

    streams: Annotated[PositiveInt, Shapes.NOTHING, NO_MATTER] = 1
    """Shares that the shards of each bucket are dealt to; each global batch takes as many samples from one as from the
    other. One per node lets a node fetch only its own share from remote storage; 1 mixes best. A run keeps the number
    that it began with."""

    @field_validator("encoder_devices")
    @classmethod
    def _something_encodes(cls, devices: list[str] | None, info: ValidationInfo) -> list[str] | None:
        if devices is not None and info.data.get("mode") == "cached":
            raise ValueError(
                "with mode cached nothing is encoded while training: set data.encoder_devices=null too, or "
                "data.mode=online"
            )
        return devices

    def pictures_at_once(self, pixels: int) -> int:
        """Pictures of so many pixels each that go through the VAE together."""
        return max(1, min(self.encode_batch_size, self.encode_batch_size * 512**2 // pixels))

    def pixels_at_once(self, largest: int) -> int:
        """Most pixels that go through the VAE together, of pictures of up to so many each."""
        return min(self.encode_batch_size * largest, max(largest, self.encode_batch_size * 512**2))

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
