"""One worker plans, the others read its plan. Reading the pictures, which is nearly all of planning, they share.

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
    """The plan of a living member, or else this one's own from `make_plan`, for the others to read.

    help_planning: done while another plans.  waiting: waits a moment, told for whom.
    Raises InputError if `make_plan` does, here or in the member that did it.
    """
    has_helped = False
    while True:
        if (plan := _read_plan_of(group)) is not None:
            return plan
        if problem := group.failure(_CLAIM):
            raise InputError(problem)
        if silent := _unheard_with_plan(group):
            waiting(f"a sign of life of {silent}, whose plan is there")
            continue
        if group.claim(_CLAIM):
            try:
                if (plan := _read_plan_of(group)) is not None:  # made between our look and our claim
                    return plan
                if not _unheard_with_plan(group):
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
    for name in sorted({member.plan for member in group.others() if member.plan and group.is_confirmed_alive(member)}):
        try:
            plan = read_plan(group.folder / name)
        except FileNotFoundError:  # its last user left and cleared up
            continue
        group.announce_plan(name)
        return plan
    return None


def _unheard_with_plan(group: WorkerGroup) -> WorkerInfo | None:
    """A member of whom it cannot be told yet whether its plan is that of a living one."""
    return next((member for member in group.others() if member.plan and not group.is_confirmed_alive(member)), None)


def _make_and_share(group: WorkerGroup, make_plan: Callable[[], Sequence[PlannedShard]]) -> PlanFile:
    try:
        plans = make_plan()
    except InputError as error:
        group.report_failure(_CLAIM, str(error))
        raise
    name = f"plan-{group.token}"
    write_plan(group.folder / name, plans)
    group.announce_plan(name)
    return read_plan(group.folder / name)  # the samples are let go of
