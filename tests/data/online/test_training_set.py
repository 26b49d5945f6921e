"""Online encoding beside the cache that preprocessing makes of the same pictures."""

import shutil
from collections import Counter
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import pytest
import torch

from configs.errors import InputError
from data.batches.row_filler import RowPolicy
from data.batches.training_set import CachedTrainingSet
from data.cache.open_cache import open_cache
from data.online.training_set import OnlineTrainingSet, encoder_device, plan_online
from data.preprocessing.run import preprocess
from data.preprocessing.worker import Worker
from tests.data.online.online_streams import (
    CPU,
    QUIET,
    assert_same,
    near,
    open_online,
    open_stream,
    settings_of,
    take,
)

# --- the same run as the cached one -----------------------------------------------------------------------------------


def test_the_plan_stands_for_the_caches_shards(online, cached):
    for name in ("path", "dataset", "bucket", "split", "samples", "plan"):
        assert getattr(online.table, name).tolist() == getattr(cached.table, name).tolist(), name
    assert len(online.table) > 4
    assert settings_of(online, 7) == settings_of(cached, 7), "a run may go on in the other mode"
    for name in ("settings", "encoders", "text_length", "text_width", "pooled_width", "mask_variants", "samples"):
        assert getattr(online.manifest, name) == getattr(cached.manifest, name), name


@pytest.mark.parametrize("rank, world_size, micro", [(0, 1, 2), (0, 1, 7), (1, 3, 1), (2, 3, 2)])
def test_a_stream_gives_what_the_caches_gives(online, cached, rank, world_size, micro):
    options = {"rank": rank, "world_size": world_size, "micro": micro}
    dropped = Counter()
    for one, other in zip(take(online, 9, **options), take(cached, 9, **options), strict=True):
        assert len(one) == len(other)
        for rows, expected in zip(one, other, strict=True):
            assert_same(rows, expected)
            dropped["mask"] += int((rows.mask == 255).flatten(1).all(dim=1).sum())
            dropped["padding"] += int((rows.weight == 0).sum())
    assert dropped["mask"], "no row lost its mask"
    assert (dropped["padding"] > 0) == (rank == 1), "7 rows are 2, 2 and 3"


def test_names_are_the_caches(online, cached):
    streams = [open_stream(samples) for samples in (online, cached)]
    for index in range(5):
        one, other = (stream.keys(stream.order.batch(index)) for stream in streams)
        assert one == other
    for stream in streams:
        stream.close()


@pytest.fixture(scope="module")
def few(demo_config, triples, tmp_path_factory):
    """Makes configs of 16 of the triples, one of them held out: `few(cache_folder, "key=value", ...)`."""
    folder = tmp_path_factory.mktemp("few")
    for role in ("target", "mask", "source"):
        (folder / role).mkdir()
        for path in sorted((triples / role).iterdir()):
            if int(path.stem.rsplit("-", 1)[-1]) % 6 == 0:
                shutil.copy(path, folder / role)
    folders = [f"data.datasets.0.{role}={folder / role}" for role in ("target", "mask", "source")]
    return lambda cache, *overrides: demo_config(cache, *folders, "data.holdout=1", *overrides)


def elsewhere(config, folder):
    """The same config with nothing in its cache: finished shards would be read."""
    return config.model_copy(update={"data": config.data.model_copy(update={"cache": folder / "empty"})})


def test_tensors_are_bit_equal_where_the_encoders_get_the_same_batches(few, tmp_path):
    config = few(tmp_path / "cache", "data.encode_batch_size=1", "data.captions.text_dtype=int8")
    preprocess(config, QUIET)
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    for one, other in zip(take(open_online(elsewhere(config, tmp_path)), 4), take(cached, 4), strict=True):
        for rows, expected in zip(one, other, strict=True):
            assert rows.t5.dtype == torch.int8
            assert_same(rows, expected, exactly=True)


def test_variants_and_mirror_images_are_those_of_the_cache(few, tmp_path):
    masks = ["data.datasets.0.source=null", "data.datasets.0.flip=true"]
    masks += ["data.datasets.0.mask={random: {brush: 0.6, box: 0.4}, variants: 3}"]
    config = few(tmp_path / "cache", *masks)
    preprocess(config, QUIET)
    cached = CachedTrainingSet(open_cache(config, Path(config.model.base)))
    online = open_online(elsewhere(config, tmp_path))
    for choice in ("random", "cycle"):
        policy = RowPolicy(mask_choice=choice)
        for one, other in zip(take(online, 6, policy=policy), take(cached, 6, policy=policy), strict=True):
            for rows, expected in zip(one, other, strict=True):
                assert_same(rows, expected)


