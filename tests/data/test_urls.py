import http.server
import threading

import pytest

from configs.errors import InputError
from data.urls import check_url, open_url


@pytest.fixture
def serve(monkeypatch):
    """Starts a server on this machine: `serve(handler)` -> its URL. Plain http is allowed as long as the test runs."""
    monkeypatch.setattr("configs.urls.SCHEMES", ("https", "s3", "gs", "http"))
    servers = []

    def start(get):
        class Handler(http.server.BaseHTTPRequestHandler):
            do_GET = get  # noqa: N815

            def log_message(self, *_):
                pass

        server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
        threading.Thread(target=server.serve_forever, args=(0.01,), daemon=True).start()
        servers.append(server)
        return f"http://127.0.0.1:{server.server_port}"

    yield start
    for server in servers:
        server.shutdown()
        server.server_close()


def test_a_file_is_read_from_a_server(serve):
    def get(handler):
        handler.send_response(200)
        handler.end_headers()
        handler.wfile.write(handler.path.encode() * 1000)

    with open_url(f"{serve(get)}/a/b.tar") as file:
        assert file.read(12) == b"/a/b.tar/a/b"
        assert len(file.read()) == 8 * 1000 - 12


def test_a_redirect_stays_within_the_schemes(serve):
    def get(handler):
        handler.send_response(302)
        handler.send_header("Location", "ftp://127.0.0.1/etc/passwd")
        handler.end_headers()

    url = serve(get)
    with pytest.raises(InputError, match=rf"{url}/a redirects; its target is ftp://127.0.0.1/etc/passwd, but only"):
        open_url(f"{url}/a").__enter__()


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
