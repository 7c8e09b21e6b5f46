"""Masks bytes in place: words become tokens that are equal where the words were."""

# A masked run of word bytes (letters, digits, `_`, `-`; or of bytes of 0x80 and above) becomes a token
# of the same length: `?`, then letters and digits made by a keyed hash of the run. The key is random
# and never stored, so equal words of one recording get equal tokens, and nobody can try words
# against them later. ASCII punctuation and white space stay, other control bytes become `.`.

from __future__ import annotations

import hashlib
import secrets
from functools import lru_cache
from typing import Final

import numpy as np
from numpy.typing import NDArray

from scope_ebpf.protocols.heads import Bytes, Heads, Numbers

Words = NDArray[np.uint64]

TOKEN_PATTERN = r"\?[0-9A-Za-z]*"  # noqa: S105 - no password
"""Matches a token in text, for folding."""

# Bits, of which a kept byte has none. Bytes that are not ASCII are words, too, but words of their own:
# in binary formats they stand right before and behind texts, whose tokens must not change by that.
_PUNCTUATION, _WORD, _CONTROL, _HIGH = 0, 1, 2, 4
_LETTERS = b"0123456789ABCDEFGHIJKLMNOPQRSTUVWXYZabcdefghijklmnopqrstuvwxyz"


def _class_of(byte: int) -> int:
    if byte >= 0x80:
        return _HIGH
    if byte in _LETTERS or byte in b"_-":
        return _WORD
    return _CONTROL if (byte < 0x20 and byte not in b"\t\r\n") or byte == 0x7F else _PUNCTUATION


_CLASSES: Final = bytes(_class_of(byte) for byte in range(256))
# A byte of hash makes a character of a token: 62 of them, some a little more often than others.
_CHARACTERS: Final = np.frombuffer((_LETTERS * 5)[:256], np.uint8)
# INSIDE[n]: the first n bytes of a word of 8.
_INSIDE: Final = np.array([(1 << 8 * count) - 1 for count in range(9)], np.uint64)

# Runs of at least so many bytes are hashed in two steps.
_LONG: Final = 64
# A token has so many different words of 8 characters; then they come again.
_DIFFERENT: Final = 3
# So many runs at a time that what SipHash works on stays in a CPU's cache.
_BLOCK: Final = 8192
_KEY_BYTES: Final = 16
# Runs of one word of 8 are looked up by so many bits of a product with any odd number.
_SLOT_BITS: Final = 14
_SPREAD: Final = np.uint64(0x9E3779B97F4A7C15)


def new_key() -> bytes:
    """A key of one recording's tokens, never to be written anywhere."""
    return secrets.token_bytes(_KEY_BYTES)


def mask(heads: Heads, kept: NDArray[np.bool_], key: bytes) -> Heads:
    """The same heads with every byte masked that is not `kept` (one boolean per byte of their data).

    A run ends at the end of its head, and where a kept byte cuts it. Equal runs become equal tokens
    under the same key, whatever surrounds them.
    """
    data, size = heads.data, len(heads.data)
    if not size:
        return heads
    classes = np.frombuffer(data.tobytes().translate(_CLASSES), np.uint8)
    classes = classes & (kept.view(np.uint8) - np.uint8(1))
    # Room at the end, for words of 8 bytes that begin within.
    result = np.zeros(size + 8, np.uint8)
    result[:size] = data
    result[np.flatnonzero(classes == _CONTROL)] = ord(".")
    begins, lengths = _runs(classes & np.uint8(_WORD | _HIGH), heads)
    if len(begins):
        _write_tokens(eight_bytes(result), begins, lengths, _hashes(result, begins, lengths, key))
    return Heads(result[:size], heads.begins, heads.lengths, heads.totals)


def eight_bytes(data: Bytes) -> Words:
    """The 8 bytes from each place on as one little-endian word; the last 8 bytes begin none."""
    return np.ndarray(max(len(data) - 8, 0), "<u8", data.data, strides=(1,))


