"""Agreement on a plan: one worker makes it, the others read it, and all of them share the reading of the pictures,
which is nearly all of planning.

A plan is good as long as a living worker goes by it. A job that starts when none is there makes a new one, as pictures
may have changed since. One that died on another machine passes for living for minutes: a worker takes a plan only from
one that it has heard of since it came itself, and waits until it has, or until the other is dead.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from configs.errors import InputError
from data.preprocessing.plan_file import PlanFile, read_plan, write_plan
from data.preprocessing.worker_group import WorkerGroup, WorkerInfo
from data.samples.shard_plan import PlannedShard

_CLAIM = "plan"


def agree_on_plan(
    group: WorkerGroup,
    make_plan: Callable[[], Sequence[PlannedShard]],
    *,
    help_planning: Callable[[], object],
    waiting: Callable[[str], object],
) -> PlanFile:
    """The plan of a living worker, or else this one's own from `make_plan`, for the others to read.

    help_planning: called while another plans.  waiting: waits a moment; its argument says for whom.
    Raises InputError if `make_plan` does, here or in the worker that called it.
    """
    has_helped = False
    while True:
        if (plan := _read_plan_of(group)) is not None:
            return plan
        if problem := group.failure(_CLAIM):
            raise problem
        if silent := _unconfirmed_with_plan(group):
            waiting(f"a sign of life of {silent}, whose plan is there")
            continue
        if group.claim(_CLAIM):
            try:
                if (plan := _read_plan_of(group)) is not None:  # made between our look and our claim
                    return plan
                if not _unconfirmed_with_plan(group):
                    group.evict_dead()
                    return _make_and_share(group, make_plan)
            finally:
                group.release(_CLAIM)
        if group.holder(_CLAIM) and not has_helped:
            with suppress(InputError, OSError):  # who plans will find it too, and say so, or has finished meanwhile
                help_planning()
            has_helped = True
            continue
        waiting(f"{group.holder(_CLAIM) or 'another worker'}, which plans")


def _read_plan_of(group: WorkerGroup) -> PlanFile | None:
    for name in sorted({other.plan for other in group.others() if other.plan and group.is_confirmed_alive(other)}):
        try:
            plan = read_plan(group.folder / name)
        except FileNotFoundError:  # its last user left and cleared up
            continue
        group.announce_plan(name)
        return plan
    return None


def _unconfirmed_with_plan(group: WorkerGroup) -> WorkerInfo | None:
    """A worker with a plan that may be dead: another machine's, not heard of since this one joined."""
    return next((other for other in group.others() if other.plan and not group.is_confirmed_alive(other)), None)


def _make_and_share(group: WorkerGroup, make_plan: Callable[[], Sequence[PlannedShard]]) -> PlanFile:
    try:
        plans = make_plan()
    except InputError as error:
        group.report_failure(_CLAIM, error)
        raise
    write_plan(group.plan_path, plans)
    group.announce_plan(group.plan_path.name)
    return read_plan(group.plan_path)  # without the samples
