"""A CUDA device for fake tensors where there is none: `load()` before torch is imported.

On cuda:0 tensors then have shape, dtype and device alone, autograd works, and autocast follows CUDA's own lists, which
are not the CPU's: norms in fp32. Reading a value (`.item()`) and an operation on two devices raise, as everything does
that would wait for a GPU.
"""

import ctypes
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
from pathlib import Path

from configs.errors import InputError

_SOURCE = Path(__file__).with_suffix(".cpp")
_COMPILERS = ("g++", "clang++", "c++")


def load() -> None:
    """Make fake tensors on cuda:0 work in this process. Does nothing on a machine with a GPU.

    Compiles a file of 30 lines at first, and keeps the library in the user's cache folder.  Raises InputError if there
    is no C++ compiler, or it fails.
    """
    if "torch" in sys.modules:
        raise RuntimeError("torch is imported already: it has looked for CUDA, and would not find this one")
    found = importlib.util.find_spec("torch")
    if found is None or not found.submodule_search_locations:
        raise InputError("torch is not installed, and a simulation needs it. Plan from tables: leave --simulate out.")
    torch_folder = Path(found.submodule_search_locations[0])
    if (torch_folder / "lib" / "libtorch_cuda.so").exists():
        _check_gpu()
        return
    library = _compile(torch_folder)
    for path in (torch_folder / "lib" / "libtorch_global_deps.so", torch_folder / "lib" / "libtorch_cpu.so", library):
        ctypes.CDLL(str(path), ctypes.RTLD_GLOBAL)

    import torch

    # What torch asks a CUDA build for before it lets autocast have bf16.
    torch.cuda.amp.common.amp_definitely_not_available = lambda: False
    torch.cuda.is_bf16_supported = lambda *_, **__: True
    # A device's own autograd thread lets go of the last graph after backward() has returned. A process that ends just
    # then dies of SIGABRT: "terminate called without an active exception".
    torch.autograd.set_multithreading_enabled(False)


def _check_gpu() -> None:
    import torch

    if not torch.cuda.is_available():
        raise InputError(
            "this torch is built for CUDA, but the machine has no GPU: its fake tensors on cuda:0 do not work. "
            "Simulate on a machine with a GPU, or with the CPU build of torch; or plan from tables, without --simulate."
        )


def _compile(torch_folder: Path) -> Path:
    """The shared library of fake_cuda.cpp, for this torch."""
    version = (torch_folder / "version.py").read_bytes()
    name = hashlib.sha256(_SOURCE.read_bytes() + version + bytes(torch_folder)).hexdigest()[:16]
    folder = _cache_folder()
    library = folder / f"fake_cuda-{name}.so"
    if library.exists():
        return library
    compiler = next(filter(None, map(shutil.which, _COMPILERS)), None)
    if compiler is None:
        raise InputError(
            f"a simulation without a GPU compiles {_SOURCE.name} once, and there is no C++ compiler "
            f"({', '.join(_COMPILERS)}). Install one (apt-get install g++), or plan from tables: leave --simulate out."
        )
    include = torch_folder / "include"
    half = folder / f"{library.name}.{os.getpid()}"
    options = ["-std=c++20", "-shared", "-fPIC", f"-I{include}", f"-I{include}/torch/csrc/api/include"]
    made = subprocess.run([compiler, *options, str(_SOURCE), "-o", str(half)], capture_output=True, text=True)
    if made.returncode:
        raise InputError(
            f"{_SOURCE.name} cannot be compiled by {compiler} for this torch: {made.stderr.strip().splitlines()[0]} "
            "Plan from tables: leave --simulate out."
        )
    half.rename(library)
    return library


def _cache_folder() -> Path:
    """fluxfill's in the user's cache folder; a temporary one where that cannot be written."""
    folder = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "fluxfill"
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError:
        return Path(tempfile.mkdtemp(prefix="fluxfill-"))
    return folder if os.access(folder, os.W_OK) else Path(tempfile.mkdtemp(prefix="fluxfill-"))
