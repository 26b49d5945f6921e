"""A sheet of stored samples: latents decoded by the model's VAE, as a PNG or as a page."""

import base64
import html
import io
from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from PIL import Image
from rich.table import Table
from torch import Tensor

from configs.errors import InputError
from data.cache.manifest import Manifest
from data.encoders.encode import decode_latents
from data.encoders.load import load_vae
from data.encoders.model_folder import find_model, fingerprint
from data.samples.summary import describe_captions, lacking_captions
from data.show.page_style import STYLES
from data.show.picture_grid import GridItem, save_grid, to_picture
from data.show.statistics import CacheStatistics
from data.show.statistics_report import BAR, describe_texts, statistics_tables
from data.show.stored_samples import StoredSample
from data.sources.problems import printable
from data.storage.atomic_write import write_atomically, write_text_atomically

_DECODED_AT_ONCE = 4
_NAME_LETTERS = 56  # of a picture's name on a sheet, from its end
_SHOWN_MASKS = 6  # of a sample, which may have 64
_PAGE_SIDE = 512  # px, of the longest side of a picture on a page


@dataclass(frozen=True)
class DecodedSample:
    """A stored sample and its decoded latents: fp32 [3, H, W] in [0, 1], `masked` for the first few mask variants."""

    stored: StoredSample
    target: Tensor
    masked: list[Tensor]


def load_cache_vae(model: str, manifest: Manifest):
    """The VAE of a model, on the GPU if there is one. Raises InputError if it is not the one that encoded the cache."""
    folder = Path(model).expanduser()
    if not (folder / "vae").is_dir():
        folder = find_model(model)
    found = fingerprint(folder / "vae")
    if found != manifest.encoders.get("vae"):
        raise InputError(
            f"{folder / 'vae'}: not the VAE that encoded the cache ({found[:12]}, not "
            f"{manifest.encoders.get('vae', 'none')[:12]}): its pictures would be wrong. Give that model with --model."
        )
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    return load_vae(folder, device=device, dtype=torch.float32)


def decode_samples(vae, samples: Iterable[StoredSample], advance: Callable[[], None]) -> Iterator[DecodedSample]:
    """Samples with their pictures, in order, and of their masks the first few.  advance: called after each."""
    for sample in samples:
        latents = torch.stack([sample.latents, *sample.masked_latents[:_SHOWN_MASKS]])
        pictures = torch.cat([decode_latents(vae, part).cpu() for part in latents.split(_DECODED_AT_ONCE)])
        yield DecodedSample(sample, pictures[0], list(pictures[1:]))
        advance()


def save_sheet(path: Path, samples: Sequence[DecodedSample]) -> None:
    """Write a PNG: for each sample a line for each mask with the size of its hole, its name, and its caption."""
    items = []
    for sample in samples:
        stored, num_masks = sample.stored, len(sample.stored.masks)
        lines, notes = [], []
        for number, (masked, mask) in enumerate(zip(sample.masked, stored.masks, strict=False), start=1):
            lines.append([sample.target if number == 1 else None, masked, torch.from_numpy(mask).float().unsqueeze(0)])
            which = f"mask {number} of {num_masks} · " if num_masks > 1 else ""
            notes.append(f"{which}hole {mask.mean():.0%}")
        name = _name_of(stored)
        name = name if len(name) <= _NAME_LETTERS else f"…{name[1 - _NAME_LETTERS :]}"
        notes[0] = f"{name} · {stored.bucket} · {notes[0]}"
        items.append(GridItem(lines, notes, stored.meta.get("caption", "") or "no caption"))
    columns = ("target", "what the model sees", "mask")
    write_atomically(path, lambda temporary: save_grid(temporary, columns, items))


def _name_of(stored: StoredSample) -> str:
    return printable(stored.meta.get("target", stored.key))


def _caption_of(stored: StoredSample) -> str:
    return printable(stored.meta.get("caption", ""))


