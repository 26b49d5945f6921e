"""`method.init_from` before a run: read by the trainer in a process of its own."""

import sys

import torch
from safetensors.torch import save_file

from launch.check import adapter
from launch.check.adapter import check_adapter

LAYER = "transformer.transformer_blocks.0.attn.to_q"


def write_lora(path, *, rank, width):
    factors = {"lora_A": torch.ones(rank, width), "lora_B": torch.ones(width, rank)}
    save_file({f"{LAYER}.{name}.weight": factor for name, factor in factors.items()}, path)
    return path


def test_an_adapter_that_goes_on_is_right_and_others_are_errors_with_all_reasons(situate, tmp_path):
    layer = "transformer_blocks.0.attn.to_q"
    lora = f"method={{{{type: lora, rank: {{}}, alpha: 4, targets: [{layer}], init_from: {{}}}}}}"
    assert list(check_adapter(situate())) == []
    right = write_lora(tmp_path / "right.safetensors", rank=4, width=192)
    [made] = check_adapter(situate(lora.format(4, right)))
    assert (made.state, str(right) in made.what) == ("ok", True)

    [made] = check_adapter(situate(lora.format(2, right)))
    assert made.state == "error" and "does not fit" in made.what and "rank" in " ".join(made.found)

    no_adapter = tmp_path / "config.safetensors"
    no_adapter.write_text("run: {name: x}")
    [made] = check_adapter(situate(lora.format(4, no_adapter)))
    assert made.state == "error" and "cannot be read as an adapter" in made.what


def test_a_librarys_warning_is_not_taken_for_what_is_wrong(situate, tmp_path, monkeypatch):
    (tmp_path / "a.safetensors").touch()
    situation = situate(f"method={{type: lora, init_from: {tmp_path}/a.safetensors}}")
    warn = "import sys, warnings; warnings.warn('pkg_resources is old'); "

    def ends_by(code):
        monkeypatch.setattr(adapter, "render_adapter_check", lambda *_: [sys.executable, "-c", warn + code])
        [made] = check_adapter(situation)
        return made.what, made.found

    assert ends_by("print('a does not fit:\\n- its rank'); sys.exit(2)") == ("a does not fit", ("- its rank",))
    assert ends_by("raise OSError('the disk is gone')") == ("OSError: the disk is gone", ())
    assert "reading it ended with -9" in ends_by("import os; os.kill(os.getpid(), 9)")[0]
