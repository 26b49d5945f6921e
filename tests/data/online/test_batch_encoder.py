from collections import Counter

import pytest
import torch

import data.online.batch_encoder as batch_encoder
from configs.errors import InputError
from data.encoders.encode import EncodedText, NotFinite, encode_captions, encode_pixels
from data.online.batch_encoder import CaptionTexts
from tests.data.online.online_streams import (
    take,
)


def test_a_caption_is_encoded_once_while_there_is_room(online, monkeypatch):
    seen = Counter()

    def counted(encoders, captions, *, text_length):
        seen.update(captions)
        return encode_captions(encoders, captions, text_length=text_length)

    monkeypatch.setattr(batch_encoder, "encode_captions", counted)
    texts = CaptionTexts(online._encoders.text, online._config.data.captions)
    one = texts.get("a cat").wait()
    for caption in ("a dog", "a cat", "a cow", "a cat"):
        texts.get(caption)
    assert seen == {"a cat": 1, "a dog": 1, "a cow": 1}
    monkeypatch.setattr(batch_encoder, "CAPTION_CACHE_BYTES", 2 * sum(tensor.nbytes for tensor in one.values()))
    texts.get("a hen")  # room for two: goes with what was not asked for longest
    texts.get("a cat")
    texts.get("a dog")
    assert seen == {"a cat": 1, "a dog": 2, "a cow": 1, "a hen": 1}
    assert len(texts._kept) <= 3


def test_an_encoder_that_fails_is_told_with_the_sample(online, monkeypatch):
    def broken(vae, batch):
        encoded = encode_pixels(vae, batch)
        encoded.masked_latents[0, -1, 3, 0, 0] = float("nan")
        return encoded

    monkeypatch.setattr(batch_encoder, "encode_pixels", broken)
    with pytest.raises(NotFinite, match=r"the latents of .*\.png hold NaN or infinity\. Look at the model's files"):
        take(online, 1)

    def broken_text(encoders, captions, *, text_length) -> EncodedText:
        text = encode_captions(encoders, captions, text_length=text_length)
        text.t5[0, 2, 1] = float("inf")
        return text

    monkeypatch.setattr(batch_encoder, "encode_captions", broken_text)
    texts = CaptionTexts(online._encoders.text, online._config.data.captions)
    with pytest.raises(NotFinite, match=r"the text of 'a cat' holds NaN or infinity"):
        texts.get("a cat").wait()


def test_memory_that_runs_out_says_what_to_set(online, monkeypatch):
    def full(vae, batch):
        raise torch.OutOfMemoryError("CUDA out of memory")

    monkeypatch.setattr(batch_encoder, "encode_pixels", full)
    with pytest.raises(InputError, match=r"no memory left to encode 2 pictures at once .*Lower data.encode_batch_size"):
        take(online, 1)
