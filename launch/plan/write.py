"""A plan put into the config that it is of."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from configs.edit_yaml import drop_comment, set_nested
from configs.errors import InputError
from configs.loading import load_config
from configs.plan import Plan
from configs.schema import Config
from configs.yaml_text import KeyPath, YamlError, parse_yaml
from data.storage.atomic_write import write_atomically


def write_plan(path: Path, overrides: Sequence[str], planned: Config, plan: Plan) -> list[str]:
    """Set engine, micro-batch and checkpointing in the config's text, and what else the command line overrode: the plan
    is of all of it together. Everything else stays as it stands there, but for comments behind values that have
    changed: they told of the old ones. Gives the overrides that the file has now.

    planned: the config with its overrides.  Raises InputError, and leaves the file as it is, where a key cannot be set
    without changing others.
    """
    chosen = {
        "parallel.engine": plan.engine,
        "train.micro_batch_size": plan.micro_batch_size,
        "train.activation_checkpointing": _checkpointing(plan),
    }
    others = [override for override in overrides if override.partition("=")[0] not in chosen]
    refusal = InputError(f"{path}: its aliases share values that would change with the plan's. Set those by hand.")
    keys: list[tuple[KeyPath, object]] = [_read_override(override) for override in others]
    keys += [(tuple(key.split(".")), value) for key, value in chosen.items()]
    text = path.read_bytes().decode("utf-8")  # with its own line ends
    try:
        for key, value in keys:
            before = _value_at(text, key)
            text = set_nested(text, key, value)
            if before != value:
                text = drop_comment(text, key)
    except YamlError as error:  # an anchor that was overwritten
        raise refusal from error

    def write(part: Path) -> None:
        part.write_bytes(text.encode("utf-8"))
        if not _holds(part, _with_plan(planned, plan)):
            raise refusal

    write_atomically(path, write)
    return others


def _checkpointing(plan: Plan) -> bool | int:
    """The key's value. Of all blocks or of none it is a word, which holds for another model too."""
    return {0: False, plan.blocks: True}.get(plan.checkpointed, plan.checkpointed)


def _read_override(override: str) -> tuple[KeyPath, object]:
    key, _, value = override.partition("=")
    path = tuple(int(step) if step.isdecimal() else step for step in key.split("."))
    return path, parse_yaml(value).value if value.strip() else ""


def _value_at(text: str, path: KeyPath) -> object:
    """None where nothing stands."""
    found: Any = parse_yaml(text).value
    for step in path:
        found = found.get(step) if isinstance(found, dict) else found and found[step]
    return found


def _holds(path: Path, config: Config) -> bool:
    try:
        return load_config(path) == config
    except InputError:
        return False


def _with_plan(config: Config, plan: Plan) -> Config:
    train = {"micro_batch_size": plan.micro_batch_size, "activation_checkpointing": _checkpointing(plan)}
    parallel = config.parallel.model_copy(update={"engine": plan.engine})
    return config.model_copy(update={"train": config.train.model_copy(update=train), "parallel": parallel})
