"""Engine: conversations in, text and images out.

    engine = Engine.from_pretrained("Alpha-VLLM/Lumina-mGPT-7B-768")
    engine.generate_image("a dog in a waterfall", seed=7).images[0].save("dog.png")

It owns the step loop: schedule, one forward, draw, advance. Any thread may call it; steps run one at a time, in
whichever thread waits for an answer, and for callers in asyncio in a thread of the Engine's own. It does not know how
a step is computed: that is the model's op list.
"""

import gc
import itertools
import secrets
import threading
import time
from collections import deque
from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path

import numpy as np
import torch
from PIL import Image
from tqdm import tqdm

from lumina_rt import hub, images, prompts, unirep, weights
from lumina_rt.backend import checked_device, choose_ops
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.generation_config import TARGET_SIZES, sampling_defaults_of, target_sizes_of
from lumina_rt.kv_cache import KVCache, Lease, bytes_a_token
from lumina_rt.model import Model
from lumina_rt.multi_step import MAX_STEPS
from lumina_rt.outputs import Answer, Event, ImageRow, RequestOutput, TextDelta, Timings
from lumina_rt.params import EngineConfig, SamplingParams, checked_int, from_options
from lumina_rt.pictures import Picture, Pictures
from lumina_rt.previews import Previews
from lumina_rt.prompts import IMAGE_MARK, Message
from lumina_rt.request import Draw, Grammar, Request, Sample, answer_length
from lumina_rt.runner import Runner
from lumina_rt.scheduler import Scheduler, Work
from lumina_rt.stream import Stream, told
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.vqgan import VQGAN

Callback = Callable[[Event], None]

# The reference's settings where an image is answered by an image (demo_image2image; fact sheet, section 6.6).
IMAGE_TO_IMAGE = {"guidance_scale": 1.0, "top_k": 200}
_TAKING = threading.Lock()  # held by the one Engine that takes what is free of a GPU, and records its graphs


