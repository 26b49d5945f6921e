import json
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from configs import data_schema, dataset_schema, schema, slurm_schema
from configs.loading import json_schema
from configs.schema import Config
from configs.section import Section, read_descriptions
from tests.configs.run_file import smallest, with_key

ROOT = Path(__file__).resolve().parents[2]


def test_defaults_are_the_documented_ones() -> None:
    config = Config.model_validate(smallest())
    assert config.run.seed == 42
    assert config.run.folder == Path("runs/try")
    assert config.method.type == "lora" and (config.method.rank, config.method.alpha) == (32, 32.0)
    assert config.data.resolution == [1024] and config.data.holdout == 64
    assert config.data.captions.dropout == 0.1 and config.data.captions.text_length == 512
    assert config.train.micro_batch_size == "auto" and config.train.ema_decay is None
    assert config.flow.guidance == 30.0 and config.flow.shift == "dynamic"
    assert (config.validation.every_steps, config.checkpoint.keep_last) == (250, 3)


@pytest.mark.parametrize(
    "key, value",
    [
        ("run.name", "..hidden"),
        ("run.name", "a/b"),
        ("run.name", ""),
        ("run.seed", -1),
        ("run.seed", 2**63),
        ("run.dir", ""),
        ("model.base", ""),
        ("model.precision", "fp16"),
        ("method.rank", 0),
        ("method.alpha", 0),
        ("method.targets", []),
        ("method.targets", "mlp"),
        ("data.cache", ""),
        ("data.datasets", []),
        ("data.datasets.0.name", "a.b"),
        ("data.datasets.0.weight", 0),
        ("data.resolution", 100),
        ("data.resolution", [512, 16]),
        ("data.resolution", [512, 4112]),
        ("data.resolution", [512, 512]),
        ("data.resolution", []),
        ("data.resolution", True),
        ("data.holdout", -1),
        ("data.max_megapixels", 0),
        ("data.captions.dropout", 1.1),
        ("data.captions.text_length", 513),
        ("data.captions.text_length", 15),
        ("train.steps", "abc"),
        ("train.steps", "200"),
        ("train.steps", True),
        ("train.steps", 200.0),
        ("train.steps", 0),
        ("train.lr", "fast"),
        ("train.lr", "1e-4"),
        ("train.lr", True),
        ("train.lr", float("inf")),
        ("train.lr", float("nan")),
        ("train.lr", 0),
        ("train.micro_batch_size", 0),
        ("train.micro_batch_size", 5),
        ("train.warmup_steps", 200),
        ("train.ema_decay", 1),
        ("train.ema_decay", 0),
        ("train.max_grad_norm", 0),
        ("train.activation_checkpointing", "yes"),
        ("train.activation_checkpointing", -1),
        ("flow.shift", 0),
        ("flow.shift", None),
        ("flow.guidance", 101),
        ("flow.keep_weight", -1),
        ("parallel.engine", "fsdp1"),
        ("validation.every_steps", 0),
        ("checkpoint.keep_last", 0),
        ("logging.trackers", ["wandb"]),
        ("train.unknown", 1),
        ("unknown", {}),
    ],
)
def test_value_outside_the_limits_is_refused(key: str, value: object) -> None:
    with pytest.raises(ValidationError):
        Config.model_validate(with_key(key, value))


@pytest.mark.parametrize(
    "key, value",
    [
        ("run.seed", 2**63 - 1),
        ("method", {"type": "full"}),
        ("method.targets", ["to_q", "to_k"]),
        ("data.resolution", [768, 512, 1024]),
        ("data.captions.dropout", 0),
        ("train.lr", 1),
        ("train.micro_batch_size", 4),
        ("train.warmup_steps", 0),
        ("train.max_grad_norm", None),
        ("train.activation_checkpointing", False),
        ("flow.shift", 3),
        ("flow.hole_weight", 0),
        ("flow.keep_weight", 0),
        ("validation.every_steps", None),
        ("checkpoint.keep_last", None),
        ("logging.trackers", []),
    ],
)
def test_value_at_the_limit_is_kept_as_given(key: str, value: object) -> None:
    found: Any = Config.model_validate(with_key(key, value)).model_dump(mode="json")
    for name in key.split("."):
        found = found[name]
    assert found == value


def test_hole_and_keep_weight_are_not_both_zero() -> None:
    raw = smallest() | {"flow": {"hole_weight": 0, "keep_weight": 0}}
    with pytest.raises(ValidationError, match="raise one of the two"):
        Config.model_validate(raw)


def test_every_key_has_a_description() -> None:
    modules = (schema, data_schema, dataset_schema, slurm_schema)
    kinds = {kind for module in modules for kind in vars(module).values() if isinstance(kind, type)}
    sections = [kind for kind in kinds if issubclass(kind, Section)]
    assert len(sections) > 20
    undescribed = [
        f"{kind.__name__}.{name}"
        for kind in sections
        for name in kind.model_fields.keys() - read_descriptions(kind).keys()
    ]
    assert not undescribed


def test_committed_schema_is_current() -> None:
    path = Path(schema.__file__).parent / "schema.json"
    assert json.loads(path.read_text(encoding="utf-8")) == json_schema(), (
        "run: fluxfill schema --out configs/schema.json"
    )


def test_configs_import_no_torch() -> None:
    code = "import configs.loading, sys; sys.exit('torch' in sys.modules)"
    assert subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=False).returncode == 0
