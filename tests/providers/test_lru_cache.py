"""The one map of bounded size, beside a simple model of it."""

import pytest
from embedding_proxy.providers.lru_cache import LRUCache
from hypothesis import given
from hypothesis import strategies as st

KEYS = st.sampled_from("abcdef")
STEPS = st.one_of(
    st.tuples(st.just("put"), KEYS, st.text("x", max_size=6)),
    st.tuples(st.sampled_from(["get", "peek", "pop", "mark_used", "make"]), KEYS, st.just("xx")),
    st.tuples(st.just("clear"), st.just(""), st.just("")),
)


@given(st.lists(STEPS, max_size=60))
def test_in_any_order_it_holds_what_was_used_last(steps):
    """At each step it has the newest values that fit, and knows their size."""
    evicted, expected = [], []
    cache = LRUCache[str, str](
        10, lambda _, text: 1 + len(text), lambda *item: evicted.append(item)
    )
    model = {}
    for step, key, value in steps:
        known = model.get(key)
        if step in ("get", "make", "mark_used") and known is not None:
            model[key] = model.pop(key)
        if step == "put":
            cache[key] = value
            model.pop(key, None)
            model[key] = value
        elif step == "make":
            assert cache.get_or_make(key, lambda value=value: value) == model.get(key, value)
            model.setdefault(key, value)
        elif step == "clear":
            cache.clear()
            model.clear()
        elif step == "mark_used":
            if known is not None:
                cache.mark_used(key)
        else:
            assert getattr(cache, step)(key) == known
            if step == "pop":
                model.pop(key, None)
        while sum(1 + len(one) for one in model.values()) > 10:
            expected.append((oldest := next(iter(model)), model.pop(oldest)))
        assert evicted == expected
        assert list(cache) == list(model)
        assert cache.size == sum(1 + len(one) for one in model.values())
        assert len(cache) == len(model)


@pytest.mark.parametrize(
    ("use", "left"),
    [("get", "ac"), ("mark_used", "ac"), ("get_or_make", "ac"), ("peek", "bc"), ("pop", "bc")],
)
def test_what_counts_as_a_use(use, left):
    """All that says that a key is of use keeps it; to look at it does not."""
    cache = LRUCache[str, int](2)
    cache["a"], cache["b"] = 1, 2
    getattr(cache, use)("a", *([int] if use == "get_or_make" else []))
    cache["c"] = 3
    assert "".join(cache) == left


def test_a_value_that_is_too_large_takes_no_others_place():
    """It is not kept, nor is what it replaces; all others stay."""
    cache = LRUCache[str, int](10, lambda _, size: size)
    cache["a"], cache["b"] = 4, 5
    cache["b"] = 11
    assert (list(cache), cache.size) == (["a"], 4)
