"""Model folders whose files are changed and whose content is not."""

import json
from pathlib import Path

from safetensors.torch import load_file, save_file


def split_transformer(model: Path) -> None:
    """Deal the tensors of a transformer that is one file to two, as another program might."""
    (file,) = (model / "transformer").glob("*.safetensors")
    tensors = load_file(file)
    file.unlink()
    files = [f"{file.stem}-0000{number}-of-00002.safetensors" for number in (1, 2)]
    places = {name: files[index % 2] for index, name in enumerate(sorted(tensors))}
    for name in files:
        save_file({key: tensors[key] for key in reversed(places) if places[key] == name}, file.with_name(name))
    index = {"metadata": {}, "weight_map": places}
    file.with_name(f"{file.name}.index.json").write_text(json.dumps(index))
