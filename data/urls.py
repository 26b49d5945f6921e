"""Files on other machines, opened as streams of bytes: https by the standard library, s3 and gs by fsspec."""

import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from http.client import HTTPMessage
from typing import IO, BinaryIO

import fsspec

from configs.errors import InputError
from configs.urls import problem_with_url

_TIMEOUT_SECONDS = 60  # without a byte
_EXTRAS = {"s3": "s3", "gs": "gcs"}  # scheme -> extra of this package that brings its fsspec driver


def check_url(url: str, where: str) -> None:
    """Raise InputError, naming `where` it stands, unless the URL is of an allowed scheme and plain."""
    if problem := problem_with_url(url):
        raise InputError(f"{where} is {url}, but {problem}.")


@contextmanager
def open_url(url: str) -> Iterator[BinaryIO | IO[bytes]]:
    """A file's bytes from its beginning, to be read once.

    Raises InputError for a URL that is not allowed or whose driver is not installed; whatever the network does comes as
    OSError or as the driver's own exceptions, and is worth a retry (`data/retry.py`). A server may end early without an
    error: compare with the length or checksum that you know.
    """
    check_url(url, "a URL")
    scheme = url.partition("://")[0]
    if scheme not in _EXTRAS:
        with _opener.open(url, timeout=_TIMEOUT_SECONDS) as file:
            yield file
        return
    try:
        opened = fsspec.open(url, "rb")
    except ImportError as error:
        raise InputError(
            f"{url}: {scheme}:// needs a driver that is not installed ({error}). "
            f"Run `pip install 'fluxfill[{_EXTRAS[scheme]}]'`."
        ) from error
    with opened as file:
        yield file


class _StayWithinSchemes(urllib.request.HTTPRedirectHandler):
    """Follows a redirect only to where one may go directly: not from https to http."""

    def redirect_request(
        self, req: urllib.request.Request, fp: IO[bytes], code: int, msg: str, headers: HTTPMessage, newurl: str
    ) -> urllib.request.Request | None:
        check_url(newurl, f"{req.full_url} redirects; its target")
        return super().redirect_request(req, fp, code, msg, headers, newurl)


_opener = urllib.request.build_opener(_StayWithinSchemes)  # with the proxies of the environment
