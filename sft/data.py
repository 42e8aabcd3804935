"""Conversations as files of tokens, and batches of similar length from them.

A file holds `tokens` (int32, all conversations in a row), `learned` (uint8, 1 where a token is a target) and `offsets`
(int64, where each conversation begins, and the end of the last), as safetensors.
"""

import argparse
import json
import sys
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from random import Random

import numpy as np
import torch
from lumina_rt.sft.tasks import TASKS, Turns
from safetensors import SafetensorError
from safetensors.numpy import load_file, save_file
from torch import Tensor
from tqdm import tqdm

from lumina_rt import prompts, unirep
from lumina_rt.checkpoint import CheckpointError
from lumina_rt.images import fit, open_image, to_pixels
from lumina_rt.prompts import IMAGE_MARK, Message
from lumina_rt.tokenizer import Tokenizer
from lumina_rt.unirep import candidate_sizes
from lumina_rt.vqgan import VQGAN

IGNORED = -100
CHUNK = 256  # conversations whose images are encoded together


def encode_turns(turns: Turns, codes: Iterator[np.ndarray], tokenizer: Tokenizer) -> tuple[list[int], list[bool]]:
    """Lay out a dialog as `bos q1 end_of_turn a1 end_of_turn ...`, and tell which tokens are learned: the answers.

    codes: of all images of the dialog, in order.
    """
    vocab = tokenizer.vocab
    tokens, learned = [vocab.bos], [False]
    for turn in turns:
        before, *pieces = turn.text.split(IMAGE_MARK)
        new = tokenizer.encode(before)
        for piece in pieces:
            new += unirep.encode(next(codes), vocab) + tokenizer.encode(piece)
        new.append(vocab.end_of_turn)
        tokens += new
        learned += [turn.role == "assistant"] * len(new)
    return tokens, learned


@torch.no_grad()
def encode_images(images: Sequence, vqgan: VQGAN, batch_size: int = 32) -> list[np.ndarray]:
    """The codes of many images, those of equal size together."""
    by_size: dict[tuple[int, int], list[int]] = {}
    for i, image in enumerate(images):
        by_size.setdefault(image.size, []).append(i)
    codes: list[np.ndarray] = [np.empty(0)] * len(images)
    for places in by_size.values():
        for start in range(0, len(places), batch_size):
            part = places[start : start + batch_size]
            pixels = torch.from_numpy(np.stack([to_pixels(images[i]) for i in part]))
            for i, found in zip(part, vqgan.encode(pixels).numpy(), strict=True):
                codes[i] = found
    return codes


def write(path: Path, dialogs: Iterable[Turns], total: int, tokenizer: Tokenizer, vqgan: VQGAN) -> None:
    """Tokenise dialogs into `path`, whole or not at all."""
    rows: list[tuple[list[int], list[bool]]] = []
    with tqdm(total=total, unit="dialog", mininterval=2, desc=path.stem) as bar:
        chunk: list[Turns] = []
        for i, turns in enumerate(dialogs):
            chunk.append(turns)
            if len(chunk) == CHUNK or i == total - 1:
                codes = iter(encode_images([image for t in chunk for turn in t for image in turn.images], vqgan))
                rows += [encode_turns(turns, codes, tokenizer) for turns in chunk]
                bar.update(len(chunk))
                chunk = []
    tensors = {
        "tokens": np.concatenate([np.array(tokens, dtype=np.int32) for tokens, _ in rows]),
        "learned": np.concatenate([np.array(learned, dtype=np.uint8) for _, learned in rows]),
        "offsets": np.cumsum([0] + [len(tokens) for tokens, _ in rows]),
    }
    partial = path.with_suffix(".partial")
    save_file(tensors, partial)
    partial.replace(path)


class Dialogs:
    """Tokenised conversations of one or several files."""

    def __init__(self, paths: Sequence[Path]):
        """Raises ValueError for a file that is none of `write`'s."""
        self.rows: list[tuple[np.ndarray, np.ndarray]] = []
        for path in paths:
            try:
                file = load_file(path)
            except (OSError, SafetensorError) as error:
                raise ValueError(f"{path} cannot be read: {error}") from error
            if missing := {"tokens", "learned", "offsets"} - file.keys():
                raise ValueError(f"{path} has no {', '.join(sorted(missing))}; expected a file of tokenised dialogs")
            cuts = file["offsets"][1:-1]
            parts = np.split(file["tokens"], cuts), np.split(file["learned"].astype(bool), cuts)
            self.rows += zip(*parts, strict=True)
        self.lengths = np.array([len(tokens) for tokens, _ in self.rows])
        self.largest = max(int(tokens.max()) for tokens, _ in self.rows)


