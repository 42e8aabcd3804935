"""A random checkpoint in the published layout: for tests, benchmarks and a first run. It has learned nothing.

Vocabulary, names and shapes are those of the released models, at any size.
"""

import json
from collections.abc import Mapping
from pathlib import Path

import tokenizers
import torch
from safetensors.torch import save_file
from tokenizers import AddedToken, Regex, decoders, models, pre_tokenizers

from lumina_rt import weights
from lumina_rt.vocab import image_name, reserved_name
from lumina_rt.vqgan import VQGAN, VQGANConfig

TINY_MODEL = {
    "model_type": "chameleon",
    "hidden_size": 64,
    "intermediate_size": 128,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 4,
    "model_parallel_size": 1,
    "swin_norm": False,
    "rms_norm_eps": 1e-5,
    "rope_theta": 10000.0,
    "torch_dtype": "float32",
}
TINY_VQGAN = VQGANConfig(
    embed_dim=8, n_embed=64, z_channels=8, ch=8, ch_mult=(1, 1, 1, 1, 2), num_res_blocks=1, norm_groups=4
)


def write_checkpoint(
    folder: Path,
    model: Mapping = TINY_MODEL,
    vqgan: VQGANConfig = TINY_VQGAN,
    seed: int = 0,
    vocab_size: int | None = None,
    generation: Mapping | None = None,
) -> Path:
    """Write model, tokenizer and VQGAN into `folder`; return it.

    model: values of config.json but for the vocabulary.  vocab_size: as `write_tokenizer`.
    generation: values of generation_config.json.
    """
    folder = Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    vocab_size = write_tokenizer(folder, vqgan.n_embed, vocab_size)
    values = {**model, "vocab_size": vocab_size}
    (folder / "config.json").write_text(json.dumps(values, indent=2))
    (folder / "generation_config.json").write_text(json.dumps(dict(generation or {}), indent=2))
    save_file(random_tensors(values, seed), folder / "model.safetensors", {"format": "pt"})
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(seed)
        VQGAN(vqgan).save_pretrained(folder)
    return folder


def random_tensors(values: Mapping, seed: int = 0) -> dict[str, torch.Tensor]:
    """Random weights under the published names, scaled so that activations stay near 1."""
    generator = torch.Generator().manual_seed(seed)
    dtype = getattr(torch, values["torch_dtype"])
    tensors = {}
    for name, shape in weights.tensor_shapes(weights.config_from_json(values)).items():
        tensor = torch.randn(shape, generator=generator)
        if name.endswith("norm.weight"):
            tensor = 1 + 0.1 * tensor
        elif name.endswith("bias"):
            tensor = 0.1 * tensor
        elif "embed" not in name:
            tensor = tensor * shape[-1] ** -0.5
        tensors[name] = tensor.to(dtype)
    return tensors


def write_tokenizer(folder: Path, n_codes: int, vocab_size: int | None = None) -> int:
    """Write a tokenizer.json that knows bytes and the names that have a meaning; return its number of ids.

    With 8,192 codes the ids of the names are those of the published tokenizer. vocab_size: padded up to this.
    """
    names = ["<s>", "<pad>", "</s>", "<unk>"]
    names += [image_name(code) for code in range(n_codes)]
    names += ["<eoss>", "<racm3:break>"]
    names += [reserved_name(n) for n in range(8194, 8865)]
    names += sorted(pre_tokenizers.ByteLevel.alphabet())
    names += [f"<filler{n}>" for n in range(len(names), vocab_size or 0)]
    ids = {name: id for id, name in enumerate(names)}
    # ignore_merges looks a whole word up in the vocabulary first, so that a control name typed by a user would be
    # taken for the token: the hard case for whoever encodes text.
    tokenizer = tokenizers.Tokenizer(models.BPE(vocab=ids, merges=[], ignore_merges=True))
    control = Regex(r"IMGIMG[A-J]+Z|<(s|/s|pad|unk|eoss|racm3:break|reserved[0-9]{5})>")
    tokenizer.pre_tokenizer = pre_tokenizers.Sequence(
        [
            pre_tokenizers.Split(control, "isolated"),
            pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False),
        ]
    )
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(name, special=True) for name in names[:4]])
    tokenizer.save(str(Path(folder) / "tokenizer.json"))
    return len(names)
