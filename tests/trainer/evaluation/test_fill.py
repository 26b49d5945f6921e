import shutil

import numpy as np
import pytest
from PIL import Image, ImageDraw
from scipy.ndimage import distance_transform_edt
from skimage import data

from tests.data.storage.small_disk import open_small_disk
from trainer.checkpoints.find import CheckpointDeleted
from trainer.checkpoints.tensor_files import StateFiles
from trainer.evaluation import fill as module
from trainer.evaluation.fill import fill_pictures, main
from trainer.evaluation.pictures import PicturePair
from trainer.evaluation.tuned_model import TunedModel
from trainer.validation import validator
from trainer.validation.sampler import Sampler


@pytest.fixture
def pair(tmp_path) -> PicturePair:
    """A photograph that is not in the demo, 333 x 517, and a mask of it with a palette."""
    photograph = Image.fromarray(data.immunohistochemistry()).resize((517, 517)).crop((90, 0, 423, 517))
    photograph.save(tmp_path / "photo.png")
    mask = Image.new("P", photograph.size, 0)
    mask.putpalette([0, 0, 0, 255, 255, 255, *[7] * 762])
    ImageDraw.Draw(mask).ellipse((120, 180, 230, 330), fill=1)
    mask.save(tmp_path / "mask.png")
    return PicturePair(tmp_path / "photo.png", tmp_path / "mask.png")


def pixels(path) -> np.ndarray:
    return np.array(Image.open(path).convert("RGB"))


def test_a_photograph_keeps_its_size_and_every_pixel_beyond_the_seam(train_run, pair, tmp_path):
    (path,) = fill_pictures(train_run("full"), [pair], tmp_path / "out", prompt="cells", sampler_steps=2, feather=6)
    before, after = pixels(pair.image), pixels(path)
    assert path.name == "photo.png" and before.shape == after.shape == (517, 333, 3)
    hole = pixels(pair.mask)[..., 0] == 255
    away = distance_transform_edt(~hole)
    assert (before[away > 7] == after[away > 7]).all()
    assert (before[hole] != after[hole]).any(axis=1).mean() > 0.95
    grid = Image.open(tmp_path / "out" / "photo.grid.png")
    assert grid.width > 4 * 240


def test_step_weights_and_seed_are_those_asked_for_and_the_same_fill_comes_twice(train_run, pair, tmp_path):
    run, fills = train_run("full"), []
    for number, options in enumerate([{}, {}, {"step": 1}, {"weights": "ema"}, {"seed": 5}]):
        (path,) = fill_pictures(run, [pair], tmp_path / str(number), prompt="", sampler_steps=1, **options)
        fills.append(pixels(path))
    assert (fills[0] == fills[1]).all()
    assert all((fills[0] != other).any() for other in fills[2:])


@pytest.mark.parametrize("step", [None, 2])
def test_where_the_run_deletes_its_newest_meanwhile_the_newest_then_fills_unless_it_was_named(
    train_run, pair, tmp_path, monkeypatch, step
):
    run = tmp_path / "run"
    shutil.copytree(train_run("lora"), run, ignore=shutil.ignore_patterns("final*"))

    class Late(TunedModel):
        def __init__(self, *given):
            super().__init__(*given)
            shutil.rmtree(run / "checkpoints" / "step-00000002")

    monkeypatch.setattr(module, "TunedModel", Late)
    options = {"prompt": "", "sampler_steps": 1, "step": step}
    if step is not None:
        with pytest.raises(CheckpointDeleted, match="step-00000002: was deleted while it was read"):
            fill_pictures(run, [pair], tmp_path / "out", **options)
        return
    (path,) = fill_pictures(run, [pair], tmp_path / "out", **options)
    monkeypatch.undo()
    (expected,) = fill_pictures(run, [pair], tmp_path / "one", **options | {"step": 1})
    assert (pixels(path) == pixels(expected)).all()


def test_an_export_fills_as_its_checkpoint_does(train_run, pair, tmp_path):
    """Up to one level: the file of an adapter holds the product of two numbers where training multiplies them."""
    run = train_run("lora")
    fills = [
        pixels(fill_pictures(place, [pair], tmp_path / place.name, prompt="", sampler_steps=1)[0]).astype(int)
        for place in (run, run / "final")
    ]
    assert np.abs(fills[0] - fills[1]).max() <= 1


