import json
import logging
import pickle
import tarfile
from dataclasses import replace

import numpy as np
import pytest
import torch
import transformers
from diffusers import FluxTransformer2DModel
from diffusers.models.autoencoders.vae import Decoder
from PIL import Image
from safetensors.torch import load
from xxhash import xxh3_64_intdigest

import data.batches.training_set
import trainer.validation.validator as validate
from configs.loading import dump_config
from configs.schema import ValidationConfig
from data.batches.noise import draw_noise
from tests.ranks import run_ranks
from trainer.model.flux import load_transformer, pack_latents
from trainer.process import stop_signals
from trainer.process.outcome import StartAgain
from trainer.validation.metrics import color_shift, hole_psnr, keep_psnr, paste_back, seam_error
from trainer.validation.sampler import SIGMA_BINS
from trainer.validation.validator import Validator, validation_is_due

SPLITS = {"holdout": 4, "train": 5}


@pytest.fixture(scope="module")
def named(config):
    """The config under another run name."""

    def rename(name: str, **changes):
        run = config.run.model_copy(update={"name": name})
        return config.model_copy(update={"run": run} | changes)

    return rename


@pytest.fixture(scope="module")
def transformer(tiny_model):
    return load_transformer(tiny_model, dtype=torch.float32)


@pytest.fixture(scope="module")
def line(named, engine, tiny_model, samples, transformer) -> dict:
    """One validation, at step 3, of the run "validated"."""
    transformer.train()
    return Validator(named("validated"), engine, tiny_model, samples).run(transformer, 3)


def items_of(config, split: str, count: int) -> list[tuple[dict, dict[str, Image.Image]]]:
    """(entry, pictures by role) of a split, straight from the cache's files."""
    folder = config.data.cache / "validation"
    entries = list(enumerate(json.loads((folder / "items.json").read_text())))
    chosen = [(number, entry) for number, entry in entries if entry["split"] == split][:count]
    return [
        (entry, {role: Image.open(folder / f"{number:04d}.{role}.png") for role in ("target", "image", "mask")})
        for number, entry in chosen
    ]


def stored_latents(config, entry) -> torch.Tensor:
    with tarfile.open(config.data.cache / entry["shard"]) as tar:
        return load(tar.extractfile(f"{entry['key']}.safetensors").read())["latents"]


def unit(picture: Image.Image) -> torch.Tensor:
    return torch.from_numpy(np.array(picture.convert("RGB"))).permute(2, 0, 1).float() / 255


def hole_of(pictures) -> torch.Tensor:
    return torch.from_numpy(np.array(pictures["mask"].convert("L")) >= 128)


def test_figures_of_both_splits_are_finite(line):
    assert line["step"] == 3
    figures = {
        "items", "hole_psnr", "hole_psnr_ceiling", "keep_psnr", "keep_psnr_ceiling", "seam_error", "color_shift",
        *(f"loss_sigma_{middle}" for middle in SIGMA_BINS),
    }  # fmt: skip
    for split, count in SPLITS.items():
        assert line[split].keys() == figures
        assert line[split]["items"] == count
        assert np.isfinite(list(line[split].values())).all()
        # Nothing is trained: far from what the VAE could show.
        assert line[split]["hole_psnr"] < line[split]["hole_psnr_ceiling"] - 5


def test_the_model_is_left_as_it_was(line, transformer, tiny_model):
    assert transformer.training
    assert all(p.grad is None and p.requires_grad for p in transformer.parameters())
    fresh = load_transformer(tiny_model, dtype=torch.float32)
    assert all(torch.equal(a, b) for a, b in zip(transformer.parameters(), fresh.parameters(), strict=True))


def test_grids_of_both_splits_are_written(line, named):
    folder = named("validated").run.folder / "samples"
    assert sorted(path.name for path in folder.iterdir()) == ["step-00000003-holdout.png", "step-00000003-train.png"]
    for path in folder.iterdir():
        assert Image.open(path).width > 700


@pytest.mark.parametrize("split", SPLITS)
def test_the_ceiling_is_the_vaes_picture_of_the_stored_latents(line, config, pipeline, split):
    ceilings = []
    for entry, pictures in items_of(config, split, SPLITS[split]):
        vae = pipeline.vae
        raw = stored_latents(config, entry).float()[None] / vae.config.scaling_factor + vae.config.shift_factor
        with torch.no_grad():
            decoded = (vae.decode(raw).sample[0] / 2 + 0.5).clamp(0, 1)
        ceilings.append(hole_psnr(decoded, unit(pictures["target"]), hole_of(pictures)))
    assert line[split]["hole_psnr_ceiling"] == pytest.approx(np.mean(ceilings), abs=1e-3)


