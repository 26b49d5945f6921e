"""What of a run's status somebody should look at."""

import shutil
from collections.abc import Iterator, Sequence
from pathlib import Path

from configs.memory import GIB
from launch.status.jobs import SlurmJob
from launch.status.run import RunStatus

_LATE_SAVES = 2  # intervals of checkpoint.every_steps
_SLOW_SHARE = 0.1  # of a step, that one rank waits for data and the others then for it
_FEW_GIB = 1.0
_STRAGGLES = 1.5  # times the median of the ranks' forward passes


def find_worries(status: RunStatus, queued: Sequence[SlurmJob] | None) -> list[str]:
    """A sentence for each thing, without a full stop."""
    return [
        *_of_progress(status),
        *_of_rank(status),
        *_of_disk(status),
        *(
            f"job {job.id} waits for one that has failed, and can never start: scancel {job.id}, and submit it again"
            for job in queued or []
            if job.can_never_start
        ),
        *(f"{path} may not be read by this user" for path in status.unreadable),
    ]


def _of_progress(status: RunStatus) -> Iterator[str]:
    if status.state == "silent" and status.silent_seconds is not None:
        yield f"nothing was written for {span(status.silent_seconds)}, and there is no outcome: killed, or it hangs"
    if status.skipped:
        yield f"{status.skipped} of the last steps were skipped: loss or gradient not finite"
    if status.rollbacks:
        last = status.rollbacks[-1]
        yield (
            f"it has gone back {len(status.rollbacks)} time(s), last from step {last.step:,} to {last.to_step:,}, for "
            f"numbers that went wrong; learning rate x {last.lr_scale:.3g} since (events.jsonl says which samples)"
        )
    if status.save_every_steps and status.step is not None:
        behind = status.step - (status.checkpoint.step if status.checkpoint else 0)
        if behind > _LATE_SAVES * status.save_every_steps:
            yield f"no checkpoint for {behind:,} steps; checkpoint.every_steps is {status.save_every_steps}"


def _of_rank(status: RunStatus) -> Iterator[str]:
    forward = status.slowest_forward
    if forward is not None and forward.seconds > _STRAGGLES * forward.median_seconds:
        yield (
            f"rank {forward.rank} takes {forward.seconds:.3g} s of a step for its forward passes, half of the ranks at "
            f"most {forward.median_seconds:.3g} s: look at its GPU"
        )
    slowest, pace = status.slowest_rank, status.seconds_per_step
    if slowest is None or pace is None:
        return
    if slowest.wait_seconds - slowest.median_seconds > _SLOW_SHARE * pace:
        yield (
            f"rank {slowest.rank} waits {slowest.wait_seconds:.3g} s of a step for data, half of the ranks at most "
            f"{slowest.median_seconds:.3g} s: look at its node's disk and network"
        )


def _of_disk(status: RunStatus) -> Iterator[str]:
    try:
        free = shutil.disk_usage(Path(status.run)).free
    except OSError:
        return
    needed = status.checkpoint.bytes if status.checkpoint else 0
    if status.state != "finished" and free < max(2 * needed, _FEW_GIB * GIB):
        yield f"the disk is nearly full: {size(free)} free, and a checkpoint is {size(needed)}"


def span(seconds: float) -> str:
    """A span of time in its two largest units."""
    left = int(seconds)
    if left < 60:
        return f"{left} s"
    days, hours, minutes = left // 86400, left // 3600 % 24, left // 60 % 60
    if days:
        return f"{days} d {hours} h"
    return f"{hours} h {minutes} min" if hours else f"{minutes} min"


def size(count: float) -> str:
    """Bytes in GiB, or MiB if fewer."""
    return f"{count / GIB:,.1f} GiB" if count >= GIB else f"{count / 2**20:,.1f} MiB"
