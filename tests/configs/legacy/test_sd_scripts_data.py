import pytest

from tests.configs.legacy.old_files import import_arguments, line_of


@pytest.fixture
def translate(tmp_path):
    """The translation of arguments, in TOML."""
    return lambda text, pictures=None: import_arguments(tmp_path / "old.toml", text, pictures=pictures)


def test_settings_of_a_subset_count_before_those_of_its_dataset_and_those_before_the_general_ones(translate):
    imported = translate(
        """
[general]
num_repeats = 2
[[datasets]]
resolution = "512,768"
num_repeats = 3
[[datasets.subsets]]
image_dir = "/a"
num_repeats = 5
[[datasets.subsets]]
image_dir = "/b"
[[datasets]]
[[datasets.subsets]]
image_dir = "/c"
""",
        pictures=10,
    )
    data = imported.config["data"]
    assert [dataset["weight"] for dataset in data["datasets"]] == [50.0, 30.0, 20.0]
    assert data["resolution"] == [512, 624], "the side of a square of 512 x 768"


def test_datasets_that_were_not_found_are_asked_for(translate):
    imported = translate('dataset_config = "nowhere.toml"')
    assert "--data" in imported.fill_in["data.datasets.0.target"]


def test_a_folder_among_the_arguments_is_the_target(translate):
    imported = translate('train_data_dir = "/d"')
    assert imported.config["data"]["datasets"][0]["target"] == "/d"
    assert "repeat folder" in line_of(imported, "train_data_dir").why


def test_repeat_folders_are_counted_and_each_is_a_dataset(translate, tmp_path):
    for name in ("10_red sofa", "2_room", "notes", "0_off"):
        (tmp_path / "img" / name).mkdir(parents=True)
    imported = translate(f'train_data_dir = "{tmp_path}/img"\nmax_train_epochs = 4\ntrain_batch_size = 3', pictures=6)
    data = imported.config["data"]
    assert [(each["name"], each["target"], each["weight"]) for each in data["datasets"]] == [
        ("10_red-sofa", f"{tmp_path}/img/10_red sofa", 60.0),
        ("2_room", f"{tmp_path}/img/2_room", 12.0),
    ]
    assert data["captions"]["default"] == "red sofa" and "the first counts" in imported.notes["data.captions.default"]
    assert imported.config["train"]["steps"] == 96  # 4 epochs of 6 x 10 + 6 x 2 samples, 3 an update


def test_pictures_of_a_folder_that_is_not_here_are_those_that_are_given(translate):
    imported = translate('train_data_dir = "/nowhere"\nmax_train_epochs = 4\ntrain_batch_size = 3', pictures=30)
    assert imported.config["train"]["steps"] == 40
    assert "--pictures as pictures x repeats" in line_of(imported, "train_data_dir").why


def test_masks_in_transparency_are_asked_for(translate):
    imported = translate('[[datasets]]\nresolution = 512\n[[datasets.subsets]]\nimage_dir = "/a"\nalpha_mask = true')
    assert imported.config["data"]["datasets"][0]["mask"] is None
    assert "fluxfill migrate" in imported.fill_in["data.datasets.0.mask"]


def test_different_rates_of_caption_dropout_are_said(translate):
    subset = '[[datasets.subsets]]\nimage_dir = "/a"\ncaption_dropout_rate = '
    imported = translate(f"[[datasets]]\n{subset}0.1\n{subset}0.0\n{subset}0.1")
    assert imported.config["data"]["captions"]["dropout"] == 0.1
    verdicts = [line.verdict for line in imported.lines if line.key.endswith("caption_dropout_rate")]
    assert verdicts == ["taken", "no equivalent", "taken"]
    assert any("different rates, 0.1, 0, 0.1" in sentence for sentence in imported.really_did)
