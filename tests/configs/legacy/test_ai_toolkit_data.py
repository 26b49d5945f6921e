import pytest

from tests.configs.legacy.old_files import import_job, line_of


@pytest.fixture
def translate(tmp_path):
    """The translation of a list of datasets, in YAML."""

    def make(datasets, pictures=None):
        text = f"model: {{name_or_path: /m}}\ndatasets: {datasets}"
        return import_job(tmp_path / "old.yaml", text, pictures=pictures)

    return make


@pytest.mark.parametrize(
    "dataset, expected",
    [
        ("{folder_path: /d, mask_path: /m}", {"mask": "/m"}),
        ("{folder_path: /d, mask_path: /m, inpaint_path: /i}", {"mask": "/m"}),
        ("{folder_path: /d, mask_path: /m, control_path: /c}", {"mask": "/m", "source": "/c"}),
        ("{folder_path: /d, mask_path: /m, invert_mask: true}", {"mask": {"folder": "/m", "label": 0}}),
        ("{folder_path: /d, flip_x: true}", {"flip": True}),
    ],
)
def test_masks_and_sources_come_along(translate, dataset, expected):
    found = translate(f"[{dataset}]").config["data"]["datasets"][0]
    assert {key: found.get(key) for key in expected} == expected
    assert found["target"] == "/d" and ("source" in found) == ("source" in expected)


@pytest.mark.parametrize("dataset", ["{folder_path: /d, inpaint_path: /i}", "{folder_path: /d, alpha_mask: true}"])
def test_masks_in_the_transparency_are_asked_for(translate, dataset):
    imported = translate(f"[{dataset}]")
    assert "fluxfill migrate" in imported.fill_in["data.datasets.0.mask"]


def test_pictures_without_masks_get_random_holes_and_it_is_said(translate):
    imported = translate("[{folder_path: /d, control_path: [/c, /e]}]")
    assert set(imported.config["data"]["datasets"][0]["mask"]["random"]) == {"brush", "box", "outpaint"}
    assert "no masks" in imported.notes["data.datasets.0.mask"]
    assert line_of(imported, "control_path").verdict == "no equivalent"


def test_shares_of_several_datasets_are_pictures_times_repeats_times_resolutions(translate):
    datasets = "[{folder_path: /a, num_repeats: 3, resolution: [512, 768]}, {folder_path: /b, resolution: 512}]"
    data = translate(datasets, pictures=10).config["data"]
    assert [dataset["weight"] for dataset in data["datasets"]] == [60.0, 10.0]
    assert (data["resolution"], data["resolution_policy"]) == ([512, 768], "each")
    uncounted = translate(datasets)
    assert [dataset["weight"] for dataset in uncounted.config["data"]["datasets"]] == [3.0, 1.0]
    assert "Put the number of pictures x 3 here" in uncounted.notes["data.datasets.0.weight"]


def test_a_single_dataset_needs_no_share(translate):
    imported = translate("[{folder_path: /a, num_repeats: 5}]", pictures=10)
    assert "weight" not in imported.config["data"]["datasets"][0]
    assert line_of(imported, "num_repeats").verdict == "converted"


def test_settings_that_count_for_all_datasets_are_the_firsts_and_others_are_named(translate):
    imported = translate(
        "[{folder_path: /a, caption_dropout_rate: 0.1, default_caption: x, mask_path: /m, mask_min_value: 0.1},"
        " {folder_path: /b, caption_dropout_rate: 0.2, default_caption: x, mask_path: /n, mask_min_value: 0.2}]"
    )
    assert imported.config["data"]["captions"] == {"default": "x", "dropout": 0.1}
    assert imported.config["flow"]["keep_weight"] == 0.1
    for key, verdict in (("caption_dropout_rate", "no equivalent"), ("default_caption", "taken")):
        assert line_of(imported, f"datasets[1].{key}").verdict == verdict
    assert line_of(imported, "datasets[1].mask_min_value").verdict == "no equivalent"


def test_captions_of_another_ending_and_lists_of_pictures_say_what_to_do(translate):
    imported = translate("[{dataset_path: /a.json, caption_ext: .tags}]")
    assert "rename the files" in line_of(imported, "caption_ext").why
    assert "table" in imported.fill_in["data.datasets.0.target"]


def test_a_job_without_datasets_asks_for_them(translate):
    assert "data.datasets.0.target" in translate("[]").fill_in


def test_what_is_always_done_here_is_not_off_where_it_was(translate):
    imported = translate("[{folder_path: /d, buckets: false, full_size_control_images: false, loss_multiplier: 0}]")
    for key in ("buckets", "full_size_control_images", "loss_multiplier"):
        assert line_of(imported, key).verdict == "no equivalent"


def test_what_counts_for_all_datasets_is_said_where_some_had_none(translate):
    imported = translate("[{folder_path: /a, caption_dropout_rate: 0.1}, {folder_path: /b, caption_dropout_rate: 0}]")
    assert line_of(imported, "[1].caption_dropout_rate").verdict == "no equivalent"
    imported = translate("[{folder_path: /a}, {folder_path: /b, trigger_word: sks}]")
    assert "also those that had none" in imported.notes["data.captions.trigger"]
    imported = translate("[{folder_path: /a, trigger_word: sks}]")
    assert "also those that had none" not in imported.notes["data.captions.trigger"]
