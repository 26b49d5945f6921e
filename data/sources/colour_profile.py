"""Pictures of another colour space than sRGB, as cameras (Adobe RGB), phones (Display P3) and printers (CMYK) write:
their numbers mean other colours than the VAE takes them for."""

import io

from PIL import Image, ImageCms


def to_srgb(picture: Image.Image) -> Image.Image:
    """A picture in the colours that its embedded profile means, in RGB or RGBA.

    As it is, in any mode, where it has none or one of sRGB; and where that is damaged, or not for pictures of its mode:
    viewers too show it so then.
    """
    data = picture.info.get("icc_profile")
    if not data:
        return picture
    try:
        profile = ImageCms.ImageCmsProfile(io.BytesIO(data))
        if "srgb" in ImageCms.getProfileDescription(profile).lower():
            return picture
        space, mode = profile.profile.xcolor_space.strip(), "RGB"
        if space == "RGB" and picture.mode != "CMYK":
            if "A" in picture.getbands() or "transparency" in picture.info:
                mode = "RGBA"
            picture = picture.convert(mode)
        converted = ImageCms.profileToProfile(
            picture,
            profile,
            ImageCms.createProfile("sRGB"),
            renderingIntent=ImageCms.Intent.RELATIVE_COLORIMETRIC,
            outputMode=mode,
            flags=ImageCms.Flags.BLACKPOINTCOMPENSATION,
        )
    except (ImageCms.PyCMSError, OSError, ValueError, TypeError):
        return picture
    return picture if converted is None else converted
