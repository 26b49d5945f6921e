"""Nothing is let in and nothing out: no code reads pickles or starts shells, and no secret that a run meets is written.

Payloads that pretend to be files stand beside the tests of their readers; row 27 of docs/reliability.md lists them.
"""

import ast
import json
import os
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from typer.testing import CliRunner

from configs.loading import dump_config
from configs.supervision import BAD_INPUT
from launch.cli import app
from tests.ranks import run_ranks

ROOT = Path(__file__).resolve().parents[1]
SOURCES = [path for top in ("configs", "data", "trainer", "launch") for path in sorted((ROOT / top).rglob("*.py"))]

# --- what no code of ours does ----------------------------------------------------------------------------------------

MODULES = {"pickle", "cPickle", "dill", "cloudpickle", "joblib", "marshal", "shelve"}
# Calls by their last two names, and what makes each harmless: a keyword with its value; None: nothing does.
CALLS: dict[str, tuple[str, object] | None] = {
    "torch.load": None,
    "dcp.load": None,
    "yaml.load": None,
    "yaml.unsafe_load": None,
    "yaml.full_load": None,
    "os.system": None,
    "os.popen": None,
    "eval": None,
    "exec": None,
    "np.load": ("allow_pickle", False),
    "extractall": ("filter", "data"),
    "extract": ("filter", "data"),
    "load_lora_adapter": ("use_safetensors", True),
    "load_lora_weights": ("use_safetensors", True),
    "FluxTransformer2DModel.from_pretrained": ("use_safetensors", True),
    "AutoencoderKL.from_pretrained": ("use_safetensors", True),
    "kind.from_pretrained": ("use_safetensors", True),
    "FluxFillPipeline.from_pretrained": ("use_safetensors", True),
    "AutoTokenizer.from_pretrained": ("trust_remote_code", False),
}
# Readers whose files hold no tensors.
HARMLESS_READERS = {"FlowMatchEulerDiscreteScheduler.from_pretrained"}


def dangers(source: str) -> Iterator[str]:
    """What a module does that could run what a file holds, by line."""
    for node in ast.walk(ast.parse(source)):
        if isinstance(node, ast.Import | ast.ImportFrom):
            names = [node.module or ""] if isinstance(node, ast.ImportFrom) else [alias.name for alias in node.names]
            yield from (f"{node.lineno}: imports {name}" for name in names if name.partition(".")[0] in MODULES)
        if not isinstance(node, ast.Call):
            continue
        keywords = {keyword.arg: ast.unparse(keyword.value) for keyword in node.keywords}
        if keywords.get("shell") == "True":
            yield f"{node.lineno}: starts a shell"
        dotted = ".".join(ast.unparse(node.func).split(".")[-2:])
        method = "." in dotted and dotted.rpartition(".")[2] not in ("eval", "exec")  # a model's, no builtin
        for name in (dotted, *([dotted.rpartition(".")[2]] if method else [])):
            harmless = CALLS.get(name, ())
            if harmless is None or (harmless and keywords.get(harmless[0]) != repr(harmless[1])):
                yield f"{node.lineno}: {name}"
        if dotted.endswith(".from_pretrained") and dotted not in CALLS.keys() | HARMLESS_READERS:
            yield f"{node.lineno}: {dotted}, of which nothing is known here"


def test_no_module_reads_pickles_or_starts_shells() -> None:
    found = {path.relative_to(ROOT).as_posix(): list(dangers(path.read_text(encoding="utf-8"))) for path in SOURCES}
    assert {path: told for path, told in found.items() if told} == {}


@pytest.mark.parametrize(
    "source, danger",
    [
        ("import pickle", "1: imports pickle"),
        ("from cloudpickle.x import y", "1: imports cloudpickle.x"),
        ("torch.load(path, weights_only=True)", "1: torch.load"),
        ("numpy.x.np.load(path)", "1: np.load"),
        ("subprocess.run(line, shell=True)", "1: starts a shell"),
        ("archive.extractall(folder)", "1: extractall"),
        ("CLIPTextModel.from_pretrained(x)", "1: CLIPTextModel.from_pretrained, of which nothing is known here"),
        ("AutoencoderKL.from_pretrained(x, use_safetensors=False)", "1: AutoencoderKL.from_pretrained"),
    ],
)
def test_a_danger_is_found(source: str, danger: str) -> None:
    assert list(dangers(source)) == [danger]


def test_what_is_harmless_passes() -> None:
    lines = (
        "np.load(path, allow_pickle=False)",
        "yaml.safe_load(text)",
        "archive.extractall(x, filter='data')",
        "re.x()",
    )
    assert [danger for line in lines for danger in dangers(line)] == []


# --- secrets ----------------------------------------------------------------------------------------------------------

CANARY = "hf_plantedCanary0123456789abcdef"
VARIABLES = ("HF_TOKEN", "HUGGING_FACE_HUB_TOKEN", "AWS_ACCESS_KEY_ID", "AWS_SECRET_ACCESS_KEY", "WANDB_API_KEY")


def files_with(canary: str, folder: Path) -> list[str]:
    """Every file below a folder that holds the canary, by name or content."""
    files = [path for path in folder.rglob("*") if path.is_file()]
    return [str(path) for path in files if canary in str(path) or canary.encode() in path.read_bytes()]


