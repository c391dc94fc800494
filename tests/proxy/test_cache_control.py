"""The header `Cache-Control`, and what it makes of a mode: it is lenient, and allows no more."""

import math
from typing import get_args

import pytest
from embedding_proxy.providers.base import NORMAL, CachePolicy
from embedding_proxy.proxy.config import fields
from embedding_proxy.proxy.config.fields import Mode
from embedding_proxy.proxy.service.cache_policy import (
    CacheControl,
    parse_cache_control,
    to_cache_policy,
)
from hypothesis import given
from hypothesis import strategies as st

MODES = get_args(Mode)
NOTHING = CacheControl()


@pytest.mark.parametrize(
    ("header", "said"),
    [
        ("", NOTHING),
        ("no-cache", CacheControl(max_age=0)),
        ("No-Cache", CacheControl(max_age=0)),
        ("no-store", CacheControl(no_store=True)),
        ("ONLY-IF-CACHED", CacheControl(only_if_cached=True)),
        ("max-age=60", CacheControl(max_age=60)),
        ("max-age=0", CacheControl(max_age=0)),
        ("max-age=007", CacheControl(max_age=7)),
        ('max-age="60"', CacheControl(max_age=60)),
        (r'max-age="\6\0"', CacheControl(max_age=60)),
        ("Max-Age = 60", CacheControl(max_age=60)),
        ("max-age=60, max-age=30, max-age=90", CacheControl(max_age=30)),
        ("max-age=60, no-cache", CacheControl(max_age=0)),
        ("no-cache, max-age=60", CacheControl(max_age=0)),
        ("max-age=" + "9" * 5000, NOTHING),
        (" ,, no-store ,only-if-cached,", CacheControl(no_store=True, only_if_cached=True)),
        ("no-store,no-cache", CacheControl(max_age=0, no_store=True)),
        ('no-cache="Set-Cookie, no-store"', CacheControl(max_age=0)),
        ("no-store=1", CacheControl(no_store=True)),
        ('private="no-store, no-cache", only-if-cached', CacheControl(only_if_cached=True)),
        (r'x="a\", no-store", no-cache', CacheControl(max_age=0)),
        ('no-cache, x="never closed, no-store', CacheControl(max_age=0)),
        # Not well formed, or of no meaning here.
        *((text, NOTHING) for text in ["max-age", "max-age=", "max-age=-1", "max-age=1.5"]),
        *((text, NOTHING) for text in ["max-age=x", 'max-age="', 'max-age=""', "max-age=²"]),
        *((text, NOTHING) for text in ["max-stale=5", "min-fresh=5", "no-transform", "x=no-store"]),
        *((text, NOTHING) for text in ["nocache", "no-cache2", "no cache", "no-store;", "=", '"']),
    ],
)
def test_each_directive_is_read_as_the_rfc_has_it(header, said):
    """Known directives count in any case and form, the rest and what is spoilt do not."""
    assert parse_cache_control(header) == said


KNOWN = ["no-cache", "no-store", "only-if-cached", "max-age=5", "max-age=70", 'max-age="9"']
UNKNOWN = ["", "x", "x=1", 'x="no-store, no-cache"', r'x="\""', "max-age=-3", "max-stale", "é"]


@given(st.lists(st.sampled_from(KNOWN + UNKNOWN)), st.randoms(use_true_random=False), st.data())
def test_neither_order_nor_case_nor_space_nor_company_matters(items, random, draw):
    """However known directives are mixed with others, they say what they say alone."""
    known = [item for item in items if item in KNOWN]
    ages = [int(item.partition("=")[2].strip('"')) for item in known if "=" in item]
    expected = CacheControl(
        0 if "no-cache" in known else min(ages, default=math.inf),
        "no-store" in known,
        "only-if-cached" in known,
    )
    random.shuffle(items)
    spaces = st.sampled_from(["", " ", "\t", "  "])
    parts = [draw.draw(spaces) + item + draw.draw(spaces) for item in items]
    assert parse_cache_control(",".join(parts)) == expected
    if not any('"' in item and "x" in item for item in items):
        assert parse_cache_control(",".join(parts).upper()) == expected


@given(st.text(st.characters(max_codepoint=255)))
def test_whatever_is_sent_is_read(header):
    """No text is an error, and none makes an age that is no age."""
    said = parse_cache_control(header)
    assert said.max_age >= 0
    for one, name in ((said.no_store, "no-store"), (said.only_if_cached, "only-if-cached")):
        assert not one or name in header.lower()


# Mode and header together.

ANY = math.inf
# Header, then by mode in their order: the age an entry may have, whether anything may stay,
# whether anything may be bought.
TABLE = [
    ("", [(ANY, True, True), (ANY, True, False), (0, True, True), (0, False, True)]),
    ("no-cache", [(0, True, True), (0, True, False), (0, True, True), (0, False, True)]),
    ("max-age=60", [(60, True, True), (60, True, False), (0, True, True), (0, False, True)]),
    ("no-store", [(ANY, False, True), (ANY, False, False), (0, False, True), (0, False, True)]),
    (
        "only-if-cached",
        [(ANY, True, False), (ANY, True, False), (ANY, True, False), (0, False, False)],
    ),
    (
        "no-cache, only-if-cached",
        [(0, True, False), (0, True, False), (0, True, False), (0, False, False)],
    ),
]


def test_without_a_word_everything_is_as_usual():
    """The mode normal and no header are what a request without terms gets."""
    assert to_cache_policy("normal", "") == NORMAL == CachePolicy()


@pytest.mark.parametrize(("header", "by_mode"), TABLE)
def test_the_stricter_one_holds(header, by_mode):
    """Each mode with each header gives what docs/caching.md promises."""
    for mode, (max_age, write, spend) in zip(MODES, by_mode, strict=True):
        got = to_cache_policy(mode, header)
        assert (got.max_age, got.write, got.spend) == (max_age, write, spend)
        assert got.frozen == (mode == "frozen")
        assert got.only_if_cached == ("only-if-cached" in header)


@given(st.sampled_from(MODES), st.lists(st.sampled_from(KNOWN + UNKNOWN)).map(",".join))
def test_no_header_makes_a_frozen_proxy_spend_or_an_off_one_keep(mode, header):
    """Whatever a client says, it is allowed no more than the mode allows."""
    alone, got = to_cache_policy(mode, ""), to_cache_policy(mode, header)
    assert alone.spend or not got.spend
    assert alone.write or not got.write
    assert got.max_age <= alone.max_age or got.only_if_cached


def test_every_mode_has_its_meaning():
    """What `serve` says of a mode is there for each."""
    assert fields.MODES.keys() == set(MODES)
