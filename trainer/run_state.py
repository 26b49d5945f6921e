"""What a run goes on from: weights, optimizer, average, step and place in the order, keyed by parameter name.

Three safetensors files and one JSON; no pickle. The layout knows nothing of how the run was spread over processes.
"""

import json
import logging
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from torch import Tensor, nn

from configs.errors import InputError
from configs.loading import dump_config
from configs.schema import Config
from data.order import OrderSettings
from trainer.checkpoint import complete_checkpoints, damage_of, latest_checkpoint, prune_checkpoints, save_checkpoint
from trainer.ema import Ema
from trainer.engine import Engine, Update
from trainer.lora import save_adapter

MAX_SKIPS = 5

log = logging.getLogger("fluxfill")


@dataclass(frozen=True)
class RunState:
    """Where a run stands.

    step: updates done.  batch: global batches taken from the order.  skips: updates in a row that were not applied.
    restarts: times the run was resumed.  order: what the order depends on; a resumed run keeps it.
    """

    step: int
    batch: int
    skips: int
    restarts: int
    order: OrderSettings

    def after(self, update: Update) -> "RunState":
        """The state after an update; one that was skipped has used up its step and its batch.

        Raises FloatingPointError after the fifth skip in a row.
        """
        skips = 0 if update.applied else self.skips + 1
        if skips > MAX_SKIPS:
            raise FloatingPointError(
                f"step {self.step + 1}: loss or gradient not finite {skips} times in a row (loss {update.loss}, gradient "
                f"norm {update.grad_norm}). Lower train.lr, or look at the samples of the last steps."
            )
        return replace(self, step=self.step + 1, batch=self.batch + 1, skips=skips)


def trained_parameters(transformer: nn.Module) -> dict[str, nn.Parameter]:
    """Name -> parameter of everything that trains."""
    return {name: parameter for name, parameter in transformer.named_parameters() if parameter.requires_grad}


def resume(
    config: Config,
    resume_from: str,
    engine: Engine,
    transformer: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
) -> RunState:
    """Where the run goes on, with weights, optimizer and average loaded; all zero for a fresh start.

    resume_from: "auto" (the newest whole checkpoint of the run folder, if there is one), "never", or a checkpoint's
    folder.  Raises InputError if it cannot be: another batch size or seed, another method, a damaged folder.
    """
    order = OrderSettings.current(seed=config.run.seed, global_batch_size=config.train.global_batch_size)
    # Rank 0 looks, for all: checking reads every byte, and ranks that chose differently would drift apart in silence.
    (folder, problem), *_ = engine.gather(_choose_checkpoint(config, resume_from) if engine.is_main else (None, None))
    if problem is not None:
        raise InputError(problem)
    if folder is None:
        return RunState(step=0, batch=0, skips=0, restarts=0, order=order)
    state = read_state(folder)
    if (state.order.seed, state.order.global_batch_size) != (order.seed, order.global_batch_size):
        raise InputError(
            f"{folder}: the run has seed {state.order.seed} and train.global_batch_size {state.order.global_batch_size}, "
            f"the config {order.seed} and {order.global_batch_size}. They fix the order of the samples: set them back, or "
            "start a new run (run.name)."
        )
    restore(folder, trained_parameters(engine.plain(transformer)), optimizer, ema)
    log.info("resumed from %s at step %d", folder, state.step)
    return replace(state, restarts=state.restarts + 1)


def _choose_checkpoint(config: Config, resume_from: str) -> tuple[Path | None, str | None]:
    """(checkpoint or None, what is wrong or None)."""
    run = config.run.folder
    if resume_from == "never":
        if complete_checkpoints(run):
            return None, f"{run}: holds checkpoints already. Choose another run.name, or resume with --resume auto."
        return None, None
    if resume_from == "auto":
        return latest_checkpoint(run), None
    folder = Path(resume_from)
    damage = damage_of(folder)
    return folder, f"--resume {folder}: {damage}. Give a whole checkpoint folder, or auto." if damage else None


def save_if_due(
    config: Config,
    engine: Engine,
    state: RunState,
    transformer: nn.Module,
    optimizer: torch.optim.Optimizer,
    ema: Ema,
) -> None:
    """Every `checkpoint.every_steps` and at the end: save, then delete what is too old. All ranks call it.

    A save that fails (a full disk) is reported and the run goes on; the checkpoints before it are untouched.
    """
    every = config.checkpoint.every_steps
    if every is None or (state.step % every and state.step != config.train.steps):
        return
    if engine.is_main:
        plain = engine.plain(transformer)

        def write(folder: Path) -> None:
            write_state(folder, config, state, trained_parameters(plain), optimizer, ema)
            if config.method.type == "lora":
                save_adapter(plain, folder / "adapter")

        try:
            folder = save_checkpoint(config.run.folder, state.step, write)
            log.info("saved %s", folder)
            if config.checkpoint.keep_last is not None:
                prune_checkpoints(config.run.folder, keep_last=config.checkpoint.keep_last)
        except OSError as error:
            log.error(
                "step %d could not be saved (%s); the run goes on, earlier checkpoints are whole", state.step, error
            )
    engine.wait()


