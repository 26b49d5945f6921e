import pytest

from configs.errors import InputError
from data.crew import join_crew
from data.share_plan import agree_on_plan


@pytest.mark.parametrize("fault", [FileNotFoundError("copies/a.part"), InputError("a.png: no such picture")])
def test_a_helper_survives_that_the_one_who_plans_is_done_first(tmp_path, fault):
    """Then what the helper still writes may go while it writes."""
    with join_crew(tmp_path / "crew", {}) as planner, join_crew(tmp_path / "crew", {}) as helper:
        assert planner.claim("plan")

        def help_planning():
            planner.release("plan")
            raise fault

        assert agree_on_plan(helper, lambda: [], help_planning=help_planning, waiting=print) == ()
