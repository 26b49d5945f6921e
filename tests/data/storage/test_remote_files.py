from urllib.error import HTTPError

import pytest

from configs.errors import InputError
from data.storage.remote_files import check_url, open_url, read_range, url_stamp


def test_a_file_is_read_from_a_server(serve):
    def get(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(handler.path.encode() * 1000)

    with open_url(f"{serve(get)}/a/b.tar") as file:
        assert file.read(12) == b"/a/b.tar/a/b"
        assert len(file.read()) == 8 * 1000 - 12


@pytest.mark.parametrize(
    "path, sent",
    [
        ("/my photo.png", "/my%20photo.png"),
        ("/фото/猫.png?x=ü y", "/%D1%84%D0%BE%D1%82%D0%BE/%E7%8C%AB.png?x=%C3%BC%20y"),
        ("/my%20photo.png?X-Amz-Credential=A%2Fb&sig=a+b/c==", "/my%20photo.png?X-Amz-Credential=A%2Fb&sig=a+b/c=="),
        ("/a&b;c(1)[2]!,100%.png", "/a&b;c(1)[2]!,100%.png"),
    ],
)
def test_a_url_is_sent_as_servers_take_it(serve, path, sent):
    """As browsers do, spaces and other letters encoded; what is encoded, or signed, stays as it is."""

    def get(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(handler.path.encode())

    assert read_range(f"{serve(get)}{path}", 0, 1000).decode() == sent


@pytest.mark.parametrize("url", ["https://a..b/x.png", f"https://{'a' * 70}.com/x.png"])
def test_what_is_no_url_is_final(url):
    with pytest.raises(InputError, match=r"https://.*/x\.png: no URL \(.*\)\. Correct it"):
        read_range(url, 0, 1)


def test_a_url_with_a_line_break_is_refused():
    with pytest.raises(InputError, match="it holds a line break, tab or other control character: correct it"):
        check_url("https://host/a\nb.png", "list.jsonl, line 1")


@pytest.mark.fault(27, "a redirect to another scheme")
def test_a_redirect_stays_within_the_schemes(serve):
    def get(handler):
        handler.send_response(302)
        handler.send_header("Location", "ftp://127.0.0.1/etc/passwd")
        handler.end_headers()

    url = serve(get)
    with pytest.raises(
        InputError, match=rf"{url}/a redirects; its target is ftp://127.0.0.1/etc/passwd, but only"
    ) as e:
        open_url(f"{url}/a?token=secret").__enter__()
    assert "secret" not in str(e.value)


def test_a_url_that_is_refused_keeps_its_password():
    with pytest.raises(InputError, match=r"list, line 1 is https://host/a, but it holds a user or password") as caught:
        check_url("https://user:secret@host/a?token=secret", "list, line 1")
    assert "secret" not in str(caught.value)


@pytest.mark.parametrize("url", ["pipe:cat /etc/passwd", "file:///etc/passwd", "simplecache::s3://a/b", "http://a/b"])
def test_a_scheme_that_is_not_allowed_opens_nothing(url):
    with pytest.raises(InputError, match=r"a URL is .*, but only https://, s3://, gs:// are read"):
        open_url(url).__enter__()
    with pytest.raises(InputError, match=r"list\.jsonl, line 3 is "):
        check_url(url, "list.jsonl, line 3")


def test_a_driver_that_is_missing_is_named(monkeypatch):
    def fail(*_, **__):
        raise ImportError("Install s3fs to access S3")

    monkeypatch.setattr("fsspec.open", fail)
    with pytest.raises(InputError, match=r"s3://a/b: .*Install s3fs.* Run `pip install 'fluxfill\[s3\]'`"):
        open_url("s3://a/b").__enter__()


@pytest.mark.parametrize("ranges", [True, False])
def test_a_range_is_read_from_any_server(serve_folder, tmp_path, ranges):
    data = bytes(range(256)) * 10_000
    (tmp_path / "a.tar").write_bytes(data)
    url, _ = serve_folder(tmp_path, ranges=ranges)
    for offset, size in ((0, 10), (1, 1), (1_500_000, 300), (len(data) - 5, 5)):
        assert read_range(f"{url}/a.tar", offset, size) == data[offset : offset + size]


def test_a_range_of_a_bucket_is_read_by_its_driver(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    memory.pipe("/bucket/a.tar", bytes(range(100)))
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (memory, url.replace("s3:/", "")))
    assert read_range("s3://bucket/a.tar", 20, 5) == bytes(range(20, 25))


def test_the_stamp_of_a_file_changes_with_the_file(serve_folder, tmp_path):
    (tmp_path / "a.tar").write_bytes(b"123")
    url, requests = serve_folder(tmp_path)
    before = url_stamp(f"{url}/a.tar")
    assert before == url_stamp(f"{url}/a.tar")
    (tmp_path / "a.tar").write_bytes(b"1234")
    assert url_stamp(f"{url}/a.tar") != before
    assert {wanted for _, wanted in requests} == {"bytes=0-0"}, "a stamp is cheap"


def test_a_server_that_tells_nothing_gives_no_stamp(serve):
    def get(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(b"x")

    assert url_stamp(f"{serve(get)}/a") is None


@pytest.mark.parametrize("code, final", [(403, True), (404, True), (429, False), (503, False)])
def test_what_another_try_would_not_mend_is_final(serve, code, final):
    url = f"{serve(lambda handler: handler.send_error(code))}/a?token=secret"
    for call in (lambda: read_range(url, 0, 1), lambda: url_stamp(url), lambda: open_url(url).__enter__()):
        with pytest.raises(InputError if final else HTTPError, match=str(code)) as caught:
            call()
        assert "secret" not in str(caught.value)


def test_a_missing_object_of_a_bucket_is_final(monkeypatch):
    import fsspec

    memory = fsspec.filesystem("memory")
    monkeypatch.setattr("fsspec.core.url_to_fs", lambda url: (memory, "/nothing"))
    for call in (lambda: read_range("s3://bucket/nothing", 0, 1), lambda: url_stamp("s3://bucket/nothing")):
        with pytest.raises(InputError, match=r"s3://bucket/nothing: not there, or closed to you"):
            call()


def test_a_driver_that_is_missing_is_named_by_every_call(monkeypatch):
    def fail(*_):
        raise ImportError("Install gcsfs to access GCS")

    monkeypatch.setattr("fsspec.core.url_to_fs", fail)
    for call in (lambda: read_range("gs://a/b", 0, 1), lambda: url_stamp("gs://a/b")):
        with pytest.raises(InputError, match=r"gs://a/b: .*Install gcsfs.* Run `pip install 'fluxfill\[gcs\]'`"):
            call()


@pytest.mark.parametrize("call", [lambda url: read_range(url, 0, 1), url_stamp])
def test_no_way_to_a_scheme_that_is_not_allowed(call):
    with pytest.raises(InputError, match="only https://, s3://, gs:// are read"):
        call("pipe:cat /etc/passwd")