def test_watched_samples_are_those_of_the_cache(online, cached):
    for split, count in (("holdout", 10), ("train", 48)):
        one, other = (
            online.validation_samples(split=split, count=count),
            cached.validation_samples(split=split, count=count),
        )
        assert len(one) == len(other) == count
        for found, expected in zip(one, other, strict=True):
            assert (found.item, found.bucket) == (expected.item, expected.bucket)
            for part in ("target", "image", "mask"):
                np.testing.assert_array_equal(getattr(found.pixels, part), getattr(expected.pixels, part))
                assert getattr(found.pixels, part).flags.writeable, "torch would warn"
            assert found.tensors.keys() == expected.tensors.keys()
            assert torch.equal(found.tensors["mask"], expected.tensors["mask"])
            for name in ("latents", "masked_latents", "t5", "pooled"):
                assert near(found.tensors[name], expected.tensors[name]), name


# --- devices ----------------------------------------------------------------------------------------------------------


def test_encoder_devices_are_dealt_to_a_machines_ranks(demo_config, tmp_path, monkeypatch):
    monkeypatch.setattr("torch.cuda.device_count", lambda: 6)
    given = ["data.mode=online", "data.encoder_devices=[cuda:4, cuda:5]"]
    config = demo_config(tmp_path, *given)
    own = torch.device("cuda:0")
    devices = [encoder_device(config, local_rank=rank, own=own) for rank in range(4)]
    assert [str(device) for device in devices] == ["cuda:4", "cuda:5", "cuda:4", "cuda:5"]
    alone = demo_config(tmp_path, "data.mode=online")
    assert encoder_device(alone, local_rank=3, own=torch.device("cuda:3")) == torch.device("cuda:3")
    one = demo_config(tmp_path, "data.mode=online", "data.encoder_devices=cuda:1")
    assert str(encoder_device(one, local_rank=0, own=own)) == "cuda:1"


def test_a_device_that_is_not_there_is_refused(demo_config, tmp_path, monkeypatch):
    config = demo_config(tmp_path, "data.mode=online", "data.encoder_devices=[cuda:1]")
    for count, there in ((0, "none"), (1, r"1 \(cuda:0\)")):
        monkeypatch.setattr("torch.cuda.device_count", lambda count=count: count)
        with pytest.raises(InputError, match=rf"data.encoder_devices names cuda:1, .* there are here: {there}\. Name"):
            encoder_device(config, local_rank=0, own=CPU)


def test_encoders_go_to_the_device_unless_they_have_one_of_their_own(demo_config, tmp_path, monkeypatch):
    placed = []
    monkeypatch.setattr(
        "data.online.training_set.load_encoders", lambda model, encoders, device_index: placed.append(encoders)
    )
    config = demo_config(tmp_path / "scan", "data.mode=online", "data.encoders.t5=cpu")
    model = Path(config.model.base)
    samples = OnlineTrainingSet(
        config, model, plan_online(config, model, QUIET), device=torch.device("cuda:1"), worker=Worker()
    )
    assert placed == [], "nothing is loaded before it is needed"
    assert samples._encoders is None
    assert (placed[0].vae, placed[0].clip, placed[0].t5) == ("cuda:1", "cuda:1", "cpu")


def test_an_encoder_on_cuda_is_on_the_gpu_that_its_process_trains_on(demo_config, tmp_path, monkeypatch):
    """Not on the one that loading another encoder has made the current one."""
    placed = []
    monkeypatch.setattr("torch.cuda.device_count", lambda: 4)
    monkeypatch.setattr("data.online.training_set._own_gpu", lambda: nullcontext(2))
    monkeypatch.setattr("data.encoders.load.load_vae", lambda model, device, **_: placed.append(device))
    for name in ("load_clip", "load_t5"):
        monkeypatch.setattr(f"data.encoders.load.{name}", lambda model, device, **_: placed.append(device) or (0, 0))
    monkeypatch.setattr("torch.cuda.set_device", lambda device: None)
    config = demo_config(tmp_path / "scan", "data.mode=online", "data.encoders.t5=cuda", "data.encoder_devices=cuda:3")
    model = Path(config.model.base)
    device = encoder_device(config, local_rank=2, own=torch.device("cuda:2"))
    samples = OnlineTrainingSet(
        config, model, plan_online(config, model, QUIET), device=device, worker=Worker(device_index=2)
    )
    assert samples._encoders is not None
    assert [str(device) for device in placed] == ["cuda:3", "cuda:3", "cuda:2"]


def test_devices_without_online_are_refused(demo_config, tmp_path):
    with pytest.raises(InputError, match=r"data.encoder_devices is .*with mode cached nothing .*=null too"):
        demo_config(tmp_path, "data.encoder_devices=[cuda:1]")
    # As an online run's config goes on from the cache: a key cannot be removed on the command line.
    config = demo_config(tmp_path, "data.encoder_devices=[cuda:1]", "data.mode=cached", "data.encoder_devices=null")
    assert config.data.encoder_devices is None
    for wrong in ("[]", "[auto]", "[gpu1]"):
        with pytest.raises(InputError, match=r"data\.encoder_devices"):
            demo_config(tmp_path, "data.mode=online", f"data.encoder_devices={wrong}")
