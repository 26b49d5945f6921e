"""The stylesheet that our HTML pages share, base.css: colours in light and dark, text, tables, panels, curves."""

from pathlib import Path

STYLES = Path(__file__).parent  # for a template loader; pages include "base.css"