def save_page(
    path: Path, cache: Path, manifest: Manifest, counted: CacheStatistics, samples: Sequence[DecodedSample]
) -> None:
    """Write an HTML page that needs no other file: the statistics, and a card for each sample."""
    title = html.escape(f"{cache.name}: {counted.samples} samples")
    captions = f"captions of {counted.captions.total()} samples: {describe_captions(counted.captions)}"
    lines = [*describe_texts(manifest, counted), captions, lacking_captions(counted.captions) or ""]
    found = "".join(f"<li>{html.escape(line)}</li>" for line in lines if line)
    heads = ("Datasets", "Bytes of a sample", "How much of the picture is painted")
    tables = zip(heads, statistics_tables(cache, counted), strict=True)
    sections = "\n".join(f"<section><h2>{head}</h2>{_table(table)}</section>" for head, table in tables)
    cards = "\n".join(_card(sample) for sample in samples)
    style = "".join((STYLES / name).read_text(encoding="utf-8") for name in ("base.css", "sheet.css"))
    write_text_atomically(
        path,
        f'<!DOCTYPE html>\n<html lang="en"><head><meta charset="utf-8"><title>{title}</title>\n'
        f'<meta name="viewport" content="width=device-width, initial-scale=1"><style>{style}</style></head>\n'
        f'<body><header><p class="eyebrow">fluxfill shards show</p><h1>{title}</h1><ul class="findings">{found}</ul>'
        f'</header>\n{sections}\n<section><h2>Samples</h2><div class="cards">\n{cards}\n</div></section>'
        "</body></html>\n",
    )


def _table(table: Table) -> str:
    """A terminal's table as one of HTML; a cell of block characters as a bar of that length."""
    sides = [' class="number"' if column.justify == "right" else "" for column in table.columns]
    heads = (
        f"<th{side}>{html.escape(str(column.header))}</th>" for column, side in zip(table.columns, sides, strict=True)
    )
    rows = []
    for cells in zip(*(map(str, column.cells) for column in table.columns), strict=True):
        tags = ("th", *["td"] * (len(cells) - 1))
        row = zip(tags, sides, cells, strict=True)
        rows.append("".join(f"<{tag}{side}>{_cell(cell)}</{tag}>" for tag, side, cell in row))
    body = "".join(f"<tr>{row}</tr>" for row in rows)
    return f'<div class="wide"><table><thead><tr>{"".join(heads)}</tr></thead><tbody>{body}</tbody></table></div>'


def _cell(text: str) -> str:
    return f'<i style="--length: {len(text)}"></i>' if text and not text.strip(BAR) else html.escape(text)


def _card(sample: DecodedSample) -> str:
    stored, meta = sample.stored, sample.stored.meta
    rows = []
    for masked, mask in zip(sample.masked, stored.masks, strict=False):
        pictures = (
            (to_picture(sample.target), "target"),
            (to_picture(masked), "what the model sees"),
            (Image.fromarray(mask), f"mask, hole {mask.mean():.1%}"),
        )
        rows.append(f'<div class="row">{"".join(_figure(picture, text) for picture, text in pictures)}</div>')
    summary = " · ".join((stored.bucket, stored.split))
    facts = {"key": stored.key, "shard": stored.shard}
    facts |= {name: printable(str(value)) for name, value in meta.items() if name not in ("caption", "text", "target")}
    details = "".join(f"<dt>{html.escape(name)}</dt><dd>{html.escape(value)}</dd>" for name, value in facts.items())
    caption = html.escape(_caption_of(stored)) or "<em>no caption</em>"
    more = f"<details><summary>{html.escape(summary)}</summary><dl>{details}</dl></details>"
    return f"<article>{''.join(rows)}<h3>{html.escape(_name_of(stored))}</h3><p>{caption}</p>{more}</article>"


def _figure(picture: Image.Image, text: str) -> str:
    small = max(picture.size) <= _PAGE_SIDE // 2
    picture.thumbnail((_PAGE_SIDE, _PAGE_SIDE))
    # JPEG would show artefacts of its own in small pictures, and edges in masks.
    kind, options = ("png", {}) if small or picture.mode == "1" else ("jpeg", {"quality": 92})
    buffer = io.BytesIO()
    picture.save(buffer, format=kind, **options)
    data = base64.b64encode(buffer.getvalue()).decode()
    size = "small" if small else "large"
    image = f'<img class="{size}" src="data:image/{kind};base64,{data}" alt="{html.escape(text)}">'
    return f"<figure>{image}<figcaption>{html.escape(text)}</figcaption></figure>"
