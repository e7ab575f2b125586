"""Tokenizers: text to token ids and back, as a stream whose tokens do not depend on how the bytes arrive.

| kind  | definition | a token is fixed when the text is known to | tokenising may start anew at |
|---|---|---|---|
| world | RWKV World vocabulary, greedy longest match | token start + 128 bytes | a token end |
| bytes | one token a byte | token end | a token end |
| bpe   | byte-level BPE behind OWN_PATTERN | pre-token start + 128 bytes | a pre-token start |
| neox  | other `tokenizer.json`, id 0 is `<|endoftext|>` | piece start + 64 KiB | a piece start |
| json  | other `tokenizer.json` | piece start + 64 KiB | a piece start |

For the first three the stream's tokens equal those of the whole text. For the last a document's tokens are defined as
those of its pieces, joined: a piece ends at the last edge from white space to a word within 64 KiB, else after 64 KiB
on a character edge. Special tokens stand for no text: their literal text is encoded as plain text, and they decode to
nothing. This module never reads files of text and knows no model; `find` gives the tokenizer that belongs to one.
"""

from __future__ import annotations

import ast
import codecs
import functools
import hashlib
import json
import re
from abc import ABC, abstractmethod
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import zip_longest
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from rwkv_stream.errors import InputError, TokenizerError
from rwkv_stream.text.utf8 import n_whole

if TYPE_CHECKING:
    from numpy.typing import NDArray
    from tokenizers import Encoding
    from tokenizers import Tokenizer as Library

# Every alternative depends on at most 27 characters from its start, all of them together match any character, and none
# looks back: so a pre-token is fixed 128 bytes after its start, and tokenising may start anew at each.
OWN_PATTERN = (
    r"'(?:[sdmt]|ll|ve|re)| ?[\p{L}\p{M}]{1,24}| ?\p{N}{1,3}| ?[^\s\p{L}\p{M}\p{N}]{1,16}"
    r"|[\r\n]{1,8}|[^\S\r\n]{1,16}(?!\S)|\s"
)
OWN_LOOKAHEAD_BYTES = 128
WORLD_LOOKAHEAD_BYTES = 128  # the longest World token
PIECE_BYTES = 65_536
STEP_BYTES = 4096  # new bytes that are worth a call of the encoder

# The token fed before a document, and those that end a generated text, by kind of tokenizer.
START_TOKEN: dict[str, int | None] = {"world": 0, "bytes": None, "bpe": 0, "neox": 0, "json": None}
END_TOKENS: dict[str, tuple[int, ...]] = {"world": (0,), "bytes": (), "bpe": (0,), "neox": (0,), "json": ()}

WORLD_SIZE = 65_536
WORLD_FILE = "rwkv_vocab_v20230424.txt"  # the vocabulary as its author gives it, in the package pyrwkv_tokenizer
PILE_SIZES = range(50_254, 50_433)  # 50,277 ids, the last 23 of them runs of spaces; rows up to a multiple of 128
PILE_FILE = "20B_tokenizer.json"
PILE_SOURCE = "github.com/BlinkDL/ChatRWKV, or tokenizer.json of huggingface.co/EleutherAI/gpt-neox-20b"
_WORLD_CLASS = re.compile(r"RWKVWorldTokenizer|Rwkv\d?Tokenizer")  # in Hugging Face folders

_SPACE_TO_WORD = re.compile(r".*\s(?=\S)", re.DOTALL)


@dataclass(frozen=True, slots=True, eq=False)
class TokenBlock:
    """n tokens in a row; all arrays [n].

    ids            int32
    ends           int64, byte offset in the document where the token ends; it starts where the one before it ends
    decided        int64, bytes of text that fix the token and all before it; -1 where only the end of the text did
    anchor_bytes   int64, last place at or before the token's end where tokenising may start anew …
    anchor_tokens  int64, … and how many tokens of the document precede that place
    """

    ids: NDArray[np.int32]
    ends: NDArray[np.int64]
    decided: NDArray[np.int64]
    anchor_bytes: NDArray[np.int64]
    anchor_tokens: NDArray[np.int64]

    def __len__(self) -> int:
        return len(self.ids)

    def __getitem__(self, part: slice) -> TokenBlock:
        return TokenBlock(
            self.ids[part], self.ends[part], self.decided[part], self.anchor_bytes[part], self.anchor_tokens[part]
        )

    def _moved(self, byte: int, token: int) -> TokenBlock:
        """The same tokens `byte` bytes and `token` tokens further on in the document."""
        decided = np.where(self.decided < 0, -1, self.decided + byte)
        return TokenBlock(self.ids, self.ends + byte, decided, self.anchor_bytes + byte, self.anchor_tokens + token)


