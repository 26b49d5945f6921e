"""A preprocessing job: a config with the model that encodes for it, and the shards it makes of the pictures."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any

from rich.progress import Progress

from configs.schema import Config
from data.cache.manifest import FORMAT_VERSION
from data.encoders.model_folder import read_part_number
from data.encoders.stored_text import text_bytes
from data.samples.plan import plan_samples
from data.samples.shard_plan import PlannedShard, plan_shards

WORKERS_FOLDER = "crew"  # in the cache, while somebody works on it

# Of the data section, what each worker may set as it likes, and what concerns training alone.
WORKER_LOCAL_KEYS: Any = {
    "cache": True,
    "mode": True,
    "encoder_devices": True,
    "local_cache": True,
    "local_cache_gib": True,
    "copies_gib": True,
    "encode_batch_size": True,
    "encoders": {"vae", "clip", "t5"},
    "reader_threads": True,
    "streams": True,
    "mask_choice": True,
    "mask_dropout": True,
    "captions": {"dropout"},
    "datasets": {"__all__": {"weight"}},
}


@dataclass(frozen=True)
class Job:
    """A config, and the model that encodes for it.  encoders: part -> fingerprint."""

    config: Config
    model: Path
    encoders: dict[str, str]

    @property
    def encoding(self) -> dict[str, object]:
        """All that shapes the tensors besides the pictures and captions."""
        data = self.config.data
        int8 = {"t5_precision": "int8"} if data.encoders.t5_precision == "int8" else {}
        text = {"text_length": data.captions.text_length, "text_dtype": data.captions.text_dtype}
        return {"encoders": dict(self.encoders), **text, **int8}

    @property
    def settings(self) -> dict[str, object]:
        """Settings that workers on one cache must agree in: all that shapes the plan."""
        data = self.config.data.model_dump(mode="json", exclude=WORKER_LOCAL_KEYS)
        keys = {f"data.{key}": value for key, value in data.items()}
        return {"format": FORMAT_VERSION, **{f"model's {part}": print for part, print in self.encoders.items()}, **keys}

    @property
    def text_bytes(self) -> int:
        """Bytes of one caption's tensors in a shard."""
        t5_width = int(read_part_number(self.model, "text_encoder_2", "d_model"))
        captions = self.config.data.captions
        return text_bytes(captions.text_length, t5_width, captions.text_dtype)


def make_plan(job: Job, progress: Progress) -> list[PlannedShard]:
    """Every shard of a job's cache: a pure function of the pictures and the settings. Raises InputError as
    `plan_samples` does."""
    return plan_shards(
        plan_samples(job.config, progress),
        size_limit=job.config.data.shard_size_mib << 20,
        text_bytes=job.text_bytes,
        encoding=job.encoding,
    )
