"""Several tokens a step, exactly: guesses of the next codes of an image are fed with it, and kept while they are right.

A draw is argmax(log p + G) with noise G that depends on (seed, image, position, token) alone, so whether a guess is
right is known as soon as its place is drawn: the tokens are those of one draw a step, whatever was guessed (after
Wiggers & Hoogeboom, ICML 2020, arXiv 2002.09928). What is wrong costs nothing but its part of the step; its keys and
values are overwritten. A guess is what the last step drew at its place, behind a past that was guessed itself
(Jacobi decoding), and for places that are new the left neighbour, which a drawn picture repeats most often.
"""

from collections import defaultdict, deque
from statistics import median_low

from lumina_rt.unirep import Layout, Slot

# Draws a step that are tried. Each costs a token of both rows.
WINDOWS = (1, 2, 3, 4, 6, 8, 12, 16, 24, 32, 48, 64)
PROBE = 64  # steps after which the next larger window is tried once


class Guesses:
    """What the codes of one image may be before they are drawn. Indices count from `<start-of-image>`."""

    def __init__(self, layout: Layout, end_of_line: int):
        self.layout, self.end_of_line = layout, end_of_line
        self._later: dict[int, int] = {}  # index -> what was drawn there behind a guessed past

    def draft(self, known: list[int], n_draws: int, n_tokens: int) -> tuple[list[int], list[int]]:
        """Guess what follows `known`, the tokens of the image so far, of which the next is a code.

        Returns (draft, indices): tokens to be fed behind the known ones, at most `n_tokens`, line ends among them,
        and the indices that can then be drawn: at most `n_draws`, the first one len(known).
        """
        tokens, first = list(known), len(known)
        indices = [first]
        while len(indices) < n_draws:
            tokens.append(self._guess(tokens))
            if self.layout.slot(len(tokens)) is Slot.END_OF_LINE:
                tokens.append(self.end_of_line)
            if len(tokens) - first > n_tokens or self.layout.slot(len(tokens)) is not Slot.CODE:
                break
            indices.append(len(tokens))
        return tokens[first : indices[-1]], indices

    def note(self, index: int, code: int) -> None:
        """Remember what was drawn behind a past that turned out wrong."""
        self._later[index] = code

    def _guess(self, known: list[int]) -> int:
        if len(known) in self._later:
            return self._later[len(known)]
        # A row begins below the beginning of the one before.
        return known[-self.layout.columns - 1] if known[-1] == self.end_of_line else known[-1]


def accepted(draft: list[int], indices: list[int], drawn: list[int]) -> int:
    """How many of the draws of a window hold: those whose past was guessed right, the first one always.

    draft, indices: as of `Guesses.draft`.  drawn: a token for each index.
    """
    n = 1
    for index, token in zip(indices[:-1], drawn, strict=False):
        if draft[index - indices[0]] != token:
            break
        n += 1
    return n


class Pace:
    """How many draws to try a step, from what steps have cost and how many draws have held.

    speculation: a number of draws, "off" for one, or "auto" for the number that commits most codes a second here.
    The time of a step is taken to grow with the lines of hidden states that its draws read, one for each draw of each
    row; what is fed beside them, line ends above all, is in their price. Beyond the sizes that were seen it grows by
    the line through the last two; so the next larger window is tried where that promises that it pays, and none beyond
    it. Now and then it is tried in any case: one draw a step tells nothing of guesses, which may hold better in another
    image.
    """

    def __init__(self, speculation: str | int):
        self.speculation = speculation
        self._times: dict[int, deque[float]] = defaultdict(lambda: deque(maxlen=9))  # the last, by lines of a step
        self._seconds: dict[int, float] = {}  # their medians, in ascending order of lines
        # How often draw i of a window held where the one before it did, and how often that was seen; those that were
        # never reached hold as often as the last that was.
        self._rates, self._n_seen = [1.0, 0.5], [0, 0]
        self._n_windows = 0

    def window(self, n_rows: int, n_others: int = 0) -> int:
        """The number of draws for each image of the next step.

        n_rows: rows of the images, a guided one having two.  n_others: rows beside them that write text.
        """
        if self.speculation != "auto":
            return 1 if self.speculation == "off" else self.speculation
        if not n_rows or not self._seconds:
            return 1
        best, best_pace, expected, chance, largest = 1, 0.0, 0.0, 1.0, next(reversed(self._seconds))
        for n_draws in range(1, WINDOWS[-1] + 1):
            chance *= self._rates[min(n_draws, len(self._rates)) - 1]
            expected += chance
            if n_draws in WINDOWS:
                size = _size(n_draws * n_rows + n_others)
                pace = expected / self._predict(size)
                if pace > best_pace:
                    best, best_pace = n_draws, pace
                if size > largest:
                    break
        self._n_windows += 1
        if self._n_windows % PROBE == 0:
            return WINDOWS[min(WINDOWS.index(best) + 1, len(WINDOWS) - 1)]
        return best

    def observe(self, n_lines: int, seconds: float) -> None:
        """Take in what a step took whose draws read so many lines."""
        size = _size(n_lines)
        self._times[size].append(seconds)
        if len(self._times[size]) == 1:
            return  # it may have compiled a kernel; the lower of two tells what a step costs
        is_new = size not in self._seconds
        self._seconds[size] = median_low(self._times[size])
        if is_new:
            self._seconds = dict(sorted(self._seconds.items()))

    def learn(self, n_draws: int, n_held: int) -> None:
        """Take in how many draws of a window held. One draw, which always holds, tells nothing."""
        for i in range(1, min(n_draws, n_held + 1)):
            if i == len(self._rates):
                self._rates.append(self._rates[-1])
                self._n_seen.append(0)
            self._n_seen[i] += 1
            # A mean at first, so that a process has learned it within some steps, then of the last few dozen.
            weight = max(0.03, 1 / (self._n_seen[i] + 1))
            self._rates[i] += weight * ((i < n_held) - self._rates[i])

    def _predict(self, size: int) -> float:
        if size in self._seconds:
            return self._seconds[size]
        smaller = [point for point in self._seconds.items() if point[0] < size]
        larger = [point for point in self._seconds.items() if point[0] > size]
        if not smaller:
            n, seconds = larger[0]
            return seconds * size / n
        (n, seconds), slope = smaller[-1], 0.0
        if others := larger[:1] or smaller[-2:-1]:
            other, seconds_of_other = others[0]
            slope = max(0.0, (seconds_of_other - seconds) / (other - n))
        return seconds + slope * (size - n)


def _size(n_lines: int) -> int:
    """A step's lines, rounded up to one of four numbers between powers of two."""
    step = max(1, 1 << max(0, (n_lines - 1).bit_length() - 3))
    return -(-n_lines // step) * step