def _runs(classes: Bytes, heads: Heads) -> tuple[Numbers, Numbers]:
    """Begin and length of each run of one class; none crosses from one head to the next."""
    word = classes != 0
    changes = np.empty(len(word) + 1, np.bool_)
    changes[0], changes[-1] = word[0], word[-1]
    np.not_equal(word[1:], word[:-1], out=changes[1:-1])
    edges = np.flatnonzero(changes)
    inner = heads.begins[(heads.lengths > 0) & (heads.begins > 0)]
    across = inner[word[inner] & word[inner - 1]]
    if (classes & _HIGH).any():
        joints = np.flatnonzero((classes[1:] != classes[:-1]) & word[1:] & word[:-1]) + 1
        across = np.unique(np.concatenate([across, joints]))
    if len(across):
        # one run ends there and another begins
        edges = np.sort(np.concatenate([edges, across, across]))
    begins = edges[::2]
    return begins, edges[1::2] - begins


def _write_tokens(
    words: Words, begins: Numbers, lengths: Numbers, hashes: tuple[Words, ...]
) -> None:
    """Replace each run by its token, 8 bytes at a time.

    A write covers bytes behind a short run, too, and leaves them as they are: the writes of one
    round go forwards, so that they never undo those of a run that begins there.
    """
    at, left, rows, part = begins, lengths, None, 0
    while len(at):
        chosen = hashes[part % _DIFFERENT]
        text = _characters(chosen if rows is None else chosen[rows])
        if part == 0:
            text = (text << np.uint64(8)) | np.uint64(ord("?"))
        old = words[at]
        # the bits that differ, within the run
        old ^= (old ^ text) & _INSIDE[np.minimum(left, 8)]
        words[at] = old
        more = np.flatnonzero(left > 8)
        at, left, part = at[more] + 8, left[more] - 8, part + 1
        rows = more if rows is None else rows[more]


def _characters(words: Words) -> Words:
    """Each byte as a character of a token."""
    return np.take(_CHARACTERS, words.view(np.uint8)).view(np.uint64)


def _hashes(
    data: Bytes, begins: Numbers, lengths: Numbers, key: bytes
) -> tuple[Words, Words, Words]:
    """Three words of keyed hash for each run; the second and third only of runs that need them."""
    hashes = (
        np.zeros(len(begins), np.uint64),
        np.zeros(len(begins), np.uint64),
        np.zeros(len(begins), np.uint64),
    )
    words = eight_bytes(data)
    chosen, short, same = _different(words, begins, lengths)
    for first in range(0, len(chosen), _BLOCK):
        rows = chosen[first : first + _BLOCK]
        some = _hash_block(words, begins[rows], lengths[rows], key)
        for whole, part in zip(hashes, some, strict=True):
            whole[rows] = part
    hashes[0][short] = hashes[0][same]
    rows = np.flatnonzero(lengths >= _LONG)
    if len(rows):
        sums = _sums(data, begins[rows], lengths[rows], key)
        state = _SipHash(key, len(rows), domain=1)
        for word in (*sums, lengths[rows].astype(np.uint64)):
            state.add(word)
        for whole, part in zip(hashes, state.words(), strict=True):
            whole[rows] = part
    return hashes


def _different(words: Words, begins: Numbers, lengths: Numbers) -> tuple[Numbers, Numbers, Numbers]:
    """Runs to be hashed; and those of at most 8 bytes, with one for each that is the same.

    Most runs are short, and few of them differ.
    """
    short = np.flatnonzero(lengths <= 8)
    text = words[begins[short]] & _INSIDE[lengths[short]]
    slots = ((text * _SPREAD) >> np.uint64(64 - _SLOT_BITS)).astype(np.intp)
    owners = np.empty(1 << _SLOT_BITS, np.intp)
    owners[slots] = np.arange(len(short))
    owner = owners[slots]
    # two runs that meet in a slot are both hashed
    owner = np.where(text[owner] == text, owner, np.arange(len(short)))
    same = short[owner]
    hashed = lengths > 8
    hashed[same] = True
    return np.flatnonzero(hashed), short, same


