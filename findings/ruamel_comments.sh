#!/usr/bin/env bash
# ruamel.yaml 0.19.1. Seconds to install.
# A round trip is to keep comments. One in front of the document's --- is lost, together with the ---. A comment is kept
# with the value before it, so deleting that key takes the next key's comment along, and what is appended to a list lands
# behind the comment of the key that follows the list.
# Seen:
#   "# head\n---\na: 1\n", unchanged             "a: 1\n"
#   "a: 1\n# of b\nb: 2\n", del a                "b: 2\n"
#   "a:\n- 1\n# of b\nb: 2\n", a.append(2)       "a:\n- 1\n# of b\n- 2\nb: 2\n"
set -euo pipefail
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
cd "$work"
python3 -m pip install -q --no-compile --no-deps --target packages ruamel.yaml==0.19.1
PYTHONPATH=packages python3 - <<'PY'
import io
import sys

from ruamel.yaml import YAML

yaml = YAML()


def changed(text, change):
    """The text after a round trip with one change in it."""
    loaded, written = yaml.load(text), io.StringIO()
    change(loaded)
    yaml.dump(loaded, written)
    return written.getvalue()


seen = {
    "unchanged": changed("# head\n---\na: 1\n", lambda loaded: None),
    "del a": changed("a: 1\n# of b\nb: 2\n", lambda loaded: loaded.pop("a")),
    "a.append(2)": changed("a:\n- 1\n# of b\nb: 2\n", lambda loaded: loaded["a"].append(2)),
}
for what, text in seen.items():
    print(f"{what}: {text!r}")
expected = {"unchanged": "a: 1\n", "del a": "b: 2\n", "a.append(2)": "a:\n- 1\n# of b\n- 2\nb: 2\n"}
sys.exit(seen != expected and f"changed: {expected} before")
PY
