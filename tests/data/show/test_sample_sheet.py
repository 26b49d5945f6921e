import re
from base64 import b64decode
from dataclasses import replace
from io import BytesIO

import numpy as np
import pytest
import torch
from PIL import Image

from configs.errors import InputError
from data.cache.validation_items import read_validation_items
from data.show.sample_sheet import DecodedSample, decode_samples, load_cache_vae, save_page, save_sheet
from data.show.statistics import count_cache
from data.show.stored_samples import read_samples, spread_samples


@pytest.fixture(scope="module")
def decoded(cache, tiny_model) -> list[DecodedSample]:
    """Eight of the demo's samples, decoded by the VAE that encoded them."""
    vae = load_cache_vae(str(tiny_model), cache.manifest)
    chosen = spread_samples(cache.table, range(len(cache.table)), 8)
    told = []
    samples = list(
        decode_samples(vae, read_samples(cache.folder, cache.manifest, cache.table, chosen), lambda: told.append(1))
    )
    assert len(told) == 8
    return samples


def test_decoded_samples_show_their_pictures(cache, tiny_model):
    """Against the pixels that were encoded, which lie beside the shards for the held-out ones."""
    vae = load_cache_vae(str(tiny_model), cache.manifest)
    shards = {path: row for row, path in enumerate(cache.table.path.tolist())}
    items = read_validation_items(cache.folder, split="holdout", count=4)
    stored = read_samples(
        cache.folder, cache.manifest, cache.table, [(shards[item.shard], item.row) for item, _ in items]
    )
    for (item, pixels), sample in zip(items, decode_samples(vae, stored, lambda: None), strict=True):
        assert sample.stored.key == item.key
        true = torch.from_numpy(pixels.target).permute(2, 0, 1) / 255
        error = (sample.target - true).square().mean()
        assert error < 0.01, "20 dB: the VAE's own round trip"
        hole = torch.from_numpy(pixels.mask)
        assert (sample.masked[0][:, hole].mean() - 0.5).abs() < 0.1, "the hole is grey"
        np.testing.assert_array_equal(sample.stored.masks[0], pixels.mask)


def test_a_sheet_is_a_picture_of_all_samples(decoded, tmp_path):
    save_sheet(tmp_path / "sheet.png", decoded)
    assert [path.name for path in tmp_path.iterdir()] == ["sheet.png"]
    with Image.open(tmp_path / "sheet.png") as sheet:
        assert sheet.format == "PNG"
        pixels = np.asarray(sheet)
    assert pixels.shape[1] > 2 * 3 * 192 and pixels.shape[0] > 4 * 96
    assert (pixels == 0).all(axis=-1).any() and (pixels == 255).all(axis=-1).any(), "masks"


def test_every_picture_carries_its_name_its_hole_and_its_caption(decoded, tmp_path, monkeypatch):
    drawn = []
    monkeypatch.setattr("data.show.sample_sheet.save_grid", lambda path, columns, items: drawn.extend(items))
    first = decoded[0]
    many = replace(first, stored=replace(first.stored, masks=first.stored.masks * 9), masked=first.masked * 6)
    nameless = replace(first, stored=replace(first.stored, meta={"target": f"{'a/' * 99}cat.png"}))
    save_sheet(tmp_path / "sheet.png", [*decoded, many, nameless])
    for sample, shown in zip(decoded, drawn, strict=False):
        hole = f"hole {sample.stored.masks[0].mean():.0%}"
        assert shown.notes == [f"{sample.stored.meta['target']} · {sample.stored.bucket} · {hole}"]
        assert shown.text == sample.stored.meta["caption"]
    assert len(drawn[-2].lines) == 6 and "· mask 1 of 9 · hole" in drawn[-2].notes[0]
    assert [line[0] is None for line in drawn[-2].lines] == [False, *[True] * 5], "the target stands there once"
    assert drawn[-2].notes[5].startswith("mask 6 of 9 · hole")
    assert drawn[-1].notes[0].startswith("…") and "/cat.png · " in drawn[-1].notes[0] and drawn[-1].text == "no caption"


def test_a_page_needs_no_other_file_and_tells_every_caption(decoded, cache, tmp_path):
    rows = list(range(len(cache.table)))
    counted = count_cache(cache.folder, cache.manifest, cache.table, rows, lambda: None)
    stranger = decoded[0].stored.meta | {"caption": "<script>alert(1)</script> 一只猫 & co", "x": "\ud83d"}
    first = replace(decoded[0], stored=replace(decoded[0].stored, meta=stranger))
    save_page(tmp_path / "page.html", cache.folder, cache.manifest, counted, [first, *decoded[1:]])
    text = (tmp_path / "page.html").read_text(encoding="utf-8")
    name = first.stored.meta["target"]
    assert f"<h3>{name}</h3>" in text
    assert not re.search(r"auto-fill, minmax\(\d", text), (
        "a column is no wider than a phone: minmax(min(..., 100%), ...)"
    )
    assert "<script>" not in text and "&lt;script&gt;alert(1)&lt;/script&gt; 一只猫 &amp; co" in text
    assert not re.search(r"(src|href)=\"(?!data:image/)", text) and "http" not in text
    for sample in decoded[1:]:
        assert sample.stored.meta["caption"] in text and sample.stored.key in text
    assert "96 samples" in text and "headers and padding" in text
    images = re.findall(r"data:image/(png|jpeg);base64,([^\"]+)", text)
    assert len(images) == 3 * 8
    for (_, data), expected in zip(images[:3], (first.target, first.masked[0], None), strict=True):
        with Image.open(BytesIO(b64decode(data))) as picture:
            assert picture.size == (first.target.shape[2], first.target.shape[1])
            if expected is not None:
                shown = torch.from_numpy(np.array(picture)).permute(2, 0, 1) / 255
                assert (shown - expected).abs().max() < 0.51 / 255
            else:
                np.testing.assert_array_equal(np.array(picture), first.stored.masks[0])


def test_another_vae_is_refused(cache, tiny_model, tmp_path):
    (tmp_path / "vae").mkdir()
    (tmp_path / "vae" / "config.json").write_text("{}")
    with pytest.raises(InputError, match=r"not the VAE that encoded the cache .* its pictures would be wrong"):
        load_cache_vae(str(tmp_path), cache.manifest)
