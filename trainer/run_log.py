"""Logs of a run: the folder's JSON lines, TensorBoard, and the console. Rank 0 writes, the others keep silent."""

import atexit
import json
import logging
import statistics
import sys
import time
from contextlib import suppress
from itertools import count
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch
from rich.console import Console
from rich.logging import RichHandler
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from torch import Tensor

from configs.loading import dump_config
from configs.schema import Config
from data.batches.batch_stream import BatchStream
from data.storage.atomic_write import write_text_atomically
from trainer.checkpoints.run_state import RunState
from trainer.engines.base import Engine, Update
from trainer.process.disk_room import keep_room, release_room
from trainer.process.json_lines import append_line, write_event
from trainer.process.run_owner import require_ownership
from trainer.process.starts import note_start, own_commit

if TYPE_CHECKING:
    from torch.utils.tensorboard import SummaryWriter

log = logging.getLogger("fluxfill")

_COMPARE_EVERY = 20  # steps over which the ranks' waits for data and forward passes are compared
_STRAGGLES = 1.5  # times the others' median


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
        self._engine = engine
        engine.profile.next_step = first_step + 1
        # For data and forward passes, of each step since ranks were compared.
        self._times: list[tuple[float, float]] = []
        self._compared: tuple[Tensor, ...] | None = None  # the same of all ranks, on their way: [world_size] each
        self._slow_rank: int | None = None  # of the last comparison
        self._named_rank: int | None = None
        self._steps = config.train.steps
        self._global_batch_size = config.train.global_batch_size
        gpus = engine.gpus  # all ranks tell theirs
        _take_peak_memory()  # the start's is no step's
        self._start: tuple[int, float] | None = None  # the step before this process's first one, and when
        self._tensorboard: SummaryWriter | None = None
        self._progress: Progress | None = None
        if not is_main:
            return
        self._folder.mkdir(parents=True, exist_ok=True)
        self._config, self._restart = dump_config(config), state.restarts
        if first_step == 0:
            self._put_config_in_force()
        keep_room(self._folder)
        place = {"engine": engine.name, "processes": engine.world_size, "nodes": engine.num_nodes, "gpus": gpus}
        note_start(self._folder, step=first_step, **place, commit=own_commit())
        self._has_tensorboard = "tensorboard" in config.logging.trackers
        # A fresh start validates at step 0 again.
        self._keep_until(first_step if first_step else -1, restart=state.restarts)
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

    def _put_config_in_force(self) -> None:
        """Write config.yaml, once a step goes by it; one by which earlier steps went stays as config.<restart>.yaml."""
        path = self._folder / "config.yaml"
        if path.is_file() and (self._folder / "metrics.jsonl").is_file():
            earlier = path.read_text(encoding="utf-8")
            if earlier != self._config:
                write_text_atomically(_free_name(path, self._restart), earlier)
        write_text_atomically(path, self._config)

    def _keep_until(self, step: int, *, restart: int) -> None:
        """Set aside what was logged of later steps."""
        for name in ("metrics", "validation"):
            _set_aside(self._folder / f"{name}.jsonl", after_step=step, restart=restart)
        if self._has_tensorboard:
            from torch.utils.tensorboard import SummaryWriter

            self._tensorboard = SummaryWriter(self._folder / "tensorboard", purge_step=step + 1)

    def go_back(self, state: RunState) -> None:
        """Set aside what was logged of the steps behind a state that the run has gone back to."""
        if not self._is_main:
            return
        self._close_tensorboard()
        self._keep_until(state.step, restart=state.restarts + 1)
        self._start = None
        if self._progress is not None:
            self._progress.update(self._task, completed=state.step)

    def step(self, state: RunState, update: Update, lr: float, stream: BatchStream) -> None:
        """Record the update that led to `state`."""
        step = state.step
        self._engine.profile.end()
        self._engine.profile.next_step = step + 1
        compared = self._compare_ranks(stream.wait_seconds, self._engine.forward_seconds())
        if not self._is_main:
            return
        require_ownership()
        if self._start is None:  # the first step of this start
            self._put_config_in_force()
        now = time.monotonic()
        seconds = now - stream.batch_start
        first_step, start = self._start = self._start or (step - 1, stream.batch_start)
        line: dict[str, Any] = {
            "step": step,
            "time": round(time.time(), 3),
            "epoch": stream.current.epoch,
            "loss": update.loss,
            "grad_norm": update.grad_norm,
            "lr": lr,
            "samples": step * self._global_batch_size,
            "seconds": round(seconds, 6),
            "samples_per_second": round(self._global_batch_size / seconds, 4),
            "data_wait_seconds": round(stream.wait_seconds, 6),
            "peak_memory_gib": _take_peak_memory(),
        }
        append_line(self._folder / "metrics.jsonl", line | compared)
        for name in ("loss", "grad_norm", "lr", "samples_per_second"):
            self._add_scalar(f"train/{name}", line[name], step)
        figures = f"loss {update.loss:.4f}  {seconds:.3g} s/step{_troubles(state)}"
        if self._progress is not None:
            self._progress.update(self._task, completed=step, figures=figures)
        elif step % max(1, self._steps // 30) == 0 or step == 1:
            left = (self._steps - step) * (now - start) / (step - first_step)
            log.info("step %d/%d  %s  about %s left", step, self._steps, figures, _duration(left))

    def _compare_ranks(self, wait_seconds: float, forward_seconds: float) -> dict:
        """Every so many steps, which rank has waited longest for data, and which took longest over its forward passes,
        a step; empty between. All ranks call it.

        The numbers are asked for at one step and looked at in the next, whose update has waited for the device anyway.
        Of forward passes medians: steps that compile are no sign.
        """
        found = {}
        if self._compared is not None:
            waits, forwards = (numbers.tolist() for numbers in self._compared)
            self._compared = None
            rank, longest, median = _longest(waits)
            found["slowest_rank"] = {"rank": rank, "data_wait_seconds": longest, "median_seconds": median}
            rank, longest, median = _longest(forwards)
            found["slowest_forward"] = {"rank": rank, "seconds": longest, "median_seconds": median}
            self._watch_straggler(rank if longest > _STRAGGLES * median else None, longest, median)
        self._times.append((wait_seconds, forward_seconds))
        if len(self._times) == _COMPARE_EVERY:
            if self._engine.ranks.world_size > 1:
                mean_wait = statistics.fmean(wait for wait, _ in self._times)
                own = mean_wait, statistics.median(forward for _, forward in self._times)
                self._compared = tuple(self._engine.ranks.start_all_gather(seconds) for seconds in own)
            self._times.clear()
        return found

    def _watch_straggler(self, rank: int | None, seconds: float, median: float) -> None:
        """Name a rank that is much slower than the others twice in a row; once."""
        if rank is not None and rank == self._slow_rank and rank != self._named_rank and self._is_main:
            log.warning(
                "rank %d takes %.3g s a step for its forward passes, half of the ranks at most %.3g s, and all wait: "
                "look at its GPU's clocks (nvidia-smi -q -d PERFORMANCE), and at what else runs there",
                *(rank, seconds, median),
            )
            write_event(self._folder, "straggler", rank=rank, seconds=seconds, median_seconds=median)
            self._named_rank = rank
        self._slow_rank = rank

    def has_validation(self, step: int) -> bool:
        """Whether the weights of a step were validated, by this start or an earlier one; all ranks call it."""
        there = self._is_main and any(line["step"] == step for line in _read_lines(self._folder / "validation.jsonl"))
        return self._engine.ranks.broadcast_object(there)

    def validation(self, line: dict | None) -> None:
        """Record one validation; the same figures of step 0 go with every later line as hole_psnr_untrained.

        line: None of a validation that was cut short, which leaves no record.
        """
        if line is None or not self._is_main:
            return
        _take_peak_memory()  # or it would be the next step's
        path = self._folder / "validation.jsonl"
        first = next((earlier for earlier in [line, *_read_lines(path)] if earlier["step"] == 0), None)
        for split, figures in line.items():
            if isinstance(figures, dict) and figures and first is not None and first.get(split):
                untrained = first[split]["hole_psnr"]
                figures["hole_psnr_untrained"] = float("nan") if untrained is None else untrained
        append_line(path, line)
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
            for name, figure in figures.items():
                self._add_scalar(f"{split}/{name}", figure, line["step"])

    def _add_scalar(self, name: str, value: Any, step: int) -> None:
        if self._tensorboard is None:
            return
        try:
            self._tensorboard.add_scalar(name, value, step)
        except OSError as error:  # of its thread, which ends by it
            log.error("TensorBoard gets nothing more: %s. metrics.jsonl has all figures", error)
            self._tensorboard = None

    def close(self) -> None:
        if self._is_main:
            release_room(self._folder)
        if self._progress is not None:
            self._progress.stop()
        self._close_tensorboard()

    def _close_tensorboard(self) -> None:
        if self._tensorboard is not None:
            with suppress(OSError):  # a full disk, with the last seconds of what metrics.jsonl has
                self._tensorboard.close()


def _take_peak_memory() -> float | None:
    """GiB that this process's tensors took of its GPU at most, since this was last asked for; None without one."""
    if not torch.cuda.is_available():
        return None
    peak = torch.cuda.max_memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    return round(peak / 2**30, 3)


def _longest(of_ranks: list[float]) -> tuple[int, float, float]:
    """(rank, its seconds, median of all)"""
    rank = max(range(len(of_ranks)), key=of_ranks.__getitem__)
    return rank, round(of_ranks[rank], 6), round(statistics.median_low(of_ranks), 6)


def _troubles(state: RunState) -> str:
    """Skips and rollbacks, for the progress line; nothing of a run that had none."""
    skipped = f"  {len(state.skipped)} skipped" if state.skipped else ""
    back = f"  {state.rollbacks} rolled back, lr x {state.lr_scale:.3g}" if state.rollbacks else ""
    return skipped + back


def _read_lines(path: Path) -> list[dict]:
    """The lines of a log that `_set_aside` has gone through; none if it is not there."""
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()] if path.is_file() else []


def _free_name(path: Path, number: int) -> Path:
    """<name>.<number>.<ending>, or the first number after it that is free."""
    names = (path.with_suffix(f".{later}{path.suffix}") for later in count(number))
    return next(name for name in names if not name.exists())


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
        write_text_atomically(_free_name(path, restart), "".join(f"{line}\n" for line in undone))
    write_text_atomically(path, "".join(f"{line}\n" for line in kept))


def _duration(seconds: float) -> str:
    hours, rest = divmod(int(seconds), 3600)
    return f"{hours} h {rest // 60} min" if hours else f"{rest // 60} min {rest % 60} s"
