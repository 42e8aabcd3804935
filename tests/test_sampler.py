"""Which head and which controls hold for each draw of a mixed step."""

from types import SimpleNamespace

import numpy as np
import pytest
import torch
from lumina_rt.kernels import reference

from lumina_rt import Engine, SamplingParams
from lumina_rt.request import Draw, Sample
from lumina_rt.sampler import Pick, Sampler


class RecordingOps(SimpleNamespace):
    """The reference ops, noting what guided_sample is given."""

    def __init__(self):
        super().__init__(calls=[], linear=reference.linear)

    def guided_sample(self, logits, cond, uncond, token_ids, controls, keys):
        self.calls.append(SimpleNamespace(logits=logits, token_ids=token_ids, controls=controls, keys=keys))
        return reference.guided_sample(logits, cond, uncond, token_ids, controls, keys)


@pytest.fixture
def engine(plain_ops, checkpoint):
    engine = Engine.from_pretrained(checkpoint, device="cpu", num_pages=16, page_size=16)
    engine.model.ops = RecordingOps()
    return engine


def sample(engine, n_answer=500, **params):
    return Sample(0, [engine.tokenizer.vocab.bos, 700], SamplingParams(**params), engine.grammar, n_answer)


def draw(engine, *samples):
    """Draw once for each sample from random hidden states, two lines each."""
    hidden = torch.randn(2 * len(samples), engine.model.config.hidden, generator=torch.Generator().manual_seed(0))
    picks = [Pick(s, 7, len(s.tokens), 2 * i, 2 * i + (1 if s.is_guided else 0)) for i, s in enumerate(samples)]
    return Sampler(engine.model, engine.tokenizer.vocab).draw(picks, hidden), hidden


def test_inside_an_image_the_head_is_computed_on_its_codes_alone(engine):
    image = sample(engine, num_images=1, size=(64, 64), top_k=33, top_p=0.9, min_p=0.01, temperature=0.8)
    tokens, hidden = draw(engine, image)
    (call,) = engine.model.ops.calls
    assert call.token_ids.tolist() == sorted(engine.tokenizer.vocab.image_ids.tolist())
    expected = hidden @ engine.model.lm_head[call.token_ids].T
    torch.testing.assert_close(call.logits, expected)
    assert [float(control) for control in call.controls] == pytest.approx([4.0, 0.8, 33, 0.9, 0.01])
    assert [int(key) for key in call.keys] == [7, 0, len(image.tokens)]
    assert tokens[0] in engine.tokenizer.vocab.image_ids


def test_text_has_its_own_controls_and_no_guidance(engine):
    draw(engine, sample(engine, text_top_k=3, text_temperature=0.5, text_top_p=0.7, text_min_p=0.2))
    (call,) = engine.model.ops.calls
    assert [float(control) for control in call.controls] == pytest.approx([1.0, 0.5, 3, 0.7, 0.2])
    assert len(call.token_ids) == engine.model.config.vocab_size


def test_text_may_hold_no_code_size_or_line_end(engine):
    vocab = engine.tokenizer.vocab
    draw(engine, sample(engine))
    allowed = set(np.flatnonzero(engine.model.ops.calls[0].logits[0].isfinite()).tolist())
    assert {vocab.image_start, vocab.end_of_turn} <= allowed
    assert not allowed & set(vocab.text_forbidden.tolist())
    assert not allowed & {vocab.end_of_line, vocab.image_end, vocab.grid_token(2), int(vocab.image_ids[0])}


@pytest.mark.parametrize(("params", "n_answer"), [({"num_images": 0}, 500), ({}, 13), ({"size": (128, 128)}, 75)])
def test_an_image_begins_in_text_only_where_it_is_allowed_and_fits(engine, params, n_answer):
    # The smallest image, 64 x 32, is 14 tokens; 128 x 128 is 76.
    start = engine.tokenizer.vocab.image_start
    plenty = sample(engine, n_answer + 1, **params)
    draw(engine, sample(engine, n_answer, **params), plenty)
    logits = engine.model.ops.calls[0].logits
    assert logits[0, start] == -torch.inf
    assert bool(logits[1, start].isfinite()) == (params.get("num_images") is None)


def test_open_sizes_are_drawn_among_the_legal_ones(engine):
    vocab = engine.tokenizer.vocab
    image = sample(engine, num_images=1)
    assert image.next_draw is Draw.HEIGHT
    heights = {vocab.grid_token(h // 32) for _, h in engine.sizes}
    for seed in range(30):
        fresh = sample(engine, num_images=1)
        hidden = torch.randn(1, engine.model.config.hidden) * 3
        pick = Pick(fresh, seed, len(fresh.tokens), 0, 0)
        sampler = Sampler(engine.model, vocab)
        (height,) = sampler.draw([pick], hidden)
        assert height in heights
        fresh.advance(height)
        (width,) = sampler.draw([pick], hidden)
        assert (vocab.grid_count(width) * 32, vocab.grid_count(height) * 32) in engine.sizes
    assert float(engine.model.ops.calls[0].controls.guidance) == 1.0  # sizes are drawn without guidance


def test_a_mixed_step_draws_what_separate_steps_draw(engine):
    def samples():
        return [sample(engine), sample(engine, num_images=1, size=(64, 64)), sample(engine, num_images=1),
                sample(engine, num_images=1, size=(64, 64), guidance_scale=1.0), sample(engine)]  # fmt: skip

    together, hidden = draw(engine, *samples())
    sampler = Sampler(engine.model, engine.tokenizer.vocab)
    for i, one in enumerate(samples()):
        alone = sampler.draw([Pick(one, 7, len(one.tokens), 0, 1 if one.is_guided else 0)], hidden[2 * i : 2 * i + 2])
        assert alone == [together[i]]


def test_logits_that_are_not_finite_are_an_error(engine):
    hidden = torch.full((1, engine.model.config.hidden), torch.nan)
    with pytest.raises(FloatingPointError, match="not finite"):
        Sampler(engine.model, engine.tokenizer.vocab).draw([Pick(sample(engine), 0, 1, 0, 0)], hidden)
