"""A thousand requests with all that can go wrong at once: every one ends, and nothing of it is left."""

import asyncio
import math
from collections import Counter
from random import Random

import numpy as np
import pytest
from PIL import Image
from test_async import idle

from lumina_rt import Engine, Message, RequestOutput, SamplingParams, previews

N_REQUESTS, N_AT_ONCE = 1000, 24
PICTURE = np.zeros((4, 4), int)
KINDS = [
    ("a dog", SamplingParams(num_images=1, size=(64, 64), seed=1)),
    ("a dog", SamplingParams(num_images=1, size=(64, 64), seed=2, n=3)),
    ("a dog on a hill", SamplingParams(num_images=1, size=(160, 64), seed=3, guidance_scale=1.0)),
    ("a cat " * 12, SamplingParams(num_images=2, size=(64, 64), seed=4)),
    ("hello", SamplingParams(num_images=0, max_tokens=12, seed=5)),
    ("hello there", SamplingParams(max_tokens=20, seed=6, n=2)),
    (Message("user", "make it red", (PICTURE,)), SamplingParams(num_images=1, size=(64, 64), seed=7)),
    (
        [Message("user", "a"), Message("assistant", "b"), Message("user", "c")],
        SamplingParams(num_images=0, max_tokens=5, seed=8),
    ),
]
BAD = [
    ("", {}),
    ("a dog", {"size": (100, 64)}),
    ("a dog <|image|>", {}),
    ("a dog", {"num_images": 500, "size": (64, 64)}),
    ("word " * 900, {}),
    ("a dog", {"n": 40, "num_images": 1}),
    (Message("user", "look", (Image.new("L", (0, 5)),)), {}),
    ("a dog", {"top_p": 2.0}),
    (None, {}),
]


class Injected(RuntimeError):
    """A failure made for the test."""


@pytest.mark.parametrize("speculation", ["off", "auto"])
def test_a_thousand_requests_with_aborts_failures_and_deadlines_leave_nothing(checkpoint, monkeypatch, speculation):
    options = {"page_size": 16, "num_pages": 160, "max_model_len": 512, "max_num_batched_tokens": 96}
    engine = Engine.from_pretrained(checkpoint, device="cpu", speculation=speculation, **options)
    alone = [engine.generate([prompt], params, progress=False)[0] for prompt, params in KINDS]
    monkeypatch.setattr(previews, "SHARE", math.inf)
    injected = Counter()
    rng, ends = Random(0), Counter()  # what is drawn is the same each time; who draws it first is the threads' affair

    def failing(name, call, one_in):
        def wrapped(*args, **kwargs):
            if rng.random() * one_in < 1:
                injected[name] += 1
                raise Injected("a failure that was injected")
            return call(*args, **kwargs)

        return wrapped

    ops = engine.model.ops
    for owner, name, one_in in (
        (ops, "paged_attention", 400),
        (ops, "guided_sample", 200),
        (engine.vqgan, "decode", 15),
        (engine.previews, "_draw", 8),
    ):
        monkeypatch.setattr(owner, name, failing(name, getattr(owner, name), one_in))

    async def read(stream, end):
        async for event in stream:
            if end == "abort" and rng.random() < 0.2:
                engine.abort(stream.request_id)
            if end == "aclose" and rng.random() < 0.2:
                await stream.aclose()
            if end == "cancel" and rng.random() < 0.2:
                asyncio.current_task().cancel()
                await asyncio.sleep(0)  # where it is raised; a stream that has events at hand awaits nothing
            last = event
        return last

    async def request():
        if rng.random() < 0.08:
            prompt, controls = rng.choice(BAD)
            with pytest.raises(ValueError, match=r"expected|needs|nearest|images") as caught:
                engine.stream(prompt, SamplingParams(**controls))
            assert "\n" not in str(caught.value)
            return "refused"
        kind = rng.randrange(len(KINDS))
        prompt, params = KINDS[kind]
        end = rng.choice(["finish"] * 5 + ["abort", "aclose", "cancel", "deadline"])
        seconds = rng.uniform(0, 0.05) if end == "deadline" else 60  # the first is what many never keep
        try:
            stream = engine.stream(prompt, params, preview_every=rng.choice([None, 1, 3]))
            async with asyncio.timeout(seconds):
                last = await read(stream, end)
        except Injected:
            return "failed"
        except TimeoutError:
            assert end == "deadline", "a request hangs"
            return "late"
        except asyncio.CancelledError:
            assert end == "cancel"
            asyncio.current_task().uncancel()
            return "cancelled"
        if not isinstance(last, RequestOutput):
            assert end == "aclose"
            return "closed"
        if "abort" in [answer.finish_reason for answer in last.answers]:
            assert end == "abort"
            return "aborted"
        assert [a.token_ids for a in last.answers] == [a.token_ids for a in alone[kind].answers]
        return "whole"

    async def caller(numbers):
        for _ in numbers:  # one iterator for all callers
            ends[await request()] += 1

    async def main():
        numbers = iter(range(N_REQUESTS))
        await asyncio.gather(*(caller(numbers) for _ in range(N_AT_ONCE)))

    asyncio.run(main())
    monkeypatch.undo()
    idle(engine)
    assert sum(ends.values()) == N_REQUESTS
    assert len(injected) == 4, injected
    expected = {"whole": 300, "refused": 40, "failed": 8, "late": 5, "cancelled": 20, "closed": 20, "aborted": 15}
    assert all(ends[end] >= least for end, least in expected.items()), ends
    again = engine.generate([KINDS[0][0]], KINDS[0][1], progress=False)[0]
    assert np.array_equal(np.asarray(again.images[0]), np.asarray(alone[0].images[0]))
