"""One worker plans, the others read its plan. Reading the pictures, which is nearly all of planning, they share.

A plan is good as long as a living worker goes by it. A job that starts when none is there makes a new one, as pictures
may have changed since.
"""

import gzip
from collections.abc import Callable, Sequence
from contextlib import suppress
from functools import partial
from pathlib import Path

from pydantic import TypeAdapter

from configs.errors import InputError
from data.atomic_write import write_atomically
from data.crew import Crew
from data.shard_plan import ShardPlan

_PLANS = TypeAdapter(tuple[ShardPlan, ...])
_CLAIM = "plan"


def agree_on_plan(
    crew: Crew,
    make_plan: Callable[[], Sequence[ShardPlan]],
    *,
    help_planning: Callable[[], object],
    waiting: Callable[[str], object],
) -> tuple[ShardPlan, ...]:
    """The plan of a living member, or else this one's own from `make_plan`, for the others to read.

    help_planning: done while another plans.  waiting: waits a moment, told for whom.
    Raises InputError if `make_plan` does, here or in the member that did it.
    """
    has_helped = False
    while True:
        if (plans := _read_plan_of(crew)) is not None:
            return plans
        if problem := crew.failure(_CLAIM):
            raise InputError(problem)
        if crew.claim(_CLAIM):
            try:
                if (plans := _read_plan_of(crew)) is not None:  # made between our look and our claim
                    return plans
                return _make_and_share(crew, make_plan)
            finally:
                crew.release(_CLAIM)
        if crew.holder(_CLAIM) and not has_helped:
            with suppress(InputError, OSError):  # who plans will find it too, and say so, or has finished meanwhile
                help_planning()
            has_helped = True
            continue
        waiting(f"{crew.holder(_CLAIM) or 'another worker'}, which plans")


def _read_plan_of(crew: Crew) -> tuple[ShardPlan, ...] | None:
    for name in sorted({member.plan for member in crew.others() if member.plan}):
        try:
            plans = _PLANS.validate_json(gzip.decompress((crew.folder / name).read_bytes()))
        except FileNotFoundError:  # its last user left and cleared up
            continue
        crew.adopt(name)
        return plans
    return None


def _make_and_share(crew: Crew, make_plan: Callable[[], Sequence[ShardPlan]]) -> tuple[ShardPlan, ...]:
    try:
        plans = tuple(make_plan())
    except InputError as error:
        crew.report_failure(_CLAIM, str(error))
        raise
    name = f"plan-{crew.token}.json.gz"
    write_atomically(crew.folder / name, partial(_write_plan, plans))
    crew.adopt(name)
    return plans


def _write_plan(plans: tuple[ShardPlan, ...], path: Path) -> None:
    path.write_bytes(gzip.compress(_PLANS.dump_json(plans), compresslevel=1))
