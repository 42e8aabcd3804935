"""Meta's vqgan.ckpt and vqgan.yaml to vqgan.safetensors and vqgan.json.

The one file that reads a pickle, and it never lets one run code.
"""

import pickle
import re
from pathlib import Path

import torch
import yaml
from torch import Tensor

from lumina_rt.checkpoint import CheckpointError
from lumina_rt.vqgan import CONFIG, VQGAN, WEIGHTS, VQGANConfig

_PARTS = ("encoder.", "decoder.", "quantize.", "quant_conv.", "post_quant_conv.")


def convert_vqgan(ckpt_path, yaml_path, out_folder, force: bool = False) -> None:
    """Convert the original VQGAN into `out_folder`, in float32. Training keys, such as loss.*, are left out.

    Raises CheckpointError for what is wrong with either file, and ValueError if `out_folder` holds either
    output and `force` is false. Nothing is written then.
    """
    for name in (WEIGHTS, CONFIG):
        target = Path(out_folder) / name
        if target.exists() and not force:
            raise ValueError(f"{target} exists; expected a folder without it, or force=True to replace it")
    config = _read_config(yaml_path)
    model = VQGAN.from_tensors(config, _read_tensors(ckpt_path), ckpt_path)
    model.save_pretrained(out_folder)


def _read_config(path) -> VQGANConfig:
    """The shape from model.params; its other keys (lossconfig, ckpt_path, ...) are about training."""
    try:
        params = yaml.safe_load(Path(path).read_bytes())["model"]["params"]
        codebook = {name: params[name] for name in ("embed_dim", "n_embed")}
        return VQGANConfig.from_dict({**params["ddconfig"], **codebook})
    except OSError as error:
        raise CheckpointError(path, [f"{error.strerror}"]) from None
    except (yaml.YAMLError, RecursionError) as error:
        raise CheckpointError(path, [f"not YAML: {' '.join(str(error).split())}"]) from None
    except (KeyError, TypeError) as error:
        raise CheckpointError(path, [f"no model.params of a VQGAN: {error}"]) from None
    except ValueError as error:
        raise CheckpointError(path, [str(error)]) from None


def _read_tensors(path) -> dict[str, Tensor]:
    try:
        checkpoint = torch.load(path, weights_only=True, map_location="cpu")
    except OSError as error:
        raise CheckpointError(path, [f"{error.strerror}"]) from None
    except pickle.UnpicklingError as error:
        named = re.search(r"GLOBAL (\S+)", str(error))
        what = named[1] if named else "something that is no tensor"
        raise CheckpointError(path, [f"refused: the pickle asks for {what}"]) from None
    except Exception as error:  # a damaged pickle can raise anything
        raise CheckpointError(path, [f"damaged, or no checkpoint of torch: {type(error).__name__}"]) from None
    state = checkpoint.get("state_dict") if isinstance(checkpoint, dict) else None
    if not isinstance(state, dict):
        raise CheckpointError(path, ["no state_dict in it"])
    tensors = {name: value for name, value in state.items() if str(name).startswith(_PARTS)}
    if odd := [f"not a dense tensor: {name}" for name, value in tensors.items() if not _is_dense(value)]:
        raise CheckpointError(path, odd)
    return tensors


def _is_dense(value) -> bool:
    """Whether it is a plain tensor: a pickle may hold sparse, nested and meta ones too."""
    odd = not isinstance(value, Tensor) or value.is_meta or value.is_nested
    return not odd and value.layout == torch.strided
