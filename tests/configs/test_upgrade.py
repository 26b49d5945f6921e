from pathlib import Path

import pytest

from configs.errors import InputError
from configs.loading import load_config
from configs.suggest import REMOVED
from configs.upgrade import upgrade_config
from tests.configs.run_file import VALID


def written(tmp_path: Path, text: str) -> Path:
    path = tmp_path / "old.yaml"
    path.write_bytes(text.encode())
    return path


@pytest.mark.parametrize("key", REMOVED)
@pytest.mark.parametrize("newline", ["\n", "\r\n"])
def test_a_key_that_is_gone_goes_and_all_other_text_stays(config_file, tmp_path, key, newline):
    section, _, name = key.partition(".")
    lines = VALID.splitlines()
    while section not in [line.partition(":")[0] for line in lines]:
        lines += [f"{section}:  # its own", "  unheard_of: 1"]
    place = next(index for index, line in enumerate(lines) if line.startswith(f"{section}:"))
    before = newline.join(["# kept", *lines, ""])
    after = newline.join(["# kept", *lines[: place + 1], f"  {name}: 3", *lines[place + 1 :], ""])
    text, changes = upgrade_config(written(tmp_path, after))
    assert [change for change in changes if change.startswith(f"{key} is gone.")]
    assert text.removesuffix(f"version: 1{newline}") == before
    assert upgrade_config(written(tmp_path, text))[1] == []


def test_a_config_without_a_version_gets_its_own(tmp_path):
    text = "".join(line for line in VALID.splitlines(keepends=True) if not line.startswith("version"))
    upgraded, changes = upgrade_config(written(tmp_path, text))
    assert len(changes) == 1 and "version is 1 now" in changes[0]
    assert upgraded.startswith(text.rstrip()) and load_config(written(tmp_path, upgraded)).version == 1


@pytest.mark.parametrize(
    "text, message", [("version: 2\nrun: {}", "version is 2, and this fluxfill knows 1 alone"), ("[1]", "no keys")]
)
def test_what_is_none_of_its_configs_is_refused(tmp_path, text, message):
    with pytest.raises(InputError, match=message):
        upgrade_config(written(tmp_path, text))


def test_a_key_behind_an_alias_is_told(tmp_path):
    text = "slurm: &s {preprocess_tasks: 3, nodes: 2}\nother: *s\nrun: {<<: *s}\ncheckpoint: *s\n"
    path = written(tmp_path, text.replace("preprocess_tasks", "requantize"))
    with pytest.raises(InputError, match=r"behind an alias.*by hand"):
        upgrade_config(path)
