"""Items: the pictures and the caption that belong together, as a source lists them, not read yet."""

import re
from dataclasses import dataclass

from configs.data_schema import CaptionsConfig
from configs.errors import InputError
from data.sources.picture_file import PictureFile


@dataclass(frozen=True, slots=True)
class Item:
    """One training item as its source names it.

    name: its own within the dataset, "a/b/cat".  mask: None where masks are random.  source: what the model sees
    instead of the target, or None.  caption: None = it has none.
    """

    name: str
    target: PictureFile
    mask: PictureFile | None
    source: PictureFile | None
    caption: str | None

    @property
    def pictures(self) -> list[PictureFile]:
        """Those it has."""
        return [file for file in (self.target, self.mask, self.source) if file is not None]


def finish_caption(text: str | None, captions: CaptionsConfig) -> str:
    """A caption on one line, or the default where there is none, or an empty one; the trigger word in front, unless it
    is in it."""
    text = " ".join((text or "").split()) or captions.default
    if captions.trigger and not _holds_word(text, captions.trigger):
        text = f"{captions.trigger}, {text}" if text else captions.trigger
    return text


OWN, DEFAULT, NONE = "of their own", "the default", "none"  # whose caption a sample has


def whose_caption(caption: str, captions: CaptionsConfig) -> str:
    """Of a finished caption: OWN, DEFAULT, or NONE where not even a default is set."""
    if caption != finish_caption(None, captions):
        return OWN
    return DEFAULT if captions.default.strip() else NONE


def _holds_word(text: str, word: str) -> bool:
    """Whether a text holds a word, not as part of another ("masks" does not hold "sks"); Chinese needs no gaps."""
    return re.search(rf"(?<!\w){re.escape(word)}(?!\w)", text, re.ASCII) is not None


def decode_text(data: bytes, name: str) -> str:
    """A caption's bytes as text. Raises InputError if they are not UTF-8."""
    try:
        return data.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        raise InputError(f"{name}: not UTF-8 text ({error}). Save the caption as UTF-8.") from error


HALF_A_CHARACTER = "holds half a character (a lone surrogate such as \\ud83d), which is no text"


def is_utf8(text: str) -> bool:
    """False for a file name of other bytes, which Python holds as lone surrogates, and for JSON that spells these."""
    try:
        text.encode()
    except UnicodeEncodeError:
        return False
    return True
