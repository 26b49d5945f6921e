import pytest

from configs.errors import InputError
from configs.loading import load_config


@pytest.mark.parametrize(
    "asked, cure, message",
    [
        (["method={type: full}", "flow.keep_target=base"], "flow.keep_target=picture", "keep_target base and method"),
        (["validation.weights=ema"], "train.ema_decay=0.99", "weights is ema, but train.ema_decay is null"),
    ],
)
def test_what_another_section_rules_out_is_refused_with_a_way_out(config_file, asked, cure, message):
    with pytest.raises(InputError, match=message):
        load_config(config_file, asked)
    load_config(config_file, [*asked, cure])
