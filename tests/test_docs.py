"""The pages of docs/: both languages say the same, and what they name is there: messages, commands, keys, numbers."""

import ast
import json
import re
import shlex
from collections import Counter
from collections.abc import Iterator, Sequence
from functools import cache
from pathlib import Path
from typing import Any

import pytest
import typer.main
import yaml
from markdown_it import MarkdownIt
from markdown_it.token import Token
from typer.testing import CliRunner

from configs.gpu_profiles import load_gpu_profile
from configs.loading import json_schema
from configs.problems import dotted_keys
from configs.slurm_schema import SlurmConfig
from configs.suggest import REMOVED
from demo.old_folders import make_old_folders
from launch.cli import COMMANDS, app
from launch.quickstart.choices import choose
from launch.quickstart.render import render_files
from launch.quickstart.seed_names import Language, render_seed_names

ROOT = Path(__file__).resolve().parents[1]
PAGES = tuple(sorted(path.stem for path in (ROOT / "docs" / "zh").glob("*.md")))
ALL = [*ROOT.glob("*.md"), *(ROOT / "docs").rglob("*.md")]
SOURCES = [path for top in ("configs", "data", "trainer", "launch") for path in (ROOT / top).rglob("*.py")]
# Of torch, not ours.
OTHERS_MESSAGES = {"torch.OutOfMemoryError: CUDA out of memory"}


@cache
def read(path: Path) -> str:
    return path.read_text(encoding="utf-8")


def page(name: str, language: Language = "en") -> Path:
    return ROOT / "docs" / f"{'zh/' if language == 'zh' else ''}{name}.md"


@cache
def parse(path: Path) -> list[Token]:
    return MarkdownIt().enable("table").parse(read(path))


def anchors(text: str) -> list[str]:
    """Of every heading, as GitHub makes them; where a link's target of its own stands above a heading, that."""
    found = []
    above = ""
    for line in re.sub(r"```.*?```", "", text, flags=re.DOTALL).splitlines():
        if heading := re.match(r"#+ (.*)", line):
            plain = re.sub(r"[^\w\- ]", "", heading[1].lower())
            found.append(above or plain.replace(" ", "-"))
        if line:
            own = re.fullmatch(r'<a id="([\w-]+)"></a>', line)
            above = own[1] if own else ""
    return found


def sections(path: Path) -> list[str]:
    """The page, cut at its headings."""
    return re.split(r"^#+ .*$", re.sub(r"<a id=.*?</a>", "", read(path)), flags=re.MULTILINE)


def code_blocks(path: Path) -> list[str]:
    return [token.content for token in parse(path) if token.type in ("fence", "code_block")]


def spans(text: str) -> Counter[str]:
    """What stands in backticks outside of code blocks."""
    return Counter(re.findall(r"`([^`\n]+)`", re.sub(r"```.*?```", "", text, flags=re.DOTALL)))


def numbers(text: str) -> Counter[str]:
    """Those outside of code and links."""
    plain = re.sub(r"```.*?```|`[^`\n]*`|\]\([^)]*\)", "", text, flags=re.DOTALL)
    return Counter(number.rstrip(".,") for number in re.findall(r"\d[\d.,]*", plain))


def tables(path: Path) -> list[list[list[str]]]:
    """Of each table its rows, of each row its cells."""
    found: list[list[list[str]]] = []
    for token in parse(path):
        if token.type == "table_open":
            found.append([])
        elif token.type == "tr_open":
            found[-1].append([])
        elif token.type == "inline" and token.level >= 4 and found and found[-1]:
            found[-1][-1].append(token.content)
    return found


# --- links ------------------------------------------------------------------------------------------------------------


def broken_links(path: Path) -> Iterator[str]:
    for target in re.findall(r"\]\(([^)\s]+)\)", read(path)):
        file, _, anchor = target.partition("#")
        place = path.parent / file if file else path
        if "://" in target:
            continue
        if not place.exists() or (anchor and anchor not in anchors(read(place))):
            yield target


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_every_link_leads_somewhere(path: Path) -> None:
    assert list(broken_links(path)) == []


def test_a_broken_link_is_found(tmp_path: Path) -> None:
    (tmp_path / "a.md").write_text("# One two\n[x](b.md) [y](#one-two) [z](#three) [w](a.md#one-two)\n")
    assert list(broken_links(tmp_path / "a.md")) == ["b.md", "#three"]


def test_every_page_that_the_program_names_has_the_heading_in_both_languages() -> None:
    named = {pointer for path in SOURCES for pointer in re.findall(r"docs/([\w-]+)\.md#([\w-]+)", read(path))}
    assert len(named) >= 6
    for name, anchor in named:
        assert anchor in anchors(read(page(name))), (name, anchor)
        assert anchor in anchors(read(page(name, "zh"))), (name, anchor)