class Tokenizer(ABC):
    """kind: see the module; id: enters the model's fingerprint; vocab_size: one more than the largest id."""

    kind: str
    id: str
    vocab_size: int

    @property
    def start_token(self) -> int | None:
        return START_TOKEN[self.kind]

    @property
    def end_tokens(self) -> tuple[int, ...]:
        return END_TOKENS[self.kind]

    def encode(self, text: str) -> list[int]:
        """The ids that `stream` gives for the whole text."""
        try:
            data = text.encode()
        except UnicodeEncodeError as error:
            raise InputError(
                f"encoding text: expected Unicode characters, found the lone surrogate {text[error.start]!r} "
                f"at character {error.start}; pass valid UTF-8"
            ) from error
        return [i for block in self.stream([data]) for i in block.ids.tolist()]

    def encode_prompt(self, text: str) -> list[int]:
        """The ids of a text that the model is to go on from, as its kind was trained to see the end of one."""
        return self.encode(text)

    @abstractmethod
    def decode(self, ids: Iterable[int]) -> bytes:
        """The bytes that the tokens stand for; ids that stand for no text give none."""

    def stream(
        self, pieces: Iterable[bytes], *, byte: int = 0, token: int = 0, pauses: bool = False
    ) -> Iterator[TokenBlock]:
        """Tokens of a text that arrives in pieces, however cut; O(64 KiB) of it is held.

        pieces       the text from an anchor on: together valid UTF-8 (any bytes for kind bytes)
        byte, token  that anchor: its byte offset and the number of tokens before it
        pauses       an empty piece is a pause: what is fixed by then is given, and then a block of no tokens
        """
        held = bytearray()
        n_new = 0
        for piece in pieces:
            is_pause = pauses and not piece
            for start in range(0, len(piece) or is_pause, STEP_BYTES):
                part = piece[start : start + STEP_BYTES]
                held += part
                n_new += len(part)
                if n_new < STEP_BYTES and not is_pause:
                    continue
                n_new = 0
                block, n_used = self._fixed(held, is_end=False)
                if len(block):
                    yield block._moved(byte, token)
                del held[:n_used]
                byte, token = byte + n_used, token + len(block)
            if is_pause:
                yield block[:0]
        while held:
            block, n_used = self._fixed(held, is_end=True)
            if len(block):
                yield block._moved(byte, token)
            del held[:n_used]
            byte, token = byte + n_used, token + len(block)

    @abstractmethod
    def _fixed(self, text: bytearray, is_end: bool) -> tuple[TokenBlock, int]:
        """The tokens at the start of `text`, an anchor, that are fixed, up to another anchor; the bytes they take."""


def _nothing() -> tuple[TokenBlock, int]:
    none = np.zeros(0, np.int64)
    return TokenBlock(none.astype(np.int32), none, none, none, none), 0


class _World(Tokenizer):
    kind = "world"
    vocab_size = WORLD_SIZE  # embedding rows; ids 0 and from 65530 on stand for no text

    def __init__(self) -> None:
        from ahocorasick_rs import BytesAhoCorasick, Implementation, MatchKind

        lines = _lines((resources.files("pyrwkv_tokenizer") / WORLD_FILE).read_bytes())
        # Each line is: id, Python literal of a str or bytes (which may hold spaces), length in bytes.
        fields = [(line[: line.index(b" ")], line[line.index(b" ") + 1 : line.rindex(b" ")]) for line in lines]
        literals = ast.literal_eval(f"[{','.join(literal.decode() for _, literal in fields)}]")  # one parse: fast
        values = [value.encode() if isinstance(value, str) else value for value in literals]
        ids = [int(token_id) for token_id, _ in fields]
        self._bytes = [b""] * self.vocab_size
        for token_id, value in zip(ids, values, strict=True):
            self._bytes[token_id] = value
        self._ids = np.array(ids, np.int32)
        # Every byte is a token, so each match begins where the one before ends: greedy. This form takes 8 MB.
        kind, form = MatchKind.LeftmostLongest, Implementation.ContiguousNFA
        self._matches = BytesAhoCorasick(values, matchkind=kind, implementation=form).find_matches_as_indexes
        self.id = _world_id(lines)

    @property
    def literals(self) -> list[str]:
        """The tokens from id 1 on as bytes literals without `b` and quotes, which is how others write them."""
        return [repr(value)[2:-1] for value in self._bytes[1:65_530]]

    def decode(self, ids: Iterable[int]) -> bytes:
        return _joined(self._bytes, ids)

    def _fixed(self, text: bytearray, is_end: bool) -> tuple[TokenBlock, int]:
        found = np.array(self._matches(bytes(text)), np.int64).reshape(-1, 3)
        ids, starts, ends = self._ids[found[:, 0]], found[:, 1], found[:, 2]
        decided = starts + WORLD_LOOKAHEAD_BYTES
        if is_end:
            decided[decided > len(text)] = -1
        else:
            n = np.searchsorted(decided, len(text), side="right")
            if not n:
                return _nothing()
            ids, ends, decided = ids[:n], ends[:n], decided[:n]
        return TokenBlock(ids, ends, decided, ends, np.arange(1, len(ids) + 1)), int(ends[-1])


