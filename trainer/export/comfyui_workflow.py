"""A ComfyUI workflow that fills a hole with an export: a graph of nodes in its API format, which it opens as a file."""

from typing import Any

_STEPS = 30
_NEGATIVE = "ConditioningZeroOut"  # Fill is guided by a number that it is told, not by a second prompt


def render_workflow(*, whole: str, lora: str | None, guidance: float) -> dict[str, dict[str, Any]]:
    """Node number -> its class and inputs.

    whole: the model's file in models/diffusion_models.  lora: the adapter's in models/loras; None: the model is whole.
    A link is [node, which of its outputs].  The mask is a picture of its own: white is painted anew.
    """
    nodes: dict[str, dict[str, Any]] = {}

    def add(class_type: str, **inputs: Any) -> str:
        number = str(len(nodes) + 1)
        nodes[number] = {"class_type": class_type, "inputs": inputs}
        return number

    model = [add("UNETLoader", unet_name=whole, weight_dtype="default"), 0]
    if lora is not None:
        model = [add("LoraLoaderModelOnly", model=model, lora_name=lora, strength_model=1.0), 0]
    clip = add("DualCLIPLoader", clip_name1="clip_l.safetensors", clip_name2="t5xxl_fp16.safetensors", type="flux")
    vae = [add("VAELoader", vae_name="ae.safetensors"), 0]
    picture = add("LoadImage", image="picture.png")
    mask = add("LoadImageMask", image="mask.png", channel="red")
    text = add("CLIPTextEncode", clip=[clip, 0], text="what the hole is filled with")
    guided = add("FluxGuidance", conditioning=[text, 0], guidance=guidance)
    empty = add(_NEGATIVE, conditioning=[text, 0])
    condition = add(
        "InpaintModelConditioning",
        positive=[guided, 0],
        negative=[empty, 0],
        vae=vae,
        pixels=[picture, 0],
        mask=[mask, 0],
        noise_mask=False,
    )
    latent = add(
        "KSampler",
        model=model,
        positive=[condition, 0],
        negative=[condition, 1],
        latent_image=[condition, 2],
        seed=0,
        steps=_STEPS,
        cfg=1.0,
        sampler_name="euler",
        scheduler="normal",
        denoise=1.0,
    )
    filled = add("VAEDecode", samples=[latent, 0], vae=vae)
    add("SaveImage", images=[filled, 0], filename_prefix="fill")
    return nodes
