"""The Engine end to end on a tiny random checkpoint: what comes out, that it reproduces, and that nothing is lost."""

import threading

import numpy as np
import pytest
import torch
from PIL import Image

from lumina_rt import (
    CheckpointError,
    Engine,
    ImageRow,
    Message,
    RequestOutput,
    SamplingParams,
    TextDelta,
    dummy,
    unirep,
)

IMAGE = SamplingParams(num_images=1, size=(64, 64), seed=3)


def pages_in_use(engine):
    return engine.scheduler.pool.num_pages - engine.scheduler.pool.n_free


def assert_nothing_is_left(engine):
    while len(engine.scheduler.prefixes):
        engine.scheduler.prefixes.drop_oldest()
    assert pages_in_use(engine) == 0
    assert not engine.scheduler.running
    assert not engine.scheduler.waiting
    assert not engine._requests


def test_an_image_has_its_size_and_its_tokens_follow_the_layout(engine):
    output = engine.generate_image("a dog", width=64, height=64, num_images_per_prompt=2, seed=7)
    assert [image.size for image in output.images] == [(64, 64)] * 2
    assert output.seed == 7
    for answer in output.answers:
        assert answer.finish_reason == "stop"
        codes = unirep.decode(answer.token_ids, engine.tokenizer.vocab)
        assert np.array_equal(codes, answer.codes[0])
        assert np.array_equal(np.asarray(engine.decode_codes(codes)), np.asarray(answer.images[0]))
    assert not np.array_equal(*[answer.codes[0] for answer in output.answers])
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("size", [(256, 64), (64, 256), (128, 128), (128, 96)])
def test_every_shape_comes_out_as_wide_and_high_as_asked(engine, size):
    assert engine.generate_image("a dog", *size, seed=1, guidance_scale=1).images[0].size == size


def test_the_image_equals_one_made_by_the_plain_loop(engine, checkpoint):
    """The whole Engine against the obvious: two full forwards a token over growing lists, no cache kept, no C++."""
    from lumina_rt.kernels import Controls, NoiseKeys, reference

    from lumina_rt import weights
    from lumina_rt.kv_cache import KVCache
    from lumina_rt.model import Step

    vocab = engine.tokenizer.vocab
    ids = torch.from_numpy(np.sort(vocab.image_ids))
    model = weights.load(checkpoint, reference, ids, 1024, None, "cpu")

    def last_hidden(tokens):
        n, shape = len(tokens), model.config
        cache = KVCache(shape.n_layers, 1, 1024, shape.kv_heads, shape.head_dim, torch.float32, "cpu")
        places = torch.arange(n)
        table, bounds = torch.zeros(1, 1, dtype=torch.int32), torch.tensor([0, n], dtype=torch.int32)
        step = Step(torch.tensor(tokens), places, places, table, bounds, bounds[1:])
        return model.forward(step, cache)[-1:]

    text = "Generate an image of 64x64 according to the following prompt:\na dog"
    image = [vocab.image_start, vocab.grid_token(2), vocab.grid_token(2)]
    prompt = [vocab.bos, *engine.tokenizer.encode(text), vocab.end_of_turn]
    controls = Controls(*(torch.tensor([x]) for x in (4.0, 1.0, 30, 1.0, 0.0)))
    for _ in range(4):
        for _ in range(4):
            hidden = torch.cat((last_hidden(prompt + image), last_hidden(image)))
            keys = NoiseKeys(*(torch.tensor([x]) for x in (7, 0, len(prompt + image))))
            logits = reference.linear(hidden, model.lm_head[ids])
            image.append(
                int(reference.guided_sample(logits, torch.tensor([0]), torch.tensor([1]), ids, controls, keys))
            )
        image.append(vocab.end_of_line)
    image.append(vocab.image_end)
    output = engine.generate_image("a dog", 64, 64, guidance_scale=4.0, seed=7, top_k=30)
    assert output.token_ids == image


