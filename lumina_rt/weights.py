"""A checkpoint folder in the published layout -> Model.

Tensors are read through memory maps, a layer at a time, and each map is closed behind it, so that little more than
the weights themselves is resident. Everything wrong with a folder is told in one CheckpointError. No pickle is read.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from types import ModuleType

import torch
from safetensors import SafetensorError, safe_open
from torch import Tensor

from lumina_rt.checkpoint import CheckpointError
from lumina_rt.kernels.quantization import BITS, GROUP, QuantizedWeight, quantize
from lumina_rt.model import Layer, Model, ModelConfig, rope_table

# Upstream Chameleon checkpoints hold the encoder of the image tokenizer too; ours comes from vqgan.safetensors.
IGNORED_PREFIX = "model.vqmodel."
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}


def read_json(path: Path) -> dict:
    """Read a JSON object. Raises CheckpointError when there is none."""
    try:
        value = json.loads(path.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise CheckpointError(path.parent, [f"{path.name} is missing"]) from None
    except (OSError, ValueError) as error:
        raise CheckpointError(path.parent, [f"{path.name} cannot be read: {error}"]) from error
    if not isinstance(value, dict):
        raise CheckpointError(path.parent, [f"{path.name} holds no JSON object"])
    return value


@dataclass(frozen=True)
class TensorFile:
    """Where a tensor lies, and its shape as the file's header tells it."""

    path: Path
    shape: tuple[int, ...]


class Checkpoint:
    """The tensors of a folder by name; only headers are read until a tensor is asked for."""

    def __init__(self, folder: Path):
        self.folder = folder
        self.problems: list[str] = []
        self.tensors: dict[str, TensorFile] = {}
        for path, promised in self._files().items():
            names = self._open(path)
            self.problems += [f"{name} is not in {path.name}, where the index says it is" for name in promised - names]

    def read(self, names: list[str], dtype: torch.dtype, pinned: bool = False) -> Tensor:
        """Copy tensors of equal width into one, above each other; never more than one is held twice.

        pinned: into memory that a GPU reads from while the host goes on.
        """
        rows = [self.tensors[name].shape[0] for name in names]
        stacked = torch.empty((sum(rows), *self.tensors[names[0]].shape[1:]), dtype=dtype, pin_memory=pinned)
        for name, part in zip(names, stacked.split(rows), strict=True):
            with safe_open(self.tensors[name].path, framework="pt") as file:
                part.copy_(file.get_tensor(name))
        return stacked

    def mapped(self, name: str, dtype: torch.dtype) -> Tensor:
        """A tensor as it lies in its file, of which only what is used takes memory; a copy where `dtype` is another."""
        with safe_open(self.tensors[name].path, framework="pt") as file:
            return file.get_tensor(name).to(dtype)

    def _files(self) -> dict[Path, set[str]]:
        """The weight files of the folder, and the names that the index promises in each."""
        index_path = self.folder / "model.safetensors.index.json"
        if not index_path.exists():
            return {self.folder / "model.safetensors": set()}
        weight_map = read_json(index_path).get("weight_map")
        if not isinstance(weight_map, dict) or not all(isinstance(file, str) for file in weight_map.values()):
            self.problems.append(f"{index_path.name} holds no weight_map of names to files")
            return {}
        files: dict[Path, set[str]] = {}
        for name, file in weight_map.items():
            if Path(file).name != file or not file.endswith(".safetensors"):
                self.problems.append(
                    f"{index_path.name} points to {file!r}; expected a .safetensors file of the folder"
                )
            else:
                files.setdefault(self.folder / file, set()).add(name)
        self.problems = sorted(set(self.problems))
        return files

    def _open(self, path: Path) -> set[str]:
        try:
            with safe_open(path, framework="pt") as file:
                names = file.keys()
                found = {name: TensorFile(path, tuple(file.get_slice(name).get_shape())) for name in names}
        except FileNotFoundError:
            self.problems.append(f"{path.name} is missing")
            return set()
        except (SafetensorError, OSError) as error:
            self.problems.append(f"{path.name} is truncated or corrupt: {error}")
            return set()
        self.problems += [f"{name} stands in two files" for name in found.keys() & self.tensors.keys()]
        self.tensors |= found
        return found.keys()


