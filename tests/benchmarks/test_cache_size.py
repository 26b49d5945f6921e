import pytest

from benchmarks import cache_size
from benchmarks.cache_size import Case, measure


@pytest.mark.parametrize(
    "case, ours, apart",
    [
        (Case(512, "unique", 1, "bf16"), 4.283, 4.283),
        (Case(512, "unique", 4, "int8"), 2 + 0.125 * 5 + 0.03125 * 4, 4 * 4.283),
        (Case(512, "one", 1, "bf16"), 0.281, 4.283),
    ],
)
def test_samples_of_real_sizes_take_what_their_tensors_do(tmp_path, monkeypatch, case, ours, apart):
    """In MiB, by hand: T5 4 (int8 2), CLIP 0.0015, latents 0.125 each, a mask 0.03125. The rest is below 1 %, but for
    the one text that all samples share."""
    monkeypatch.setattr(cache_size, "SHARD_BYTES", 24 << 20)
    result = measure(tmp_path / "case", case)
    shared = 4.0 / result["samples"] if case.captions == "one" else 0
    assert result["bytes_per_sample"] / 2**20 == pytest.approx(ours + shared, rel=0.015)
    assert result["file_per_mask_bytes_per_sample"] / 2**20 == pytest.approx(apart, rel=0.001)
    assert sum(result["parts"].values()) == pytest.approx(result["bytes_per_sample"], abs=4)
    assert not (tmp_path / "case").exists()
