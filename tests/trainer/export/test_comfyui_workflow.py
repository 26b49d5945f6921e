"""The example workflow is a graph that ComfyUI can run, and its files are those of the export."""

import json

import pytest
from safetensors import safe_open

from tests.trainer.adapters.live_models import lora
from tests.trainer.export.made_checkpoints import WHOLE, make_checkpoint
from trainer.export.comfyui_workflow import render_workflow
from trainer.export.from_checkpoint import export_checkpoint

# ComfyUI's nodes: what each wants, and the types of its outputs.  A type in capitals comes by a link.
NODES = {
    "UNETLoader": ({"unet_name": "file", "weight_dtype": "choice"}, ["MODEL"]),
    "LoraLoaderModelOnly": ({"model": "MODEL", "lora_name": "file", "strength_model": "number"}, ["MODEL"]),
    "DualCLIPLoader": ({"clip_name1": "file", "clip_name2": "file", "type": "choice"}, ["CLIP"]),
    "VAELoader": ({"vae_name": "file"}, ["VAE"]),
    "LoadImage": ({"image": "file"}, ["IMAGE", "MASK"]),
    "LoadImageMask": ({"image": "file", "channel": "choice"}, ["MASK"]),
    "CLIPTextEncode": ({"clip": "CLIP", "text": "text"}, ["CONDITIONING"]),
    "FluxGuidance": ({"conditioning": "CONDITIONING", "guidance": "number"}, ["CONDITIONING"]),
    "ConditioningZeroOut": ({"conditioning": "CONDITIONING"}, ["CONDITIONING"]),
    "InpaintModelConditioning": (
        {"positive": "CONDITIONING", "negative": "CONDITIONING", "vae": "VAE", "pixels": "IMAGE", "mask": "MASK"}
        | {"noise_mask": "choice"},
        ["CONDITIONING", "CONDITIONING", "LATENT"],
    ),
    "KSampler": (
        {"model": "MODEL", "positive": "CONDITIONING", "negative": "CONDITIONING", "latent_image": "LATENT"}
        | {"seed": "number", "steps": "number", "cfg": "number", "denoise": "number"}
        | {"sampler_name": "choice", "scheduler": "choice"},
        ["LATENT"],
    ),
    "VAEDecode": ({"samples": "LATENT", "vae": "VAE"}, ["IMAGE"]),
    "SaveImage": ({"images": "IMAGE", "filename_prefix": "text"}, []),
}


def assert_runs(workflow):
    """Every input is there, every link leads to an output of its type, and everything is of use to the last node."""
    used = set()
    for node in workflow.values():
        wanted, _ = NODES[node["class_type"]]
        assert node["inputs"].keys() == wanted.keys(), node
        for name, kind in wanted.items():
            given = node["inputs"][name]
            assert isinstance(given, list) == kind.isupper(), (node, name)
            if kind.isupper():
                source, output = given
                used.add(source)
                assert NODES[workflow[source]["class_type"]][1][output] == kind, (node, name)
    assert [workflow[number]["class_type"] for number in workflow.keys() - used] == ["SaveImage"]


@pytest.mark.parametrize("lora", [None, "a.safetensors"])
def test_the_graph_is_whole(lora):
    workflow = render_workflow(whole="flux1-fill-dev.safetensors", lora=lora, guidance=30.0)
    assert_runs(workflow)
    assert any(node["class_type"] == "LoraLoaderModelOnly" for node in workflow.values()) == (lora is not None)


def inputs_of(workflow, class_type):
    return next(node["inputs"] for node in workflow.values() if node["class_type"] == class_type)


@pytest.mark.parametrize("kind", ["lora", "lora of dev", "lora of dev, rank 320", "full"])
def test_its_files_are_those_of_the_export(tiny_model, tiny_dev_model, tmp_path, kind):
    """And hold the keys that the node which loads them looks for."""
    dev = "dev" in kind
    method = WHOLE if kind == "full" else lora(rank=320 if "320" in kind else 4)
    make_checkpoint(tiny_dev_model if dev else tiny_model, method, tmp_path / "sofa", expanded=dev)
    export_checkpoint(tmp_path / "sofa", tmp_path / "out", form="comfyui")
    workflow = json.loads((tmp_path / "out" / "workflow.json").read_text())
    assert_runs(workflow)
    (file,) = (tmp_path / "out").glob("*.safetensors")
    with safe_open(file, "pt") as opened:
        names, metadata = set(opened.keys()), opened.metadata()
        whole = inputs_of(workflow, "UNETLoader")["unet_name"]
        if kind == "full":
            assert whole == file.name
            assert opened.get_slice("img_in.weight").get_shape()[1] == 384  # by which it is taken for a Fill
            assert {"double_blocks.0.img_attn.qkv.weight", "final_layer.linear.weight"} <= names
        else:
            assert inputs_of(workflow, "LoraLoaderModelOnly")["lora_name"] == file.name
            assert whole == ("flux1-dev.safetensors" if dev else "flux1-fill-dev.safetensors")
            assert ("transformer.x_embedder.reshape_weight" in names) == dev
            assert "transformer.transformer_blocks.0.attn.to_q.lora_A.weight" in names
    assert inputs_of(workflow, "FluxGuidance")["guidance"] == float(metadata["fluxfill.guidance"])
    assert inputs_of(workflow, "LoadImageMask")["channel"] == "red" and "white" in metadata["fluxfill.mask"]