def test_text_streams_in_whole_characters_and_adds_up(engine):
    params = SamplingParams(num_images=0, max_tokens=60, seed=2, text_top_k=0)
    *deltas, output = engine.stream("hello", params)
    assert isinstance(output, RequestOutput)
    assert all(isinstance(delta, TextDelta) for delta in deltas)
    assert output.finish_reason in ("stop", "length")
    assert output.text == "".join(delta.text for delta in deltas)
    assert output.answers[0].images == []


def test_rows_of_an_image_are_told_once_each_in_order(engine):
    rows = []
    params = SamplingParams(num_images=2, size=(160, 64), n=2, seed=1)
    (output,) = engine.generate(["x"], params, callback=lambda e: rows.append(e) if isinstance(e, ImageRow) else None)
    for answer in output.answers:
        mine = [row for row in rows if row.sample == answer.index]
        assert [(row.image, row.row) for row in mine] == [(i, r) for i in range(2) for r in range(4)]
        for i in range(2):
            codes = np.stack([row.codes for row in mine if row.image == i])
            assert np.array_equal(codes, answer.codes[i])


def test_several_images_in_one_answer(engine):
    output = engine.multiview("a cup", views=3, size=64, seed=5)
    assert [image.size for image in output.images] == [(64, 64)] * 3
    assert output.text == "<|image|>" * 3
    assert_nothing_is_left(engine)


def test_a_model_left_free_writes_text_and_images_that_decode(plain_ops, engine):
    # A random model seldom begins an image, so it is made to like that token.
    start = engine.tokenizer.vocab.image_start
    engine.model.lm_head[start] = engine.model.image_head.mean(0) + 0.5
    outputs = [engine.chat("draw", max_tokens=300, seed=seed, text_top_k=0, text_temperature=2.0) for seed in range(8)]
    assert any(output.images for output in outputs)
    for output in outputs:
        assert output.text.count("<|image|>") == len(output.images)
        assert all(image.size in engine.sizes for image in output.images)
        assert len(output.token_ids) <= 300
    assert_nothing_is_left(engine)


@pytest.mark.parametrize("task", ["segment", "depth", "normals", "pose"])
def test_labels_have_the_size_of_their_picture(engine, task):
    picture = Image.new("RGB", (200, 100), "red")
    output = getattr(engine, task)(picture, seed=1)
    assert output.images[0].size == (192, 96) or output.images[0].size in engine.input_sizes
    assert output.images[0].width > output.images[0].height


def test_the_other_tasks(engine):
    picture = Image.new("RGB", (64, 64), "blue")
    assert len(engine.edit(picture, "make it green", seed=1).images) == 1
    assert len(engine.detect(picture, "the cup", seed=1).images) == 1
    assert len(engine.from_condition(picture, "a cup", seed=1).images) == 1
    assert engine.describe(picture, max_tokens=5, seed=1).images == []
    assert engine.describe(picture, "What is it? <|image|>", max_tokens=5, seed=1).images == []


def test_a_seed_gives_the_same_image_and_none_gives_another(engine):
    first = engine.generate_image("a dog", 64, 64, seed=7)
    assert engine.generate_image("a dog", 64, 64, seed=7).token_ids == first.token_ids
    assert engine.generate_image("a dog", 64, 64, seed=8).token_ids != first.token_ids
    unseeded = engine.generate_image("a dog", 64, 64)
    assert engine.generate_image("a dog", 64, 64, seed=unseeded.seed).token_ids == unseeded.token_ids


def test_numbers_of_numpy_count_as_numbers(engine):
    plain = engine.generate_image("a dog", 64, 64, seed=7, guidance_scale=3)
    other = engine.generate_image("a dog", np.int64(64), np.int64(64), seed=np.int32(7), guidance_scale=np.float32(3))
    assert other.token_ids == plain.token_ids
    assert type(other.seed) is int


