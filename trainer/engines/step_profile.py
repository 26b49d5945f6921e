"""Profiler traces of the steps that a config names: what ran when, on the CPU and on the GPU."""

import logging
from pathlib import Path

import torch
from torch.profiler import ProfilerActivity, profile

from configs.schema import Config

PROFILE = "profile"
log = logging.getLogger("fluxfill")


class StepProfile:
    """The traces of one rank: <run>/profile/step-<n>-rank-<n>.json.gz for each of `train.profile_steps`.

    next_step: the number of the step that begins next, kept by who counts them.
    """

    def __init__(self, config: Config, rank: int) -> None:
        self.next_step = 0
        self._steps, self._folder, self._rank = frozenset(config.train.profile_steps), config.run.folder, rank
        self._running: profile | None = None

    def begin(self) -> None:
        """The next step begins, with the wait for its data."""
        if self.next_step not in self._steps or self._running is not None:
            return
        kinds = [ProfilerActivity.CPU, *[ProfilerActivity.CUDA] * torch.cuda.is_available()]
        self._running = profile(activities=kinds, record_shapes=True)
        self._running.start()

    def end(self) -> None:
        """The step has ended: its trace is written, if it has one. A disk that does not take it does not end a run."""
        if self._running is None:
            return
        running, self._running = self._running, None
        running.stop()  # waits for the device
        path = self._folder / PROFILE / f"step-{self.next_step:08d}-rank-{self._rank:05d}.json.gz"
        try:
            self._write(running, path)
        except (OSError, RuntimeError) as error:  # the second is torch's, of its own writer
            log.error("step %d has no trace: %s", self.next_step, error)
        else:
            log.info("profiled step %d: %s", self.next_step, path)

    def _write(self, running: profile, path: Path) -> None:
        path.parent.mkdir(parents=True, exist_ok=True)
        running.export_chrome_trace(str(path))
