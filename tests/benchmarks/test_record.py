import json

from benchmarks.page_tables import conditions as in_words
from benchmarks.record import add_result


def test_results_are_appended_with_what_they_were_measured_under(tmp_path, capsys):
    out = tmp_path / "results" / "some.jsonl"
    add_result({"benchmark": "some", "ratio": 1.5}, out)
    add_result({"benchmark": "some", "ratio": 2.5}, out)
    add_result({"benchmark": "some", "ratio": 3.5}, None)
    lines = [json.loads(line) for line in out.read_text().splitlines()]
    assert [line["ratio"] for line in lines] == [1.5, 2.5]
    assert len(capsys.readouterr().out.splitlines()) == 3
    text = in_words(lines)
    for word in (lines[1]["conditions"]["date"], "load", "torch", f"{lines[1]['conditions']['cores']} cores"):
        assert word in text