def test_it_is_the_sampler_of_validation(train_run, pair, tmp_path, monkeypatch):
    """The run's own number of steps, guidance and text length; nothing of its own."""
    assert module.Sampler is validator.Sampler
    calls, sample = [], Sampler.sample

    def watched(self, pipeline, requests, **options):
        calls.append((self._steps, self._flow.guidance, requests[0].t5.shape[0]))
        return sample(self, pipeline, requests, **options)

    monkeypatch.setattr(Sampler, "sample", watched)
    run = train_run("full")
    fill_pictures(run, [pair], tmp_path / "out", prompt="")
    config = module.find_source(run).config
    assert calls == [(config.validation.sampler_steps, config.flow.guidance, config.data.captions.text_length)]


@pytest.mark.parametrize(
    "what",
    [
        "mask of another size",
        "no such step",
        "half-written",
        "no run",
        "no mask",
        "overwrites",
        "no average",
        "average of an export",
    ],
)
def test_bad_input_is_a_message_and_exit_code_2(train_run, pair, tmp_path, capsys, monkeypatch, what):
    """Before a model is loaded."""
    monkeypatch.setattr(module, "load_text_encoders", lambda *_: pytest.fail("a model was loaded"))
    run, more = train_run("full"), []
    if what == "mask of another size":
        Image.open(pair.mask).resize((332, 517)).save(pair.mask)
    if what == "no such step":
        more = ["--step", "9"]
    if what == "half-written":
        run = tmp_path / "run"
        shutil.copytree(train_run("full") / "checkpoints" / "step-00000002", run / "checkpoints" / "step-00000002")
        (run / "checkpoints" / "step-00000002" / "COMPLETE").unlink()
        run = run / "checkpoints" / "step-00000002"
    if what == "no run":
        run = tmp_path
    if what == "no average":
        monkeypatch.setattr(StateFiles, "kinds", lambda self: {"weight"})
        more = ["--weights", "ema"]
    if what == "average of an export":
        run, more = run / "final", ["--weights", "ema"]
    mask = tmp_path / "none.png" if what == "no mask" else pair.mask
    out = pair.image.parent if what == "overwrites" else tmp_path / "out"
    arguments = [str(run), "--image", str(pair.image), "--mask", str(mask), "--out", str(out), *more]
    assert main(arguments) == 2
    message = {
        "mask of another size": "332x517, but",
        "no such step": "no checkpoint of step 9",
        "half-written": "half-written",
        "no run": "is no run",
        "no mask": "there is no such file",
        "overwrites": "photo.png would be overwritten",
        "no average": "Give --weights live",
        "average of an export": "is an export, which holds one kind",
    }[what]
    told = capsys.readouterr()
    assert message in told.err and "Traceback" not in told.err and not (tmp_path / "out").exists()


def test_a_folder_is_filled_with_the_captions_beside_its_pictures(train_run, pair, tmp_path, capsys):
    for role, file in (("images", pair.image), ("masks", pair.mask)):
        (tmp_path / role).mkdir()
        for name in ("a", "b"):
            shutil.copy(file, tmp_path / role / f"{name}.png")
    (tmp_path / "images" / "b.txt").write_text("a red car", encoding="utf-8")
    arguments = ["--image", str(tmp_path / "images"), "--mask", str(tmp_path / "masks"), "--out", str(tmp_path / "out")]
    assert main([str(train_run("full")), *arguments, "--sampler-steps", "1"]) == 0
    written = sorted(path.name for path in (tmp_path / "out").iterdir())
    assert written == ["a.grid.png", "a.png", "b.grid.png", "b.png"]
    assert capsys.readouterr().out.split() == [str(tmp_path / "out" / name) for name in ("a.png", "b.png")]
    assert (
        pixels(tmp_path / "out" / "a.png") != pixels(tmp_path / "out" / "b.png")
    ).any()  # captions, and noise by name


def test_a_disk_that_fills_up_is_told_with_exit_code_1_and_no_picture_is_half_written(
    train_run, pair, tmp_path, capsys
):
    with open_small_disk(tmp_path) as disk:
        options = ["--image", str(pair.image), "--mask", str(pair.mask), "--prompt", "", "--sampler-steps", "1"]
        with disk.with_room_for(8192):
            assert main([str(train_run("full")), *options, "--out", str(disk.folder / "out")]) == 1
        told = " ".join(capsys.readouterr().err.split())
        assert "photo.png: cannot be written" in told and "Traceback" not in told
        assert list((disk.folder / "out").iterdir()) == []