# --- two languages ----------------------------------------------------------------------------------------------------


def test_every_page_that_no_program_makes_is_there_in_both_languages() -> None:
    made = {"combinations", "performance", "planning", "reliability"}
    assert {path.stem for path in (ROOT / "docs").glob("*.md")} - made == set(PAGES)


@pytest.mark.parametrize("name", PAGES)
def test_both_languages_have_the_same_headings_code_and_numbers(name: str) -> None:
    english, chinese = page(name), page(name, "zh")
    assert anchors(read(english))[1:] == anchors(read(chinese))[1:]
    assert code_blocks(english) == code_blocks(chinese)
    for one, other in zip(sections(english), sections(chinese), strict=True):
        local = other.replace("docs/zh/", "docs/")
        assert spans(one) == spans(local), one
        assert numbers(one) == numbers(other), one


@pytest.mark.parametrize("language", ["en", "zh"])
@pytest.mark.parametrize("name", PAGES)
def test_tables_are_whole(name: str, language: Language) -> None:
    """A stray | would make a row longer than its head, and Markdown would cut it off."""
    lines = [line for line in read(page(name, language)).splitlines() if line.startswith("|")]
    found = tables(page(name, language))
    assert len(lines) == sum(len(rows) + 1 for rows in found)
    widths = iter(len(re.findall(r"(?<!\\)\|", line)) - 1 for line in lines)
    for rows in found:
        assert {next(widths) for _ in range(len(rows) + 1)} == {len(rows[0])}


@pytest.mark.parametrize("language", ["en", "zh"])
def test_the_guide_has_the_table_of_names(language: Language) -> None:
    assert read(page("guide", language)).endswith(f"\n\n{render_seed_names(language)}\n")


# --- what the pages name ----------------------------------------------------------------------------------------------


# Of SLURM, accelerate, pip and others, not ours.
OTHERS_OPTIONS = set(
    re.findall(
        r"--\S+",
        "--array --batch --config_file --container-image --cpus-per-task --dependency --exclusive --export "
        "--fix-duplicates --gpus --main_process_ip --mixed_precision --multi_gpu --no-compile --no-deps --no-requeue "
        "--non-interactive --ntasks-per-node --num_processes --nv --only-binary --open-mode --password --platform "
        "--python-version --requeue --sample-type --signal --split-ratio --time",
    )
)


@cache
def command_at(words: tuple[str, ...]) -> tuple[Any, tuple[str, ...]]:
    """What these words of a command line come to, as far as they name commands, and the words behind those."""
    found: Any = typer.main.get_group(app)
    context = found.make_context("fluxfill", ["help"])
    rest = [word.partition("|")[0] for word in words]
    while hasattr(found, "resolve_command") and rest:
        _, found, rest = found.resolve_command(context, rest)
    return found, tuple(rest)


def options(command: Any) -> set[str]:
    own = {name for parameter in command.params for name in (*parameter.opts, *parameter.secondary_opts)}
    return own.union({"--help"}, *map(options, getattr(command, "commands", {}).values()))


@cache
def known_keys() -> frozenset[str]:
    return frozenset({*dotted_keys(json_schema()), *REMOVED})