class _RawBytes(Tokenizer):
    kind = id = "bytes"
    vocab_size = 256

    def decode(self, ids: Iterable[int]) -> bytes:
        return bytes(i for i in ids if 0 <= i < 256)

    def _fixed(self, text: bytearray, is_end: bool) -> tuple[TokenBlock, int]:
        ends = np.arange(1, len(text) + 1, dtype=np.int64)
        return TokenBlock(np.frombuffer(bytes(text), np.uint8).astype(np.int32), ends, ends, ends, ends), len(text)


class _FromFile(Tokenizer):
    """What the two kinds of `tokenizer.json` share."""

    def __init__(self, definition: dict[str, Any], library: Library) -> None:
        library.no_truncation()
        library.no_padding()
        library.encode_special_tokens = True  # the literal text of a special token is plain text
        library.post_processor = None  # which takes the white space before a word out of its offsets
        self._library = library
        vocabulary: dict[str, int] = library.get_vocab(with_added_tokens=True)
        self.vocab_size = max(vocabulary.values(), default=-1) + 1
        self._bytes = _byte_level(definition, vocabulary)

    def _encoding(self, text: bytes) -> Encoding:
        return self._library.encode(text.decode(), add_special_tokens=False)

    def decode(self, ids: Iterable[int]) -> bytes:
        if self._bytes is not None:
            return _joined(self._bytes, ids)
        known = [int(i) for i in ids if 0 <= i < self.vocab_size]
        return str(self._library.decode(known, skip_special_tokens=True)).encode()


class _OwnBPE(_FromFile):
    kind = "bpe"

    def __init__(self, definition: dict[str, Any], library: Library) -> None:
        super().__init__(definition, library)
        assert self._bytes is not None
        if missing := 256 - len({value for value in self._bytes if len(value) == 1}):
            raise TokenizerError(f"expected a token for each of the 256 bytes, found {missing} missing")
        vocabulary, merges = definition["model"]["vocab"], definition["model"]["merges"]
        tokens = sorted(vocabulary, key=vocabulary.__getitem__)
        pairs = [pair if isinstance(pair, str) else " ".join(pair) for pair in merges]  # both spellings are in use
        special = sorted(token["content"] for token in definition["added_tokens"])
        self.id = f"bpe:{_digest([OWN_PATTERN, tokens, [vocabulary[t] for t in tokens], pairs, special])}"
        self._lengths = np.array([len(value) for value in self._bytes], np.int64)

    def _fixed(self, text: bytearray, is_end: bool) -> tuple[TokenBlock, int]:
        n = len(text) if is_end else n_whole(text)
        encoding = self._encoding(bytes(text[:n]))
        ids = np.array(encoding.ids, np.int32)
        words = np.array(encoding.word_ids, np.int64)  # one number for each pre-token
        ends = np.cumsum(self._lengths[ids])
        firsts = np.flatnonzero(np.diff(words, prepend=-1))  # the first token of each pre-token
        starts = ends[firsts] - self._lengths[ids[firsts]]
        decided = starts + OWN_LOOKAHEAD_BYTES
        n_used = n
        if is_end:
            decided[decided > n] = -1
        else:
            n_fixed = int(np.searchsorted(decided, n, side="right"))
            if n_fixed == 0:
                return _nothing()
            if n_fixed < len(firsts):
                n_used, ids, ends = int(starts[n_fixed]), ids[: firsts[n_fixed]], ends[: firsts[n_fixed]]
            firsts, starts, decided = firsts[:n_fixed], starts[:n_fixed], decided[:n_fixed]
        counts = np.diff(firsts, append=len(ids))
        decided, starts, firsts = (np.repeat(array, counts) for array in (decided, starts, firsts))
        return TokenBlock(ids, ends, decided, starts, firsts), n_used