def train_with_secrets(arguments: list[str], output: str) -> list[str]:
    """The trainer, in a rank, with secrets in its environment and what it prints in a file: the command lines of all
    processes that it could see."""
    from trainer.main import train
    from trainer.process.outcome import run_and_report

    os.environ.update(dict.fromkeys(VARIABLES, CANARY), FLUXFILL_OUTCOME=f"{output}.outcome")
    printed = os.open(output, os.O_CREAT | os.O_WRONLY | os.O_APPEND)
    os.dup2(printed, 1), os.dup2(printed, 2)
    assert run_and_report(lambda: train(arguments)) == 0
    lines = []
    for path in Path("/proc").glob("[0-9]*/cmdline"):
        try:
            lines.append(path.read_bytes().decode(errors="replace"))
        except OSError:  # it has ended
            continue
    return lines


@pytest.mark.fault(
    27, "a token in the environment of a run and in the URLs of its pictures, searched for in all it writes"
)
def test_no_secret_is_in_anything_that_a_run_writes(
    demo_config: Callable, triples: Path, serve: Callable, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its folder with logs, events, TensorBoard, checkpoints and export; the cache; what it prints; command lines."""
    from rich.console import Console

    from data.preprocessing.run import preprocess

    def answer(handler):
        data = (triples / handler.path.partition("?")[0].lstrip("/")).read_bytes()
        handler.send_response(200)
        handler.send_header("Content-Length", str(len(data)))
        handler.end_headers()
        handler.wfile.write(data)

    url = serve(answer)
    names = sorted(path.name for path in (triples / "target").glob("*.png"))[:12]
    places = [{role: f"{url}/{role}/{name}?sig={CANARY}" for role in ("target", "mask", "source")} for name in names]
    (tmp_path / "list").mkdir()
    (tmp_path / "list" / "list.jsonl").write_text("\n".join(map(json.dumps, places)))
    table = f"{{name: listed, table: {tmp_path}/list/list.jsonl, columns: {{source: source}}}}"
    settings = [f"data.datasets=[{table}]", "data.holdout=2", f"run.dir={tmp_path}/runs", "run.name=canary"]
    settings += ["train.steps=2", "train.warmup_steps=1", "train.global_batch_size=4", "train.micro_batch_size=2"]
    settings += ["checkpoint.every_steps=1"]
    settings += ["validation.every_steps=2", "validation.images=1", "validation.sampler_steps=1", "train.ema_decay=0.5"]
    for name in VARIABLES:
        monkeypatch.setenv(name, CANARY)
    config = demo_config(tmp_path / "made" / "cache", *settings)
    (tmp_path / "made").mkdir(), (tmp_path / "runs").mkdir()
    with (tmp_path / "made" / "preprocess.txt").open("w") as told:
        preprocess(config, Console(file=told))
    (tmp_path / "config.yaml").write_text(dump_config(config), encoding="utf-8")

    lines = run_ranks(
        "ddp", 2, train_with_secrets, ["--config", str(tmp_path / "config.yaml")], str(tmp_path / "runs" / "printed")
    )
    written = {path.name for path in (tmp_path / "runs").rglob("*")}
    assert {"metrics.jsonl", "config.yaml", "tensorboard", "state.json", "COMPLETE", "final", "printed"} <= written
    assert "saved" in (tmp_path / "runs" / "printed").read_text()
    assert files_with(CANARY, tmp_path / "runs") == []
    assert not any(CANARY in line for line in lines[0])
    # The list itself, and where the scan keeps the places that it read there. So the search does find it.
    folders = {Path(path).relative_to(tmp_path).parent.as_posix() for path in files_with(CANARY, tmp_path)}
    assert folders == {"list", "made/cache/scan/listed"}


@pytest.mark.fault(27, "a token in a config, on the command line and in a URL there")
@pytest.mark.parametrize(
    "where, given",
    [
        ("config", f"hf_token: {CANARY}\n"),
        ("config", f"hub: {{push: true, api_key: {CANARY}}}\n"),
        ("config", f"logging: {{wandb_key: {CANARY}}}\n"),
        ("config", f"slurm: {{env: {{HF_TOKEN: {CANARY}}}}}\n"),
        ("command line", f"model.token={CANARY}"),
        ("command line", f"slurm.env.AWS_SECRET_ACCESS_KEY={CANARY}"),
        ("command line", f"data.cache=https://me:{CANARY}@host/cache"),
        ("command line", f"data.cache=https://host/cache?sig={CANARY}"),
        ("command line", f"data.datasets.0.target=https://me:{CANARY}@host/folder"),
        ("command line", f"data.datasets=[{{name: a, table: 'https://host/list?sig={CANARY}'}}]"),
    ],
)
@pytest.mark.parametrize("command", [["train"], ["train", "--dry-run"], ["check"], ["preprocess"]])
def test_a_secret_that_is_given_is_refused_and_not_printed(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, where: str, given: str, command: list[str]
) -> None:
    monkeypatch.chdir(tmp_path)
    text = (ROOT / "configs" / "fill_lora.yaml").read_text(encoding="utf-8")
    (tmp_path / "mine").mkdir()
    config = tmp_path / "mine" / "config.yaml"
    config.write_text(text + (given if where == "config" else ""), encoding="utf-8")
    arguments = [command[0], str(config), *([given] if where == "command line" else []), *command[1:]]
    ended = CliRunner().invoke(app, arguments)
    assert ended.exit_code == BAD_INPUT or (command[-1] == "--dry-run" and "datasets" in given)  # it looks at no place
    assert CANARY not in ended.output and (ended.exception is None or CANARY not in str(ended.exception))
    assert files_with(CANARY, tmp_path) == ([str(config)] if where == "config" else [])
