"""The random checkpoint has the layout of the published ones, and every part of it loads."""

import json

import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from lumina_rt import Engine, SamplingParams, dummy
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vqgan import VQGAN

POST_NORM = {
    **dummy.TINY_MODEL,
    "num_key_value_heads": 2,
    "model_parallel_size": 2,
    "swin_norm": True,
    "torch_dtype": "bfloat16",
}


def test_with_8192_codes_the_names_have_the_published_ids(tmp_path):
    n_ids = dummy.write_tokenizer(tmp_path, n_codes=8192)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    vocab = tokenizer.vocab
    assert (vocab.bos, vocab.image_end, vocab.image_start) == (0, 8196, 8197)
    assert (vocab.end_of_turn, vocab.end_of_line) == (8710, 8803)
    assert vocab.image_ids.tolist() == list(range(4, 8196))
    assert [vocab.grid_token(n) for n in range(1, 65)] == [8804 + n for n in range(1, 65)]
    assert vocab.size == n_ids


@pytest.mark.parametrize("n_codes", [1, 64, 300])
def test_the_tokenizer_returns_how_many_ids_it_has_and_pads_up_to_what_is_asked(tmp_path, n_codes):
    n_ids = dummy.write_tokenizer(tmp_path, n_codes)
    vocab = Tokenizer.from_file(tmp_path / "tokenizer.json").vocab
    assert (len(vocab.image_ids), vocab.size) == (n_codes, n_ids)
    assert dummy.write_tokenizer(tmp_path, n_codes, n_ids + 37) == n_ids + 37
    assert Tokenizer.from_file(tmp_path / "tokenizer.json").vocab.size == n_ids + 37


def test_a_control_name_reaches_its_id_in_the_library_as_in_the_published_file(tmp_path):
    dummy.write_tokenizer(tmp_path, 64)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    for name in ("<s>", "</s>", "IMGIMGAZ", "IMGIMGGDZ", "<eoss>", "<racm3:break>", "<reserved08706>"):
        (id,) = tokenizer._file.encode(f"a{name}b", add_special_tokens=False).ids[1:-1]
        assert tokenizer._file.id_to_token(id) == name


def test_every_byte_of_text_is_a_token(tmp_path):
    dummy.write_tokenizer(tmp_path, 64)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    text = "".join(map(chr, [*range(256), 0x20AC, 0x1F642]))
    assert len(tokenizer.encode(text)) == len(text.encode())
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("model", [dummy.TINY_MODEL, POST_NORM], ids=["7B", "34B"])
def test_a_checkpoint_of_either_kind_loads_and_draws(tmp_path, model):
    folder = dummy.write_checkpoint(tmp_path / "deep" / "folder", model, generation={"target_sizes": [64]})
    assert folder == tmp_path / "deep" / "folder"
    assert sorted(path.name for path in folder.iterdir() if "vqgan" not in path.name) == [
        *("config.json", "generation_config.json", "model.safetensors", "tokenizer.json")
    ]
    engine = Engine.from_pretrained(folder, device="cpu", num_pages=8)
    assert engine.default_size == (64, 64)
    assert engine.model.config.post_norm == model["swin_norm"]
    output = engine.generate(["a"], SamplingParams(num_images=1, size=(64, 64), seed=0), progress=False)[0]
    assert output.images[0].size == (64, 64)


def test_the_config_is_what_was_asked_for_and_the_vocabulary(tmp_path):
    dummy.write_checkpoint(tmp_path, POST_NORM, vocab_size=2048, generation={"target_sizes": [64]})
    assert json.loads((tmp_path / "config.json").read_text()) == {**POST_NORM, "vocab_size": 2048}
    assert json.loads((tmp_path / "generation_config.json").read_text()) == {"target_sizes": [64]}


def test_the_published_tensors_are_there_under_their_names_and_no_other(tmp_path):
    dummy.write_checkpoint(tmp_path, POST_NORM, vocab_size=2048)
    tensors = load_file(tmp_path / "model.safetensors")
    layer = {
        "input_layernorm.weight": (64,),
        "post_attention_layernorm.weight": (64,),
        "self_attn.q_proj.weight": (64, 64),
        "self_attn.k_proj.weight": (32, 64),
        "self_attn.v_proj.weight": (32, 64),
        "self_attn.o_proj.weight": (64, 64),
        "mlp.gate_proj.weight": (128, 64),
        "mlp.up_proj.weight": (128, 64),
        "mlp.down_proj.weight": (64, 128),
    } | {f"self_attn.{x}_norm.{part}": (2, 16) for x in "qk" for part in ("weight", "bias")}
    expected = {f"model.layers.{i}.{name}": shape for i in range(2) for name, shape in layer.items()}
    expected["model.embed_tokens.weight"] = expected["lm_head.weight"] = (2048, 64)
    expected["model.norm.weight"] = (64,)
    assert {name: tuple(tensor.shape) for name, tensor in tensors.items()} == expected
    assert {tensor.dtype for tensor in tensors.values()} == {torch.bfloat16}


def test_a_seed_decides_every_weight(tmp_path):
    folders = [dummy.write_checkpoint(tmp_path / str(i), seed=seed) for i, seed in enumerate((3, 3, 4))]
    tensors = [load_file(folder / "model.safetensors") for folder in folders]
    vqgans = [VQGAN.from_pretrained(folder).state_dict() for folder in folders]
    for first, second, other in (tensors, vqgans):
        assert all(torch.equal(first[name], second[name]) for name in first)
        assert any(not torch.equal(first[name], other[name]) for name in first)
    for name, tensor in tensors[0].items():
        assert not torch.equal(tensor, tensors[2][name]), f"{name} does not depend on the seed"


def test_random_weights_keep_activations_near_one():
    tensors = dummy.random_tensors({**dummy.TINY_MODEL, "vocab_size": 3000})
    x = tensors["model.embed_tokens.weight"]
    assert np.isclose(x.std(), 1, atol=0.05)
    for name in ("mlp.gate_proj", "self_attn.q_proj", "self_attn.o_proj"):
        assert np.isclose((x @ tensors[f"model.layers.0.{name}.weight"].T).std(), 1, atol=0.2)
    gates = torch.randn(3000, 128) @ tensors["model.layers.1.mlp.down_proj.weight"].T
    assert np.isclose(gates.std(), 1, atol=0.2)
    for name, tensor in tensors.items():
        if name.endswith("norm.weight"):
            assert abs(tensor.mean() - 1) < 0.1, f"{name} is no scale near 1"
        assert tensor.isfinite().all()
