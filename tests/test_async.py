"""The Engine in asyncio: streams share the steps of one thread, and whatever ends one of them leaves nothing behind."""

import asyncio
import threading
import time

import pytest
from test_engine import IMAGE, assert_nothing_is_left

from lumina_rt import ImageRow, Message, RequestOutput, SamplingParams

LONG = SamplingParams(num_images=8, size=(64, 64), seed=5)


@pytest.fixture
def forwards(engine, monkeypatch):
    """The thread of every forward that the engine runs; each takes a millisecond at least."""
    threads, forward = [], engine.model.forward

    def spy(*args):
        threads.append(threading.current_thread())
        time.sleep(0.001)
        return forward(*args)

    monkeypatch.setattr(engine.model, "forward", spy)
    return threads


def idle(engine):
    """Wait until the thread of steps has ended, as it must when nobody awaits anything."""
    end = time.monotonic() + 30
    while engine._is_looping:
        assert time.monotonic() < end, "the thread of steps goes on"
        time.sleep(0.005)
    assert_nothing_is_left(engine)


async def read(stream):
    return [event async for event in stream]


def test_async_for_yields_what_for_yields(engine):
    def told(events):
        return [(type(e), e.row, e.codes.tolist()) if isinstance(e, ImageRow) else e.token_ids for e in events]

    expected = told(engine.stream("a dog", IMAGE))
    assert len(expected) == 5
    assert told(asyncio.run(read(engine.stream("a dog", IMAGE)))) == expected
    idle(engine)


def test_streams_share_the_steps_of_one_thread_and_the_loop_stays_free(engine, forwards):
    alone = [list(engine.stream("a dog", SamplingParams(num_images=1, size=(64, 64), seed=i)))[-1] for i in range(8)]
    n_alone = len(forwards)
    forwards.clear()
    ticks = 0

    async def tick():
        nonlocal ticks
        while True:
            ticks += 1
            await asyncio.sleep(0)

    async def main():
        ticker = asyncio.create_task(tick())
        params = [SamplingParams(num_images=1, size=(64, 64), seed=i) for i in range(8)]
        results = await asyncio.gather(*(read(engine.stream("a dog", p)) for p in params))
        ticker.cancel()
        return results

    together = asyncio.run(main())
    assert [events[-1].token_ids for events in together] == [output.token_ids for output in alone]
    (thread,) = set(forwards)
    assert thread.name == "steps"
    assert len(forwards) < n_alone / 3
    assert ticks > 10
    idle(engine)


