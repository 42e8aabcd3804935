"""Dialogs as tokens, their files, and batches that are reproducible and never too large."""

import json
from collections import Counter
from itertools import islice
from random import Random

import numpy as np
import pytest
import torch
from lumina_rt.sft import data, tasks
from lumina_rt.sft.data import IGNORED, Batches, Dialogs, collate, encode_turns
from PIL import Image
from safetensors.numpy import load_file, save_file

from lumina_rt import prompts, unirep
from lumina_rt.images import fit, to_pixels
from lumina_rt.prompts import IMAGE_MARK, Message, encode_conversation
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.unirep import candidate_sizes
from lumina_rt.vqgan import VQGAN

CODES = (np.arange(4).reshape(2, 2), np.arange(8, 16).reshape(2, 4), np.full((4, 2), 7))
START = 900  # stands for <start-of-image> in dialogs that are made by hand


@pytest.fixture(scope="module")
def tokenizer(checkpoint):
    return Tokenizer.from_file(checkpoint / "tokenizer.json")


@pytest.fixture(scope="module")
def vqgan(checkpoint):
    return VQGAN.from_pretrained(checkpoint)


def save(path, rows):
    """Write (tokens, learned) rows as a file of dialogs."""
    tensors = {
        "tokens": np.concatenate([tokens for tokens, _ in rows]).astype(np.int32),
        "learned": np.concatenate([learned for _, learned in rows]).astype(np.uint8),
        "offsets": np.cumsum([0] + [len(tokens) for tokens, _ in rows]),
    }
    save_file(tensors, path)
    return path


def of_lengths(path, lengths):
    """Dialogs whose tokens are their own number."""
    return Dialogs([save(path, [(np.full(n, i), np.ones(n)) for i, n in enumerate(lengths)])])


def test_a_dialog_is_laid_out_as_the_runtime_asks_and_its_answers_are_learned(tokenizer):
    vocab, said = tokenizer.vocab, tokenizer.encode
    turns = (
        Message("user", f"Say {IMAGE_MARK} and {IMAGE_MARK}", (None, None)),
        Message("assistant", "yes"),
        Message("user", "Draw"),
        Message("assistant", IMAGE_MARK, (None,)),
    )
    first, second, third = (unirep.encode(codes, vocab) for codes in CODES)
    end = [vocab.end_of_turn]
    asked = [vocab.bos, *said("Say "), *first, *said(" and "), *second, *said(""), *end]
    answers = [*said("yes"), *end], [*third, *end]
    again = [*said("Draw"), *end]
    tokens, learned = encode_turns(turns, iter(CODES), tokenizer)
    assert tokens == [*asked, *answers[0], *again, *answers[1]]
    expected = [False] * len(asked) + [True] * len(answers[0]) + [False] * len(again) + [True] * len(answers[1])
    assert learned == expected
    assert not learned[0]
    assert learned[-1]


@pytest.mark.parametrize("task", tasks.TASKS)
def test_what_is_trained_begins_with_what_the_runtime_asks(task, tokenizer, vqgan):
    turns = tasks.TASKS[task](Random(5), (64, 64))
    codes = data.encode_images([image for turn in turns for image in turn.images], vqgan)
    tokens, learned = encode_turns(turns, iter(codes), tokenizer)
    encode = dict(zip([id(image) for turn in turns for image in turn.images], codes, strict=True))
    asked = encode_conversation(turns[:-1], tokenizer, lambda image: encode[id(image)])
    assert tokens[: len(asked)] == asked
    assert all(learned[len(asked) :])
    assert learned.count(True) == len(tokens) - len(asked) or len(turns) > 2