def test_an_image_of_a_seed_does_not_depend_on_how_many_are_asked_for(engine):
    two = engine.generate_image("a dog", 64, 64, num_images_per_prompt=2, seed=7)
    five = engine.generate_image("a dog", 64, 64, num_images_per_prompt=5, seed=7)
    for a, b in zip(two.answers, five.answers, strict=False):
        assert a.token_ids == b.token_ids


def test_a_request_alone_and_among_seven_that_come_and_go_gives_the_same_tokens(checkpoint, engine):
    params = SamplingParams(num_images=1, size=(128, 128), seed=11)
    (alone,) = engine.generate(["a dog on a hill"], params)
    busy = Engine.from_pretrained(
        checkpoint, device="cpu", page_size=32, num_pages=128, max_model_len=1024, max_num_batched_tokens=48
    )
    others = [
        SamplingParams(num_images=1, size=size, seed=i, guidance_scale=scale, n=n)
        for i, (size, scale, n) in enumerate([((64, 64), 4.0, 1), ((160, 64), 1.0, 2), ((64, 160), 2.0, 1)])
    ]
    others += [SamplingParams(num_images=0, max_tokens=20, seed=9), SamplingParams(max_tokens=40, seed=10)]
    streams = [busy.stream(f"other prompt {i}" * (3 * i + 1), other) for i, other in enumerate(others[:3])]
    for stream in streams:
        next(stream)
    streams.append(busy.stream("a dog on a hill", params))
    streams += [busy.stream("late", other) for other in others[3:]]
    events = [next(stream) for stream in streams[3:4]]
    streams[0].close()  # one leaves in the middle
    streams += [busy.stream("later still", others[0]), busy.stream("and one more", others[1])]
    outputs = {}
    for stream in streams[1:]:
        events = list(stream)
        outputs[streams.index(stream)] = events[-1]
    assert outputs[3].token_ids == alone.token_ids
    assert_nothing_is_left(busy)


def test_chunked_prefill_and_page_size_change_no_token(checkpoint):
    tokens = set()
    for options in ({"page_size": 16}, {"page_size": 256}, {"max_num_batched_tokens": 16}):
        engine = Engine.from_pretrained(checkpoint, device="cpu", max_model_len=1024, **options)
        tokens.add(tuple(engine.generate_image("a dog" * 20, 64, 64, seed=7, num_images_per_prompt=2).token_ids))
    assert len(tokens) == 1


def count_fed(engine, monkeypatch):
    fed, forward = [], engine.model.forward
    monkeypatch.setattr(
        engine.model, "forward", lambda step, cache: (fed.append(len(step.tokens)), forward(step, cache))[1]
    )
    return fed


def test_images_of_one_prompt_prefill_it_once_and_share_its_pages(engine, monkeypatch):
    fed = count_fed(engine, monkeypatch)
    stream = engine.stream("word " * 60, SamplingParams(num_images=1, size=(64, 64), n=4, seed=1))
    next(stream)
    (request,) = engine._requests.values()
    n_prompt = request.samples[0].n_prompt
    assert n_prompt > 300
    assert sum(fed[:1]) == n_prompt + 3 + 3
    assert max(fed[1:]) <= 4 * (2 + 3)
    whole_pages = (n_prompt + 2) // 16
    for sample in request.samples[1:]:
        assert sample.cond.pages[:whole_pages] == request.samples[0].cond.pages[:whole_pages]
        assert sample.cond.pages[whole_pages] != request.samples[0].cond.pages[whole_pages]
    stream.close()
    assert_nothing_is_left(engine)


