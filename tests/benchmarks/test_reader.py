import benchmarks.reader


def test_small_samples_are_measured_side_by_side(monkeypatch, tmp_path):
    monkeypatch.setattr(benchmarks.reader, "TEXT_LENGTH", 4)
    monkeypatch.setattr(benchmarks.reader, "SHARD_BYTES", 64 << 10)
    cache = benchmarks.reader.write_cache(tmp_path / "cache", 32, 12)
    plain = benchmarks.reader.write_plain_tars(tmp_path / "plain", 32, 12)
    line = benchmarks.reader.measure(cache, plain, 32, 2, repeats=1)
    assert (line["samples"], line["batch_size"]) == (12, 2)
    assert line["sample_bytes"] == 2 * 2 * 16 * 4 * 4 + 32 * 4 + 2 * (4 * 4096 + 768)
    for name in ("webdataset", "fluxfill", "fluxfill_with_noise"):
        assert line[f"{name}_samples_per_s"] > 0
        assert len(line["runs"][name]) == 1
    assert line["times_webdataset"] > 0 and line["share_of_cat"] > 0
