"""A preprocessing job: a config with the model that encodes for it, and the shards it makes of the pictures."""

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path

from rich.progress import Progress

from configs.cache_settings import tensor_settings, worker_settings
from configs.schema import Config
from data.cache.manifest import read_format
from data.encoders.model_folder import read_part_number
from data.encoders.stored_text import text_bytes
from data.samples.plan import plan_samples
from data.samples.shard_plan import PlannedShard, plan_shards
from data.samples.summary import print_summary


@dataclass(frozen=True)
class Job:
    """A config, and the model that encodes for it.  encoders: part -> fingerprint.  thorough: decode every picture in
    full before any is encoded.  replace: delete what the cache holds for another run, where it is in the way."""

    config: Config
    model: Path
    encoders: dict[str, str]
    thorough: bool = False
    replace: bool = False

    @cached_property
    def format_version(self) -> int:
        """The format of the job's cache, as it was when the job began: one that was begun in format 1 goes on in it, so
        that no shard of it is encoded again."""
        return read_format(self.config.data.cache_folder)

    @property
    def encoding(self) -> dict[str, object]:
        """All that shapes the tensors besides the pictures and captions."""
        return {"encoders": dict(self.encoders), **tensor_settings(self.config.data)}

    @property
    def settings(self) -> dict[str, object]:
        """Settings that workers on one cache must agree in: all that shapes the plan."""
        encoders = {f"model's {part}": print for part, print in self.encoders.items()}
        return {"format": self.format_version, **encoders, **worker_settings(self.config.data)}

    @property
    def text_bytes(self) -> int:
        """Bytes of one caption's tensors in a shard."""
        t5_width = int(read_part_number(self.model, "text_encoder_2", "d_model"))
        captions = self.config.data.captions
        return text_bytes(captions.text_length, t5_width, captions.text_dtype)


def make_plan(job: Job, progress: Progress) -> list[PlannedShard]:
    """Every shard of a job's cache: a pure function of the pictures and the settings. Prints what a person should know
    of it. Raises InputError as `plan_samples` does."""
    samples = plan_samples(job.config, progress, thorough=job.thorough)
    print_summary(progress.console, samples, job.config.data.captions)
    return plan_shards(
        samples,
        size_limit=job.config.data.shard_size_mib << 20,
        text_bytes=job.text_bytes,
        encoding=job.encoding,
        format_version=job.format_version,
    )