def test_the_next_turn_of_a_dialog_finds_its_past_and_its_own_codes(engine, monkeypatch):
    dialog = [Message("user", "draw a cup " * 10)]
    first = engine.chat(dialog, num_images=1, size=(128, 128), seed=1)
    monkeypatch.setattr(engine.vqgan, "encode", lambda pixels: pytest.fail("a generated image was encoded again"))
    fed = count_fed(engine, monkeypatch)
    dialog += [first.answers[0].message(), Message("user", "now a bigger one")]
    second = engine.chat(dialog, num_images=0, max_tokens=3, seed=1)
    assert second.timings.n_prompt_tokens > 200
    assert fed[0] < 30
    again = Engine(engine.model, engine.tokenizer, engine.vqgan, engine.config, (128, 64))
    monkeypatch.undo()
    assert again.chat(dialog, num_images=0, max_tokens=3, seed=1).token_ids == second.token_ids


def one_line(caught):
    message = str(caught.value)
    assert "\n" not in message
    return message


@pytest.mark.parametrize(
    ("call", "expected"),
    [
        (lambda e: e.generate_image("a", 100, 64), "size 100x64 .* nearest are 64x64"),
        (lambda e: e.generate_image("a", -64, 64), r"size is \(-64, 64\)"),
        (lambda e: e.generate_image("a", 0, 64), r"size is \(0, 64\)"),
        (lambda e: e.generate_image("a", 64.0, 64), r"size is \(64.0, 64\)"),
        (lambda e: e.generate_image(None, 64, 64), "prompt is a NoneType"),
        (lambda e: e.multiview("a", views=0, size=64), "views is 0"),
        (lambda e: e.segment(Image.new("L", (0, 5))), "0x5 pixels; expected at least one"),
        (lambda e: e.segment(None), "image is NoneType"),
        (lambda e: e.segment(np.zeros((64, 64, 3), np.uint8)), r"uint8 of shape \(64, 64, 3\); expected integers"),
        (lambda e: e.segment(np.zeros((3, 4), int)), "3 x 4 latents; expected two even"),
        (lambda e: e.generate_image("", 64, 64), "prompt is ''"),
        (lambda e: e.generate_image("a <|image|>", 64, 64), r"<\|image\|>"),
        (
            lambda e: e.generate_image("word " * 900, 64, 64),
            "tokens; .* max_model_len|left beside the prompt|expected fewer",
        ),
        (lambda e: e.generate_image("a", 64, 64, guidance_scale=float("nan")), "guidance_scale is nan"),
        (lambda e: e.generate_image("a", 64, 64, top_k=-1), "top_k is -1"),
        (lambda e: e.generate_image("a", 64, 64, top_p=1.5), "top_p is 1.5"),
        (lambda e: e.generate_image("a", 64, 64, temperature=-1), "temperature is -1"),
        (lambda e: e.generate_image("a", 64, 64, num_images_per_prompt=0), "n is 0"),
        (lambda e: e.generate_image("a", 64, 64, num_images_per_prompt=33), "66 rows; max_num_seqs is 64"),
        (lambda e: e.generate_image("a", 64, 64, cfg=3), "unknown option 'cfg'"),
        (lambda e: e.generate("a"), "expected a list of conversations"),
        (lambda e: e.generate(["a"], "fast"), "SamplingParams"),
        (lambda e: e.generate(["a", "b"], [IMAGE]), "1 SamplingParams for 2 conversations"),
        (lambda e: e.generate([Message("user", "<|image|>")], IMAGE), r"0 images for 1 <\|image\|> mark"),
        (lambda e: e.describe("/nowhere.png"), "/nowhere.png"),
        (lambda e: e.multiview("a", views=500, size=64), "500 images take"),
    ],
)
def test_bad_input_is_one_clear_line_and_leaves_nothing(engine, call, expected):
    with pytest.raises(ValueError, match=expected) as caught:
        call(engine)
    one_line(caught)
    assert_nothing_is_left(engine)
    assert len(engine.generate_image("fine", 64, 64).images) == 1


def test_one_bad_conversation_among_good_ones_starts_nothing(engine):
    with pytest.raises(ValueError, match="message 0 is empty"):
        engine.generate(["fine", "", "fine"], IMAGE)
    assert_nothing_is_left(engine)


