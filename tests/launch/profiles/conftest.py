"""A machine with GPUs: nvidia-smi and sysfs, stood in for by files of the shape of real ones."""

from collections.abc import Callable
from pathlib import Path

import pytest

Machine = Callable[..., Path]


@pytest.fixture
def machine(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Machine:
    """machine("NVIDIA H100 80GB HBM3", mib=81559, count=8, links=["26.562 GB/s", ...], rdma=[("InfiniBand", "400 Gb/sec
    (4X NDR)", "4: ACTIVE"), ...], ethernet=[("up", "100000"), ...]): nvidia-smi goes on PATH; returns a folder in place
    of /sys."""
    monkeypatch.setenv("XDG_CONFIG_HOME", str(tmp_path / "config"))
    monkeypatch.delenv("CUDA_VISIBLE_DEVICES", raising=False)

    def build(
        name: str,
        *more: str,
        mib: object = 81559,
        capability: str = "9.0",
        count: int = 8,
        links: list[str] | None = None,
        rdma: list[tuple[str, str, str]] | None = None,
        ethernet: list[tuple[str, str]] | None = None,
    ) -> Path:
        names = [name] * count + list(more)
        rows = [f"{i}, {each}, {mib}, 512, 580.65.06, {capability}, GPU-{i}" for i, each in enumerate(names)]
        status = [f"GPU 0: {name} (UUID: GPU-0)", *(f"\t Link {i}: {rate}" for i, rate in enumerate(links or []))]
        newline = "\n"
        program = tmp_path / "bin" / "nvidia-smi"
        program.parent.mkdir()
        program.write_text(
            f"#!/bin/sh\ncase $1 in\n--query-gpu*) cat <<'END'\n{newline.join(rows)}\nEND\n;;\n"
            f"nvlink) [ \"$*\" = 'nvlink -s -i 0' ] && cat <<'END'\n{newline.join(status)}\nEND\n;;\nesac\n"
        )
        program.chmod(0o755)
        monkeypatch.setenv("PATH", str(program.parent), prepend=":")
        system = tmp_path / "sys"
        (system / "class").mkdir(parents=True)
        for i, (layer, rate, state) in enumerate(rdma or []):
            write(system / f"class/infiniband/mlx5_{i}/ports/1", link_layer=layer, rate=rate, state=state)
        for i, (state, speed) in enumerate(ethernet or []):
            write(system / f"class/net/eth{i}", operstate=state, speed=speed)
            (system / f"class/net/eth{i}/device").mkdir()
        write(system / "class/net/docker0", operstate="up", speed="800000")  # a bridge: no device
        return system

    def write(folder: Path, **files: str) -> None:
        folder.mkdir(parents=True)
        for name, text in files.items():
            (folder / name).write_text(text + "\n")

    return build