def commands(codes: Sequence[str]) -> Iterator[list[str]]:
    """The words behind `fluxfill` in code, as far as they are one command with its arguments."""
    for code in codes:
        for line in re.findall(r"^\s*(?:exec |srun |[A-Z_]+=\S+ |-\S+ )*fluxfill ([a-z].*)", code, flags=re.MULTILINE):
            words = [word.strip("[]()") for word in shlex.split(line, comments=True)]
            yield [word for word in words if word != "&"]


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_commands_in_code_can_be_typed(path: Path) -> None:
    for words in commands([*code_blocks(path), *spans(read(path))]):
        given = {word.partition("=")[0] for word in words if word.startswith("--")}
        assert given <= options(command_at(tuple(word for word in words if not word.startswith("-")))[0]), words
        set_keys = {word.partition("=")[0] for word in words if re.match(r"[a-z_.]+\.[a-z_.]+=", word)}
        assert set_keys <= known_keys(), words


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_lines_of_code_blocks_lack_nothing(path: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every line has what its command's parser asks for; those that only make text do so."""
    monkeypatch.chdir(tmp_path)
    here = str(tmp_path.resolve())
    (tmp_path / "my.yaml").write_text(read(ROOT / "configs" / "fill_lora.yaml"), encoding="utf-8")
    codes = [re.sub(r" \[[^]\n]*\]", "", code).replace("$(pwd -P)", here) for code in code_blocks(path)]
    for words in commands(codes):  # without what may be left out
        command, rest = command_at(tuple(words))
        command.make_context("fluxfill", list(rest))  # raises click.UsageError
        if words[0] in ("quickstart", "plan", "render"):
            done = CliRunner().invoke(app, words)
            assert (done.exit_code, "warning" in done.stderr) == (0, False), done.output


def test_the_guide_types_commands() -> None:
    assert len(list(commands(code_blocks(page("guide"))))) > 8


@cache
def all_options() -> frozenset[str]:
    scripts = (file for top in ("data", "trainer", "demo", "benchmarks") for file in (ROOT / top).rglob("*.py"))
    of_scripts = {option for file in scripts for option in re.findall(r"add_argument\(\"(--[\w-]+)", read(file))}
    return frozenset(of_scripts.union(OTHERS_OPTIONS, *(options(command_at((name,))[0]) for name in COMMANDS)))


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_options_are_those_of_a_program(path: Path) -> None:
    assert set(re.findall(r"(?<![\w-])--[a-z][\w-]*", read(path), flags=re.ASCII)) - all_options() == set()


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_are_those_of_a_config(path: Path) -> None:
    roots = "|".join({key.partition(".")[0] for key in known_keys()})
    keys = set(re.findall(rf"(?<![\w./-])((?:{roots})\.[a-z_][\w.*]*[\w*])(?![\w/(-])", read(path), flags=re.ASCII))
    keys = {
        key.replace(".*", ".0", 1)
        for key in keys
        if not re.search(r"\.(yaml|py|jsonl?|md|sbatch)$|^data\.samples\.", key)
    }
    assert {key for key in keys if key not in known_keys() and key.removesuffix(".0") not in known_keys()} == set()


def keys_of(node: yaml.Node | None, above: str) -> Iterator[str]:
    """Of a piece of a config as YAML, one without a section being a dataset; where values are free, none."""
    for entry in node.value if isinstance(node, yaml.SequenceNode) else ():
        yield from keys_of(entry, above)
    for name, value in node.value if isinstance(node, yaml.MappingNode) else ():
        key = f"{above}.{name.value}" if above else name.value
        if not above or any(known.startswith(f"{above}.") for known in known_keys()):
            yield key
        yield from keys_of(value, f"{key}.0" if isinstance(value, yaml.SequenceNode) else key)


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_keys_in_pieces_of_yaml_are_those_of_a_config(path: Path) -> None:
    for token in parse(path):
        if token.type == "fence" and token.info == "yaml":
            node = yaml.compose(token.content)
            section = isinstance(node, yaml.MappingNode) and node.value[0][0].value in known_keys()
            assert set(keys_of(node, "" if section else "data.datasets.0")) - known_keys() == set(), token.content


@pytest.mark.parametrize("path", ALL, ids=lambda path: str(path.relative_to(ROOT)))
def test_files_and_modules_are_there(path: Path) -> None:
    tops = "configs|data|trainer|launch|slurm|demo|tests|benchmarks|docs|findings"
    files = set(re.findall(rf"(?<![\w./~-])((?:{tops})/[\w./*-]*[\w/*])", read(path), flags=re.ASCII))
    modules = re.findall(rf"python -m ((?:{tops})(?:\.\w+)+)", read(path))
    places = [module.replace(".", "/") for module in modules]
    files.update(place if (ROOT / place).is_dir() else f"{place}.py" for place in places)
    assert {file for file in files if not any(ROOT.glob(file))} == set()


def not_printed(shown: Sequence[str], printed: str) -> list[str]:
    """Pieces of excerpts, between "...", that a program did not print; lines may be wrapped otherwise."""
    pieces = [" ".join(piece.split()) for block in shown for piece in block.split("...\n")]
    assert len(pieces) > 1
    return [piece for piece in pieces if piece not in " ".join(printed.split())]


def test_what_import_config_prints_is_what_the_guide_shows(tmp_path: Path) -> None:
    old = ROOT / "tests" / "configs" / "legacy" / "samples" / "migrated_80gb.yaml"
    printed = CliRunner().invoke(app, ["import-config", str(old), "--out", str(tmp_path / "new.yaml")]).output
    shown = [block for block in code_blocks(page("guide")) if "no equivalent" in block or "really did" in block]
    assert not_printed(shown, printed) == []


def test_what_migrate_prints_is_what_the_guide_shows(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    make_old_folders(tmp_path / "old")
    (tmp_path / "flux-inpainting").mkdir()
    monkeypatch.chdir(tmp_path / "flux-inpainting")
    old = {"--target": "target_image_dir", "--mask": "mask_dir", "--masked": "source_image_dir"}
    places = [word for option, folder in old.items() for word in (option, f"../old/{folder}")]
    printed = CliRunner().invoke(app, ["migrate", *places, "--out", "dataset"]).output
    shown = [block for block in code_blocks(page("guide")) if "in quarantine" in block]
    assert not_printed(shown, printed) == []


@cache
def said() -> list[str]:
    """Every piece of text in the program's sources, adjacent literals put together."""
    nodes = (node for path in SOURCES for node in ast.walk(ast.parse(read(path))))
    return [node.value for node in nodes if isinstance(node, ast.Constant) and isinstance(node.value, str)]


def test_messages_in_troubleshooting_are_the_programs() -> None:
    messages = [
        span
        for table in tables(page("troubleshooting"))
        for row in table[1:]
        for span in spans(row[0])
        if " " in span and span not in OTHERS_MESSAGES and not span.startswith("fluxfill ")
    ]
    assert len(messages) > 35
    for message in messages:
        for piece in filter(None, map(str.strip, message.split("..."))):
            assert any(piece in text for text in said()), message


# --- numbers of comparison.md -----------------------------------------------------------------------------------------


def results(name: str) -> list[dict]:
    return [json.loads(line) for line in read(ROOT / "benchmarks" / "results" / f"{name}.jsonl").splitlines()]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_what_was_counted_and_measured_is_what_the_page_says(language: Language) -> None:
    (counted,) = results("old_way")
    claims, memory, chosen, speed, _ = (rows[1:] for rows in tables(page("comparison", language)))
    own = counted["encoders_gib_by_part"]
    expected = [counted["training_gib"], own["T5 and CLIP"], own["VAE in fp32"], own["1 pictures in it"]]
    assert [float(row[-1]) for row in memory] == [*expected, counted["encoders_gib"]]
    columns = ("vae", "clip", "t5", "transformer")
    assert [[float(cell) for cell in row[2:6]] for row in speed] == [
        [step[name] for name in columns] for step in counted["operations"]
    ]
    ratios = [step["plain_step"] for step in counted["operations"]]
    assert [row[6] for row in speed] == [f"{ratio} x" for ratio in ratios]
    together = counted["training_gib"] + counted["encoders_gib"]
    assert f"{together:.1f} → {counted['training_gib']} GiB" in claims[0][2]
    assert f"{counted['encoders_gib'] / together:.0%}".replace("%", " %") in claims[0][2]
    assert {f"{min(ratios):.2f}", f"{max(ratios):.2f}"} <= set(numbers(claims[1][2]))
    text = read(page("comparison", language))
    assert {f"{min(ratios) - 1:.2f}", f"{max(ratios) - 1:.2f}"} <= set(numbers(text))
    assert all(f"{count:,}" in text for count in counted["parameters"].values())
    sizes = {
        f"{line['bytes_per_sample'] / 2**20:.2f}"
        for line in results("cache_size")
        if line["side"] == 1024 and (line["text_dtype"] == "bf16" or (line["captions"], line["masks"]) == ("unique", 1))
    }
    assert {"5.13", "3.13", "1.15", "7.01"} == sizes and sizes <= set(numbers(text))
    for command, *_, gib in chosen:
        memory_size, count = re.findall(r"(\d+)GB --num-gpus (\d)", command)[0]
        profile = load_gpu_profile(f"{memory_size}GB")
        choices = choose(profile, num_gpus=int(count), num_nodes=1, online=False)
        assert list(map(float, re.findall(r"[\d.]+", gib))) == [
            round(sum(choices.memory.values()), 1),
            profile.memory_gib,
        ]


@pytest.mark.parametrize("language", ["en", "zh"])
def test_lines_that_a_user_owns(language: Language) -> None:
    choices = choose(load_gpu_profile("80GB"), num_gpus=2, num_nodes=1, online=False)
    texts = render_files(
        choices, gpu_name="80GB", folder=Path("/run"), model="owner/model", python="python", slurm=SlurmConfig()
    )
    config = [line for line in texts["train_flux_inpainting.yaml"].splitlines() if re.match(r"\s*[^\s#]", line)]
    (excerpt,) = (block for block in code_blocks(page("guide", language)) if block.startswith("  precision:"))
    assert excerpt in texts["train_flux_inpainting.yaml"]
    paths = re.findall(r"/path/to/your/\w+", texts["migrate_your_data.py"])
    owned = {str(len(config) + len(paths)), str(len(config))}
    assert len(paths) == 3 and owned <= set(numbers(read(page("comparison", language)).split("## ")[-2]))
