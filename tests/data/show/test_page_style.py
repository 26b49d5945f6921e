import re

from data.show.page_style import STYLES


def test_every_colour_has_a_value_in_light_and_in_dark():
    light, dark = (
        set(re.findall(r"(--\w+):", block))
        for block in re.findall(r":root \{(.*?)\n *\}", (STYLES / "base.css").read_text(), re.DOTALL)
    )
    assert light == dark and {"--paper", "--ink", "--accent"} <= light