class _TokenizerJson(_FromFile):
    def __init__(self, definition: dict[str, Any], library: Library) -> None:
        super().__init__(definition, library)
        if definition["model"].get("dropout"):
            raise TokenizerError("expected a tokenizer without dropout, found random tokens; set `dropout` to null")
        special = [token["content"] for token in definition["added_tokens"] if token["special"]]
        self.kind = "neox" if "<|endoftext|>" in special and library.token_to_id("<|endoftext|>") == 0 else "json"
        parts = ("added_tokens", "normalizer", "pre_tokenizer", "model", "decoder")
        self.id = f"{self.kind}:{_digest([definition.get(part) for part in parts])}"

    def encode_prompt(self, text: str) -> list[int]:
        ids = self.encode(text)
        # Between paragraphs a blank line is two tokens, and so models have seen it, but at the end of a text it is one.
        if self.kind == "neox" and self.decode(ids[-1:]) == b"\n\n":
            ids[-1:] = self.encode("\n") * 2
        return ids

    def _fixed(self, text: bytearray, is_end: bool) -> tuple[TokenBlock, int]:
        if len(text) >= PIECE_BYTES:
            window = bytes(text[: n_whole(text[:PIECE_BYTES])])
            edge = _SPACE_TO_WORD.match(window.decode())
            piece = edge.group().encode() if edge else window
            decided = PIECE_BYTES
        elif is_end:
            piece, decided = bytes(text), -1
        else:
            return _nothing()
        encoding = self._encoding(piece)
        n = len(encoding.ids)
        # Offsets count characters of the text before normalisation. A token ends where the next one starts, so that
        # what a tokenizer drops, an accent in NFC or white space, belongs to the token before it.
        byte_at = np.flatnonzero((np.frombuffer(piece + b"\0", np.uint8) & 0xC0) != 0x80)  # of each character, the end
        starts = byte_at[np.array(encoding.offsets, np.int64).reshape(n, 2)[:, 0]]
        ends = np.append(starts[1:], len(piece))[:n]
        zeros = np.zeros(n, np.int64)
        return TokenBlock(np.array(encoding.ids, np.int32), ends, zeros + decided, zeros, zeros), len(piece)


class TextDecoder:
    """Text of generated tokens, as far as it is complete: half a character waits for the rest of it."""

    def __init__(self, tokenizer: Tokenizer) -> None:
        self._tokenizer = tokenizer
        self._utf8 = codecs.getincrementaldecoder("utf-8")("replace")
        self._by_token = not (isinstance(tokenizer, _FromFile) and tokenizer._bytes is None)
        self._ids: list[int] = []  # for decoders that look at neighbours: the tokens told last, and those not told yet
        self._n_told = 0

    def feed(self, ids: int | Sequence[int]) -> str:
        """The text that is complete with these tokens and was not told yet."""
        new = [ids] if isinstance(ids, int) else ids
        if self._by_token:
            return self._utf8.decode(self._tokenizer.decode(new))
        self._ids.extend(new)
        return self._told(is_end=False)

    def flush(self) -> str:
        """The rest, with U+FFFD for half a character; the decoder is then as new."""
        rest = self._utf8.decode(b"", final=True) if self._by_token else self._told(is_end=True)
        self._utf8.reset()
        self._ids, self._n_told = [], 0
        return rest

    def _told(self, is_end: bool) -> str:
        told = self._tokenizer.decode(self._ids[: self._n_told]).decode()
        text = self._tokenizer.decode(self._ids).decode()
        if text.endswith("\ufffd") and not is_end:  # half a character, which the library has replaced already
            return ""
        self._ids, self._n_told = self._ids[self._n_told :], len(self._ids) - self._n_told
        return text[len(told) :]


@functools.cache
def world() -> _World:
    """The RWKV World tokenizer."""
    return _World()


