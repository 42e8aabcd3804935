"""Loading a checkpoint folder: every published layout, one report of everything wrong, and little memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from lumina_rt.kernels import reference
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from lumina_rt import CheckpointError, dummy, weights

CONFIG = {**dummy.TINY_MODEL, "vocab_size": 100}
IMAGE_IDS = torch.arange(4, 68)


@pytest.fixture
def folder(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    save_file(dummy.random_tensors(CONFIG), tmp_path / "model.safetensors")
    return tmp_path


def load(folder, dtype=torch.float32):
    return weights.load(folder, reference, IMAGE_IDS, 64, dtype, "cpu")


def problems(folder, dtype=torch.float32):
    with pytest.raises(CheckpointError) as caught:
        load(folder, dtype)
    assert str(folder) in str(caught.value)
    return caught.value.problems


def shard(folder, n=3):
    """Split model.safetensors as the published checkpoints are split, with an index."""
    tensors = load_file(folder / "model.safetensors")
    (folder / "model.safetensors").unlink()
    weight_map = {}
    for i in range(n):
        name = f"model-{i + 1:05d}-of-{n:05d}.safetensors"
        part = {key: tensors[key] for key in sorted(tensors)[i::n]}
        save_file(part, folder / name)
        weight_map |= dict.fromkeys(part, name)
    write_index(folder, weight_map)
    return weight_map


def write_index(folder, weight_map):
    (folder / "model.safetensors.index.json").write_text(json.dumps({"weight_map": weight_map}))


def all_tensors(model):
    yield from (model.embed, model.edge_norm, model.lm_head, model.image_head)
    for layer in model.layers:
        for value in vars(layer).values():
            yield from value if isinstance(value, tuple) else (value,)


def test_the_published_7b_has_419_tensors_and_7_013_158_912_parameters():
    config = weights.config_from_json(
        {
            "vocab_size": 65536,
            "hidden_size": 4096,
            "intermediate_size": 11008,
            "num_hidden_layers": 32,
            "num_attention_heads": 32,
        }
    )
    shapes = weights.tensor_shapes(config)
    assert len(shapes) == 419
    assert sum(torch.Size(shape).numel() for shape in shapes.values()) == 7_013_158_912
    assert (config.head_dim, config.kv_heads, config.post_norm) == (128, 32, False)


def test_the_34b_is_post_norm_with_grouped_queries():
    config = weights.config_from_json(
        {
            "vocab_size": 65536, "hidden_size": 8192, "intermediate_size": 22016, "num_hidden_layers": 48,
            "num_attention_heads": 64, "num_key_value_heads": 8, "swin_norm": True, "model_parallel_size": 4,
        }
    )  # fmt: skip
    n_parameters = sum(torch.Size(shape).numel() for shape in weights.tensor_shapes(config).values())
    assert round(n_parameters / 1e9, 1) == 34.3
    assert config.post_norm
    assert config.qk_norm_rows == (4, 4)


def test_single_and_sharded_checkpoints_load_alike(folder):
    single = list(all_tensors(load(folder)))
    shard(folder)
    for a, b in zip(single, all_tensors(load(folder)), strict=True):
        assert torch.equal(a, b)


def test_fused_weights_hold_the_parts_in_order(folder):
    tensors, model = load_file(folder / "model.safetensors"), load(folder)
    layer = "model.layers.1."
    parts = [tensors[f"{layer}self_attn.{x}_proj.weight"] for x in "qkv"]
    assert torch.equal(model.layers[1].qkv, torch.cat(parts))
    assert torch.equal(
        model.layers[1].gate_up, torch.cat([tensors[f"{layer}mlp.{x}_proj.weight"] for x in ("gate", "up")])
    )
    assert torch.equal(model.image_head, tensors["lm_head.weight"][4:68])
    assert model.image_head.data_ptr() == model.lm_head[4:].data_ptr()  # a view: no byte is held twice


def test_image_rows_of_the_head_need_not_be_neighbours(folder):
    model = weights.load(folder, reference, torch.tensor([3, 9, 50]), 64, torch.float32, "cpu")
    assert torch.equal(model.image_head, model.lm_head[[3, 9, 50]])


def test_weights_are_converted_to_the_dtype_asked_for(folder):
    for exact, rounded in zip(all_tensors(load(folder)), all_tensors(load(folder, torch.bfloat16)), strict=True):
        assert rounded.dtype == torch.bfloat16
        assert torch.equal(exact.bfloat16(), rounded)


def test_the_image_tokenizers_encoder_in_a_checkpoint_is_passed_over(folder):
    tensors = load_file(folder / "model.safetensors")
    tensors["model.vqmodel.encoder.conv_in.weight"] = torch.zeros(2, 2)
    save_file(tensors, folder / "model.safetensors")
    load(folder)


@pytest.mark.parametrize("rows", [1, 2, 4])
def test_the_tensor_decides_how_many_rows_the_qk_norm_has(folder, rows):
    tensors = load_file(folder / "model.safetensors")
    for name in tensors:
        if "_norm." in name and "self_attn" in name:
            tensors[name] = torch.randn(rows, 16)
    save_file(tensors, folder / "model.safetensors")
    assert load(folder).layers[0].q_norm[0].shape == (rows, 16)


def test_missing_unexpected_and_misshaped_tensors_are_told_in_one_report(folder):
    tensors = load_file(folder / "model.safetensors")
    del tensors["model.norm.weight"], tensors["model.layers.1.mlp.up_proj.weight"]
    tensors["model.layers.9.mlp.up_proj.weight"] = torch.zeros(1)
    tensors["lm_head.weight"] = torch.zeros(100, 63)
    tensors["model.layers.0.self_attn.q_norm.weight"] = torch.zeros(3, 16)
    save_file(tensors, folder / "model.safetensors")
    assert sorted(problems(folder)) == [
        "lm_head.weight has shape [100, 63]; expected [100, 64]",
        "model.layers.0.self_attn.q_norm.weight has shape [3, 16]; expected [1, 16]",
        "model.layers.1.mlp.up_proj.weight is missing",
        "model.layers.9.mlp.up_proj.weight is unexpected",
        "model.norm.weight is missing",
    ]


def test_a_truncated_shard_is_named(folder):
    name = shard(folder)["model.norm.weight"]
    data = (folder / name).read_bytes()
    (folder / name).write_bytes(data[:-1])
    found = problems(folder)
    assert any(name in problem and "truncated or corrupt" in problem for problem in found)


@pytest.mark.parametrize("data", [b"", b"\x00" * 7, b"\xff" * 64, b"PK\x03\x04pickle"])
def test_a_file_that_is_no_safetensors_is_named(folder, data):
    (folder / "model.safetensors").write_bytes(data)
    assert any("model.safetensors is truncated or corrupt" in problem for problem in problems(folder))


@pytest.mark.parametrize("target", ["../model.safetensors", "/etc/passwd", "model.bin", "sub/model.safetensors"])
def test_an_index_that_points_elsewhere_is_refused(folder, target):
    weight_map = shard(folder)
    weight_map["model.norm.weight"] = target
    write_index(folder, weight_map)
    assert any(repr(target) in problem for problem in problems(folder))


def test_an_index_that_promises_what_a_shard_has_not_is_told(folder):
    weight_map = shard(folder)
    moved = next(file for file in weight_map.values() if file != weight_map["model.norm.weight"])
    weight_map["model.norm.weight"] = moved
    write_index(folder, weight_map)
    assert f"model.norm.weight is not in {moved}, where the index says it is" in problems(folder)


def test_a_missing_shard_and_a_missing_config_are_told(folder):
    name = shard(folder)["model.norm.weight"]
    (folder / name).unlink()
    assert f"{name} is missing" in problems(folder)
    (folder / "config.json").unlink()
    assert problems(folder) == ["config.json is missing"]


@pytest.mark.parametrize("text", ["", "[]", "{", '{"weight_map": 3}', '{"weight_map": {"a": 1}}'])
def test_a_broken_index_is_told(folder, text):
    (folder / "model.safetensors.index.json").write_text(text)
    assert any("model.safetensors.index.json" in problem for problem in problems(folder))


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("rope_scaling", {"type": "linear"}),
        ("quantization_config", {"quant_method": "bitsandbytes"}),
        ("tie_word_embeddings", True),
        ("hidden_act", "gelu"),
        ("model_type", "llama"),
        ("hidden_size", None),
        ("num_hidden_layers", "two"),
        ("num_attention_heads", 5),
        ("num_key_value_heads", "four"),
        ("model_parallel_size", -1),
        ("rms_norm_eps", "small"),
        ("rope_theta", -5),
        ("rope_parameters", [1]),
        ("torch_dtype", "float16"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(folder, key, value):
    (folder / "config.json").write_text(json.dumps({**CONFIG, key: value}))
    found = problems(folder, dtype=None)
    assert len(found) == 1
    assert key.removeprefix("torch_") in found[0] or "5 heads" in found[0]


def test_peak_memory_stays_under_1_15_times_the_weights(tmp_path):
    values = {
        **CONFIG,
        "hidden_size": 1024,
        "intermediate_size": 2816,
        "num_hidden_layers": 12,
        "torch_dtype": "bfloat16",
    }
    (tmp_path / "config.json").write_text(json.dumps(values))
    save_file(dummy.random_tensors(values), tmp_path / "model.safetensors")
    shard(tmp_path, n=2)
    script = f"""
