"""Logs of a run: the folder's JSON lines, TensorBoard, and the console. Rank 0 writes, the others keep silent."""

import atexit
import json
import logging
import math
import sys
import time
from itertools import count
from pathlib import Path

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from configs.loading import dump_config
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.storage.atomic_write import write_text_atomically
from trainer.checkpoints.run_state import RunState
from trainer.engines.base import Engine, Update

log = logging.getLogger("fluxfill")


def configure_logging(engine: Engine) -> Console:
    """Messages of this program from rank 0, warnings alone from the others. Returns where they go."""
    console = Console()
    if console.is_terminal:
        handler: logging.Handler = RichHandler(console=console, show_path=False, show_level=False, markup=False)
    else:
        handler = logging.StreamHandler(sys.stdout)
        handler.setFormatter(logging.Formatter("%(asctime)s %(message)s", datefmt="%H:%M:%S"))
    log.handlers = [handler]
    log.propagate = False
    log.setLevel(logging.INFO if engine.is_main else logging.WARNING)
    return console


class RunLog:
    """metrics.jsonl, validation.jsonl, TensorBoard and the progress bar of one process of a run."""

    def __init__(self, config: Config, engine: Engine, state: RunState, console: Console) -> None:
        is_main, first_step = engine.is_main, state.step
        self._folder = config.run.folder
        self._is_main = is_main
        self._steps = config.train.steps
        self._global_batch_size = config.train.global_batch_size
        self._start: tuple[int, float] | None = None  # the step before this process's first one, and when
        self._tensorboard = None
        self._progress: Progress | None = None
        if not is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        write_text_atomically(self._folder / "config.yaml", dump_config(config))
        kept_step = first_step if first_step else -1  # a fresh start validates at step 0 again
        for name in ("metrics", "validation"):
            _set_aside(self._folder / f"{name}.jsonl", after_step=kept_step, restart=state.restarts)
        if "tensorboard" in config.logging.trackers:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self._folder / "tensorboard", purge_step=kept_step + 1)
        if console.is_terminal:
            self._progress = Progress(
                TextColumn("training"),
                BarColumn(),
                MofNCompleteColumn(),
                TextColumn("{task.fields[figures]}"),
                TimeRemainingColumn(elapsed_when_finished=True),
                console=console,
            )
            self._task = self._progress.add_task("training", total=self._steps, completed=first_step, figures="")
            self._progress.start()
            atexit.register(self._progress.stop)  # also when the run raises: a bar left running hides the cursor

    def step(self, state: RunState, update: Update, lr: float, stream: BatchStream) -> None:
        """Record the update that led to `state`."""
        step = state.step
        if not update.applied:
            log.warning("step %d skipped: loss %s, gradient norm %s", step, update.loss, update.grad_norm)
        if not self._is_main:
            return
        now = time.monotonic()
        seconds = now - stream.batch_start
        first_step, start = self._start = self._start or (step - 1, stream.batch_start)
        line = {
            "step": step,
            "epoch": stream.current.epoch,
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "lr": lr,
            "samples": step * self._global_batch_size,
            "seconds": round(seconds, 6),
            "samples_per_second": round(self._global_batch_size / seconds, 4),
            "data_wait_seconds": round(stream.wait_seconds, 6),
            "peak_memory_gib": round(torch.cuda.max_memory_allocated() / 2**30, 3)
            if torch.cuda.is_available()
            else None,
        }
        _append(self._folder / "metrics.jsonl", line)
        if self._tensorboard is not None:
            for name in ("loss", "grad_norm", "lr", "samples_per_second"):
                self._tensorboard.add_scalar(f"train/{name}", line[name], step)
        figures = f"loss {update.loss:.4f}  {seconds:.3g} s/step"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif step % max(1, self._steps // 30) == 0 or step == 1:
            left = (self._steps - step) * (now - start) / (step - first_step)
            log.info("step %d/%d  %s  about %s left", step, self._steps, figures, _duration(left))

    def validation(self, line: dict) -> None:
        """Record one validation; the same figures of step 0 go with every later line as hole_psnr_untrained."""
        if not self._is_main:
            return
        path = self._folder / "validation.jsonl"
        first = line if line["step"] == 0 else _first_line(path)
        for split, figures in line.items():
            if isinstance(figures, dict) and figures and first is not None and first.get(split):
                untrained = first[split]["hole_psnr"]
                figures["hole_psnr_untrained"] = float("nan") if untrained is None else untrained
        _append(path, line)
        for split, figures in line.items():
            if not isinstance(figures, dict) or not figures:
                continue
            log.info(
                "validation at step %d, %s: hole %.2f dB (VAE's ceiling %.2f, untrained %.2f), loss at sigma 0.5 %.4f",
                line["step"],
                split,
                figures["hole_psnr"],
                figures["hole_psnr_ceiling"],
                figures.get("hole_psnr_untrained", float("nan")),
                figures["loss_sigma_0.5"],
            )
            if self._tensorboard is not None:
                for name, figure in figures.items():
                    self._tensorboard.add_scalar(f"{split}/{name}", figure, line["step"])

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
        if self._tensorboard is not None:
            self._tensorboard.close()


def _append(path: Path, line: dict) -> None:
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(_finite(line), allow_nan=False) + "\n")


def _finite(figure: object) -> object:
    """A figure as JSON has it: null for nan and inf."""
    if isinstance(figure, dict):
        return {name: _finite(inner) for name, inner in figure.items()}
    return None if isinstance(figure, float) and not math.isfinite(figure) else figure


def _first_line(path: Path) -> dict | None:
    if not path.is_file():
        return None
    with path.open(encoding="utf-8") as file:
        line = json.loads(file.readline() or "null")
    return line if line and line["step"] == 0 else None


def _set_aside(path: Path, *, after_step: int, restart: int) -> None:
    """Keep the lines up to a step; later ones belong to what a resume undid and move to <name>.<restart>.jsonl, or the
    first number after it that is free: two starts from one checkpoint count alike."""
    if not path.is_file():
        return
    kept: list[str] = []
    undone: list[str] = []
    for line in path.read_text(encoding="utf-8").splitlines():
        try:
            step = json.loads(line)["step"]
        except ValueError:
            continue  # the last line of a process that was killed while it wrote
        (kept if step <= after_step else undone).append(line)
    if undone:
        aside = next(p for number in count(restart) if not (p := path.with_suffix(f".{number}.jsonl")).exists())
        write_text_atomically(aside, "".join(f"{line}\n" for line in undone))
    write_text_atomically(path, "".join(f"{line}\n" for line in kept))


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