def config_from_json(values: Mapping, folder: Path | str = "config.json") -> ModelConfig:
    """Read a ModelConfig from the values of a config.json. Raises CheckpointError for what is not supported."""
    problems = []
    for key, supported in {
        "model_type": "chameleon", "hidden_act": "silu", "rope_scaling": None, "attention_bias": False,
        "mlp_bias": False, "tie_word_embeddings": False,
    }.items():  # fmt: skip
        if values.get(key, supported) not in (supported, None):
            problems.append(f"{key} {json.dumps(values[key])[:80]} is not supported; expected {json.dumps(supported)}")
    quantized = values.get("quantization_config")
    if quantized not in (None, *map(quantization_config, BITS)):
        problems.append(f"quantization_config {json.dumps(quantized)[:80]} is not supported; expected our own or none")
    rope = values.get("rope_parameters") or {}
    if not isinstance(rope, dict):
        problems.append(f"rope_parameters is {rope!r}; expected an object")
    elif rope.get("rope_type", "default") != "default":
        problems.append(f"rope_type {rope['rope_type']!r} is not supported; expected 'default'")
    sizes = {}
    for key in ("vocab_size", "hidden_size", "intermediate_size", "num_hidden_layers", "num_attention_heads"):
        sizes[key] = values.get(key)
        if not isinstance(sizes[key], int) or sizes[key] <= 0:
            problems.append(f"{key} is {sizes[key]!r}; expected a positive whole number")
    kv_heads = values.get("num_key_value_heads") or sizes["num_attention_heads"]
    rows = values.get("model_parallel_size") or 1
    for key, value in (("num_key_value_heads", kv_heads), ("model_parallel_size", rows)):
        if not isinstance(value, int) or value < 0:
            problems.append(f"{key} is {value!r}; expected a positive whole number")
    norm_eps = values.get("rms_norm_eps", 1e-5)
    rope_theta = (isinstance(rope, dict) and rope.get("rope_theta")) or values.get("rope_theta") or 10000.0
    for key, value in (("rms_norm_eps", norm_eps), ("rope_theta", rope_theta)):
        if not isinstance(value, (int, float)) or value <= 0:
            problems.append(f"{key} is {value!r}; expected a positive number")
    if problems:
        raise CheckpointError(folder, problems)

    hidden, heads = sizes["hidden_size"], sizes["num_attention_heads"]
    if hidden % heads or heads % kv_heads or hidden // heads % 2:
        raise CheckpointError(folder, [f"{heads} heads and {kv_heads} key-value heads do not divide {hidden} evenly"])
    return ModelConfig(
        vocab_size=sizes["vocab_size"],
        hidden=hidden,
        intermediate=sizes["intermediate_size"],
        n_layers=sizes["num_hidden_layers"],
        heads=heads,
        kv_heads=kv_heads,
        head_dim=hidden // heads,
        qk_norm_rows=(rows, rows),
        post_norm=bool(values.get("swin_norm", False)),
        norm_eps=float(norm_eps),
        rope_theta=float(rope_theta),
    )


def quantization_config(quantization: str) -> dict:
    """What config.json says of a checkpoint whose matrices are in "int8" or "int4"."""
    return {"quant_method": "lumina_rt", "bits": BITS[quantization], "group_size": GROUP}


def stored_quantization(values: Mapping) -> str | None:
    """What the matrices of a checkpoint are in, by its config.json: "int8", "int4", or None for floats."""
    found = values.get("quantization_config")
    return found and next(name for name, bits in BITS.items() if bits == found["bits"])


def is_matrix(name: str) -> bool:
    """Whether a tensor is one that quantization rounds."""
    return name.endswith("_proj.weight") or name == "lm_head.weight"


def bits_of(name: str, quantization: str) -> int:
    """Bits of a matrix: the head has 8 at least."""
    return max(BITS[quantization], 8 if name == "lm_head.weight" else 0)


def quantized_names(name: str) -> tuple[str, str]:
    """Under which names a quantized checkpoint holds a matrix: values and scales."""
    stem = name.removesuffix("weight")
    return stem + "values", stem + "scales"


