"""Checkpoints made in a moment: a model with trained tensors, saved as one rank of a run saves it."""

from pathlib import Path

from diffusers import FluxTransformer2DModel

from configs.adapter_targets import AdapterConfig
from configs.loading import dump_config, load_config
from configs.schema import Config, FullConfig
from data.batches.order import OrderSettings
from tests.trainer.adapters.live_models import adapted, train_a_little
from tests.trainer.export.trained_models import trained_model
from trainer.checkpoints.folders import MANIFEST, save_checkpoint
from trainer.checkpoints.run_state import RunState, TrainedBase, write_state
from trainer.checkpoints.tensor_files import Span, rank_file, write_index, write_tensors
from trainer.model.base_fingerprint import base_fingerprint

DEMO = Path(__file__).parents[3] / "configs" / "demo.yaml"
WHOLE = FullConfig(type="full")
ORDER = OrderSettings.current(seed=0, global_batch_size=2, weights={"demo": 1.0}, shards="0")


def config_of(model: Path, method: AdapterConfig | FullConfig, run: Path) -> Config:
    config = load_config(DEMO, [f"model.base={model}", f"run.dir={run.parent}", f"run.name={run.name}"])
    return config.model_copy(update={"method": method})


def make_checkpoint(
    model: Path, method: AdapterConfig | FullConfig, run: Path, *, step: int = 3, expanded: bool = False
) -> tuple[Path, FluxTransformer2DModel]:
    """(a complete checkpoint of a run on the base `model`, its live model).  Its average is twice the live weights."""
    if isinstance(method, FullConfig):
        live = trained_model(model)
    else:
        live = adapted(model, method, expanded=expanded)
        train_a_little(live)
    trained = {name: parameter.detach() for name, parameter in live.named_parameters() if parameter.requires_grad}
    tensors = {f"weight/{name}": value.reshape(-1).clone() for name, value in trained.items()}
    tensors |= {f"ema/{name}": 2 * value.reshape(-1) for name, value in trained.items()}

    def write(folder: Path) -> None:
        (folder / "config.yaml").write_text(dump_config(config_of(model, method, run)), encoding="utf-8")
        base = TrainedBase(base_fingerprint(model), "fp32")
        write_state(folder, RunState(step, step, 0, 0, ORDER, base=base), engine={})
        write_tensors(folder / rank_file(0), tensors)
        spans = {0: {name: Span(0, tensor.numel()) for name, tensor in tensors.items()}}
        write_index(folder, spans, {name: value.numel() for name, value in trained.items()})

    folder = save_checkpoint(run, step, write)
    (run / "config.yaml").write_text((folder / "config.yaml").read_text())
    return folder, live


def change_base(folder: Path, model: Path) -> None:
    """Let a checkpoint's config name another base."""
    lines = (folder / "config.yaml").read_text().splitlines()
    changed = [f"  base: {model}" if line.strip().startswith("base:") else line for line in lines]
    (folder / "config.yaml").write_text("\n".join(changed) + "\n")
    (folder / MANIFEST).write_text("{}")
