"""The vocabulary: ids by name, and the map between image tokens and VQ codes.

Every id is read from a name. The published image tokens are the ids 4 to 8195, perhaps in the order of their
codes, but nothing here assumes it. Text is not this file's business.
"""

import re
from collections import Counter
from collections.abc import Mapping

import numpy as np

_DIGITS, _LETTERS = "0123456789", "ABCDEFGHIJ"
_IMAGE_NAME = re.compile(r"IMGIMG([A-J]+)Z")
_RESERVED_NAME = re.compile(r"<reserved(\d{5})>", re.ASCII)
_PLACEHOLDER = "<|image|>"  # has an id beyond the embedding table in the published tokenizer
_CONTROL_NAME = re.compile(
    r"IMGIMG[A-J]+Z|<s>|<pad>|</s>|<unk>|<eoss>|<racm3:break>|<reserved\d+>|<sentinel:\d+>|<image>|<\|image\|>"
)

_NAMES = {
    "bos": "<s>",
    "image_start": "<racm3:break>",
    "image_end": "<eoss>",
    "end_of_line": "<reserved08799>",
    "end_of_turn": "<reserved08706>",
}
_GRID_ZERO = 8800  # <reserved08800> stands for 0 grid units, <reserved08801> for 1, and so on
_MAX_ID = 2**24  # far beyond any vocabulary; tables here are as long as the largest id


def image_name(code: int) -> str:
    """The name of the token of a code: its decimal digits as the letters A to J, IMGIMGBCZ for 12."""
    return "IMGIMG" + str(code).translate(str.maketrans(_DIGITS, _LETTERS)) + "Z"


def reserved_name(n: int) -> str:
    """The name of the n-th reserved token."""
    return f"<reserved{n:05d}>"


class Vocab:
    """Ids by name.

    bos, image_start, image_end, end_of_line, end_of_turn: ids.
    size: one more than the largest id of the embedding table, in which `<|image|>` does not count.
    image_ids: int64 [n_codes], the token of each code.  image_tokens: the same, ascending.
    control_ids: every id that text of a user may never become.
    text_forbidden: int64, the control ids below `size` that a text answer may not hold: all but image_start
        and end_of_turn.

    Raises one ValueError with everything that is missing from, or twice in, the names.
    """

    bos: int
    image_start: int
    image_end: int
    end_of_line: int
    end_of_turn: int

    def __init__(self, ids: Mapping[str, int], special: frozenset[int] = frozenset()):
        """ids: name -> id.  special: further ids that the tokenizer's file declares as special."""
        n_codes = sum(_IMAGE_NAME.fullmatch(name) is not None for name in ids)
        problems = _problems(ids, n_codes)
        if problems:
            raise ValueError("this is not a tokenizer of Lumina-mGPT: " + "; ".join(problems))

        for attribute, name in _NAMES.items():
            setattr(self, attribute, ids[name])
        self.size = max(id for name, id in ids.items() if name != _PLACEHOLDER) + 1
        self.image_ids = np.array([ids[image_name(code)] for code in range(n_codes)], dtype=np.int64)
        self.image_ids.setflags(write=False)
        self.image_tokens = np.sort(self.image_ids)
        self._codes = np.full(self.size, -1, dtype=np.int64)
        self._codes[self.image_ids] = np.arange(n_codes)
        reserved = {int(match[1]): ids[name] for name in ids if (match := _RESERVED_NAME.fullmatch(name))}
        self._grid_tokens = {n - _GRID_ZERO: id for n, id in reserved.items() if n > _GRID_ZERO}
        self._grid_counts = {id: n for n, id in self._grid_tokens.items()}
        named = {id for name, id in ids.items() if _CONTROL_NAME.fullmatch(name)}
        self.control_ids = frozenset(special | named)
        forbidden = self.control_ids - {self.image_start, self.end_of_turn}
        self.text_forbidden = np.array(sorted(id for id in forbidden if id < self.size), dtype=np.int64)

    def codes(self, ids: np.ndarray) -> np.ndarray:
        """Map token ids (integers of any shape) to codes: int64, -1 where an id is no image token."""
        ids = np.asarray(ids)
        inside = (ids >= 0) & (ids < self.size)
        return np.where(inside, self._codes[np.where(inside, ids, self.bos)], -1)

    def grid_token(self, n: int) -> int:
        """The size token of `n` grid units. Raises ValueError where there is none, and for 0 units."""
        if n not in self._grid_tokens:
            raise ValueError(f"the vocabulary has no size token for {n} grid units")
        return self._grid_tokens[n]

    def grid_count(self, id: int) -> int:
        """The grid units, 1 or more, that a size token stands for. Raises ValueError for any other token."""
        if id not in self._grid_counts:
            raise ValueError(f"token {id} is not a size token")
        return self._grid_counts[id]


def _problems(ids: Mapping[str, int], n_codes: int) -> list[str]:
    """Everything that makes `ids` unusable, a short phrase each."""
    problems = [f"no token named {name}" for name in _NAMES.values() if name not in ids]
    gaps = [code for code in range(max(n_codes, 1)) if image_name(code) not in ids]
    problems += [f"no image token for code {code} of {n_codes} ({image_name(code)})" for code in gaps[:5]]
    if len(gaps) > 5:
        problems.append(f"nor for {len(gaps) - 5} more codes")
    if reserved_name(_GRID_ZERO + 1) not in ids:
        problems.append(f"no size tokens ({reserved_name(_GRID_ZERO + 1)} and on)")
    wild = [name for name, id in ids.items() if not 0 <= id < _MAX_ID]
    problems += [f"{name} has the id {ids[name]}" for name in wild[:5]]
    shared = [id for id, n in Counter(ids.values()).items() if n > 1]
    for id in shared[:5]:
        problems.append(f"id {id} is shared by " + " and ".join(name for name in ids if ids[name] == id))
    return problems
