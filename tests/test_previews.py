"""Previews: the finished rows over gray, decoded beside the steps, never waited for, and their errors told."""

import math
import threading
from concurrent.futures import Future
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from PIL import Image
from test_engine import assert_nothing_is_left

from lumina_rt import ImageRow, Preview, RequestOutput, SamplingParams, previews
from lumina_rt.previews import UNDRAWN, stand_aside
from lumina_rt.unirep import Layout

IMAGE = SamplingParams(num_images=1, size=(64, 160), seed=3)  # 10 rows of 4 codes


@pytest.fixture(autouse=True)
def as_many_as_are_asked_for(monkeypatch):
    monkeypatch.setattr(previews, "SHARE", math.inf)


class AtOnce:
    """In the place of the thread of previews: decodes while it is asked."""

    def __init__(self, *_, **__):
        pass

    def submit(self, call, *args):
        done = Future()
        done.set_result(call(*args))
        return done


class Waiting(AtOnce):
    """Likewise, when it is told to."""

    def __init__(self):
        self.calls = []

    def submit(self, call, *args):
        done = Future()
        self.calls.append(lambda: done.done() or done.set_result(call(*args)))
        return done

    def run(self):
        while self.calls:
            self.calls.pop(0)()


def read(stream):
    """All events of a stream; each preview is waited for before the next step."""
    events = []
    for event in stream:
        events.append(event)
        if stream._request.preview:
            stream._request.preview.exception()
    return events


def test_a_preview_is_the_finished_rows_decoded_over_gray(engine):
    events = read(engine.stream("a dog", IMAGE, preview_every=3))
    shown = [event for event in events if isinstance(event, Preview)]
    assert [(p.sample, p.image, p.rows_done, p.n_rows) for p in shown] == [(0, 0, n, 10) for n in (3, 6, 9)]
    codes = events[-1].answers[0].codes[0]
    for preview in shown:
        pixels, height = np.asarray(preview.picture), 16 * preview.rows_done
        assert pixels.shape == (160, 64, 3)
        assert np.array_equal(pixels[:height], np.asarray(engine.decode_codes(codes[: preview.rows_done])))
        assert (pixels[height:] == UNDRAWN).all()
    assert isinstance(events[-1], RequestOutput)


def test_previews_change_no_token_and_none_come_unasked(engine):
    *_, plain = events = read(engine.stream("a dog", IMAGE))
    assert not any(isinstance(event, Preview) for event in events)
    assert read(engine.stream("a dog", IMAGE, preview_every=1))[-1].token_ids == plain.token_ids


def test_each_image_of_each_answer_has_previews(engine):
    engine.previews._thread = AtOnce()
    params = SamplingParams(num_images=2, size=(64, 64), n=2, seed=1)
    events = engine.stream("a dog", params, preview_every=2)
    shown = [(p.sample, p.image, p.rows_done) for p in events if isinstance(p, Preview)]
    # The last row of an answer asks for none.
    assert sorted(shown) == [(sample, *place) for sample in (0, 1) for place in ((0, 2), (0, 4), (1, 2))]


def test_several_answers_take_turns_where_previews_are_slow(engine):
    asked = []

    class Slow(AtOnce):
        def submit(self, call, *args):
            asked.append(args[1])  # the answer; its preview is ready two rows of codes later
            done = Future()
            engine.previews.pending = lambda: done.done() or done.set_result(call(*args))
            return done

    engine.previews._thread, rows = Slow(), 0
    for event in engine.stream("a dog", SamplingParams(num_images=1, size=(128, 128), n=3, seed=1), preview_every=1):
        rows += isinstance(event, ImageRow)
        if rows % 6 == 5 and engine.previews.pending:
            engine.previews.pending()
            engine.previews.pending = None
    assert asked[:4] == [0, 1, 2, 0]


def test_an_answer_that_writes_text_keeps_no_other_from_its_previews(engine):
    engine.previews._thread, layout = Waiting(), Layout(2, 2)
    writing, drawing = (SimpleNamespace(layout=of, finish_reason=None) for of in (None, layout))
    request = SimpleNamespace(request_id=0, samples=[writing, drawing, drawing], previewed=2, preview=None)
    begun = []
    for sample in (1, 2, 1):
        engine.previews.begin(request, sample, 0, layout, np.zeros((1, 4), np.int64))
        begun.append(request.previewed)
        request.preview = None
    assert begun == [1, 2, 1]


