"""Requests that fail, end early or do not fit, on a tiny random checkpoint: each is told, and nothing of it is left."""

from collections import deque

import pytest
from test_engine import assert_nothing_is_left
from test_scheduler import Broken

from lumina_rt import Engine, SamplingParams
from lumina_rt.outputs import ImageRow, RequestOutput


@pytest.mark.parametrize("step", [0, 1, 7, 16])
def test_a_failing_model_is_raised_and_leaves_nothing_behind(engine, monkeypatch, step):
    forward, n_steps = engine.model.forward, 0

    def fail(*args):
        nonlocal n_steps
        n_steps += 1
        if n_steps > step:
            raise Broken("no memory")
        return forward(*args)

    params = SamplingParams(num_images=1, size=(64, 64), seed=3, n=2)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail, raising=True)
        with pytest.raises(Broken, match="no memory"):
            engine.generate(["a dog", "a cat"], params, progress=False)
    assert_nothing_is_left(engine)
    outputs = engine.generate(["a dog"], params, progress=False)
    assert [codes.shape for answer in outputs[0].answers for codes in answer.codes] == [(4, 4)] * 2
    assert_nothing_is_left(engine)


def test_logits_that_are_not_finite_are_raised_and_leave_nothing_behind(engine, monkeypatch):
    forward = engine.model.forward
    params = SamplingParams(num_images=1, size=(64, 64), seed=3)
    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", lambda *args: forward(*args) * float("nan"))
        with pytest.raises(FloatingPointError, match="not finite"):
            engine.generate(["a dog"], params, progress=False)
    assert_nothing_is_left(engine)


def test_an_abort_amid_an_image_gives_what_is_finished_and_all_pages_back(engine):
    params = SamplingParams(num_images=2, size=(64, 64), seed=3)
    kinds = []
    for event in engine.stream("two dogs", params):
        kinds.append(type(event))
        if isinstance(event, ImageRow) and (event.image, event.row) == (1, 1):
            assert engine.abort(event.request_id)
            assert not engine.abort(event.request_id)
    assert kinds == [ImageRow] * 6 + [RequestOutput]
    assert event.finish_reason == "abort"
    assert [image.size for image in event.images] == [(64, 64)]
    assert event.text == "<|image|>"
    assert_nothing_is_left(engine)


def test_leaving_a_stream_early_gives_all_pages_back(engine):
    for _ in engine.stream("a dog", SamplingParams(num_images=1, size=(64, 64), seed=3)):
        break
    assert_nothing_is_left(engine)


def test_an_answer_of_no_known_length_takes_what_the_pool_can_give(checkpoint):
    engine = Engine.from_pretrained(checkpoint, device="cpu", page_size=16, num_pages=8, max_model_len=1024)
    n_prompt = 1 + len(engine.tokenizer.encode("hello")) + 1
    for n, guidance in ((1, 1.0), (2, 1.0), (1, 4.0)):
        params = SamplingParams(num_images=0, n=n, guidance_scale=guidance, seed=0)
        (output,) = engine.generate(["hello"], params, progress=False)
        assert all(0 < len(answer.token_ids) <= 8 * 16 // n - n_prompt for answer in output.answers)
    with pytest.raises(ValueError, match="pages of 16 tokens; the pool has 8"):
        engine.generate(["hello " * 100], params, progress=False)
    # What fits as it was asked for stays so, though the largest image would not fit beside it.
    request = engine._submit("hello", SamplingParams(max_tokens=20, seed=0), deque())
    assert [sample.n_end - sample.n_prompt for sample in request.samples] == [20]


def test_an_answer_that_is_finished_leaves_its_places_and_promised_pages_to_others(checkpoint):
    engine = Engine.from_pretrained(checkpoint, device="cpu", page_size=16, num_pages=128, max_num_seqs=4)
    scheduler, text = engine.scheduler, SamplingParams(num_images=0, max_tokens=400, n=4, seed=0)
    first = engine._submit("hello", text, deque())
    while not first.has_forked:
        engine.step()
    for sample in first.samples[1:]:
        sample.finish_reason = "stop"
        scheduler.settle(first, sample)
    assert scheduler.pool.n_free > 60
    second = engine._submit("hello", SamplingParams(num_images=0, max_tokens=4, n=3, seed=0), deque())
    engine.step()
    assert second in scheduler.running
    while engine.step():
        pass
    assert_nothing_is_left(engine)


def test_a_request_that_can_never_fit_is_one_error_and_the_rest_is_not_begun(checkpoint):
    engine = Engine.from_pretrained(checkpoint, device="cpu", page_size=16, num_pages=10, max_model_len=1024)
    params = [SamplingParams(num_images=1, size=size, seed=0) for size in ((64, 64), (128, 128))]
    with pytest.raises(ValueError, match=r"needs 11 pages of 16 tokens; the pool has 10") as caught:
        engine.generate(["a dog", "a dog"], params, progress=False)
    assert "\n" not in str(caught.value)
    assert_nothing_is_left(engine)


def test_an_image_is_the_same_alone_and_in_a_crowded_pool(checkpoint):
    options = {"device": "cpu", "page_size": 16, "max_model_len": 512}
    params = [SamplingParams(num_images=1, size=(64, 64), seed=seed, n=2) for seed in range(4)]
    crowded = Engine.from_pretrained(checkpoint, num_pages=20, max_num_batched_tokens=16, max_num_seqs=5, **options)
    prompts = ["a small dog", "a small dog", "a small cat", "a long story of a small dog"]
    together = crowded.generate(prompts, params, progress=False)
    for prompt, one, output in zip(prompts, params, together, strict=True):
        alone = Engine.from_pretrained(checkpoint, num_pages=64, **options)
        (expected,) = alone.generate([prompt], one, progress=False)
        assert [a.token_ids for a in output.answers] == [a.token_ids for a in expected.answers]
    assert_nothing_is_left(crowded)
