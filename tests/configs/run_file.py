"""Small valid configs, as text and as keys, and what loading says of one with a change."""

from pathlib import Path
from typing import Any

import pytest

from configs.errors import InputError
from configs.loading import load_config

VALID = """\
version: 1
run: {name: try}
model:
  base: some/model
method:
  type: lora
  rank: 16
data:
  cache: cache
  datasets:
    - name: a
      target: t
      mask: m
    - {name: b, target: t2, mask: m2}
train:
  steps: 200
  global_batch_size: 4
  lr: 1e-4
"""


def problems_of(path: Path | str, *overrides: str) -> list[str]:
    """The lines of the error that loading ends in."""
    with pytest.raises(InputError) as caught:
        load_config(path, overrides)
    return str(caught.value).splitlines()


def problems_with(path: Path, old: str, new: str) -> list[str]:
    """The lines of the error after one change to the valid file."""
    assert old in VALID
    path.write_text(VALID.replace(old, new), encoding="utf-8")
    return problems_of(path)


def smallest() -> dict[str, Any]:
    """Only what must be given."""
    return {
        "run": {"name": "try"},
        "model": {"base": "some/model"},
        "method": {"type": "lora"},
        "data": {"cache": "cache", "datasets": [{"name": "a", "target": "t", "mask": "m"}]},
        "train": {"steps": 200, "global_batch_size": 4, "lr": 1e-4},
    }


def with_key(dotted: str, value: object) -> dict[str, Any]:
    """The smallest config with one key set."""
    raw = smallest()
    *sections, last = dotted.split(".")
    place: Any = raw
    for name in sections:
        place = place[int(name)] if isinstance(place, list) else place.setdefault(name, {})
    place[last] = value
    return raw
