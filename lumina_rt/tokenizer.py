"""Text to token ids and back, over the `tokenizers` library.

No text, whatever it spells, becomes a control token here: only prompts.py and the grammar place those.
"""

import codecs
from collections.abc import Sequence
from pathlib import Path

import tokenizers

from lumina_rt.vocab import Vocab

# Byte-level BPE writes each byte as one symbol: printable bytes as themselves, the others from U+0100 on.
_PRINTABLE = (*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100))
_OTHERS = (byte for byte in range(256) if byte not in _PRINTABLE)
_BYTES = {chr(byte): byte for byte in _PRINTABLE} | {chr(256 + i): byte for i, byte in enumerate(_OTHERS)}


class Tokenizer:
    """The text tokenizer of a checkpoint, with its vocabulary of names."""

    vocab: Vocab

    def __init__(self, file: tokenizers.Tokenizer):
        # Never truncate or pad on behalf of settings that came with the file.
        file.no_truncation()
        file.no_padding()
        ids = file.get_vocab(with_added_tokens=True)
        added = file.get_added_tokens_decoder()
        self.vocab = Vocab(ids, frozenset(id for id, token in added.items() if token.special))
        absent = [byte for symbol, byte in _BYTES.items() if symbol not in ids]
        if absent:
            raise ValueError(f"no token for {len(absent)} of the 256 bytes, {absent[0]:#04x} among them")
        self._file = file
        self._added = added.keys()
        self._spelled: dict[str, list[int]] = {}

    @classmethod
    def from_file(cls, path: str | Path) -> "Tokenizer":
        """Load a tokenizer.json. Raises ValueError when there is none, or it is not one of this family."""
        path = Path(path)
        if not path.is_file():
            raise ValueError(f"no tokenizer at {path}; expected a tokenizer.json")
        try:
            file = tokenizers.Tokenizer.from_str(path.read_text(encoding="utf-8"))
        except Exception as error:  # the library raises bare Exception
            raise ValueError(f"{path} is not a tokenizer.json: {error}") from error
        try:
            return cls(file)
        except ValueError as error:
            raise ValueError(f"{path}: {error}") from error

    def encode(self, text: str) -> list[int]:
        """Encode ordinary text, without a beginning-of-sequence token.

        A name of a control token in `text` is spelled out in its characters, however the file flags it.
        Raises ValueError for text that is not valid Unicode (lone surrogates).
        """
        try:
            text.encode("utf-8")
        except UnicodeEncodeError as error:
            problem = f"text holds a lone surrogate at character {error.start}; expected valid Unicode"
            raise ValueError(problem) from error
        encoding = self._file.encode(text, add_special_tokens=False)
        ids = []
        for id, (begin, end) in zip(encoding.ids, encoding.offsets, strict=True):
            if id not in self.vocab.control_ids:
                ids.append(id)
                continue
            for character in text[begin:end]:
                ids += self._spell(character)
        return ids

    def _spell(self, character: str) -> list[int]:
        if character not in self._spelled:
            ids = self._file.encode(character, add_special_tokens=False).ids
            if not self.vocab.control_ids.isdisjoint(ids):
                raise ValueError(f"the tokenizer has no ordinary token for {character!r}")
            self._spelled[character] = ids
        return self._spelled[character]

    def decode(self, ids: Sequence[int]) -> str:
        """Decode text. Control tokens and unknown ids are left out; bytes that are no UTF-8 are U+FFFD."""
        return b"".join(map(self._bytes, ids)).decode("utf-8", errors="replace")

    def stream(self) -> "TextStream":
        """A decoder for one answer that comes token by token."""
        return TextStream(self)

    def _bytes(self, id: int) -> bytes:
        name = self._file.id_to_token(int(id))
        if name is None or id in self.vocab.control_ids:
            return b""
        if id in self._added:  # these are kept as plain text, not as symbols of bytes
            return name.encode()
        return bytes(_BYTES[symbol] for symbol in name)


class TextStream:
    """Decodes an answer token by token, and never gives out half a character.

    All that `step` and `finish` return is together what `Tokenizer.decode` makes of all tokens.
    """

    def __init__(self, tokenizer: Tokenizer):
        self._tokenizer = tokenizer
        self._decoder = codecs.getincrementaldecoder("utf-8")(errors="replace")

    def step(self, id: int) -> str:
        """The text that token `id` completes; "" while a character is unfinished, and for control tokens."""
        return self._decoder.decode(self._tokenizer._bytes(id))

    def finish(self) -> str:
        """What is left when the answer ends: U+FFFD for a character that was never finished, or ""."""
        return self._decoder.decode(b"", final=True)