def test_a_request_that_can_never_fit_says_need_and_have(checkpoint):
    engine = Engine.from_pretrained(checkpoint, device="cpu", page_size=16, num_pages=4)
    with pytest.raises(ValueError, match=r"needs \d+ pages of 16 tokens; the pool has 4") as caught:
        engine.generate_image("a", 64, 64)
    one_line(caught)


@pytest.mark.parametrize(
    ("arguments", "expected"),
    [
        ({"page_sice": 16}, "unknown option 'page_sice'"),
        ({"device": "tpu"}, "device is 'tpu'"),
        ({"dtype": "int3"}, "dtype is 'int3'"),
        ({"tokenizer": "/nowhere/tokenizer.json"}, "/nowhere/tokenizer.json"),
        ({"vqgan": "/nowhere"}, "/nowhere"),
        ({"page_size": 24}, "page_size is 24"),
    ],
)
def test_bad_arguments_of_from_pretrained(checkpoint, arguments, expected):
    with pytest.raises(ValueError, match=expected):
        Engine.from_pretrained(checkpoint, **arguments)


@pytest.mark.parametrize("sizes", ["768", [], [128, "64"], {"a": 1}, [0]])
def test_target_sizes_that_are_none_are_told(tmp_path, sizes):
    folder = dummy.write_checkpoint(tmp_path, generation={"target_sizes": sizes})
    with pytest.raises(
        CheckpointError, match=r"target_sizes is .* in generation_config.json; expected a list"
    ) as caught:
        Engine.from_pretrained(folder)
    one_line(caught)


def test_small_files_are_checked_before_the_weights_are_read(tmp_path, monkeypatch):
    folder = dummy.write_checkpoint(tmp_path)
    (folder / "vqgan.safetensors").write_bytes(b"broken")
    monkeypatch.setattr("lumina_rt.weights.load", lambda *_: pytest.fail("the weights were read first"))
    with pytest.raises(CheckpointError, match=r"vqgan\.safetensors"):
        Engine.from_pretrained(folder)


def test_a_tokenizer_with_more_ids_than_the_model_has_rows_is_told(tmp_path):
    folder = dummy.write_checkpoint(tmp_path / "a")
    n_ids = dummy.write_tokenizer(tmp_path, 64, 1001)
    assert n_ids == 1001
    with pytest.raises(CheckpointError, match="1001 ids in the tokenizer, 997 in the model"):
        Engine.from_pretrained(folder, tokenizer=tmp_path / "tokenizer.json")


def test_a_model_that_is_nowhere_is_told():
    with pytest.raises(CheckpointError, match="no such folder"):
        Engine.from_pretrained("no-such-folder")


def test_a_tokenizer_and_vqgan_that_do_not_belong_together_are_told(tmp_path):
    folder = dummy.write_checkpoint(tmp_path / "a")
    other = dummy.write_checkpoint(
        tmp_path / "b", vqgan=dummy.VQGANConfig(**{**vars(dummy.TINY_VQGAN), "n_embed": 128})
    )
    with pytest.raises(CheckpointError, match="128 codes in the VQGAN, 64 in the tokenizer"):
        Engine.from_pretrained(folder, vqgan=other)


def test_leaving_a_stream_returns_its_pages(engine):
    stream = engine.stream("a dog", IMAGE)
    next(stream)
    assert pages_in_use(engine) > 0
    stream.close()
    assert_nothing_is_left(engine)


def test_a_stream_that_is_dropped_unread_returns_its_pages(engine):
    stream = engine.stream("a dog", IMAGE)
    engine.generate(["a cat"], IMAGE)
    assert isinstance(stream.request_id, int)
    del stream
    assert_nothing_is_left(engine)


