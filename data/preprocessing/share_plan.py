"""One worker plans, the others read its plan. Reading the pictures, which is nearly all of planning, they share.

A plan is good as long as a living worker goes by it. A job that starts when none is there makes a new one, as pictures
may have changed since. One that died on another machine passes for living for minutes: a worker takes a plan only from
one that it has heard of since it came itself, and waits until it has, or until the other is dead.
"""

from collections.abc import Callable, Sequence
from contextlib import suppress

from configs.errors import InputError
from data.preprocessing.plan_file import PlanFile, read_plan, write_plan
from data.preprocessing.worker_group import Crew, Member
from data.samples.shard_plan import ShardPlan

_CLAIM = "plan"


def agree_on_plan(
    crew: Crew,
    make_plan: Callable[[], Sequence[ShardPlan]],
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
        if (plan := _read_plan_of(crew)) is not None:
            return plan
        if problem := crew.failure(_CLAIM):
            raise InputError(problem)
        if silent := _unheard_with_plan(crew):
            waiting(f"a sign of life of {silent}, whose plan is there")
            continue
        if crew.claim(_CLAIM):
            try:
                if (plan := _read_plan_of(crew)) is not None:  # made between our look and our claim
                    return plan
                if not _unheard_with_plan(crew):
                    crew.bury_the_dead()
                    return _make_and_share(crew, make_plan)
            finally:
                crew.release(_CLAIM)
        if crew.holder(_CLAIM) and not has_helped:
            with suppress(InputError, OSError):  # who plans will find it too, and say so, or has finished meanwhile
                help_planning()
            has_helped = True
            continue
        waiting(f"{crew.holder(_CLAIM) or 'another worker'}, which plans")


def _read_plan_of(crew: Crew) -> PlanFile | None:
    for name in sorted({member.plan for member in crew.others() if member.plan and crew.has_heard(member)}):
        try:
            plan = read_plan(crew.folder / name)
        except FileNotFoundError:  # its last user left and cleared up
            continue
        crew.adopt(name)
        return plan
    return None


def _unheard_with_plan(crew: Crew) -> Member | None:
    """A member of whom it cannot be told yet whether its plan is that of a living one."""
    return next((member for member in crew.others() if member.plan and not crew.has_heard(member)), None)


def _make_and_share(crew: Crew, make_plan: Callable[[], Sequence[ShardPlan]]) -> PlanFile:
    try:
        plans = make_plan()
    except InputError as error:
        crew.report_failure(_CLAIM, str(error))
        raise
    name = f"plan-{crew.token}"
    write_plan(crew.folder / name, plans)
    crew.adopt(name)
    return read_plan(crew.folder / name)  # the samples are let go of
