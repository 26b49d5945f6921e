"""What a run does not use is not imported, and works when it is used; each case in a process that has only imported
trainer/main.py."""

import importlib
import io
import os
import subprocess
import sys
from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import pytest

from benchmarks.ranks import take_environment, warm_context
from tests.patience import PATIENCE

ROOT = Path(__file__).resolve().parents[2]

NOT_FOR_EVERY_RUN = [
    *(
        "bitsandbytes",
        "boto3",
        "deepspeed",
        "peft",
        "prodigyopt",
        "pyarrow",
        "scipy",
        "skimage",
        "sklearn",
        "tensorboard",
    ),
    *("torchao", "transformers", "torch._inductor.compile_fx"),
]
PACKAGES = {"nf4": "bitsandbytes", "int8": "torchao", "fp8": "torchao"}
LAYERS = {"nf4": ("peft.tuners.lora.bnb", "Nf4Linear")}  # the others': peft's ordinary one


def in_a_fresh_process(function: Callable[..., Any], *arguments: object) -> Any:
    with warm_context().Pool(1, take_environment, (dict(os.environ),)) as pool:
        return pool.apply_async(function, arguments).get(PATIENCE)


def test_a_run_imports_no_package_that_it_does_not_use():
    script = f"import sys, trainer.main; print([name for name in {NOT_FOR_EVERY_RUN} if name in sys.modules])"
    ended = subprocess.run([sys.executable, "-c", script], cwd=ROOT, capture_output=True, text=True, check=True)
    assert ended.stdout == "[]\n"


def quantize_and_adapt(precision: Any) -> tuple[list[str], tuple[str, str]]:
    """The package that a quantized base brought with it; the class of an adapted layer, and of the layer in it."""
    from diffusers import FluxTransformer2DModel

    from configs.schema import LoraConfig
    from trainer.adapters.build import add_adapter
    from trainer.model.quantize import quantize_base

    sizes = {"num_layers": 1, "num_single_layers": 1, "attention_head_dim": 16, "num_attention_heads": 4}
    inputs = {"joint_attention_dim": 64, "pooled_projection_dim": 64, "axes_dims_rope": (4, 6, 6)}
    model = FluxTransformer2DModel(**sizes, **inputs).bfloat16()
    quantize_base(model, precision, lambda tensor: tensor)
    add_adapter(model, LoraConfig(type="lora", rank=2), expanded=False, seed=0)
    layer = model.transformer_blocks[0].attn.to_q
    peft_class = type(layer).__base__
    return sorted(set(PACKAGES.values()) & set(sys.modules)), (peft_class.__module__, type(layer.base_layer).__name__)


@pytest.mark.parametrize("precision", PACKAGES)
def test_a_quantized_base_and_its_adapter_get_their_package(precision):
    packages, layer = in_a_fresh_process(quantize_and_adapt, precision)
    assert PACKAGES[precision] in packages
    assert layer == LAYERS.get(precision, ("peft.tuners.lora.layer", "WeightOnlyLinear"))


def use_what_diffusers_was_given_late() -> None:
    import torch
    from diffusers import FlowMatchEulerDiscreteScheduler
    from diffusers.quantizers.bitsandbytes import utils
    from diffusers.quantizers.torchao import torchao_quantizer

    scheduler = FlowMatchEulerDiscreteScheduler(use_beta_sigmas=True)
    scheduler.set_timesteps(4)
    assert len(scheduler.sigmas) == 5
    file = io.BytesIO()
    torch.save({"weight": torch.ones(2)}, file)
    file.seek(0)
    assert torch.load(file, weights_only=True)["weight"].tolist() == [1, 1]
    import bitsandbytes
    from torchao.quantization import FqnToConfig

    assert utils.bnb.nn.Linear4bit is bitsandbytes.nn.Linear4bit
    assert isinstance(FqnToConfig(), torchao_quantizer.FqnToConfig)
    assert not isinstance(scheduler, torchao_quantizer.FqnToConfig)


def test_what_was_left_out_works_when_it_is_used():
    in_a_fresh_process(use_what_diffusers_was_given_late)


NAMED = "from late_package.shapes import Square\n"
MODULES = {
    "named": NAMED + "def is_square(shape): return isinstance(shape, Square)",
    "made": NAMED + "side = Square(2).side",
    "derived": NAMED + "class Tile(Square): ...\nside = Tile(3).side",
    "typed": NAMED + "def draw(shape: Square | None): ...",
    "asked": "import late_package\nversion = late_package.__version__\nhas_round = 'round' in late_package.corners",
    "module": "from late_package import hidden\ndef value(): return hidden.VALUE",
    "broken": NAMED + "raise KeyError('its own')",
}


def import_modules_that_use_a_late_package(folder: str) -> dict[str, bool]:
    """Module -> whether the package had been imported when it was."""
    from configs import lighter_imports

    sys.path.insert(0, folder)
    lighter_imports._LATE = {"late_user": ("late_package",)}
    lighter_imports.lighten_imports()
    got_package = {}
    for name in MODULES:
        own_error = pytest.raises(KeyError, match="its own") if name == "broken" else nullcontext()
        with own_error:
            importlib.import_module(f"late_user.{name}")
        got_package[name] = "late_package" in sys.modules
        if name == "named":
            square = importlib.import_module("late_package.shapes").Square(1)
            assert sys.modules["late_user.named"].is_square(square) and not sys.modules["late_user.named"].is_square(1)
        if name == "module":
            assert sys.modules["late_user.module"].value() == 7
        for imported in [module for module in sys.modules if module.partition(".")[0] == "late_package"]:
            del sys.modules[imported]
    return got_package


def test_a_module_that_does_more_than_name_a_package_gets_it_at_once(tmp_path):
    """As a next release of diffusers may do."""
    package = {"__init__": "__version__, corners = '1', ['sharp']", "hidden": "VALUE = 7"}
    package["shapes"] = "class Square:\n    def __init__(self, side): self.side = side"
    for folder, files in (("late_package", package), ("late_user", {"__init__": "", **MODULES})):
        (tmp_path / folder).mkdir()
        for name, text in files.items():
            (tmp_path / folder / f"{name}.py").write_text(text)
    got_package = in_a_fresh_process(import_modules_that_use_a_late_package, str(tmp_path))
    late = {name for name, got in got_package.items() if not got}
    assert late == {"named", "module"}
