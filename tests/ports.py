"""Ports of this machine for programs that are told on which to listen."""

import socket
from collections.abc import Iterator
from contextlib import contextmanager


@contextmanager
def own_port() -> Iterator[int]:
    """A port that nobody else is given as long as the context lasts: it is bound, and not listened on. Whoever is told
    of it binds it all the same, by SO_REUSEADDR, as servers and torch's stores do; until then connections are refused.
    """
    with socket.socket() as holder:
        holder.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        holder.bind(("127.0.0.1", 0))
        yield holder.getsockname()[1]
