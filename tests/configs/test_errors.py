from configs.errors import list_problems


def test_a_long_list_of_problems_ends_with_how_many_more():
    lines = list_problems([f"problem {number}" for number in range(70)]).splitlines()
    assert lines[0] == "problem 0"
    assert lines[-1] == "... and 20 more."
    assert len(lines) == 51