class Batches:
    """An endless, reproducible order of batches: lists of conversations of similar length.

    Each epoch shuffles, sorts by length within windows, cuts where the padded batch would pass `max_tokens`, and
    shuffles the batches.
    """

    def __init__(self, dialogs: Dialogs, max_tokens: int, seed: int):
        longest = int(dialogs.lengths.max())
        if longest > max_tokens:
            raise ValueError(f"batches hold {max_tokens} tokens; the longest dialog has {longest}")
        self.dialogs, self.max_tokens, self.seed = dialogs, max_tokens, seed

    def epoch(self, number: int) -> list[list[int]]:
        rng, lengths = np.random.default_rng((self.seed, number)), self.dialogs.lengths
        order = rng.permutation(len(lengths))
        window = 100 * max(1, self.max_tokens // int(lengths.mean()))
        batches: list[list[int]] = []
        for start in range(0, len(order), window):
            part = order[start : start + window]
            batch: list[int] = []
            for i in part[np.argsort(lengths[part], kind="stable")].tolist():
                if batch and lengths[i] * (len(batch) + 1) > self.max_tokens:
                    batches.append(batch)
                    batch = []
                batch.append(i)
            batches.append(batch)
        return [batches[i] for i in rng.permutation(len(batches))]

    def groups(self, size: int, start: int = 0) -> Iterator[list[list[int]]]:
        """Groups of `size` batches, one group a training step, from step `start` on."""
        epoch, step = 0, 0
        while True:
            batches = self.epoch(epoch)
            n_groups = len(batches) // size
            if not n_groups:
                raise ValueError(f"an epoch has {len(batches)} batches; a step needs {size}")
            for i in range(max(0, min(start - step, n_groups)), n_groups):
                yield batches[i * size : (i + 1) * size]
            step, epoch = step + n_groups, epoch + 1


def collate(
    dialogs: Dialogs, batch: list[int], image_start: int, context_drop: float, seed: int
) -> tuple[Tensor, Tensor]:
    """Pad a batch on the right. Returns tokens and labels, int64 [b, n]; labels are IGNORED where nothing is learned.

    With probability `context_drop` all before the last image that is drawn is left out, as guidance's unconditional
    stream begins at `<start-of-image>` (paper, appendix E).
    """
    rng = Random(f"{seed}")
    rows = []
    for i in batch:
        tokens, learned = dialogs.rows[i]
        drawn = np.flatnonzero((tokens == image_start) & learned)
        if rng.random() < context_drop and len(drawn):
            tokens, learned = tokens[drawn[-1] :], learned[drawn[-1] :]
        rows.append((tokens, learned))
    longest = max(len(tokens) for tokens, _ in rows)
    inputs = torch.zeros(len(rows), longest, dtype=torch.int64)
    labels = torch.full_like(inputs, IGNORED)
    for row, (tokens, learned) in enumerate(rows):
        inputs[row, : len(tokens)] = torch.from_numpy(tokens)
        labels[row, : len(tokens)] = torch.from_numpy(np.where(learned, tokens, IGNORED))
    return inputs, labels


def dialogs_of(shares: dict[str, float], targets: Sequence[int], factor: int, n: int, seed: str) -> Iterator[Turns]:
    """Draw `n` dialogs: tasks by their share; of a target drawn for each, every other picture is the square."""
    sizes = [candidate_sizes(target, patch=2 * factor) for target in targets]
    for i in range(n):
        rng = Random(f"{seed} {i}")
        (task,) = rng.choices(list(shares), list(shares.values()))
        target = rng.randrange(len(targets))
        size = (targets[target],) * 2 if rng.random() < 0.5 else rng.choice(sizes[target])
        yield TASKS[task](rng, size)


def read_dialogs(path: Path, sizes: Sequence[tuple[int, int]]) -> Iterator[Turns]:
    """Read dialogs of your own from JSON lines: each a picture with its caption, or turns with the assistant last.

        {"image": "cat.jpg", "caption": "a cat on a red sofa"}
        [{"role": "user", "content": "What is it?", "images": ["cat.jpg"]}, {"role": "assistant", "content": "A cat."}]

    Pictures are files, named from where `path` lies. Each is fitted to the best of `sizes` for it, in pixels, and the
    prompt of a caption tells that size, as the runtime does (paper, sections 2.2.1 and 2.2.2). Raises ValueError,
    naming the line.
    """
    with path.open(encoding="utf-8") as file:
        for number, line in enumerate(file, start=1):
            try:
                yield _dialog(json.loads(line), path.parent, sizes)
            except ValueError as error:
                raise ValueError(f"{path}, line {number}: {error}") from error


def _dialog(value: object, folder: Path, sizes: Sequence[tuple[int, int]]) -> Turns:
    if isinstance(value, dict):
        if value.keys() != {"image", "caption"}:
            raise ValueError(f"the keys {sorted(value)}; expected image and caption, or a list of turns")
        image = fit(open_image(folder / str(value["image"])), sizes)
        asked = Message("user", prompts.text_to_image(value["caption"], *image.size))
        return asked, Message("assistant", IMAGE_MARK, (image,))
    if not isinstance(value, list) or not value:
        raise ValueError(f"{type(value).__name__}; expected image and caption, or a list of turns")
    *turns, _ = prompts.as_conversation([*value, Message("user", "go on")])  # so checked, and ends with an answer
    return tuple(
        replace(turn, images=tuple(fit(open_image(folder / image), sizes) for image in turn.images)) for turn in turns
    )


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(
        prog="python -m lumina_rt.sft.data", description="Tokenise dialogs, your own or of the procedural world."
    )
    parser.add_argument("output", type=Path)
    parser.add_argument("--model", type=Path, required=True, help="a folder with tokenizer.json and vqgan.safetensors")
    source = parser.add_mutually_exclusive_group(required=True)
    source.add_argument("--dialogs", type=Path, metavar="JSONL", help="your own, see `read_dialogs`")
    source.add_argument("--tasks", type=json.loads, help='shares of what is drawn, as {"text_to_image": 3, "talk": 1}')
    parser.add_argument("--targets", type=int, nargs="+", required=True, help="areas of the pictures, by their root")
    parser.add_argument("-n", type=int, help="how many to draw of --tasks")
    parser.add_argument("--seed", default="0")
    args = parser.parse_args(argv)
    if args.tasks is not None:
        if not isinstance(args.tasks, dict) or not args.tasks:
            parser.error(f"--tasks is {json.dumps(args.tasks)}; expected shares by the names of tasks")
        if unknown := args.tasks.keys() - TASKS.keys():
            parser.error(f"unknown task {sorted(unknown)[0]!r}; expected some of {', '.join(TASKS)}")
        if args.n is None or args.n < 1:
            parser.error(f"-n is {args.n}; expected how many dialogs to draw, at least 1")
    try:
        vqgan = VQGAN.from_pretrained(args.model)
        tokenizer = Tokenizer.from_file(args.model / "tokenizer.json")
        factor = vqgan.config.factor
        if args.dialogs:
            sizes = [size for target in args.targets for size in candidate_sizes(target, patch=2 * factor)]
            # Twice: the first reading names a line that is wrong before an hour of encoding.
            n = sum(1 for _ in read_dialogs(args.dialogs, sizes))
            if not n:
                raise ValueError(f"{args.dialogs} is empty; expected a dialog a line")
            dialogs = read_dialogs(args.dialogs, sizes)
        else:
            n, dialogs = args.n, dialogs_of(args.tasks, args.targets, factor, args.n, f"{args.output.stem} {args.seed}")
        args.output.parent.mkdir(parents=True, exist_ok=True)
        write(args.output, dialogs, n, tokenizer, vqgan)
    except (CheckpointError, OSError, ValueError) as error:
        print(f"error: {error}", file=sys.stderr)
        return 1
    return 0


if __name__ == "__main__":
    sys.exit(main())
