"""Quantized checkpoints: they hold what quantizing while loading would make, and what is wrong is told."""

import json

import pytest
import torch
from safetensors import safe_open

from lumina_rt import CheckpointError, Engine, cli, quantized, weights


def tensors_of(model):
    parts = [model.lm_head, model.image_head, *(v for layer in model.layers for v in vars(layer).values())]
    while parts:
        part = parts.pop()
        parts += part if isinstance(part, tuple) else []
        if isinstance(part, torch.Tensor):
            yield part


@pytest.mark.parametrize("quantization", ["int8", "int4"])
def test_it_loads_as_what_quantizing_while_loading_makes(checkpoint, tmp_path, quantization):
    files = quantized.write_checkpoint(checkpoint, tmp_path / "out", quantization)
    assert sorted(files) == sorted((tmp_path / "out").iterdir())
    stored = Engine.from_pretrained(tmp_path / "out", device="cpu", num_pages=8)
    made = Engine.from_pretrained(checkpoint, device="cpu", num_pages=8, quantization=quantization)
    for ours, theirs in zip(tensors_of(stored.model), tensors_of(made.model), strict=True):
        assert torch.equal(ours, theirs)
    plain = Engine.from_pretrained(checkpoint, device="cpu", num_pages=8)
    assert weights.n_bytes(stored.model) < 0.7 * weights.n_bytes(plain.model)  # the embedding stays as it is
    drawn = [engine.generate_image("a dog", 64, 64, seed=1, progress=False).token_ids for engine in (stored, made)]
    assert drawn[0] == drawn[1]


def test_the_head_is_in_int8_at_least(checkpoint, tmp_path):
    quantized.write_checkpoint(checkpoint, tmp_path / "out", "int4")
    index = json.loads((tmp_path / "out" / quantized.INDEX).read_text())["weight_map"]
    for name, share in (("lm_head.values", 1), ("model.layers.0.mlp.up_proj.values", 2)):
        with safe_open(tmp_path / "out" / index[name], framework="pt") as file:
            assert file.get_slice(name).get_shape()[1] == 64 // share


def test_another_quantization_of_a_quantized_checkpoint_is_refused(checkpoint, tmp_path):
    quantized.write_checkpoint(checkpoint, tmp_path / "out", "int8")
    with pytest.raises(ValueError, match="quantization is 'int4'; the checkpoint is in int8 already"):
        Engine.from_pretrained(tmp_path / "out", device="cpu", quantization="int4")
    with pytest.raises(CheckpointError, match="the weights are in int8; expected floats"):
        quantized.write_checkpoint(tmp_path / "out", tmp_path / "again", "int4")
    assert Engine.from_pretrained(tmp_path / "out", device="cpu", quantization="int8", num_pages=8)


def test_files_that_are_there_stay_unless_forced(checkpoint, tmp_path):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "notes.txt").write_text("mine")
    with pytest.raises(ValueError, match="holds files; expected an empty folder"):
        quantized.write_checkpoint(checkpoint, tmp_path / "out", "int8")
    quantized.write_checkpoint(checkpoint, tmp_path / "out", "int8", force=True)
    assert (tmp_path / "out" / "notes.txt").read_text() == "mine"
    assert not list(tmp_path.glob("*.partial"))


def test_a_config_of_another_quantizer_is_refused(checkpoint, tmp_path):
    quantized.write_checkpoint(checkpoint, tmp_path / "out", "int8")
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    for other in ({"quant_method": "awq", "bits": 4}, {**config["quantization_config"], "group_size": 32}):
        (tmp_path / "out" / "config.json").write_text(json.dumps({**config, "quantization_config": other}))
        with pytest.raises(CheckpointError, match=r"quantization_config .* is not supported"):
            Engine.from_pretrained(tmp_path / "out", device="cpu")


def test_the_command_line_converts_and_tells_what_is_missing(checkpoint, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    command = ["convert", str(checkpoint), "--quantize", "int4"]
    assert cli.main(command) == 1
    assert "expected one model and --output FOLDER" in capsys.readouterr().err
    assert cli.main([*command, "--output", "out"]) == 0
    assert Engine.from_pretrained(tmp_path / "out", device="cpu", num_pages=8)
    assert cli.main(["convert", "vqgan.ckpt"]) == 1
    assert "1 sources; expected two, vqgan.ckpt and vqgan.yaml" in capsys.readouterr().err
