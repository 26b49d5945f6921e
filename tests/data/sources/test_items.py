import pytest

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from data.sources.items import decode_text, finish_caption, is_utf8


@pytest.mark.parametrize(
    "text, expected",
    [
        ("a cat", "sks, a cat"),
        ("", "sks"),
        ("a sks cat", "a sks cat"),
        ("a cat, sks.", "a cat, sks."),
        ("a cat behind masks", "sks, a cat behind masks"),
        ("一只sks猫", "一只sks猫"),
    ],
)
def test_the_trigger_word_stands_in_every_caption_once(text, expected):
    assert finish_caption(text, CaptionsConfig(trigger="sks")) == expected


@pytest.mark.parametrize(
    "text, expected", [(None, "a photo"), (" \n", "a photo"), (" a grey\n  cat,\t鴨 \n", "a grey cat, 鴨")]
)
def test_a_caption_is_one_line_and_the_default_where_there_is_none(text, expected):
    assert finish_caption(text, CaptionsConfig(default="a photo")) == expected


def test_text_is_utf8_with_a_mark_or_without():
    assert decode_text("\ufeffgrün".encode(), "a.txt") == decode_text("grün".encode(), "a.txt") == "grün"
    with pytest.raises(InputError, match=r"a\.txt: not UTF-8 text .* Save the caption as UTF-8"):
        decode_text("grün".encode("latin-1"), "a.txt")


def test_half_a_character_is_no_utf8():
    assert is_utf8("鴨") and not is_utf8("\ud83d")
