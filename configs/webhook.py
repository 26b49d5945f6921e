"""Notices of a run's end, failure or NaN to the URL in $FLUXFILL_WEBHOOK; none where it is not set.

The URL is a secret: whoever has it can write there. So it comes from the environment, never from a config, and no
message shows it. A notice never costs the run anything but a few seconds at its end: what goes wrong is said in a line.
"""

import json
import os
import socket
import sys
import threading
import urllib.error
import urllib.request
from collections.abc import Mapping
from typing import Any, Literal

from configs.supervision import STOPPED

VARIABLE = "FLUXFILL_WEBHOOK"

Kind = Literal["finished", "stopped", "failed", "skipped an update", "rolled back"]

_SECONDS = 5.0  # for all of it: name, connection, answer
_MOST_LETTERS = 1500  # of a reason; Discord takes 2,000 of a message


class _NoRedirect(urllib.request.HTTPRedirectHandler):
    def redirect_request(self, *_: Any) -> None:
        """None: a notice goes where it was sent, or nowhere."""


def notify_end(
    run: str, *, code: int, reason: str, step: int | None, environment: Mapping[str, str] = os.environ
) -> None:
    """Tell how a run ended, by its exit code; returns when it is sent, or has failed, or after five seconds."""
    kind: Kind = "finished" if code == 0 else "stopped" if code == STOPPED else "failed"
    notify(run, kind, reason=reason, step=step, environment=environment)


def notify(
    run: str,
    kind: Kind,
    *,
    reason: str,
    step: int | None,
    wait: bool = True,
    environment: Mapping[str, str] = os.environ,
) -> None:
    """Send a notice: JSON with run, kind, step, reason and host, and a sentence as "text" (Slack, Mattermost, Teams)
    and "content" (Discord).  wait: at most five seconds; without it, it is sent while the caller goes on. Never raises.
    """
    url = environment.get(VARIABLE, "")
    if not url:
        return
    reason = reason[:_MOST_LETTERS]
    at = "" if step is None else f" at step {step}"
    why = f": {reason}" if reason and kind != "finished" else ""
    told = {"run": run, "kind": kind, "step": step, "reason": reason, "host": socket.gethostname()}
    sentence = f"fluxfill: {run} {kind}{at}{why}"
    body = json.dumps(told | {"text": sentence, "content": sentence}).encode()
    sending = threading.Thread(target=_send, args=(url, body), name="webhook", daemon=True)
    sending.start()
    if wait:
        sending.join(_SECONDS)
        if sending.is_alive():
            _say("no answer")


def _send(url: str, body: bytes) -> None:
    try:
        if not url.lower().startswith(("https://", "http://")):
            return _say("it is no https URL")
        header = {"Content-Type": "application/json", "User-Agent": "fluxfill"}
        request = urllib.request.Request(url, data=body, headers=header, method="POST")
        with urllib.request.build_opener(_NoRedirect).open(request, timeout=_SECONDS):
            pass
    except urllib.error.HTTPError as error:
        _say(f"it answers {error.code}")
    except Exception as error:  # whatever it is: a run's end must not hang on it, nor its words hold the URL
        _say(type(getattr(error, "reason", error)).__name__)


def _say(why: str) -> None:
    print(f"fluxfill: no notice was sent to ${VARIABLE} ({why})", file=sys.stderr, flush=True)