@functools.cache
def raw_bytes() -> Tokenizer:
    """One token a byte: id = byte."""
    return _RawBytes()


def from_file(path: str | Path) -> Tokenizer:
    """The tokenizer of a file. Raises TokenizerError.

    Of a `tokenizer.json` our own BPE if its pre-tokens are those of OWN_PATTERN, else a generic one; of a vocabulary in
    the form of `rwkv_vocab_v20230424.txt`, or of the `vocab.txt` of Hugging Face, the World tokenizer if it is World's.
    """
    path = Path(path)
    try:
        data = path.read_bytes()
        return _of_vocabulary(data) if path.suffix == ".txt" else _of_json(data)
    except OSError as error:
        raise TokenizerError(f"loading tokenizer '{path}': expected a file, found: {error.strerror}") from error
    except TokenizerError as error:
        raise TokenizerError(f"loading tokenizer '{path}': {error}") from error


def find(given: str | Path | None, path: Path, vocab_size: int, metadata: Mapping[str, Any]) -> Tokenizer:
    """The tokenizer of a model.

    given       world, bytes or the path of a file for `from_file`, before all that is found; None finds one
    path        the checkpoint, a file or a folder
    vocab_size  rows of its embedding
    metadata    of its container; in that of a GGUF is a vocabulary
    raises      TokenizerError where there is none, it is damaged, or has more tokens than the model has rows

    It is found inside the checkpoint, else beside it, else by the size of its vocabulary. Several models may lie in one
    folder, so World and Pile files count only for models that have as many rows.
    """
    where = f"loading model '{path}'"
    try:
        chosen, source = _found(given, path, vocab_size, metadata)
    except TokenizerError as error:
        raise TokenizerError(f"{where}: {error}") from error
    if chosen.vocab_size > vocab_size:
        raise TokenizerError(
            f"{where}: expected a tokenizer of at most {vocab_size} tokens, found {chosen.vocab_size} in '{source}'; "
            "pass --tokenizer with the one it was trained with"
        )
    return chosen


def _found(
    given: str | Path | None, path: Path, vocab_size: int, metadata: Mapping[str, Any]
) -> tuple[Tokenizer, str | Path]:
    """The tokenizer, and where it was found."""
    if given is not None:
        by_name = {"world": world, "bytes": raw_bytes}
        return by_name[given]() if isinstance(given, str) and given in by_name else from_file(given), given
    inside = metadata.get("tokenizer.ggml.model", "no_vocab")
    if inside == "rwkv":
        tokens = metadata.get("tokenizer.ggml.tokens")
        return _if_world([str(token) for token in tokens] if isinstance(tokens, list) else []), path
    folder = path if path.is_dir() else path.parent
    beside = [folder / "tokenizer.json"]
    beside += [folder / PILE_FILE] if vocab_size in PILE_SIZES else []
    for file in beside:
        if file.exists():
            return from_file(file), file
    declared = _declared_class(folder)
    is_world = bool(_WORLD_CLASS.fullmatch(declared))
    found = "none in or beside it"
    if inside != "no_vocab":
        found = f"one of kind '{inside}' inside, which does not say how text is normalised"
    elif declared and not is_world:
        found = f"'{declared}' in its 'tokenizer_config.json', and code beside a model is never run"
    elif vocab_size == WORLD_SIZE:
        for file in [*folder.glob("rwkv_vocab_*.txt"), *(folder.glob("vocab.txt") if is_world else ())]:
            from_file(file)
        return world(), folder
    elif vocab_size == 256:
        return raw_bytes(), folder
    wanted = (
        f"get {PILE_FILE} (from {PILE_SOURCE}) and put it" if vocab_size in PILE_SIZES else "put its tokenizer.json"
    )
    raise TokenizerError(
        f"expected a tokenizer for its vocabulary of {vocab_size}, found {found}; {wanted} into '{folder}', or pass "
        "--tokenizer with its path"
    )


def _declared_class(folder: Path) -> str:
    """The class of tokenizer that a Hugging Face folder asks for, or nothing."""
    path = folder / "tokenizer_config.json"
    try:
        return str(json.loads(path.read_bytes()).get("tokenizer_class", ""))
    except FileNotFoundError:
        return ""
    except (OSError, ValueError, AttributeError, RecursionError) as error:
        raise TokenizerError(f"reading '{path}': expected a JSON object, found: {error}") from error