def test_steps_never_wait_for_a_preview_and_what_comes_meanwhile_is_left_out(engine):
    begun, go_on, asked = threading.Event(), threading.Event(), []

    def decode(codes):
        asked.append(len(codes))
        begun.set()
        assert go_on.wait(60)
        return engine.decode_codes(codes)

    engine.previews._decode = decode
    rows, shown = 0, []
    for event in engine.stream("a dog", IMAGE, preview_every=1):
        rows += isinstance(event, ImageRow)
        assert begun.wait(60)
        if isinstance(event, Preview):
            shown.append(event.rows_done)
        if rows == 5 and not go_on.is_set():
            (request,) = engine._requests.values()
            assert asked == [1]
            assert not request.preview.done()
            go_on.set()
            request.preview.result()
    assert rows == 10
    assert shown[0] == 1
    assert 2 not in asked
    assert 4 not in asked


@pytest.fixture
def clock(engine, monkeypatch):
    """A clock that a test turns; a preview takes three seconds."""
    clock = SimpleNamespace(now=0.0)

    def decode(codes):
        clock.now += 3.0
        return Image.new("RGB", (64, 16 * len(codes)))

    monkeypatch.setattr(previews, "time", SimpleNamespace(monotonic=lambda: clock.now))
    monkeypatch.setattr(previews, "SHARE", 0.03)
    engine.previews._decode = decode
    return clock


def test_previews_take_no_more_than_their_share_of_the_time(engine, clock):
    engine.previews._thread, shown = AtOnce(), []
    for event in engine.stream("a dog", IMAGE, preview_every=1):
        clock.now += 25 * isinstance(event, ImageRow)
        shown += [event.rows_done] if isinstance(event, Preview) else []
    assert shown == [1, 5, 9], "three seconds, and none for the hundred after them"


def test_previews_of_several_requests_share_what_they_may_take(engine, clock):
    engine.previews._thread, shown = Waiting(), []

    def note(event):
        clock.now += 10 * isinstance(event, ImageRow)  # two requests: 20 seconds a row
        engine.previews._thread.run()
        shown.extend([event.rows_done] if isinstance(event, Preview) else [])

    engine.generate(["a dog", "a cat"], IMAGE, callback=note, progress=False, preview_every=1)
    # Both ask before the first is decoded: six seconds, and what is left of two hundred.
    assert shown == [1, 1]


def test_a_preview_is_decoded_by_one_thread_and_leaves_the_steps_theirs(engine):
    seen, before = [], torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        engine.previews._decode = lambda codes: seen.append(torch.get_num_threads()) or engine.decode_codes(codes)
        read(engine.stream("a dog", IMAGE, preview_every=9))
        assert (seen, torch.get_num_threads()) == ([1], 2)
    finally:
        torch.set_num_threads(before)


def test_an_image_ends_while_its_preview_is_still_being_decoded(engine):
    go_on = threading.Event()
    engine.previews._decode = lambda codes: go_on.wait(60) and engine.decode_codes(codes)
    seen = []
    engine.generate(["a dog", "a cat"], IMAGE, callback=seen.append, preview_every=1)
    assert not any(isinstance(event, Preview) for event in seen)
    assert_nothing_is_left(engine)
    go_on.set()
    assert any(isinstance(event, Preview) for event in read(engine.stream("a dog", IMAGE, preview_every=9)))


def test_an_error_of_a_preview_ends_its_request_alone(engine):
    def fail(codes):
        raise MemoryError("no memory left for the preview")

    engine.previews._decode = fail
    other = engine.stream("a cat", IMAGE)
    next(other)
    with pytest.raises(MemoryError, match="for the preview"):
        read(engine.stream("a dog", IMAGE, preview_every=1))
    *_, output = other
    assert output.finish_reason == "stop"
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("value", [0, -1, 1.5, True, "4"])
def test_a_bad_preview_every_is_one_line_and_starts_nothing(engine, value):
    with pytest.raises(ValueError, match=rf"^preview_every is {value!r}; expected a whole number of at least 1$"):
        engine.stream("a dog", IMAGE, preview_every=value)
    assert_nothing_is_left(engine)


def test_every_task_takes_preview_every(engine):
    for call in (engine.chat, lambda prompt, **options: engine.generate_image(prompt, 64, 64, **options)):
        with pytest.raises(ValueError, match="preview_every is 0"):
            call("a dog", preview_every=0)


@pytest.mark.parametrize("in_use", [True, False])
def test_the_thread_of_previews_has_a_stream_of_its_own_where_a_gpu_is_in_use(monkeypatch, in_use):
    streams = []
    monkeypatch.setattr(torch.cuda, "is_initialized", lambda: in_use)
    monkeypatch.setattr(torch.cuda, "Stream", object)
    monkeypatch.setattr(torch.cuda, "set_stream", streams.append)
    monkeypatch.setattr(torch, "set_num_threads", lambda n: n)  # this thread is the tests' own
    stand_aside()
    assert len(streams) == in_use