def test_streams_of_several_loops_and_of_plain_threads_run_side_by_side(engine):
    (alone,) = engine.generate(["a dog"], LONG, progress=False)
    found = {}

    def plain(i):
        found[i] = engine.generate(["a dog"], LONG, progress=False)[0].token_ids

    def in_loop(i):
        found[i] = asyncio.run(read(engine.stream("a dog", LONG)))[-1].token_ids

    threads = [threading.Thread(target=(plain, in_loop)[i % 2], args=(i,)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert found == dict.fromkeys(range(4), alone.token_ids)
    idle(engine)


@pytest.mark.parametrize("way", ["plain", "asyncio"])
def test_steps_go_on_while_a_picture_is_decoded(engine, monkeypatch, way):
    decode, begun, go_on, waited = engine.vqgan.decode, threading.Event(), threading.Event(), []

    def slow(codes):
        begun.set()
        waited.append(go_on.wait(20))
        return decode(codes)

    monkeypatch.setattr(engine.vqgan, "decode", slow)

    async def main():
        drawing = asyncio.create_task(read(engine.stream("a dog", IMAGE)))
        while not begun.is_set():
            await asyncio.sleep(0.001)
        await read(engine.stream("a cat", SamplingParams(num_images=0, max_tokens=5)))
        go_on.set()
        await drawing

    if way == "asyncio":
        asyncio.run(main())
    else:
        drawing = threading.Thread(target=lambda: list(engine.stream("a dog", IMAGE)))
        drawing.start()
        assert begun.wait(20)
        engine.generate(["a cat"], SamplingParams(num_images=0, max_tokens=5), progress=False)
        go_on.set()
        drawing.join()
    assert waited == [True]
    idle(engine)


def test_a_stream_that_is_dropped_ends_within_a_step(engine, forwards):
    async def main():
        await anext(engine.stream("a cat", LONG))
        n_before = len(forwards)
        while engine._requests:
            await asyncio.sleep(0.001)
        return len(forwards) - n_before

    assert asyncio.run(main()) <= 2
    idle(engine)


@pytest.mark.parametrize("way", ["cancel", "aclose", "timeout", "break", "drop"])
def test_a_stream_that_is_left_ends_within_a_step_and_the_others_go_on(engine, forwards, way):
    async def leave(stream):
        async with asyncio.timeout(0.02 if way == "timeout" else None), stream:
            async for event in stream:
                if way == "break":
                    break
                if way == "aclose":
                    await stream.aclose()
                if way == "cancel" and isinstance(event, ImageRow):
                    asyncio.current_task().cancel()
                if way == "timeout":
                    await asyncio.sleep(60)

    async def main():
        if way == "drop":
            await anext(engine.stream("a cat", LONG))
        else:
            try:
                await leave(engine.stream("a cat", LONG))
            except (asyncio.CancelledError, TimeoutError):
                assert way in ("cancel", "timeout")
                asyncio.current_task().uncancel()
        n_before = len(forwards)
        other = await read(engine.stream("a dog", IMAGE))
        return other[-1].token_ids, len(forwards) - n_before

    tokens, n_steps = asyncio.run(main())
    idle(engine)
    n_all = len(forwards)
    assert tokens == engine.generate(["a dog"], IMAGE, progress=False)[0].token_ids
    # Eight images take 130 steps; the one beside it took its own and at most what ran when the stream was left.
    assert n_all < 100
    assert n_steps <= len(forwards) - n_all + 2


def test_a_reader_is_told_when_another_task_closes_its_stream(engine, monkeypatch):
    go_on, forward = threading.Event(), engine.model.forward
    monkeypatch.setattr(engine.model, "forward", lambda *args: go_on.wait(60) and forward(*args))

    async def main():
        stream = engine.stream("a dog", LONG)
        reader = asyncio.create_task(read(stream))
        await asyncio.sleep(0.02)
        assert not reader.done()
        await stream.aclose()
        assert await asyncio.wait_for(reader, 10) == []  # while the step still runs
        go_on.set()

    asyncio.run(main())
    idle(engine)


def test_a_stream_that_another_thread_closes_ends_for_the_one_that_reads_it(engine, forwards):
    stream, begun, ended = engine.stream("a dog", LONG), threading.Event(), []

    def read_on():
        for _ in stream:
            begun.set()
        ended.append(True)

    reader = threading.Thread(target=read_on)
    reader.start()
    assert begun.wait(30)
    stream.close()
    reader.join(30)
    assert ended == [True]
    assert len(forwards) < 400
    assert_nothing_is_left(engine)


def test_abort_ends_an_awaited_request_with_what_it_has(engine):
    async def main():
        stream = engine.stream("a dog", LONG)
        async for event in stream:
            if isinstance(event, ImageRow) and event.image == 1:
                engine.abort(stream.request_id)
        return event

    output = asyncio.run(main())
    assert isinstance(output, RequestOutput)
    assert output.finish_reason == "abort"
    assert 1 <= len(output.images) < 8
    idle(engine)


class Broken(BaseException):
    """Not an Exception, as an exit of the process is not."""


@pytest.mark.parametrize("kind", [MemoryError, Broken])
def test_a_step_that_fails_is_told_to_all_who_await_it_and_the_next_one_works(engine, monkeypatch, kind):
    def fail(*_):
        raise kind("no memory left for attention")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(engine.model, "forward", fail)
            streams = [engine.stream(prompt, IMAGE) for prompt in ("a dog", "a cat")]
            results = await asyncio.gather(*map(read, streams), return_exceptions=True)
        assert [type(result) for result in results] == [kind, kind]
        return await read(engine.stream("a dog", IMAGE))

    assert asyncio.run(main())[-1].finish_reason == "stop"
    idle(engine)


def test_an_error_outside_of_a_step_is_told_too(engine, monkeypatch):
    def fail(request):
        raise AssertionError("the queue is broken")

    async def main():
        with monkeypatch.context() as patch:
            patch.setattr(engine.scheduler, "add", fail)
            with pytest.raises(AssertionError, match="queue is broken"):
                await asyncio.wait_for(read(engine.stream("a dog", IMAGE)), 10)
        return await read(engine.stream("a dog", IMAGE))

    assert asyncio.run(main())[-1].finish_reason == "stop"
    idle(engine)


def test_a_loop_that_is_closed_on_an_open_stream_ends_its_request(engine):
    stream = engine.stream("a dog", LONG)
    asyncio.run(anext(stream))
    idle(engine)
    assert not stream._is_done  # nobody closed it


def test_a_stream_that_has_ended_stays_so_and_bad_input_is_told_at_once(engine):
    async def main():
        stream = engine.stream([Message("user", "hello")], SamplingParams(num_images=0, max_tokens=3, seed=1))
        await read(stream)
        assert await read(stream) == []
        with pytest.raises(ValueError, match="message 0 is empty"):
            engine.stream("")

    asyncio.run(main())
    idle(engine)