class Engine:
    """A loaded model. Make one with `Engine.from_pretrained`.

    sizes: the legal (width, height) of images, in pixels.  default_size: what an image gets when none is asked for.
    defaults: the model's own for fields of SamplingParams, where the caller says nothing.
    editing: the model's own for edits, which differ from IMAGE_TO_IMAGE.
    kv_bytes_a_token: what a token of one row takes of the KV cache.
    """

    def __init__(
        self,
        model: Model,
        tokenizer: Tokenizer,
        vqgan: VQGAN,
        config: EngineConfig | None = None,
        target_sizes: Sequence[int] = TARGET_SIZES,
        defaults: Mapping | None = None,
        editing: Mapping | None = None,
    ):
        self.config = (config or EngineConfig()).on(model.embed.device.type)
        self.model, self.tokenizer, self.vqgan, self.defaults = model, tokenizer, vqgan, dict(defaults or {})
        self.editing = dict(editing or {})
        factor = vqgan.config.factor
        candidates = [unirep.candidate_sizes(target, patch=2 * factor) for target in target_sizes]
        self.input_sizes = candidates[0]  # what a picture of the user is fitted to
        self.sizes = tuple(size for group in candidates for size in group)
        self.default_size = (target_sizes[0], target_sizes[0])
        self.grammar = Grammar(tokenizer.vocab, self.sizes, factor)
        shape, page_size = model.config, self.config.page_size
        dtype = torch.int8 if self.config.kv_cache_dtype else model.embed.dtype
        self.kv_bytes_a_token = bytes_a_token(shape.n_layers, shape.kv_heads, shape.head_dim, dtype)
        device = model.embed.device
        is_graphed = device.type == "cuda" and not self.config.enforce_eager
        with _TAKING:
            num_pages = self._num_pages()
            # Padding of a graph writes to a page of its own.
            n_pages = num_pages + is_graphed
            self.cache = KVCache(shape.n_layers, n_pages, page_size, shape.kv_heads, shape.head_dim, dtype, device)
            self.scheduler = Scheduler(self.config, self.cache, num_pages)
            self.runner = Runner(model, tokenizer.vocab, self.cache, page_size)
            if is_graphed:
                self.runner.record(self.config.max_num_seqs, self._blocks_of_the_longest_row())
                self.scheduler.max_steps = MAX_STEPS
        self.pictures = Pictures(vqgan)
        self.previews = Previews(self.decode_codes, factor)
        self._stepping = threading.Lock()  # held by the thread that steps; guards the scheduler and the cache
        self._requests: dict[int, Request] = {}
        # What other threads ask for waits here until the step that runs is over; appending needs no lock.
        self._arriving: deque[Request] = deque()
        self._leaving: deque[tuple[Request, str | None]] = deque()
        self._ids = itertools.count()
        self._awaiting = threading.Lock()  # guards the next
        self._is_looping = False  # whether a thread steps for callers in asyncio

    @classmethod
    def from_pretrained(
        cls,
        model: str | Path = "demo",
        *,
        tokenizer: str | Path | None = None,
        vqgan: str | Path | None = None,
        dtype: str | None = None,
        device: str | None = None,
        quantization: str | None = None,
        **options,
    ) -> "Engine":
        """Load a checkpoint in the published layout.

        model: a folder, a hub id, or "demo".  tokenizer: a tokenizer.json, where the model's folder has none.
        vqgan: the folder or file of vqgan.safetensors, likewise.  dtype: "bfloat16" or "float32"; the
        checkpoint's own by default.  device: "cpu" or "cuda"; a GPU where there is one by default.
        quantization: "int8" or "int4" weights, made while loading; None keeps the checkpoint's.
        options: fields of EngineConfig.

        Raises CheckpointError, a ValueError, with everything that is wrong with the files, and ValueError for
        arguments that name nothing known.
        """
        device, torch_dtype = checked_device(device), _dtype(dtype)
        config = from_options(EngineConfig, options).on(device)
        folder = hub.find_model(model)
        target_sizes, defaults = target_sizes_of(folder), sampling_defaults_of(folder)
        editing = sampling_defaults_of(folder, "editing")
        tokens = Tokenizer.from_file(hub.find_tokenizer(folder, tokenizer))
        # Before the weights, which may take minutes: what is wrong with the small files is told at once.
        image_tokenizer = VQGAN.from_pretrained(hub.find_vqgan(folder, vqgan), device=device)
        image_tokenizer.decode_in(weights.fastest_dtype(device))
        n_codes, n_tokens = image_tokenizer.config.n_embed, len(tokens.vocab.image_ids)
        if n_codes != n_tokens:
            raise CheckpointError(folder, [f"{n_codes} codes in the VQGAN, {n_tokens} in the tokenizer"])
        values = weights.read_json(folder / "config.json")
        head_dim = weights.config_from_json(values, folder).head_dim
        torch_dtype = torch_dtype or weights.stored_dtype(values, folder)
        ops, _ = choose_ops(config, device, torch_dtype, head_dim)
        image_ids, max_len = tokens.vocab.image_tokens, config.max_model_len
        loaded = weights.load(folder, ops, image_ids, max_len, torch_dtype, device, quantization)
        if tokens.vocab.size > loaded.config.vocab_size:
            problem = f"{tokens.vocab.size} ids in the tokenizer, {loaded.config.vocab_size} in the model"
            raise CheckpointError(folder, [problem])
        return cls(loaded, tokens, image_tokenizer, config, target_sizes, defaults, editing)

    def params(self, **controls) -> SamplingParams:
        """SamplingParams of these fields, the others as the model has them. Raises ValueError for an unknown field."""
        return from_options(SamplingParams, {**self.defaults, **controls})

    def generate(
        self,
        conversations: Sequence,
        params: SamplingParams | Sequence[SamplingParams] | None = None,
        *,
        progress: bool = True,
        callback: Callback | None = None,
        preview_every: int | None = None,
    ) -> list[RequestOutput]:
        """Answer every conversation, in order; all of them share the steps.

        conversations: each a str, a Message, or the turns of a dialog (see `prompts.as_conversation`).
        params: one for all, or one each; the model's own by default.  progress: show a bar of image rows, with the
        time left.
        callback: called with every TextDelta, ImageRow, Preview and RequestOutput.
        preview_every: as of `stream`.

        Raises ValueError for bad input, before anything runs. Whatever is raised, nothing stays behind.
        """
        if isinstance(conversations, (str, Message)) or not isinstance(conversations, Sequence):
            found = type(conversations).__name__
            raise ValueError(f"conversations is a {found}; expected a list of conversations")
        if params is None or isinstance(params, SamplingParams):
            params = [params or self.params()] * len(conversations)
        if len(params) != len(conversations):
            raise ValueError(f"{len(params)} SamplingParams for {len(conversations)} conversations; expected one each")
        requests: list[Request] = []
        events: deque = deque()
        try:
            for conversation, request_params in zip(conversations, params, strict=True):
                requests.append(self._submit(conversation, request_params, events, preview_every))
            with _progress_bar(requests, shown=progress) as bar:
                return self._finish(requests, events, bar, callback)
        finally:
            self._leave(requests)

    def stream(self, conversation, params: SamplingParams | None = None, *, preview_every: int | None = None) -> Stream:
        """Answer one conversation event by event: TextDelta, ImageRow, Preview, and last the RequestOutput.

        preview_every: ask for a Preview of an image after so many rows, again and again; None for none. They are
        decoded beside the steps; where one takes longer than its rows, those asked for meanwhile are left out, and so
        are those that would take more than 2 % of the time.

        `for event in stream` runs the steps itself; `async for event in stream` leaves them to a thread, which all
        streams of all event loops share. Dropping or closing the stream early, or cancelling the task that reads it,
        ends the request within a step. A picture of the user is encoded before this returns: a loop that must not
        wait for that calls `await asyncio.to_thread(engine.stream, ...)`.

        Other arguments and errors as `generate`.
        """
        return Stream(self, self._submit(conversation, params or self.params(), deque(), preview_every))

    def abort(self, request_id: int) -> bool:
        """End a request within a step, or within a row of latents where that is run in one go, from any thread.

        What is finished of it comes as its RequestOutput. Returns whether it was still running.
        """
        request = self._requests.get(request_id)
        if request is None:
            return False
        self._leave([request], "abort")
        return True

    def generate_image(
        self,
        prompt: str | Sequence[str],
        width: int | None = None,
        height: int | None = None,
        num_images_per_prompt: int = 1,
        guidance_scale: float | None = None,
        seed: int | None = None,
        *,
        progress: bool = True,
        callback: Callback | None = None,
        preview_every: int | None = None,
        **controls,
    ) -> RequestOutput | list[RequestOutput]:
        """Make images from text.

        prompt: one (one result) or several (a list of results).  width, height: pixels, a legal size; the model's
        own by default, as is the guidance_scale.  controls: further fields of SamplingParams.
        """
        if not isinstance(prompt, (str, list, tuple)):
            raise ValueError(f"prompt is a {type(prompt).__name__}; expected a str, or a list of them")
        size = tuple(
            default if side is None else side for side, default in zip((width, height), self.default_size, strict=True)
        )
        if guidance_scale is not None:
            controls["guidance_scale"] = guidance_scale
        params = self.params(size=size, num_images=1, n=num_images_per_prompt, seed=seed, **controls)
        unirep.check_size(*params.size, self.sizes)
        several = [prompt] if isinstance(prompt, str) else prompt
        texts = [prompts.text_to_image(text, *params.size) for text in several]
        outputs = self.generate(texts, params, progress=progress, callback=callback, preview_every=preview_every)
        return outputs[0] if isinstance(prompt, str) else outputs

    def edit(self, image, instruction: str, **controls) -> RequestOutput:
        """Edit a picture as told."""
        return self._image_to_image(prompts.editing(instruction), image, self.editing | controls)

    def segment(self, image, **controls) -> RequestOutput:
        """Draw the semantic segmentation of a picture."""
        return self._image_to_image(prompts.segmentation(), image, controls)

    def depth(self, image, **controls) -> RequestOutput:
        """Draw the depth map of a picture."""
        return self._image_to_image(prompts.depth(), image, controls)

    def normals(self, image, **controls) -> RequestOutput:
        """Draw the surface normals of a picture."""
        return self._image_to_image(prompts.surface_normal(), image, controls)

    def pose(self, image, **controls) -> RequestOutput:
        """Draw the human poses in a picture."""
        return self._image_to_image(prompts.pose(), image, controls)

    def detect(self, image, object: str, **controls) -> RequestOutput:
        """Draw a box around `object` in a picture."""
        return self._image_to_image(prompts.detection(object), image, controls)

    def from_condition(self, image, caption: str, **controls) -> RequestOutput:
        """Make a picture of `caption` that follows a depth map, segmentation, normal map or pose."""
        return self._image_to_image(prompts.from_condition(caption), image, controls)

    def multiview(self, prompt: str, views: int = 16, size: int | None = None, **controls) -> RequestOutput:
        """Make `views` pictures of one object from all sides, in one answer.

        size: pixels a side (default: the smallest square that the model knows, 384 of the released ones).
        """
        size = min(width for width, height in self.sizes if width == height) if size is None else size
        params = {"num_images": views, "size": (size, size), **controls}
        return self._answer(Message("user", prompts.multiview(prompt, views, size)), params)

    def describe(self, image, question: str | None = None, **controls) -> RequestOutput:
        """Describe a picture in text, or answer a question about it."""
        text = prompts.description() if question is None else question
        return self._answer(Message("user", text, (image,)), {"num_images": 0, **controls})

    def chat(self, messages, **controls) -> RequestOutput:
        """Answer a dialog; `answers[0].message()` is its next turn, whose pages are found again."""
        return self._answer(messages, controls)

    def step(self) -> bool:
        """Run one step of everything in flight; return whether there was anything to run.

        When a step fails, the requests in it are ended, their pages returned, and the error raised to whoever waits
        for them.
        """
        self._stepping.acquire()
        try:
            return self._step()
        finally:
            self._release()

    def _await(self, request: Request, wake: Callable[[], None]) -> None:
        """Have a thread step until this request has ended, and call `wake` at each of its events."""
        with self._awaiting:
            request.wake = wake
            if not self._is_looping:
                threading.Thread(target=self._loop, name="steps", daemon=True).start()
                self._is_looping = True  # only now: where no thread can be had, the next caller tries again

    def _loop(self) -> None:
        while True:
            with self._awaiting:
                awaited = [request for request in tuple(self._requests.values()) if request.wake]
                if not awaited:
                    self._is_looping = False
                    return
            try:
                self.step()
            except BaseException as error:  # what this thread raised nobody would see; who awaits it is told
                for request in awaited:
                    request.tell(error)
                    request.wake = None

    def _step(self) -> bool:
        self._apply()
        plan: list[Work] | None = None
        try:
            plan = self.scheduler.schedule(time.perf_counter())
            if plan:
                begun = time.perf_counter()
                drawn = self.runner.run(plan)
                self.scheduler.observe(plan, time.perf_counter() - begun)
                for work, tokens in zip(plan, self.scheduler.commit(plan, drawn), strict=True):
                    for token in tokens:
                        self._advance(work.request, work.sample, token)
                for request in dict.fromkeys(work.request for work in plan):
                    if self._show_preview(request) and request.is_finished:
                        self._retire(request)
        except BaseException as error:
            affected = self.scheduler.running if plan is None else [work.request for work in plan]
            for request in dict.fromkeys(affected):
                request.tell(error)
                self._forget(request)
            if not isinstance(error, Exception):  # an interrupt is the caller's too
                raise
            return True
        self._apply()
        return bool(plan)

    def _apply(self) -> None:
        """Let requests in and out that came or went since the last step."""
        while self._arriving:
            self.scheduler.add(self._arriving.popleft())
        while self._leaving:
            request, reason = self._leaving.popleft()
            if request.request_id not in self._requests:
                continue
            if reason:
                self._retire(request, reason)
            else:
                self._forget(request)

    def _leave(self, requests: list[Request], reason: str | None = None) -> None:
        """End requests: at once where no step runs, else after the one that does, which is not waited for."""
        self._leaving.extend((request, reason) for request in requests)
        if self._stepping.acquire(blocking=False):
            try:
                self._apply()
            finally:
                self._release()

    def _release(self) -> None:
        self._stepping.release()
        if self._leaving:  # somebody came between the last look and the release
            self._leave([])

    def _submit(self, conversation, params: SamplingParams, events: deque, preview_every: int | None = None) -> Request:
        if not isinstance(params, SamplingParams):
            raise ValueError(f"params is a {type(params).__name__}; expected SamplingParams")
        if preview_every is not None:
            preview_every = checked_int("preview_every", preview_every, 1)
        if params.size:
            unirep.check_size(*params.size, self.sizes)
        prompt = prompts.encode_conversation(conversation, self.tokenizer, self.encode_image)
        room = self.config.max_model_len - len(prompt)
        if room < 1:
            limit = self.config.max_model_len
            raise ValueError(f"the prompt has {len(prompt)} tokens; expected fewer than {limit} (max_model_len)")
        n_answer = answer_length(params, self.grammar, room)
        if params.n > self.config.max_num_seqs:  # told before as many samples are made
            limit = self.config.max_num_seqs
            raise ValueError(f"the request needs at least {params.n} rows; max_num_seqs is {limit}")
        seed = secrets.randbits(32) if params.seed is None else params.seed
        samples = [Sample(i, prompt, params, self.grammar, n_answer) for i in range(params.n)]
        texts = [self.tokenizer.stream() for _ in samples]
        request = Request(next(self._ids), samples, Lease(self.scheduler.pool), seed, texts, events, preview_every)
        if not params.num_images:  # an answer of no known length takes what the pool can give it
            self.scheduler.shorten(request)
        self.scheduler.check(request)
        self._requests[request.request_id] = request
        self._arriving.append(request)
        return request

    def _advance(self, request: Request, sample: Sample, token: int) -> None:
        """Tell a sample what was drawn, and note what it has finished by that."""
        request.prefilled = request.prefilled or time.perf_counter()
        is_text = sample.next_draw is Draw.TEXT
        begun, layout, rows, n_images = sample.image_start, sample.layout, sample.rows_done, len(sample.images)
        sample.advance(token)
        if is_text:
            text = request.texts[sample.index].step(token)
            if sample.finish_reason:  # what is left of a character that was never finished
                text += request.texts[sample.index].finish()
            if text:
                request.tell(TextDelta(request.request_id, sample.index, text))
        if layout and (begun != sample.image_start or sample.rows_done > rows):
            first = begun + 3 + rows * (layout.columns + 1)
            codes = self.tokenizer.vocab.codes(np.array(sample.tokens[first : first + layout.columns]))
            request.tell(ImageRow(request.request_id, sample.index, n_images, rows, layout.rows, codes))
            if request.preview_every and (rows + 1) % request.preview_every == 0 and not sample.finish_reason:
                lines = np.array(sample.tokens[begun + 3 : first + layout.columns + 1]).reshape(rows + 1, -1)
                self.previews.begin(request, sample.index, n_images, layout, self.tokenizer.vocab.codes(lines[:, :-1]))
        self.scheduler.settle(request, sample)

    def _show_preview(self, request: Request) -> bool:
        """Pass a preview on that has become ready. One that failed ends its request; returns whether it goes on."""
        try:
            preview = self.previews.take(request)
        except Exception as error:
            request.tell(error)
            self._forget(request)
            return False
        if preview:
            request.tell(preview)
        return True

    def _retire(self, request: Request, reason: str | None = None) -> None:
        """End a request. Its pages are free at once; who reads its end has its images decoded, and holds up no step."""
        self._forget(request)
        for sample in request.samples:
            sample.finish_reason = sample.finish_reason or reason
        pictures = [[self.pictures.add(codes) for codes in sample.images] for sample in request.samples]
        request.tell(partial(self._output, request, pictures, time.perf_counter()))

    def _output(self, request: Request, pictures: list[list[Picture]], done: float) -> RequestOutput:
        """Make the output of a request that ended at the time `done`, with the pictures of each sample."""
        begun = time.perf_counter()
        answers = [self._read_answer(*pair) for pair in zip(request.samples, pictures, strict=True)]
        vq_s = time.perf_counter() - begun
        admitted = request.admitted or done
        prefilled = request.prefilled or done
        timings = Timings(
            queue_s=admitted - request.arrived,
            prefill_s=prefilled - admitted,
            decode_s=done - prefilled,
            vq_s=vq_s,
            total_s=done - request.arrived + vq_s,
            n_prompt_tokens=request.samples[0].n_prompt,
            n_answer_tokens=sum(len(sample.answer) for sample in request.samples),
            n_steps=request.n_steps,
        )
        return RequestOutput(request.request_id, answers, request.seed, timings)

    def _forget(self, request: Request) -> None:
        self.scheduler.remove(request)
        self._requests.pop(request.request_id, None)
        if request.preview:
            request.preview.cancel()  # one that waits behind others is decoded for nobody

    def _read_answer(self, sample: Sample, pictures: list[Picture]) -> Answer:
        vocab, tokens = self.tokenizer.vocab, sample.answer
        if tokens and tokens[-1] == vocab.end_of_turn:
            tokens = tokens[:-1]
        if sample.image_start is not None:  # an aborted image is no part of the answer
            tokens = tokens[: sample.image_start - sample.n_prompt]
        text, start = "", 0
        while vocab.image_start in tokens[start:]:
            image = tokens.index(vocab.image_start, start)
            text += self.tokenizer.decode(tokens[start:image]) + IMAGE_MARK
            start = tokens.index(vocab.image_end, image) + 1
        text += self.tokenizer.decode(tokens[start:])
        drawn = [self.pictures.read(picture) for picture in pictures]
        return Answer(sample.index, text, drawn, sample.images, tokens, sample.finish_reason)

    def _finish(
        self, requests: list[Request], events: deque, bar: tqdm, callback: Callback | None
    ) -> list[RequestOutput]:
        by_id = {request.request_id: request for request in requests}
        outputs: dict[int, RequestOutput] = {}
        while len(outputs) < len(requests):
            event = self._next_event(events)
            _show(bar, event, by_id[event.request_id])
            if callback:
                callback(event)
            if isinstance(event, RequestOutput):
                outputs[event.request_id] = event
        return [outputs[request.request_id] for request in requests]

    def _next_event(self, events: deque) -> Event:
        """Run steps, or let another thread run them, until there is an event. Raises what ended a request."""
        while not events:
            if not self._stepping.acquire(timeout=0.05):
                continue  # another thread steps, for this one too
            try:
                if not (events or self._step() or events):
                    raise AssertionError("a request waits, and there is nothing to run")
            finally:
                self._release()
        return told(events.popleft())

    def decode_codes(self, codes: np.ndarray) -> Image.Image:
        """Draw the picture that codes stand for. codes: integers [rows, columns]."""
        return self.pictures.draw([codes])[0]

    def encode_image(self, image) -> np.ndarray:
        """The codes of a picture, fitted to the candidate size of nearest shape.

        image: PIL image, path, or bytes of a PNG, JPEG or WEBP.  Returns int64 [rows, columns].
        """
        pixels = images.to_pixels(images.fit(images.open_image(image), self.input_sizes))
        codes = self.vqgan.encode(torch.from_numpy(pixels)[None].to(self.model.embed.device))
        return codes[0].cpu().numpy()

    def _answer(self, conversation, controls: dict) -> RequestOutput:
        known = ("progress", "callback", "preview_every")
        options = {name: controls.pop(name) for name in known if name in controls}
        return self.generate([conversation], self.params(**controls), **options)[0]

    def _image_to_image(self, text: str, image, controls: dict) -> RequestOutput:
        """Answer an image by one of the same size."""
        codes = image if isinstance(image, np.ndarray) else self.encode_image(image)
        question = prompts.as_conversation(Message("user", text, (codes,)))
        size = unirep.Layout(*codes.shape).size(self.grammar.factor)
        defaults = {"num_images": 1, "size": size, **IMAGE_TO_IMAGE}
        return self._answer(question, defaults | controls)

    def _num_pages(self) -> int:
        """Pages of the pool. Raises ValueError, naming need and have, where a GPU has no memory for them."""
        config, longest = self.config, self._blocks_of_the_longest_row()
        page_bytes, enough = config.page_size * self.kv_bytes_a_token, config.max_num_seqs * longest
        if self.model.embed.device.type == "cpu":
            return config.num_pages or max(1, min(int(config.kv_cache_gib * 2**30) // page_bytes, enough))
        gc.collect()  # an Engine that was dropped is held by its own previews until then
        torch.cuda.empty_cache()  # what loading took is free again
        free, total = torch.cuda.mem_get_info(self.model.embed.device)
        have = int(free - (1 - config.gpu_memory_utilization) * total) - page_bytes  # a page for what graphs pad
        needed = config.num_pages or longest
        if needed * page_bytes > have:
            what = "num_pages" if config.num_pages else f"max_model_len ({config.max_model_len} tokens)"
            need, left, size = (f"{n / 2**30:.1f}" for n in (needed * page_bytes, max(have, 0), total))
            raise ValueError(
                f"{what} takes {need} GiB of KV cache; {left} are left of the GPU's {size} "
                f"(gpu_memory_utilization is {config.gpu_memory_utilization})"
            )
        return config.num_pages or min(have // page_bytes, enough)

    def _blocks_of_the_longest_row(self) -> int:
        return -(-self.config.max_model_len // self.config.page_size)


def _dtype(name: str | None) -> torch.dtype | None:
    if name is not None and name not in weights.DTYPES:
        raise ValueError(f"dtype is {name!r}; expected one of {', '.join(weights.DTYPES)}")
    return weights.DTYPES.get(name)


def _progress_bar(requests: Iterable[Request], shown: bool) -> tqdm:
    """A bar of image rows; images whose size the model chooses are added when they begin."""
    params = [sample.params for request in requests for sample in request.samples]
    total = 0
    for request in requests:
        for sample in request.samples:
            if sample.layout and sample.params.num_images:
                total += sample.params.num_images * sample.layout.rows
    hidden = not shown or all(p.num_images == 0 for p in params)
    # disable=None hides the bar where nobody watches (no terminal).
    return tqdm(total=total, unit="row", disable=True if hidden else None, leave=False)


def _show(bar: tqdm, event: Event, request: Request) -> None:
    if not isinstance(event, ImageRow):
        return
    params = request.samples[event.sample].params
    if event.row == 0 and not (params.size and params.num_images):
        bar.total += event.n_rows
    bar.update(1)