def _hash_block(words: Words, begins: Numbers, lengths: Numbers, key: bytes) -> list[Words]:
    """SipHash-1-3 of the runs that are not long: the three words of `_hashes`."""
    state = _SipHash(key, len(begins))
    rest = np.where(lengths < _LONG, lengths, 0)
    rows, offset = np.flatnonzero(rest >= 8), 0
    while len(rows):
        state.add_to(rows, words[begins[rows] + offset])
        rest[rows] -= 8
        rows, offset = rows[rest[rows] >= 8], offset + 8
    # The last word is what is left, and the length.
    last = words[np.minimum(begins + (lengths & ~7), len(words) - 1)] & _INSIDE[rest]
    state.add(last | (lengths.astype(np.uint64) << np.uint64(56)))
    hashes = [
        state.finish(0xFF),
        np.zeros(len(begins), np.uint64),
        np.zeros(len(begins), np.uint64),
    ]
    # The first word makes 7 characters.
    rows = np.flatnonzero(lengths > 8)
    if len(rows):
        more = state.of(rows)
        hashes[1][rows] = more.finish(0xDD)
        hashes[2][rows] = more.finish(0xEE)
    return hashes


def _sums(data: Bytes, begins: Numbers, lengths: Numbers, key: bytes) -> list[Words]:
    """Two sums of bytes times secret weights for each run.

    Two different runs have the same sum by chance of 2^-56 (multilinear hashing: the product of a
    difference of bytes and a random weight is uniform but for the lowest 8 bits).
    """
    order = np.cumsum(lengths) - lengths
    position = np.arange(lengths.sum()) - np.repeat(order, lengths)
    values = data[position + np.repeat(begins, lengths)].astype(np.uint64)
    weights = _weights(key, 1 << int(lengths.max()).bit_length())
    return [np.add.reduceat(values * lane[position], order) for lane in weights]


@lru_cache(maxsize=4)
def _weights(key: bytes, count: int) -> tuple[Words, Words]:
    """Weights that follow from the key."""
    stream = hashlib.shake_256(b"weights" + key).digest(16 * count)
    weights = np.frombuffer(stream, np.uint64)
    # one after the other, so that a longer table begins with a shorter one
    return weights[0::2].copy(), weights[1::2].copy()


class _SipHash:
    """SipHash-1-3 (Aumasson and Bernstein, 2012) of many messages at once.

    More than 64 bits of it are made as its 128-bit form does: by more rounds of the same state.
    """

    def __init__(self, key: bytes, count: int, domain: int = 0) -> None:
        """Begin `count` messages; another domain hashes the same message to something else."""
        low, high = np.frombuffer(key[:_KEY_BYTES].ljust(_KEY_BYTES, b"\0"), "<u8").tolist()
        constants = (0x736F6D6570736575, 0x646F72616E646F6D, 0x6C7967656E657261, 0x7465646279746573)
        keys = (low, high, low, high ^ domain)
        self._state = [
            np.full(count, constant ^ word, np.uint64)
            for constant, word in zip(constants, keys, strict=True)
        ]
        self._scratch = np.empty(count, np.uint64)

    def of(self, rows: NDArray[np.intp]) -> _SipHash:
        """Some of the messages."""
        some = object.__new__(_SipHash)
        some._state = [word[rows] for word in self._state]
        some._scratch = np.empty(len(rows), np.uint64)
        return some

    def add(self, words: Words) -> None:
        """Take the next 8 bytes of each message."""
        self._state[3] ^= words
        self._round()
        self._state[0] ^= words

    def add_to(self, rows: NDArray[np.intp], words: Words) -> None:
        """Take the next 8 bytes of some of the messages."""
        some = self.of(rows)
        some.add(words)
        for whole, part in zip(self._state, some._state, strict=True):
            whole[rows] = part

    def finish(self, mark: int) -> Words:
        """A word of the hash."""
        self._state[2 if mark != 0xDD else 1] ^= np.uint64(mark)
        for _ in range(3):
            self._round()
        a, b, c, d = self._state
        return a ^ b ^ c ^ d

    def words(self) -> tuple[Words, Words, Words]:
        """Three words of it."""
        return self.finish(0xFF), self.finish(0xDD), self.finish(0xEE)

    def _round(self) -> None:
        a, b, c, d = self._state
        a += b
        self._rotate(b, 13)
        b ^= a
        self._rotate(a, 32)
        c += d
        self._rotate(d, 16)
        d ^= c
        a += d
        self._rotate(d, 21)
        d ^= a
        c += b
        self._rotate(b, 17)
        b ^= c
        self._rotate(c, 32)

    def _rotate(self, words: Words, bits: int) -> None:
        np.right_shift(words, np.uint64(64 - bits), out=self._scratch)
        np.left_shift(words, np.uint64(bits), out=words)
        words |= self._scratch