def _of_vocabulary(data: bytes) -> Tokenizer:
    lines = _lines(data)
    if lines and lines[0][:2] == b"b'":  # the bytes literal of each token from 0 on, else id, literal and length from 1
        return _if_world([line[2:-1].decode("utf-8", "replace") for line in lines])
    if _world_id(lines) != world().id:
        raise _other_vocabulary(f"{len(lines)} lines of another hash")
    return world()


def _if_world(literals: list[str]) -> Tokenizer:
    """The World tokenizer if these are its tokens from id 0 on, as `_World.literals` and `[PAD65530]` and so on."""
    expected = world().literals
    end = 1 + len(expected)
    found = literals[1:end] + [literal for literal in literals[end:] if not literal.startswith("[PAD")]
    if found != expected:
        i = next(i for i, (a, b) in enumerate(zip_longest(found, expected)) if a != b)
        raise _other_vocabulary(
            f"'{found[i]}' as token {i + 1}" if i < len(found) else f"the first {i} tokens of it only"
        )
    return world()


def _other_vocabulary(found: str) -> TokenizerError:
    return TokenizerError(
        f"expected the World vocabulary, found {found}; for another one pass --tokenizer with its tokenizer.json, "
        "--tokenizer world takes it for World's all the same"
    )


def _of_json(data: bytes) -> Tokenizer:
    import tokenizers

    try:
        text = data.decode()
        absent: dict[str, object] = {"added_tokens": [], "normalizer": None, "pre_tokenizer": None, "decoder": None}
        definition = absent | json.loads(text)
        library = tokenizers.Tokenizer.from_str(text)
    except Exception as error:  # the library raises nothing narrower
        raise TokenizerError(f"expected a tokenizer.json, found: {error}") from error
    return (_OwnBPE if _is_own(definition) else _TokenizerJson)(definition, library)


def _is_own(definition: dict[str, Any]) -> bool:
    """Is this a byte-level BPE whose tokens follow from each pre-token of OWN_PATTERN alone?"""
    match definition:
        case {
            "normalizer": None,
            "pre_tokenizer": {
                "type": "Sequence",
                "pretokenizers": [
                    {"type": "Split", "pattern": {"Regex": pattern}, "behavior": "Isolated", "invert": False},
                    {"type": "ByteLevel", "add_prefix_space": False, "use_regex": False},
                ],
            },
            "decoder": {"type": "ByteLevel"},
            "model": {"type": "BPE", "vocab": _, "merges": _, **model},
            "added_tokens": added,
        }:
            plain = not any(model.get(key) for key in ("dropout", "continuing_subword_prefix", "end_of_word_suffix"))
            return pattern == OWN_PATTERN and plain and all(token["special"] for token in added)
    return False


def _byte_level(definition: dict[str, Any], vocabulary: dict[str, int]) -> list[bytes] | None:
    """The bytes of each token where the decoder is ByteLevel, so that each token stands for its own; else None."""
    if (definition["decoder"] or {}).get("type") != "ByteLevel":
        return None
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]  # GPT-2's bytes_to_unicode
    others = [byte for byte in range(256) if byte not in printable]
    characters = {256 + i: chr(byte) for i, byte in enumerate(others)}  # in which they are written
    known = {*map(chr, printable), *map(chr, characters)}
    table = [b""] * (max(vocabulary.values(), default=-1) + 1)
    added = {token["content"]: token["special"] for token in definition["added_tokens"]}
    for text, token_id in vocabulary.items():
        if text not in added and known.issuperset(text):
            table[token_id] = text.translate(characters).encode("latin-1")
        elif not added.get(text):
            table[token_id] = text.encode()
    return table


def _lines(data: bytes) -> list[bytes]:
    """The lines of a vocabulary, whose ends some have as CRLF."""
    return [line.rstrip(b"\r") for line in data.split(b"\n") if line.strip()]


def _world_id(lines: list[bytes]) -> str:
    digest = hashlib.sha256(b"".join(line + b"\n" for line in lines))
    return f"world:{digest.hexdigest()}"


def _joined(table: list[bytes], ids: Iterable[int]) -> bytes:
    return b"".join(table[i] for i in ids if 0 <= i < len(table))


def _digest(definition: object) -> str:
    return hashlib.sha256(json.dumps(definition, sort_keys=True, separators=(",", ":")).encode()).hexdigest()