def test_a_picture_that_cannot_be_decoded_ends_its_request_alone(engine, monkeypatch):
    def fail(codes):
        raise MemoryError("no memory left for the picture")

    with monkeypatch.context() as patch:
        patch.setattr(engine.vqgan, "decode", fail)
        with pytest.raises(MemoryError, match="picture"):
            engine.generate_image("a dog", 64, 64)
    assert_nothing_is_left(engine)
    assert len(engine.generate_image("a dog", 64, 64).images) == 1


def test_abort_ends_a_request_with_what_it_has(engine):
    stream = engine.stream("a dog", SamplingParams(num_images=2, size=(64, 64), seed=1))
    event = next(event for event in stream if event.image == 1)
    assert engine.abort(event.request_id)
    *_, output = stream
    assert output.finish_reason == "abort"
    assert len(output.images) == 1
    assert not engine.abort(event.request_id)
    assert_nothing_is_left(engine)


def test_abort_from_another_thread_ends_a_running_generate(engine):
    started = threading.Event()

    def stop():
        started.wait()
        engine.abort(0)

    thread = threading.Thread(target=stop, daemon=True)
    thread.start()
    params = SamplingParams(num_images=20, size=(64, 64), seed=1)
    (output,) = engine.generate(["a dog"], params, callback=lambda event: started.set())
    thread.join()
    assert output.finish_reason == "abort"
    assert_nothing_is_left(engine)


def test_a_step_that_fails_ends_its_requests_and_the_next_one_works(engine, monkeypatch):
    waiting = engine.stream("another", IMAGE)
    next(waiting)

    def fail(*_):
        raise MemoryError("no memory left for attention")

    with monkeypatch.context() as patch:
        patch.setattr(engine.model, "forward", fail)
        with pytest.raises(MemoryError, match="attention"):
            engine.generate(["a dog"], IMAGE)
    with pytest.raises(MemoryError, match="attention"):
        list(waiting)
    assert_nothing_is_left(engine)
    assert len(engine.generate_image("a dog", 64, 64).images) == 1


def test_a_callback_that_raises_leaves_nothing(engine):
    def fail(event):
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        engine.generate(["a", "b"], IMAGE, callback=fail)
    assert_nothing_is_left(engine)


def test_weights_that_are_not_finite_are_an_error_not_an_image(plain_ops, engine):
    engine.model.layers[0].down[0, 0] = torch.nan
    with pytest.raises(FloatingPointError, match="not finite"):
        engine.generate_image("a", 64, 64)
    assert_nothing_is_left(engine)