def test_images_of_unequal_size_keep_their_order_and_have_the_codes_of_each_alone(vqgan):
    rng = np.random.default_rng(0)
    sizes = [(64, 32), (32, 32), (64, 32), (32, 64), (32, 32), (64, 32)]
    images = [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for w, h in sizes]
    found = data.encode_images(images, vqgan, batch_size=2)
    for image, codes in zip(images, found, strict=True):
        alone = vqgan.encode(torch.from_numpy(to_pixels(image))[None])[0].numpy()
        assert np.array_equal(codes, alone)
        assert codes.shape == (image.height // 16, image.width // 16)


def test_what_was_written_is_read_back_dialog_by_dialog(tokenizer, vqgan, tmp_path, monkeypatch):
    monkeypatch.setattr(data, "CHUNK", 4)  # so that the last chunk is a part of one
    names = ("talk", "segmentation", "editing", "questions", "text_to_image", "talk")
    dialogs = [tasks.TASKS[name](Random(i), (64, 64)) for i, name in enumerate(names)]
    paths = [tmp_path / "first.safetensors", tmp_path / "second.safetensors"]
    data.write(paths[0], iter(dialogs), len(dialogs), tokenizer, vqgan)
    data.write(paths[1], iter(dialogs[:1]), 1, tokenizer, vqgan)
    assert sorted(path.name for path in tmp_path.iterdir()) == [path.name for path in paths]
    read = Dialogs(paths)
    rows = []
    for turns in [*dialogs, dialogs[0]]:
        codes = iter(data.encode_images([image for turn in turns for image in turn.images], vqgan))
        rows.append(encode_turns(turns, codes, tokenizer))
    assert [(tokens.tolist(), learned.tolist()) for tokens, learned in read.rows] == rows
    assert read.lengths.tolist() == [len(tokens) for tokens, _ in rows]
    assert read.largest == max(max(tokens) for tokens, _ in rows)


def test_a_write_that_fails_leaves_the_file_that_was_there(tokenizer, vqgan, tmp_path):
    path = save(tmp_path / "a.safetensors", [(np.arange(3), np.ones(3))])
    before = path.read_bytes()

    def dialogs():
        yield tasks.talk(Random(0), (64, 64))
        raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        data.write(path, dialogs(), 2, tokenizer, vqgan)
    assert path.read_bytes() == before


def test_files_that_are_no_dialogs_are_refused_by_name(tmp_path):
    text, other, none = (tmp_path / f"{name}.safetensors" for name in ("text", "other", "none"))
    text.write_text("no tensors")
    save_file({"tokens": np.zeros(3, dtype=np.int32)}, other)
    good = save(tmp_path / "good.safetensors", [(np.arange(3), np.ones(3))])
    cut = tmp_path / "cut.safetensors"
    cut.write_bytes(good.read_bytes()[:-4])
    for path in (text, none, cut):
        with pytest.raises(ValueError, match=f"{path.name} cannot be read"):
            Dialogs([good, path])
    with pytest.raises(ValueError, match=r"other.safetensors has no learned, offsets; expected a file of tokenised"):
        Dialogs([good, other])


def test_every_dialog_comes_once_an_epoch_and_no_batch_is_too_large(tmp_path):
    lengths = np.random.default_rng(1).integers(1, 90, 700).tolist()
    batches = Batches(of_lengths(tmp_path / "a", lengths), 100, seed=4)
    for number in range(3):
        epoch = batches.epoch(number)
        assert sorted(i for batch in epoch for i in batch) == list(range(700))
        assert all(len(batch) * max(lengths[i] for i in batch) <= 100 for batch in epoch)
        padding = sum(len(batch) * max(lengths[i] for i in batch) for batch in epoch) / sum(lengths) - 1
        assert padding < 0.1  # of similar length
    firsts = [lengths[batch[0]] for batch in batches.epoch(0)]
    assert firsts != sorted(firsts)


def test_the_order_follows_the_seed_and_differs_between_epochs(tmp_path):
    dialogs = of_lengths(tmp_path / "a", [3, 4, 5] * 40)
    orders = [Batches(dialogs, 20, seed).epoch(number) for seed, number in ((1, 0), (1, 0), (1, 1), (2, 0))]
    assert orders[0] == orders[1]
    assert orders[0] != orders[2] != orders[3] != orders[0]


def test_groups_from_a_step_on_are_those_of_a_run_from_the_beginning(tmp_path):
    lengths = np.random.default_rng(1).integers(4, 20, 300).tolist()
    batches = Batches(of_lengths(tmp_path / "a", lengths), 20, seed=4)
    epochs = [batches.epoch(number) for number in range(8)]
    assert len({len(epoch) // 19 for epoch in epochs}) > 1  # of unequal numbers of steps
    assert any(len(epoch) % 19 for epoch in epochs)  # and with batches that fill no group
    expected = [epoch[i : i + 19] for epoch in epochs for i in range(0, len(epoch) - 18, 19)]
    for start in range(40):
        assert list(islice(batches.groups(19, start), 40 - start)) == expected[start:40]


def test_batches_that_cannot_be_made_are_refused(tmp_path):
    dialogs = of_lengths(tmp_path / "a", [3, 21, 5])
    with pytest.raises(ValueError, match="batches hold 20 tokens; the longest dialog has 21"):
        Batches(dialogs, 20, seed=0)
    with pytest.raises(ValueError, match="an epoch has 2 batches; a step needs 3"):
        next(Batches(dialogs, 21, seed=0).groups(3))


def test_a_batch_is_padded_on_the_right_and_labels_are_what_is_learned(tmp_path):
    rows = [(np.array([5, 6, 7]), np.array([0, 0, 1])), (np.array([8, 9, 10, 11, 12]), np.array([0, 1, 1, 0, 1]))]
    dialogs = Dialogs([save(tmp_path / "a", rows)])
    tokens, labels = collate(dialogs, [1, 0], START, 0.0, seed=0)
    assert tokens.tolist() == [[8, 9, 10, 11, 12], [5, 6, 7, 0, 0]]
    assert labels.tolist() == [[IGNORED, 9, 10, IGNORED, 12], [IGNORED, IGNORED, 7, IGNORED, IGNORED]]
    assert tokens.dtype == labels.dtype == torch.int64
    assert IGNORED == -100


def test_a_drop_leaves_the_last_drawn_image_and_what_follows_it(tmp_path):
    shown, drawn = [1, START, 5, 2, START, 6, 3, 4], [0, 0, 0, 0, 1, 1, 1, 1]
    rows = [
        (np.array(shown), np.array(drawn)),
        (np.array([1, START, 5, 2, 3]), np.array([0, 0, 0, 0, 1])),  # an image that is only shown
        (np.array([1, 2, START, 7, 2, START, 8]), np.array([0, 0, 1, 1, 0, 1, 1])),
    ]
    dialogs = Dialogs([save(tmp_path / "a", rows)])
    tokens, labels = collate(dialogs, [0, 1, 2], START, 1.0, seed=0)
    assert tokens.tolist() == [[START, 6, 3, 4, 0], [1, START, 5, 2, 3], [START, 8, 0, 0, 0]]
    assert labels.tolist() == [
        [START, 6, 3, 4, IGNORED],
        [IGNORED, IGNORED, IGNORED, IGNORED, 3],
        [START, 8, IGNORED, IGNORED, IGNORED],
    ]
    assert dialogs.rows[0][0].tolist() == shown


def test_drops_come_as_often_as_asked_and_follow_the_seed(tmp_path):
    rows = [(np.array([1, START, 5]), np.array([0, 1, 1]))] * 2000
    dialogs = Dialogs([save(tmp_path / "a", rows)])
    first, same, other = (collate(dialogs, range(2000), START, 0.1, seed)[0] for seed in (1, 1, 2))
    dropped = (first[:, 0] == START).float().mean()
    assert 0.08 < dropped < 0.12
    assert torch.equal(first, same)
    assert not torch.equal(first, other)
    assert not (collate(dialogs, range(2000), START, 0.0, 1)[0][:, 0] == START).any()


def test_dialogs_come_by_their_share_and_in_the_sizes_of_their_targets():
    shares = {"text_to_image": 3, "talk": 1}
    dialogs = list(data.dialogs_of(shares, (64, 96), 8, 400, "seed"))
    drawn = [turns[-1].images[0].size for turns in dialogs if turns[-1].images]
    assert 0.68 < len(drawn) / len(dialogs) < 0.82
    assert set(drawn) <= {size for target in (64, 96) for size in candidate_sizes(target, patch=16)}
    counts = Counter(drawn)
    assert counts[64, 64] > 50
    assert counts[96, 96] > 50
    assert len(counts) > 20
    again = list(islice(data.dialogs_of(shares, (64, 96), 8, 400, "seed"), 20))
    assert [turns[0].text for turns in again] == [turns[0].text for turns in dialogs[:20]]
    others = list(data.dialogs_of(shares, (64, 96), 8, 20, "other"))
    assert [turns[0].text for turns in others] != [turns[0].text for turns in again]


def test_the_command_writes_the_dialogs_that_it_was_asked_for(checkpoint, tokenizer, tmp_path):
    def run(name, *more):
        path = tmp_path / "deep" / name
        given = ("--model", str(checkpoint), "--tasks", json.dumps({"talk": 1, "describe": 2}), "--targets", "64")
        data.main([str(path), *given, "-n", "6", *more])
        return load_file(path)

    first, same, other = run("a.one"), run("a.two"), run("a.three", "--seed", "1")
    assert len(first["offsets"]) == 7
    assert (first["tokens"][first["offsets"][:-1]] == tokenizer.vocab.bos).all()
    assert (first["tokens"][first["offsets"][1:] - 1] == tokenizer.vocab.end_of_turn).all()
    assert all(np.array_equal(first[name], same[name]) for name in first)
    assert not np.array_equal(first["tokens"], other["tokens"])
    assert len(Dialogs([tmp_path / "deep" / "a.one"]).rows) == 6


def test_dialogs_of_ones_own_are_fitted_to_their_best_size_and_laid_out_as_the_runtime_asks(
    checkpoint, tokenizer, vqgan, tmp_path
):
    rng = np.random.default_rng(0)
    for name, shape in (("wide.png", (50, 130, 3)), ("tall.jpg", (300, 90, 3))):
        Image.fromarray(rng.integers(0, 256, shape, dtype=np.uint8)).save(tmp_path / name)
    lines = [
        {"image": "wide.png", "caption": "a cat"},
        [
            {"role": "user", "content": "What is it?", "images": ["tall.jpg"]},
            {"role": "assistant", "content": "A <s> cat."},
        ],
    ]
    (tmp_path / "own.jsonl").write_text("\n".join(map(json.dumps, lines)))
    path = tmp_path / "own.safetensors"
    given = ("--model", str(checkpoint), "--dialogs", str(tmp_path / "own.jsonl"), "--targets", "64")
    assert data.main([str(path), *given]) == 0
    sizes = candidate_sizes(64, patch=2 * vqgan.config.factor)
    wide, tall = (fit(Image.open(tmp_path / name), sizes) for name in ("wide.png", "tall.jpg"))
    assert wide.width > wide.height
    assert tall.width < tall.height
    turns = (
        (Message("user", prompts.text_to_image("a cat", *wide.size)), Message("assistant", IMAGE_MARK, (wide,))),
        (Message("user", f"{IMAGE_MARK} What is it?", (tall,)), Message("assistant", "A <s> cat.")),
    )
    rows = [
        encode_turns(turn, iter(data.encode_images([image], vqgan)), tokenizer)
        for turn, image in zip(turns, (wide, tall), strict=True)
    ]
    for (tokens, learned), (wanted, targets) in zip(Dialogs([path]).rows, rows, strict=True):
        assert tokens.tolist() == wanted
        assert learned.tolist() == targets


@pytest.mark.parametrize(
    ("line", "message"),
    [
        ('{"image": "a.png"}', "line 1: the keys ['image']; expected image and caption"),
        ('{"image": "a.png", "caption": "a cat"}', "is not a file"),
        ('{"image": "dot.png", "caption": "<|image|>"}', "prompt contains <|image|>"),
        ('[{"role": "user", "content": "a"}]', "line 1: message 1 has the role 'user'; expected 'assistant'"),
        ("[]", "line 1: list; expected image and caption"),
        ("3", "line 1: int; expected"),
        ("{", "line 1: Expecting"),
        ("", "own.jsonl is empty; expected a dialog a line"),
    ],
)
def test_a_line_that_is_no_dialog_is_named_and_nothing_is_written(checkpoint, tmp_path, capsys, line, message):
    Image.new("RGB", (9, 9)).save(tmp_path / "dot.png")
    (tmp_path / "own.jsonl").write_text(line)
    given = ("--model", str(checkpoint), "--dialogs", str(tmp_path / "own.jsonl"), "--targets", "64")
    assert data.main([str(tmp_path / "out" / "a"), *given]) == 1
    error = capsys.readouterr().err
    assert message in error
    assert len(error.splitlines()) == 1
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("tasks", ["[1]", "{}"])
def test_the_command_refuses_shares_that_are_none(checkpoint, tmp_path, tasks):
    with pytest.raises(SystemExit, match="2"):
        data.main([str(tmp_path / "a"), "--model", str(checkpoint), "--tasks", tasks, "--targets", "64", "-n", "6"])


def test_the_command_refuses_a_task_that_there_is_not(checkpoint, tmp_path, capsys):
    given = ("--model", str(checkpoint), "--tasks", '{"juggle": 1}', "--targets", "64", "-n", "6")
    with pytest.raises(SystemExit) as stopped:
        data.main([str(tmp_path / "a"), *given])
    assert stopped.value.code == 2
    assert "unknown task 'juggle'; expected some of text_to_image" in capsys.readouterr().err
    assert not (tmp_path / "a").exists()