@pytest.mark.parametrize("split", SPLITS)
def test_figures_are_those_of_a_pipeline_called_from_scratch(line, config, pipeline, split):
    """Told nothing but files, captions, and noise by the item's name: so no item depends on the others, either."""
    figures, text_length = [], config.data.captions.text_length
    for entry, pictures in items_of(config, split, SPLITS[split]):
        width, height = pictures["target"].size
        key = xxh3_64_intdigest(entry["key"].encode()) >> 1
        noise = np.empty((1, 16, height // 8, width // 8), dtype=np.float32)
        draw_noise(2024, key, noise)
        # As the cache holds it: rounded to bf16.
        t5, pooled, _ = pipeline.encode_prompt(entry["caption"], None, max_sequence_length=text_length)
        fill = pipeline(
            image=pictures["image"],
            mask_image=pictures["mask"],
            height=height,
            width=width,
            prompt_embeds=t5.bfloat16().float(),
            pooled_prompt_embeds=pooled.bfloat16().float(),
            latents=pack_latents(torch.from_numpy(noise)),
            num_inference_steps=config.validation.sampler_steps,
            guidance_scale=config.flow.guidance,
            generator=torch.Generator().manual_seed(key),
            output_type="pt",
        ).images[0]
        target, image, hole = unit(pictures["target"]), unit(pictures["image"]), hole_of(pictures)
        pasted = paste_back(fill, image, hole)
        found = {"hole_psnr": hole_psnr(fill, target, hole), "keep_psnr": keep_psnr(fill, image, hole)}
        found |= {
            name: of(pasted, target, hole) for name, of in (("seam_error", seam_error), ("color_shift", color_shift))
        }
        figures.append(found)
    for name in figures[0]:
        assert line[split][name] == pytest.approx(np.mean([f[name] for f in figures]), abs=1e-3), name


def test_figures_do_not_depend_on_how_items_are_chunked(
    line, named, engine, tiny_model, samples, transformer, monkeypatch
):
    monkeypatch.setattr(validate, "SAMPLED_AT_ONCE", 0)  # one by one
    again = Validator(named("one-by-one"), engine, tiny_model, samples).run(transformer, 3)
    for split in SPLITS:
        assert again[split] == pytest.approx(line[split], abs=1e-3)


class _OneOfMany:
    """The engine of a rank among several, alone: what it sends is kept."""

    def __init__(self, engine, rank: int, world_size: int) -> None:
        self.rank, self.world_size, self.is_main = rank, world_size, False
        self.name, self.gpus = engine.name, engine.gpus
        self.device, self.compute_dtype = engine.device, engine.compute_dtype
        self.ranks, self.sent = self, {}
        self.all_gather, self.broadcast_object, self.all_reduce_sum = lambda item: [item], lambda item: item, float
        self.all_reduce_sum_ = lambda tensor: None

    def gather(self, item):
        self.sent = item


@pytest.mark.parametrize("world_size", [2, 6])
def test_ranks_send_each_picture_once_as_bytes_and_nothing_behind_it(
    named, engine, tiny_model, samples, transformer, monkeypatch, world_size
):
    """A picture that is a slice of its batch would carry the whole batch along, and floats are four times as large."""
    monkeypatch.setattr(Validator, "_summary", lambda *_: {})
    sent, sizes = [], []
    for rank in range(world_size):
        of_rank = _OneOfMany(engine, rank, world_size)
        Validator(named("sent"), of_rank, tiny_model, samples).run(transformer, 3)
        sent += of_rank.sent
        pixels = sum(picture.numel() for picture in of_rank.sent.values())
        sizes.append(len(pickle.dumps(of_rank.sent)) - pixels - 1000 * len(of_rank.sent))
    assert sorted(sent) == list(range(sum(SPLITS.values())))
    assert max(sizes) < 1000


def test_weights_of_the_regions_do_not_change_the_reported_loss(
    line, named, engine, tiny_model, samples, transformer, config
):
    """Runs that weigh the hole otherwise stay comparable."""
    flow = config.flow.model_copy(update={"hole_weight": 5.0, "keep_weight": 0.1})
    again = Validator(named("weighted", flow=flow), engine, tiny_model, samples).run(transformer, 3)
    assert again["holdout"]["loss_sigma_0.5"] == line["holdout"]["loss_sigma_0.5"]


def test_a_hole_as_large_as_the_picture_leaves_the_other_figures_finite(
    line, named, engine, tiny_model, samples, transformer, monkeypatch
):
    """Masks may be random, and one kind of them is full."""
    read = data.batches.training_set.read_validation_items

    def with_a_full_hole(folder, *, split, count):
        (item, pixels), *others = read(folder, split=split, count=count)
        return [(item, replace(pixels, mask=np.ones_like(pixels.mask))), *others]

    monkeypatch.setattr(data.batches.training_set, "read_validation_items", with_a_full_hole)
    again = Validator(named("full"), engine, tiny_model, samples).run(transformer, 3)
    for split in SPLITS:
        assert again[split].keys() == line[split].keys()
        assert again[split]["items"] == line[split]["items"]
        assert np.isfinite(list(again[split].values())).all()


def test_pictures_are_decoded_one_by_one(named, engine, tiny_model, samples, monkeypatch):
    """Four of 1024 px at once would take more memory than training on them."""
    decode, sizes = Decoder.forward, []

    def watched(self, latents, *rest):
        sizes.append(len(latents))
        return decode(self, latents, *rest)

    monkeypatch.setattr(Decoder, "forward", watched)
    Validator(named("sliced"), engine, tiny_model, samples)
    assert sizes == [1] * sum(SPLITS.values())


def test_no_text_encoder_is_loaded(named, engine, tiny_model, samples, monkeypatch):
    def refuse(*args, **kwargs):
        raise AssertionError("a text encoder was loaded")

    for name in ("T5EncoderModel", "CLIPTextModel", "AutoTokenizer"):
        monkeypatch.setattr(getattr(transformers, name), "from_pretrained", refuse)
    Validator(named("no-text"), engine, tiny_model, samples)


@pytest.mark.parametrize("every, due", [(None, []), (4, [0, 4, 8, 10]), (5, [0, 5, 10]), (100, [0, 10])])
def test_validation_is_due_before_between_and_at_the_end(config, every, due):
    settings = ValidationConfig(every_steps=every)
    run = config.model_copy(update={"validation": settings, "train": config.train.model_copy(update={"steps": 10})})
    assert [step for step in range(11) if validation_is_due(run, step)] == due


# --- cut short, and out of memory -------------------------------------------------------------------------------------


@pytest.fixture
def sampler_steps(monkeypatch) -> list[int]:
    """Pictures of each sampler step that has begun."""
    forward, sizes = FluxTransformer2DModel.forward, []

    def counted(self, hidden_states, *rest, **named):
        sizes.append(len(hidden_states))
        return forward(self, hidden_states, *rest, **named)

    monkeypatch.setattr(FluxTransformer2DModel, "forward", counted)
    return sizes


def test_a_stop_signal_ends_it_at_the_next_step_of_the_sampler(
    named, engine, tiny_model, samples, transformer, sampler_steps, monkeypatch
):
    monkeypatch.setattr(validate, "stop_signal", lambda: "SIGTERM" if len(sampler_steps) >= 2 else None)
    transformer.train()
    validator = Validator(named("cut"), engine, tiny_model, samples)
    assert validator.run(transformer, 3) is None
    assert len(sampler_steps) == 2 and transformer.training
    assert not (named("cut").run.folder / "samples").exists()


def test_what_is_given_runs_between_steps_of_the_sampler(named, engine, tiny_model, samples, transformer, config):
    calls = []
    validator = Validator(named("meanwhile"), engine, tiny_model, samples, meanwhile=lambda: calls.append(1))
    assert validator.run(transformer, 3) is not None
    assert len(calls) >= config.validation.sampler_steps


@pytest.mark.fault(15, "torch's error in validation")
@pytest.mark.parametrize("most", [1, 0])
def test_what_does_not_fit_is_sampled_one_by_one_and_then_left_out(
    line, named, engine, tiny_model, samples, transformer, monkeypatch, caplog, most
):
    """A stand-in for a GPU whose memory holds so many pictures."""
    forward = FluxTransformer2DModel.forward

    def limited(self, hidden_states, *rest, **named):
        if len(hidden_states) > most:
            raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
        return forward(self, hidden_states, *rest, **named)

    monkeypatch.setattr(logging.getLogger("fluxfill"), "propagate", True)
    monkeypatch.setattr(FluxTransformer2DModel, "forward", limited)
    transformer.train()
    run = named(f"limited-{most}")
    run.run.folder.mkdir()
    again = Validator(run, engine, tiny_model, samples).run(transformer, 3)
    assert transformer.training
    assert "again, one picture at a time" in caplog.text
    if most:
        for split in SPLITS:
            assert again[split] == pytest.approx(line[split], abs=1e-3)
    else:
        assert again is None
        assert "no more validation: at step 3 a single picture does not fit the memory" in caplog.text
        (event,) = [json.loads(line) for line in (run.run.folder / "events.jsonl").read_text().splitlines()]
        assert event["event"] == "validation left out" and "step 3" in event["why"]


def test_a_vae_that_does_not_fit_leaves_validation_out(named, engine, tiny_model, samples, transformer, monkeypatch):
    def refuse(*_):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")

    monkeypatch.setattr(Decoder, "forward", refuse)
    run = named("no-vae")
    run.run.folder.mkdir()
    assert Validator(run, engine, tiny_model, samples).run(transformer, 3) is None
    assert "the VAE does not fit" in (run.run.folder / "events.jsonl").read_text()


def validate_on_two(arguments, model, fault: str) -> tuple[bool, list[int]]:
    """(whether there was a result, pictures of each step) of a rank. Rank 1 has the fault, in its second step."""
    from data.batches.training_set import CachedTrainingSet
    from data.cache.open_cache import open_cache
    from trainer.engines.start import start_engine
    from trainer.process.command_line import read_command_line

    config = read_command_line(arguments).config
    engine = start_engine(config)
    transformer = load_transformer(model, dtype=torch.float32)
    transformer = engine.prepare(transformer, lambda parameters: torch.optim.SGD(parameters, lr=0.1))
    validator = Validator(config, engine, model, CachedTrainingSet(open_cache(config, model)))
    forward, sizes = FluxTransformer2DModel.forward, []

    def faulty(self, hidden_states, *rest, **named):
        sizes.append(len(hidden_states))
        if engine.rank == 1 and len(sizes) == 2:
            if fault == "memory":
                raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB.")
            stop_signals._receive(15, None)
        return forward(self, hidden_states, *rest, **named)

    FluxTransformer2DModel.forward = faulty
    told, handler = [], logging.Handler(logging.WARNING)
    handler.emit = lambda record: told.append(record.getMessage())
    logging.getLogger("fluxfill").addHandler(handler)
    line = validator.run(engine.unwrap(), 3)
    return line is not None, sizes, told


@pytest.mark.parametrize("fault", ["memory", "signal"])
def test_ranks_leave_the_sampler_together(config, tiny_model, tmp_path, fault):
    path = tmp_path / "config.yaml"
    path.write_text(dump_config(config), encoding="utf-8")
    arguments = ["--config", str(path), f"run.dir={tmp_path}", "run.name=two"]
    ends = run_ranks("ddp", 2, validate_on_two, arguments, tiny_model, fault)
    if fault == "signal":
        assert [(done, len(sizes)) for done, sizes, _ in ends] == [(False, 2), (False, 2)]
    else:
        assert [done for done, *_ in ends] == [True, True]
        assert max(size for _, sizes, _ in ends for size in sizes[:2]) > 1
        assert {size for _, sizes, _ in ends for size in sizes[2:]} == {1}
        once = "validation at step 3 does not fit the memory: again, one picture at a time"
        assert [told for *_, told in ends] == [[once], []]


def test_of_a_sharded_model_the_next_start_validates_less(named, engine, tiny_model, samples, transformer, monkeypatch):
    """Its ranks cannot agree in the middle of a forward pass. Here one of two, alone: what it sends is nobody's."""

    class Sharded(_OneOfMany):
        rank0_has_full_model = False

    def refuse(*_, **__):
        raise torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total of 24 GiB")

    run = named("sharded")
    first = Validator(run, Sharded(engine, 1, 2), tiny_model, samples)
    assert max(map(len, first._chunks)) > 1
    monkeypatch.setattr(FluxTransformer2DModel, "forward", refuse)
    with pytest.raises(StartAgain, match=r"goes on from the last checkpoint, one picture at a time"):
        first.run(transformer, 3)

    def at_the_next_start() -> Validator:
        of_rank = Sharded(engine, 1, 2)
        of_rank.is_main = True  # as rank 0 reads the record, for all
        return Validator(run, of_rank, tiny_model, samples)

    second = at_the_next_start()
    assert set(map(len, second._chunks)) == {1}
    with pytest.raises(StartAgain, match="goes on from the last checkpoint, without validation"):
        second.run(transformer, 3)
    assert at_the_next_start().run(transformer, 3) is None