def test_threads_that_generate_at_once_share_the_steps(engine):
    alone = engine.generate_image("a dog", 64, 64, seed=0).token_ids
    results = {}

    def work(i):
        results[i] = engine.generate_image("a dog", 64, 64, seed=i % 2).token_ids

    threads = [threading.Thread(target=work, args=(i,)) for i in range(6)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert results[0] == results[2] == results[4] == alone
    assert results[1] == results[3] != alone
    assert_nothing_is_left(engine)


@pytest.mark.parametrize(
    ("dtype", "quantization", "kv_cache_dtype"),
    [("float32", None, None), ("bfloat16", None, None), ("bfloat16", "int8", "int8"), ("float32", "int4", "int8")],
)
def test_an_image_is_the_same_whatever_else_is_in_the_steps(checkpoint, dtype, quantization, kv_cache_dtype):
    engine = Engine.from_pretrained(
        checkpoint, device="cpu", dtype=dtype, quantization=quantization, kv_cache_dtype=kv_cache_dtype, page_size=16,
        num_pages=512,
    )  # fmt: skip
    params = [SamplingParams(num_images=1, size=(64, 64), seed=i, guidance_scale=1 + i % 3) for i in range(9)]
    alone = [engine.generate([f"dog {i}"], p, progress=False)[0].token_ids for i, p in enumerate(params)]
    together = engine.generate([f"dog {i}" for i in range(9)], params, progress=False)
    assert [output.token_ids for output in together] == alone
    assert len({tuple(tokens) for tokens in alone}) == 9


def test_a_quantization_that_is_not_known_is_refused(checkpoint):
    with pytest.raises(ValueError, match="quantization is 'int3'; expected None or one of int8, int4"):
        Engine.from_pretrained(checkpoint, device="cpu", quantization="int3")


def test_keys_and_values_in_int8_take_less_and_draw_nearly_the_same(checkpoint):
    plain, small = (
        Engine.from_pretrained(checkpoint, device="cpu", kv_cache_dtype=kind, page_size=16, num_pages=64)
        for kind in (None, "int8")
    )
    assert small.cache.k.dtype == torch.int8
    shape = plain.model.config
    assert plain.kv_bytes_a_token == 2 * shape.n_layers * shape.kv_heads * 4 * shape.head_dim
    assert small.kv_bytes_a_token == 2 * shape.n_layers * shape.kv_heads * (shape.head_dim + 4)
    drawn = [
        engine.generate_image("a dog", 64, 64, seed=1, temperature=0.1, progress=False).token_ids
        for engine in (plain, small)
    ]
    assert np.mean(np.equal(*drawn)) > 0.5
    with pytest.raises(ValueError, match="kv_cache_dtype is 'int4'; expected 'int8' or None"):
        Engine.from_pretrained(checkpoint, device="cpu", kv_cache_dtype="int4")


def test_a_model_may_name_defaults_of_its_own(tmp_path):
    own = {"temperature": 0.0, "guidance_scale": 2.0}
    folder = dummy.write_checkpoint(tmp_path, generation={"target_sizes": [64], "temperature": 9, "sampling": own})
    engine = Engine.from_pretrained(folder, device="cpu", page_size=16, num_pages=64)
    assert engine.params(top_k=7) == SamplingParams(temperature=0.0, guidance_scale=2.0, top_k=7)
    drawn = [engine.generate_image("a dog", seed=seed, progress=False).token_ids for seed in (1, 2)]
    assert drawn[0] == drawn[1]  # no noise at a temperature of 0
    asked = [engine.generate_image("a dog", seed=i, temperature=1.0, progress=False).token_ids for i in (1, 2)]
    assert asked[0] != asked[1]
    explicit = SamplingParams(num_images=1, size=(64, 64), seed=1, guidance_scale=2.0, temperature=0.0)
    text = "Generate an image of 64x64 according to the following prompt:\na dog"
    assert engine.generate([text], explicit, progress=False)[0].token_ids == drawn[0]


def test_a_model_may_edit_in_its_own_way(tmp_path):
    own = {"sampling": {"temperature": 1.0, "guidance_scale": 3.0}, "editing": {"temperature": 0.0}}
    folder = dummy.write_checkpoint(tmp_path, generation={"target_sizes": [64], **own})
    engine = Engine.from_pretrained(folder, device="cpu", page_size=16, num_pages=64)
    picture = Image.new("RGB", (64, 64), "red")
    drawn = [engine.edit(picture, "Make it blue.", seed=seed, progress=False).token_ids for seed in (1, 2)]
    assert drawn[0] == drawn[1]
    asked = [engine.edit(picture, "Make it blue.", seed=i, temperature=1.0, progress=False).token_ids for i in (1, 2)]
    assert asked[0] != asked[1]
    labels = [engine.depth(picture, seed=seed, progress=False).token_ids for seed in (1, 2)]
    assert labels[0] != labels[1]


@pytest.mark.parametrize("key", ["sampling", "editing"])
@pytest.mark.parametrize("wrong", [{"heat": 1}, {"temperature": -1}, [1]])
def test_wrong_defaults_of_a_model_are_told(tmp_path, key, wrong):
    folder = dummy.write_checkpoint(tmp_path, generation={"target_sizes": [64], key: wrong})
    with pytest.raises(CheckpointError, match=rf"{key} is .* in generation_config.json"):
        Engine.from_pretrained(folder, device="cpu")
