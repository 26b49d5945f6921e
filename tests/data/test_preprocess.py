"""The door: `accelerate launch data/preprocess.py`."""

from configs.loading import dump_config
from data.preprocess import main
from tests.data import sixty_triples


def test_it_ends_with_0_and_a_table_and_a_second_time_too(demo_config, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(demo_config(tmp_path / "cache")), encoding="utf-8")
    for encoded in (96, 0):
        assert main(["--config", str(config)]) == 0
        printed = capsys.readouterr().out
        assert f"{encoded} of 96 samples were encoded now" in printed
        assert "photographs" in printed


def test_what_the_user_can_mend_is_said_in_red_and_ends_with_2(demo_config, tmp_path, capsys):
    config = tmp_path / "config.yaml"
    config.write_text(dump_config(demo_config(tmp_path / "cache")), encoding="utf-8")
    for arguments, said in (
        (["--worker", "3"], "--worker and --workers belong together"),
        (["data.resolutoin=64"], "Did you mean data.resolution?"),
    ):
        assert main(["--config", str(config), *arguments]) == 2
        assert said in capsys.readouterr().err
    assert not (tmp_path / "cache").exists()


def test_thorough_finds_a_picture_that_was_cut_off(demo_config, tmp_path, capsys):
    sixty_triples.write(tmp_path / "set")
    sixty_triples.cure(tmp_path / "set")
    places = ", ".join(f"{role}: {tmp_path}/set/{role}" for role in ("target", "mask"))
    config = tmp_path / "config.yaml"
    dataset = f"data.datasets=[{{name: sixty, {places}}}]"
    config.write_text(dump_config(demo_config(tmp_path / "cache", dataset, "data.holdout=4")), encoding="utf-8")
    path = tmp_path / "set" / "target" / "street-01.png"
    path.write_bytes(path.read_bytes()[:-200])
    assert main(["--config", str(config), "--thorough", "--dry-run"]) == 2
    assert f"1 problem:\ntruncated, 1:\n  {path}: cannot be decoded" in capsys.readouterr().err
