"""A checkpoint with its matrices in int8 or int4: a file for each layer, read through memory maps like any other.

It loads in the time that its bytes take; quantizing while loading reads four times as many and rounds them.
"""

import json
import shutil
from pathlib import Path

from safetensors.torch import save_file
from torch import Tensor
from tqdm import tqdm

from lumina_rt import weights
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.kernels.quantization import quantize

COPIED = ("tokenizer.json", "generation_config.json", "vqgan.json", "vqgan.safetensors")
INDEX = "model.safetensors.index.json"


def write_checkpoint(source: Path, output: Path, quantization: str, force: bool = False) -> list[Path]:
    """Quantize the checkpoint folder `source` into `output`, a layer at a time; return the files.

    The small files are copied where `source` has them. Nothing is in `output` until all is done. Raises
    CheckpointError for what is wrong with `source`, and ValueError where `output` holds something and `force` is not
    given.
    """
    if output.exists() and any(output.iterdir()) and not force:
        raise ValueError(f"{output} holds files; expected an empty folder, or force to write over them")
    values, config = weights.read_json(source / "config.json"), weights.stored_config(source)
    checkpoint, dtype = weights.Checkpoint(source), weights.stored_dtype(values, source)
    groups: dict[str, list[str]] = {}
    for name in weights.tensor_shapes(config):
        parts = name.split(".")
        groups.setdefault(parts[2] if parts[1] == "layers" else "rest", []).append(name)

    partial = output.with_name(output.name + ".partial")
    shutil.rmtree(partial, ignore_errors=True)
    partial.mkdir(parents=True)
    index: dict[str, str] = {}
    for i, names in enumerate(tqdm(groups.values(), unit="layer", desc=quantization)):
        file = f"model-{i + 1:05}-of-{len(groups):05}.safetensors"
        tensors: dict[str, Tensor] = {}
        for name in names:
            tensors |= _quantized(name, checkpoint.read([name], dtype), quantization)
        save_file(tensors, partial / file, {"format": "pt"})
        index |= dict.fromkeys(tensors, file)
    (partial / INDEX).write_text(json.dumps({"metadata": {}, "weight_map": index}, indent=2))
    values["quantization_config"] = weights.quantization_config(quantization)
    (partial / "config.json").write_text(json.dumps(values, indent=2))
    for name in COPIED:
        if (source / name).is_file():
            shutil.copyfile(source / name, partial / name)
    output.mkdir(exist_ok=True)
    files = [file.replace(output / file.name) for file in sorted(partial.iterdir())]
    partial.rmdir()
    return files


def _quantized(name: str, tensor: Tensor, quantization: str) -> dict[str, Tensor]:
    if not weights.is_matrix(name):
        return {name: tensor}
    try:
        parts = quantize(tensor, weights.bits_of(name, quantization))
    except ValueError as error:
        raise CheckpointError(name, [str(error)]) from None
    return dict(zip(weights.quantized_names(name), parts, strict=True))
