"""An iterator prefetched by a thread."""

import threading
from collections.abc import Generator, Iterable
from queue import Full, Queue
from typing import TypeVar

_T = TypeVar("_T")


def run_ahead(items: Iterable[_T], depth: int) -> Generator[_T]:
    """The items in their order, made by a thread of its own, up to `depth` of them (and the one in the making) before
    they are asked for.

    What `items` raises is raised here, in its place. Closed early, it ends the thread before it returns.
    """
    ready: Queue[tuple[str, object]] = Queue(depth)
    stopped = threading.Event()

    def hand_over(kind: str, item: object) -> None:
        while not stopped.is_set():
            try:
                return ready.put((kind, item), timeout=0.1)
            except Full:
                pass

    def produce() -> None:
        source = iter(items)
        try:
            for item in source:
                hand_over("item", item)
                if stopped.is_set():
                    return
            hand_over("end", None)
        except BaseException as error:
            hand_over("error", error)
        finally:
            if close := getattr(source, "close", None):  # generators end where they began
                close()

    thread = threading.Thread(target=produce, name="ahead", daemon=True)
    thread.start()
    try:
        while True:
            kind, item = ready.get()
            if kind == "end":
                return
            if kind == "error":
                raise item  # type: ignore[misc]
            yield item  # type: ignore[misc]
    finally:
        stopped.set()
        thread.join()