def write_state(
    folder: Path,
    config: Config,
    state: RunState,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
) -> None:
    """Fill a checkpoint folder. Raises FloatingPointError rather than save weights that are not finite."""
    weights = {name: parameter.detach() for name, parameter in parameters.items()}
    for name, weight in weights.items():
        if not torch.isfinite(weight).all():
            raise FloatingPointError(f"step {state.step}: {name} is not finite; such weights are never saved")
    _save(weights, folder / "weights.safetensors")
    tensors, numbers = _flatten_optimizer(optimizer, list(parameters))
    _save(tensors, folder / "optimizer.safetensors")
    if ema.averages:
        _save(ema.averages, folder / "ema.safetensors")
    text = json.dumps({"state": asdict(state), "optimizer": numbers}, indent=1)
    (folder / "state.json").write_text(text, encoding="utf-8")
    (folder / "config.yaml").write_text(dump_config(config), encoding="utf-8")


def read_state(folder: Path) -> RunState:
    """The state in a checkpoint folder."""
    fields = json.loads((folder / "state.json").read_text(encoding="utf-8"))["state"]
    return RunState(**fields | {"order": OrderSettings(**fields["order"])})


def restore(
    folder: Path,
    parameters: Mapping[str, nn.Parameter],
    optimizer: torch.optim.Optimizer,
    ema: Ema,
) -> None:
    """Load weights, optimizer and average from a checkpoint folder into what is there.

    Raises InputError if the checkpoint is of another method, rank or optimizer.
    """
    with safe_open(folder / "weights.safetensors", framework="pt") as saved:
        if set(saved.keys()) != set(parameters):
            raise InputError(
                f"{folder}: holds {len(saved.keys())} trained tensors, this config trains {len(parameters)} others. "
                "model.base and method must stay as they were; start a new run (run.name) to change them."
            )
        with torch.no_grad():
            for name, parameter in parameters.items():
                weight = saved.get_tensor(name)
                if weight.shape != parameter.shape:
                    raise InputError(
                        f"{folder}: {name} is {list(weight.shape)}, this config has {list(parameter.shape)}. "
                        "model.base and method must stay as they were; start a new run (run.name) to change them."
                    )
                parameter.copy_(weight)
    numbers = json.loads((folder / "state.json").read_text(encoding="utf-8"))["optimizer"]
    _load_optimizer(optimizer, list(parameters), load_file(folder / "optimizer.safetensors"), numbers, folder)
    if ema.averages:
        if not (folder / "ema.safetensors").is_file():
            raise InputError(f"{folder}: has no moving average. Set train.ema_decay=null, or start a new run.")
        ema.load(load_file(folder / "ema.safetensors"))


def _save(tensors: Mapping[str, Tensor], path: Path) -> None:
    save_file({name: tensor.detach().cpu().contiguous() for name, tensor in tensors.items()}, path)


def _leaves(value: Mapping, prefix: str) -> Iterator[tuple[str, object]]:
    """(path, leaf) of a nested dict; the parts of a path are joined by "/"."""
    for name, leaf in value.items():
        if isinstance(leaf, Mapping):
            yield from _leaves(leaf, f"{prefix}{name}/")
        else:
            yield f"{prefix}{name}", leaf


def _flatten_optimizer(optimizer: torch.optim.Optimizer, names: list[str]) -> tuple[dict[str, Tensor], dict]:
    """An optimizer's state as named tensors ("<parameter>//<path>") and plain numbers of the same names."""
    tensors, numbers = {}, {}
    for index, state in optimizer.state_dict()["state"].items():
        for path, leaf in _leaves(state, ""):
            (tensors if isinstance(leaf, Tensor) else numbers)[f"{names[index]}//{path}"] = leaf
    return tensors, numbers


def _load_optimizer(
    optimizer: torch.optim.Optimizer, names: list[str], tensors: Mapping[str, Tensor], numbers: Mapping, folder: Path
) -> None:
    state: dict[int, dict] = {}
    place = {name: index for index, name in enumerate(names)}
    for name, leaf in [*tensors.items(), *numbers.items()]:
        parameter, path = name.split("//")
        *parents, last = path.split("/")
        at = state.setdefault(place[parameter], {})
        for parent in parents:
            at = at.setdefault(parent, {})
        at[last] = leaf
    fresh = optimizer.state_dict()
    if state and set(state) != set(range(len(names))):
        raise InputError(f"{folder}: the optimizer's state does not cover every trained tensor.")
    try:
        optimizer.load_state_dict({"state": state, "param_groups": fresh["param_groups"]})
    except (KeyError, ValueError) as error:
        raise InputError(
            f"{folder}: its optimizer state is not one of this optimizer ({error}). train.optimizer must stay as it was."
        ) from error
