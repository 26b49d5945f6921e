from benchmarks.order import ROWS_PER_RANK, start_rank, write_cache_manifest


def test_a_rank_starts_on_a_small_head(tmp_path):
    write_cache_manifest(tmp_path, 3000)
    places = [(streams, share) for streams in (1, 2) for share in (0.0, 0.9)]
    lines = [start_rank(tmp_path, rank=5, ranks=16, streams=streams, share=share) for streams, share in places]
    for line in lines:
        assert line["rows"] == ROWS_PER_RANK
        assert 3000 * 80 * 0.9 < line["samples"] < 3000 * 120
        assert line["seconds_to_first_batch"] > 0
    assert [line["first_batch"] > 0 for line in lines] == [False, True, False, True]
