"""Masking: what stays, what equals what, and that tokens do not tell what they stand for."""

from __future__ import annotations

import random
import re
import string
import uuid

import numpy as np
import polars as pl
import pytest

from scope_ebpf.protocols.heads import Heads
from scope_ebpf.protocols.masking import TOKEN_PATTERN, mask, new_key

pytestmark = pytest.mark.pure

KEY = bytes(range(16))
WORD = rb"[0-9A-Za-z_\-]+|[\x80-\xff]+"


def heads_of(*payloads: bytes) -> Heads:
    lengths = np.array([len(payload) for payload in payloads], np.int64)
    return Heads.of(pl.Series(payloads, dtype=pl.Binary), lengths)


def masked(*payloads: bytes, key: bytes = KEY, kept: str = "") -> list[bytes]:
    """The payloads, masked but for the places where `kept` has a K."""
    heads = heads_of(*payloads)
    chosen = np.zeros(len(heads.data), np.bool_)
    chosen[[place for place, letter in enumerate(kept) if letter == "K"]] = True
    return mask(heads, chosen, key).payloads().to_list()


def random_payloads(count: int, seed: int) -> list[bytes]:
    choose = random.Random(seed)
    return [
        bytes(choose.choice([choose.randrange(256), 97, 98, 45, 32]) for _ in range(length))
        if choose.random() < 0.7
        else bytes(choose.choice(b"ab_9") for _ in range(length))
        for length in [choose.choice([0, 1, 2, 7, 8, 9, 16, 63, 64, 65, 300]) for _ in range(count)]
    ]


def test_each_word_becomes_a_token_of_its_length_and_the_rest_stays():
    payloads = random_payloads(2_000, 1)
    for before, after in zip(payloads, masked(*payloads), strict=True):
        assert len(before) == len(after)
        place = 0
        for run in re.finditer(WORD, before):
            between = re.sub(
                rb"[\x00-\x08\x0b\x0c\x0e-\x1f\x7f]", b".", before[place : run.start()]
            )
            assert after[place : run.start()] == between
            token = after[run.start() : run.end()]
            assert re.fullmatch(TOKEN_PATTERN, token.decode("ascii")), (run, token)
            place = run.end()


def test_a_token_depends_on_its_run_alone():
    payloads = random_payloads(2_000, 2)
    tokens: dict[bytes, bytes] = {}
    for before, after in zip(payloads, masked(*payloads), strict=True):
        for run in re.finditer(WORD, before):
            token = after[run.start() : run.end()]
            assert tokens.setdefault(run[0], token) == token
    runs = list(tokens)
    assert masked(*runs) == list(tokens.values())
    elsewhere = masked(*(b"x" * 90 + b" " + run + b"." for run in runs))
    assert [text[91:-1] for text in elsewhere] == list(tokens.values())
    long = [token for token in tokens.values() if len(token) >= 12]
    assert len(set(long)) == len(long)


def test_kept_bytes_stay_and_cut_runs():
    assert masked(b"user-17", kept="KKKKK..") == [b"user-" + masked(b"17")[0]]
    assert masked(b"a\x00b", kept=".K.") == [b"?\x00?"]
    cut = masked(b"abcdefXabcdef", kept="......K")[0]
    assert cut[:6] == cut[7:] == masked(b"abcdef")[0]


def test_runs_end_with_their_head():
    first, second, third = masked(b"abc", b"", b"def")[0], b"", masked(b"def")[0]
    assert masked(b"abc", b"", b"def") == [first, second, third]
    assert masked() == []


def test_single_bytes_are_a_question_mark():
    assert masked(b"a b 9 _ \xff\t\r\n\x01") == [b"? ? ? ? ?\t\r\n."]


def test_ids_that_differ_in_one_place_have_different_tokens():
    base = str(uuid.UUID(int=7))
    for length in (12, 36, 64, 100, 5000):
        text = (base * (length // 36 + 1))[:length].encode()
        others = [
            text[:place] + bytes([letter]) + text[place + 1 :]
            for place in random.Random(3).sample(range(length), 12)
            for letter in b"WXYZ"
        ]
        tokens = masked(text, *others)
        assert len(set(tokens)) == 49, length


def test_many_ids_do_not_collide():
    ids = [f"{number:012x}".encode() for number in range(300_000)]
    tokens = masked(*ids)
    assert len(set(tokens)) == len(ids)


def test_tokens_use_all_characters_evenly():
    ids = [uuid.UUID(int=number).hex.encode() for number in range(20_000)]
    letters = np.frombuffer(b"".join(masked(*ids)), np.uint8).reshape(len(ids), 32)
    assert (letters[:, 0] == ord("?")).all()
    alphabet = (string.digits + string.ascii_letters).encode()
    for column in letters[:, 1:].T:
        counts = np.bincount(column, minlength=256)[list(alphabet)]
        assert counts.sum() == len(ids)
        assert counts.min() > len(ids) / 62 * 0.75
        assert counts.max() < len(ids) / 62 * 1.5


def test_another_key_gives_other_tokens():
    text = b"5f7c2b1a-aaaa-bbbb-cccc-0123456789ab " + b"long" * 40
    assert new_key() != new_key()
    first, second = masked(text, key=new_key()), masked(text, key=new_key())
    assert first != second
    # every bit of the key counts
    keys = [bytes(KEY[:byte] + bytes([KEY[byte] ^ 128]) + KEY[byte + 1 :]) for byte in range(16)]
    assert len({masked(text, key=key)[0] for key in [KEY, *keys]}) == 17
