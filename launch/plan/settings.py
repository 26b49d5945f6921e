"""Settings that take less memory, and a config with them."""

from collections.abc import Iterator, Mapping
from typing import TypeVar

from configs.combinations import QUANTIZED
from configs.schema import Config
from configs.section import Section

Settings = Mapping[str, object]  # dotted key -> value
_S = TypeVar("_S", bound=Section)


def smaller_settings(config: Config) -> Iterator[Settings]:
    """Of what trains and of its base, those first that change the least."""
    if config.method.type == "full":
        if config.train.optimizer == "adamw" and config.train.weights == "fp32_master":
            yield {"train.optimizer": "adamw8bit"}
        if config.train.ema_decay is not None:
            yield {"train.ema_decay": None}
        if config.train.weights == "fp32_master":
            least: Settings = {"train.weights": "bf16_stochastic", "train.optimizer": "adamw"}
            yield least
            yield {**least, "train.ema_decay": None}
    elif config.model.precision not in QUANTIZED:
        yield from ({"model.precision": precision} for precision in ("int8", "nf4"))
    elif config.model.precision != "nf4":
        yield {"model.precision": "nf4"}


def cached_settings(config: Config) -> Settings:
    """Of a run whose pictures were encoded before it."""
    return {"data.mode": "cached"} | ({"data.encoder_devices": None} if config.data.encoder_devices else {})


def with_settings(section: _S, settings: Settings) -> _S:
    """A config, or a section of one, with other values; nothing is checked."""
    for key, value in settings.items():
        name, _, rest = key.partition(".")
        changed = with_settings(getattr(section, name), {rest: value}) if rest else value
        section = section.model_copy(update={name: changed})
    return section


def written(settings: Settings) -> list[str]:
    """As they are given on a command line."""
    words = {"None": "null", "True": "true"}
    return [f"{key}={words.get(str(value), value)}" for key, value in settings.items()]
