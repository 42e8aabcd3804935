"""The events of one request, for a caller that reads them as they come: by `for`, or in asyncio by `async for`."""

import asyncio
import weakref
from collections.abc import AsyncIterator, Callable, Iterator
from typing import TYPE_CHECKING

from lumina_rt.outputs import Event, RequestOutput
from lumina_rt.request import Request

if TYPE_CHECKING:
    from lumina_rt.engine import Engine


def told(event: Event | Callable[[], Event] | BaseException) -> Event:
    """The event: one that is made when it is read is made now, and what ended a request in its place is raised."""
    if isinstance(event, BaseException):
        raise event
    return event() if callable(event) else event


class Stream:
    """The events of one request, as they come: an iterator, plain or of asyncio, that ends after the RequestOutput.

    request_id: what `Engine.abort` takes. Each `next` runs steps until there is an event, and raises what ended the
    request where that was no answer; `anext` raises the same, and waits while a thread steps.
    """

    def __init__(self, engine: "Engine", request: Request):
        self.request_id = request.request_id
        self._engine, self._request = engine, request
        self._is_done = False
        self._loop: asyncio.AbstractEventLoop | None = None  # of the first `anext`

    def __iter__(self) -> Iterator[Event]:
        return self

    def __next__(self) -> Event:
        if self._is_done:
            raise StopIteration
        try:
            return self._note(self._engine._next_event(self._request.events))
        except BaseException:
            self.close()
            raise

    def __aiter__(self) -> AsyncIterator[Event]:
        return self

    async def __anext__(self) -> Event:
        try:
            await self._arrival()
            if self._is_done:
                raise StopAsyncIteration
            event = self._request.events.popleft()
            # What has pictures to decode does so in another thread than that of the loop.
            return self._note(await asyncio.to_thread(told, event) if callable(event) else told(event))
        except BaseException:  # an error, or a task that was cancelled
            self.close()
            raise

    async def _arrival(self) -> None:
        """Wait until there is an event, or the stream is closed."""
        events = self._request.events
        if self._loop is None:
            self._loop, self._ready = asyncio.get_running_loop(), asyncio.Event()
            wake = weakref.WeakMethod(self._wake)  # the request must not keep a stream that was dropped
            self._engine._await(self._request, lambda: (call := wake()) and call())
        while not (events or self._is_done):
            self._ready.clear()
            if not (events or self._is_done):  # nothing came before the flag was down
                await self._ready.wait()

    def _wake(self) -> None:
        try:
            self._loop.call_soon_threadsafe(self._ready.set)
        except RuntimeError:  # the loop was closed: nobody is left to read
            self._engine._leaving.append((self._request, None))

    def _note(self, event: Event) -> Event:
        self._is_done |= isinstance(event, RequestOutput)
        return event

    async def aclose(self) -> None:
        """As `close`, which waits for nothing either."""
        self.close()

    def close(self) -> None:
        """End the request, from any thread; its pages are free at once, or after the step that runs."""
        if not self._is_done:
            self._is_done = True
            self._request.events.append(StopIteration())  # for another thread that waits for the next event
            self._engine._leave([self._request])
            if self._loop:  # another task may wait for the next event
                self._wake()

    def __enter__(self) -> "Stream":
        return self

    def __exit__(self, *_) -> None:
        self.close()

    async def __aenter__(self) -> "Stream":
        return self

    async def __aexit__(self, *_) -> None:
        self.close()

    def __del__(self):
        self.close()
