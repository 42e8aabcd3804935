"""The pictures of docs/: that attention is the model's own, and that a page is written whole."""

from random import Random

import numpy as np
import torch
from lumina_rt.sft import figures
from lumina_rt.sft.model import TrainableModel
from PIL import Image

from lumina_rt import Engine, weights


def test_the_attention_of_the_last_token_is_that_of_the_model(checkpoint):
    """Moving the value of one place moves the output of a layer by the weight of that place."""
    engine = Engine.from_pretrained(checkpoint, device="cpu")
    model = TrainableModel(engine.model.config)
    model.load_state_dict(weights.read_state(checkpoint, engine.model.config))
    model.model.layers = model.model.layers[:1]
    tokens = torch.tensor([[Random(0).randrange(50) for _ in range(9)]])
    weight = figures.attention_of_last(model, tokens)
    assert weight.shape == (9,)
    assert np.isclose(weight.sum(), 1, atol=1e-5)
    layer = model.model.layers[0]
    shift = torch.ones(layer.self_attn.v_proj.out_features)
    inputs = []
    layer.self_attn.o_proj.register_forward_hook(lambda module, given, output: inputs.append(given[0][0, -1]))
    for place in (None, 0, 4, 8):
        moved = torch.zeros(9, 1)
        if place is not None:
            moved[place] = 1
        hook = layer.self_attn.v_proj.register_forward_hook(lambda m, i, out, moved=moved: out + moved * shift)
        model(tokens)
        hook.remove()
    plain, *others = inputs
    for place, other in zip((0, 4, 8), others, strict=True):
        assert np.isclose((other - plain).mean().item(), weight[place], atol=1e-5)


def test_a_page_and_its_pictures_are_written(checkpoint, tmp_path, monkeypatch):
    monkeypatch.setattr(figures, "SWEEPS", {name: values[:2] for name, values in figures.SWEEPS.items()})
    figures.main([str(tmp_path / "docs"), "--model", str(checkpoint), "-n", "6"])
    page = (tmp_path / "docs" / "README.md").read_text()
    for name in ("pictures", "sampling", "guidance", "attention", "acceptance"):
        assert f"{name}.png" in page
        with Image.open(tmp_path / "docs" / f"{name}.png") as image:
            assert min(image.size) > 100
    assert page.count("| --- |") == len(figures.SWEEPS) + 1


def test_acceptance_adds_up_to_the_steps_that_were_saved(checkpoint, tmp_path):
    engine = Engine.from_pretrained(checkpoint, device="cpu", speculation=16)
    fed, commit = [], engine.scheduler.commit
    engine.scheduler.commit = lambda plan, drawn: (fed.append(len(plan)), commit(plan, drawn))[1]
    shares = figures.acceptance(engine, tmp_path / "a.png", 5)
    assert shares.shape == (8, 8)
    assert ((shares >= 0) & (shares <= 1)).all()
    assert shares[0, 0] == 0  # the first is drawn from the prompt
    assert shares.sum() > 0
    assert 5 * shares.sum() == 5 * 64 - sum(fed)  # one code of each step of an image took that step
    assert engine.scheduler.commit is not commit