import torch
from pathlib import Path
from lumina_rt import weights
from lumina_rt.kernels import reference
def peak():  # VmHWM, not ru_maxrss: that one is inherited from the parent process
    status = Path("/proc/self/status").read_text()
    return int(status.split("VmHWM:")[1].split()[0]) * 1024
args = reference, torch.arange(4, 68), 64, torch.bfloat16, "cpu"
before = peak()
model = weights.load(Path({str(tmp_path)!r}), *args)
print((peak() - before) / weights.n_bytes(model))
"""
    ratio = float(subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, check=True).stdout)
    assert 0.9 < ratio < 1.15


@pytest.mark.skipif(sys.platform != "linux", reason="what is mapped stands in /proc")
def test_the_embedding_stays_in_its_file_where_it_has_the_dtype(folder):
    def is_mapped(tensor):
        for line in Path("/proc/self/maps").read_text().splitlines():
            first, last = (int(end, 16) for end in line.split()[0].split("-"))
            if first <= tensor.data_ptr() < last:
                return line.endswith("model.safetensors")

    assert is_mapped(load(folder).embed)
    assert not is_mapped(load(folder, torch.bfloat16).embed)
    assert not is_mapped(load(folder).layers[0].o)


def test_only_convert_reads_pickles():
    package = Path(weights.__file__).parent
    for path in [*package.glob("*.py"), *Path(reference.__file__).parent.glob("*.py")]:
        source = path.read_text()
        if path.name != "convert.py":
            assert "torch.load" not in source, path
            assert "pickle" not in source.replace("No pickle is read", ""), path


def test_safetensors_headers_are_what_the_checks_read(folder):
    with safe_open(folder / "model.safetensors", framework="pt") as file:
        assert set(file.keys()) == set(weights.tensor_shapes(weights.config_from_json(CONFIG)))
