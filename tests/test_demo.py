"""The embedded model: that it can be built from nothing, and what is shipped."""

import json
from dataclasses import replace
from itertools import product
from random import Random

import numpy as np
import pytest
import torch
from lumina_rt.sft import checker, demo, evaluate, world
from lumina_rt.sft.data import Dialogs
from lumina_rt.sft.model import TrainableModel
from PIL import Image

from lumina_rt import Engine, hub, weights
from lumina_rt.images import to_pixels
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vqgan import VQGAN, to_uint8


@pytest.fixture(scope="module")
def shipped():
    return Engine.from_pretrained("demo", device="cpu")


@pytest.fixture
def vqgan_folder(tmp_path):
    VQGAN(replace(demo.vq.CONFIG, n_embed=32)).save_pretrained(tmp_path / "vqgan")
    return tmp_path / "vqgan"


def test_a_build_writes_a_checkpoint_that_the_engine_loads_and_goes_on_where_it_stopped(
    tmp_path, vqgan_folder, monkeypatch
):
    chosen = [stage for stage in demo.STAGES if stage.name in ("fp64", "long", "deeper")]
    stages = tuple(replace(stage, targets=(64,), n=12, passes=1) for stage in chosen)
    stages = (*stages[:-1], replace(stages[-1], quantization="int4"))
    configs, run = [], demo.Trainer.run
    monkeypatch.setattr(demo.Trainer, "run", lambda trainer: configs.append(trainer.config) or run(trainer))
    monkeypatch.setattr(demo, "STAGES", stages)
    monkeypatch.setattr(demo, "BATCH_TOKENS", 1024)
    demo.main([str(tmp_path), "--vqgan", str(vqgan_folder)])
    assert [config.quantization for config in configs] == ["", "", "int4"]
    output = tmp_path / stages[-1].name
    engine = Engine.from_pretrained(output, device="cpu")
    n_grown = sum(len(stage.grows) for stage in stages)
    assert engine.model.config.n_layers == demo.MODEL["num_hidden_layers"] + n_grown
    assert engine.default_size == (demo.TARGET_SIZES[0],) * 2
    assert engine.generate_image("a red circle", 64, 64, seed=0, progress=False).images[0].size == (64, 64)
    assert len(Dialogs([tmp_path / "data" / f"{stages[0].name}.safetensors"]).rows) == 12
    written = (output / "model.safetensors").stat().st_mtime_ns
    demo.main([str(tmp_path), "--vqgan", str(vqgan_folder)])
    assert (output / "model.safetensors").stat().st_mtime_ns == written


def test_a_model_that_has_grown_computes_what_it_did(tmp_path, vqgan_folder):
    demo.write_start(tmp_path / "start", vqgan_folder)
    grown = demo.grow(tmp_path / "start", tmp_path / "grown", (2, 4))
    tokens, logits = torch.arange(60).view(2, 30), []
    for folder in (tmp_path / "start", grown):
        config = weights.stored_config(folder)
        model = TrainableModel(config)
        model.load_state_dict(weights.read_state(folder, config))
        logits.append(model(tokens))
        logits[-1].sum().backward()
    assert torch.equal(*logits)
    assert all(
        parameter.grad.any() for name, parameter in model.named_parameters() if name.endswith("down_proj.weight")
    )


def test_codes_that_look_alike_begin_as_tokens_that_are_alike(plain_ops, tmp_path, vqgan_folder):
    vqgan = VQGAN.from_pretrained(vqgan_folder)
    rows = vqgan.quantize.embedding.weight.data
    rows[1] = rows[0] + 1e-3
    vqgan.save_pretrained(vqgan_folder)
    demo.write_start(tmp_path / "start", vqgan_folder)
    engine = Engine.from_pretrained(tmp_path / "start", device="cpu")
    tokens = engine.tokenizer.vocab.image_tokens
    for table in (engine.model.embed, engine.model.lm_head):
        first, alike, other = (table[int(tokens[code])] for code in (0, 1, 2))
        assert (first - alike).norm() < 0.7 * (first - other).norm()


def test_the_tokenizer_has_the_published_names_and_whole_words_of_the_world(tmp_path):
    n = demo.write_tokenizer(tmp_path, n_codes=16)
    tokenizer = Tokenizer.from_file(tmp_path / "tokenizer.json")
    assert tokenizer.vocab.size == n
    text = "a purple triangle left of a ring"
    tokens = tokenizer.encode(text)
    assert tokenizer.decode(tokens) == text
    assert len(tokens) <= 8


def test_the_shipped_model_is_small_and_in_the_published_layout():
    files = {path.name: path.stat().st_size for path in hub.DEMO_FOLDER.iterdir()}
    assert set(files) == {
        "config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "vqgan.json",
        "vqgan.safetensors",
    }  # fmt: skip
    assert sum(files.values()) <= 30e6
    assert json.loads((hub.DEMO_FOLDER / "config.json").read_text())["model_type"] == "chameleon"


def test_the_shipped_model_draws_in_the_colors_that_it_is_told(shipped):
    """A guard against a broken file; how good the model is stands in the README."""
    cases = evaluate.text_to_image_cases(shipped, 24)
    shown = [{thing.color for thing in checker.find_things(image)} for image in evaluate.draw(shipped, cases)]
    told = [{thing.color for thing in case.scene.things} for case in cases]
    assert sum(colors <= found for colors, found in zip(told, shown, strict=True)) >= 20


@pytest.mark.parametrize("background", world.BACKGROUNDS)
def test_the_checker_reads_every_thing_right_through_the_shipped_tokenizer(background):
    """Else a rightly drawn picture counts as wrong: it once took large pink stars for triangles."""
    vqgan = VQGAN.from_pretrained(hub.DEMO_FOLDER)
    kinds = list(product(world.SHAPES, world.COLORS, world.SIZES))
    rng, backdrop = Random(0), world.Scene((), (background,))
    things = [world.place_beside(rng, backdrop, *kind) for kind in kinds]
    pictures = [world.picture(replace(backdrop, things=(thing,)), 80, 80) for thing in things]
    pixels = torch.from_numpy(np.stack([to_pixels(picture) for picture in pictures]))
    with torch.inference_mode():
        drawn = to_uint8(vqgan.decode(vqgan.encode(pixels))).numpy()
    found = [[seen.name for seen in checker.find_things(Image.fromarray(image))] for image in drawn]
    assert found == [[thing.name] for thing in things]