def quantized_shapes(config: ModelConfig, quantization: str) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a quantized checkpoint."""
    shapes = {}
    for name, shape in tensor_shapes(config).items():
        if not is_matrix(name):
            shapes[name] = shape
            continue
        values, scales = quantized_names(name)
        shapes[values] = (shape[0], shape[1] * bits_of(name, quantization) // 8)
        shapes[scales] = (shape[0], shape[1] // GROUP)
    return shapes


def tensor_shapes(config: ModelConfig) -> dict[str, tuple[int, ...]]:
    """Name and shape of every tensor of a checkpoint, as published."""
    hidden, intermediate, head_dim = config.hidden, config.intermediate, config.head_dim
    shapes = {"model.embed_tokens.weight": (config.vocab_size, hidden)}
    for i in range(config.n_layers):
        layer = f"model.layers.{i}."
        shapes |= {
            layer + "input_layernorm.weight": (hidden,),
            layer + "self_attn.q_proj.weight": (config.heads * head_dim, hidden),
            layer + "self_attn.k_proj.weight": (config.kv_heads * head_dim, hidden),
            layer + "self_attn.v_proj.weight": (config.kv_heads * head_dim, hidden),
            layer + "self_attn.o_proj.weight": (hidden, config.heads * head_dim),
            layer + "self_attn.q_norm.weight": (config.qk_norm_rows[0], head_dim),
            layer + "self_attn.q_norm.bias": (config.qk_norm_rows[0], head_dim),
            layer + "self_attn.k_norm.weight": (config.qk_norm_rows[1], head_dim),
            layer + "self_attn.k_norm.bias": (config.qk_norm_rows[1], head_dim),
            layer + "post_attention_layernorm.weight": (hidden,),
            layer + "mlp.gate_proj.weight": (intermediate, hidden),
            layer + "mlp.up_proj.weight": (intermediate, hidden),
            layer + "mlp.down_proj.weight": (hidden, intermediate),
        }
    return shapes | {"model.norm.weight": (hidden,), "lm_head.weight": (config.vocab_size, hidden)}


def _check(checkpoint: Checkpoint, config: ModelConfig, stored: str | None = None) -> None:
    """Raise one CheckpointError with everything that is wrong with the tensors."""
    problems, found = list(checkpoint.problems), checkpoint.tensors
    expected = quantized_shapes(config, stored) if stored else tensor_shapes(config)
    problems += [f"{name} is missing" for name in expected if name not in found]
    problems += [
        f"{name} is unexpected" for name in found if name not in expected and not name.startswith(IGNORED_PREFIX)
    ]
    for name, shape in expected.items():
        if name not in found or found[name].shape == shape:
            continue
        heads = config.heads if ".q_norm." in name else config.kv_heads
        rows = found[name].shape[0] if found[name].shape else 0
        # The rows of the QK-norm differ among sources (1, 4, 8, or one a head): the tensor decides, not the config.
        if "_norm." in name and found[name].shape[1:] == shape[1:] and rows and heads % rows == 0:
            continue
        problems.append(f"{name} has shape {list(found[name].shape)}; expected {list(shape)}")
    if problems:
        raise CheckpointError(checkpoint.folder, problems)


def has_weights(folder: Path) -> bool:
    """Whether a folder holds the weights of a model."""
    return any((folder / name).exists() for name in ("model.safetensors", "model.safetensors.index.json"))


def stored_config(folder: Path) -> ModelConfig:
    """The ModelConfig of a folder; where it has weights, their tensors tell how many rows the QK-norms have.

    Raises CheckpointError as `load`, and where the weights are quantized.
    """
    values = read_json(folder / "config.json")
    config = config_from_json(values, folder)
    if stored := stored_quantization(values):
        raise CheckpointError(folder, [f"the weights are in {stored}; expected floats"])
    if not has_weights(folder):
        return config
    checkpoint = Checkpoint(folder)
    _check(checkpoint, config)
    norms = (checkpoint.tensors[f"model.layers.0.self_attn.{part}_norm.weight"] for part in "qk")
    return replace(config, qk_norm_rows=tuple(norm.shape[0] for norm in norms))


def read_state(folder: Path, config: ModelConfig) -> dict[str, Tensor]:
    """All tensors of a checkpoint by their published names, in fp32. Raises CheckpointError as `load`."""
    checkpoint = Checkpoint(folder)
    _check(checkpoint, config)
    return {name: checkpoint.read([name], torch.float32) for name in tensor_shapes(config)}


def load(
    folder: Path,
    ops: ModuleType,
    image_ids: Sequence[int],
    max_positions: int,
    dtype: torch.dtype | None,
    device: str,
    quantization: str | None = None,
) -> Model:
    """Load a checkpoint folder.

    image_ids: ascending tokens whose rows of the head are wanted apart.  max_positions: length of the RoPE table.
    dtype: None for the checkpoint's own.  quantization: of the matrices, a key of `kernels.quantization.BITS`, the
    head in int8 at least; None for what the checkpoint has.  Raises CheckpointError
    with everything that is wrong, and ValueError for a quantization that cannot be had.
    """
    if quantization not in (None, *BITS):
        raise ValueError(f"quantization is {quantization!r}; expected None or one of {', '.join(BITS)}")
    values = read_json(folder / "config.json")
    config = config_from_json(values, folder)
    dtype, stored = dtype or stored_dtype(values, folder), stored_quantization(values)
    if stored and quantization not in (None, stored):
        raise ValueError(f"quantization is {quantization!r}; the checkpoint is in {stored} already")
    checkpoint = Checkpoint(folder)
    _check(checkpoint, config, stored)
    if image_ids[-1] >= config.vocab_size:
        problem = f"the tokenizer has an image token {int(image_ids[-1])}, the model {config.vocab_size} tokens"
        raise CheckpointError(folder, [problem])

    def read(*names: str, dtype: torch.dtype = dtype) -> Tensor:
        # A GPU copies from pinned memory while the next tensors are read; torch keeps the memory until it has.
        pinned = torch.device(device).type == "cuda"
        return checkpoint.read(list(names), dtype, pinned).to(device, non_blocking=True)

    def matrix(*names: str) -> Tensor | QuantizedWeight:
        if stored:
            values, scales = zip(*map(quantized_names, names), strict=True)
            return QuantizedWeight(read(*values, dtype=torch.uint8), read(*scales, dtype=torch.bfloat16))
        weight = read(*names)
        return quantize(weight, bits_of(names[0], quantization)) if quantization else weight

    def packed(*names: str):
        return ops.pack(matrix(*names))

    norms = []  # in the order of the checkpoint: two a layer, then the model's last
    layers = []
    for i in range(config.n_layers):
        attention, mlp = f"model.layers.{i}.self_attn.", f"model.layers.{i}.mlp."
        norms += [
            read(f"model.layers.{i}.input_layernorm.weight"),
            read(f"model.layers.{i}.post_attention_layernorm.weight"),
        ]
        layers.append(
            Layer(
                qkv=packed(attention + "q_proj.weight", attention + "k_proj.weight", attention + "v_proj.weight"),
                q_norm=(read(attention + "q_norm.weight"), read(attention + "q_norm.bias")),
                k_norm=(read(attention + "k_norm.weight"), read(attention + "k_norm.bias")),
                o=packed(attention + "o_proj.weight"),
                attention_join=None,
                gate_up=packed(mlp + "gate_proj.weight", mlp + "up_proj.weight"),
                down=packed(mlp + "down_proj.weight"),
                mlp_join=None,
            )
        )
    norms.append(read("model.norm.weight"))
    # A pre-norm layer's sums are followed by the next norm; a post-norm layer's own norms come before its sums.
    edge_norm = norms.pop(-1 if config.post_norm else 0)
    for i, layer in enumerate(layers):
        layer.attention_join, layer.mlp_join = norms[2 * i], norms[2 * i + 1]

    lm_head = matrix("lm_head.weight")
    return Model(
        config=config,
        ops=ops,
        embed=checkpoint.mapped("model.embed_tokens.weight", dtype).to(device),
        layers=layers,
        edge_norm=edge_norm,
        lm_head=ops.pack(lm_head),
        image_head=ops.pack(_rows(lm_head, image_ids)),
        rope=rope_table(max_positions, config.head_dim, config.rope_theta, dtype).to(device),
    )


def _rows(matrix: Tensor | QuantizedWeight, ids: Sequence[int]) -> Tensor | QuantizedWeight:
    """Some rows, ascending; a view of them where they are neighbours."""
    if isinstance(matrix, QuantizedWeight):
        return QuantizedWeight(*(_rows(part, ids) for part in matrix))
    first, n = int(ids[0]), len(ids)
    if int(ids[-1]) - first + 1 == n:
        return matrix.narrow(0, first, n)
    return matrix.index_select(0, torch.as_tensor(ids, device=matrix.device))


def stored_dtype(values: Mapping, folder: Path) -> torch.dtype:
    """The dtype that config.json names; bf16 where it names none. Raises CheckpointError for one we do not run."""
    name = values.get("dtype") or values.get("torch_dtype") or "bfloat16"
    if name not in DTYPES:
        raise CheckpointError(folder, [f"dtype {name!r} is not run as it is; ask for one of {', '.join(DTYPES)}"])
    return DTYPES[name]


def fastest_dtype(device: str) -> torch.dtype:
    """bf16 where a device multiplies it faster than fp32, else fp32 (AVX2: torch's bf16 is 8 times slower)."""
    if device != "cpu" or torch.cpu.get_capabilities().get("avx512_bf16", False):
        return torch.bfloat16
    return torch.float32


def n_bytes(model: Model) -> int:
    """Bytes of all weights of a model, each counted once."""
    found: dict[int, int] = {}
    parts: list = [model.embed, model.lm_head, model.image_head, model.edge_norm]
    parts += [value for layer in model.layers for value in vars(layer).values()]
    while parts:
        part = parts.pop()
        if isinstance(part, tuple):
            parts += part
        elif isinstance(part, Tensor):  # what is a view of another is counted with it
            storage = part.untyped_storage()
            found[storage.data_ptr()] = storage.nbytes()
    return sum(found.values())
