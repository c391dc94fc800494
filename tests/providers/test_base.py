"""The words of the house: when two spaces are one, and the tree of errors."""

import re

import pytest
from embedding_proxy.providers import errors
from embedding_proxy.providers.base import Space, current_label
from embedding_proxy.providers.errors import InvalidRequest, ProviderError, RateLimited, Refusal
from hypothesis import given, settings
from hypothesis import strategies as st

MODEL = Space("vendor/model", 8)

JSON = st.recursive(
    st.none() | st.booleans() | st.integers(-(2**53), 2**53) | st.text(max_size=8),
    lambda inner: (
        st.lists(inner, max_size=3) | st.dictionaries(st.text(max_size=4), inner, max_size=3)
    ),
    max_leaves=6,
)
FIELDS = st.dictionaries(st.text(min_size=1, max_size=6), JSON, min_size=1, max_size=4)


def _reversed(value: object) -> object:
    """Return the same JSON with the fields of every object in the opposite order."""
    if isinstance(value, dict):
        return {name: _reversed(value[name]) for name in reversed(value)}
    return [_reversed(item) for item in value] if isinstance(value, list) else value


@given(FIELDS)
@settings(deadline=None)
def test_the_order_of_fields_is_no_part_of_a_space(fields):
    """Fields in another order, at any depth, give the same space and the same label."""
    one, other = MODEL.with_parameters(fields), MODEL.with_parameters(_reversed(fields))
    assert one == other
    assert hash(one) == hash(other)
    assert one.label == other.label


@pytest.mark.parametrize(
    ("one", "other"),
    [
        ({"task": "query"}, {"task": "passage"}),
        ({"task": "query"}, {"input_type": "query"}),
        ({"task": "1"}, {"task": 1}),
        ({"task": 1}, {"task": True}),
        ({"task": "null"}, {"task": None}),
        ({"task": ["a", "b"]}, {"task": ["b", "a"]}),
        ({"task": {"a": 1}}, {"task": {"a": 2}}),
        ({"task": "query"}, {"task": "query", "late": True}),
        ({"a": "b", "c": "d"}, {"a": "d", "c": "b"}),
        ({"task": "é"}, {"task": "e\u0301"}),
    ],
)
def test_whatever_may_change_the_numbers_changes_the_space(one, other):
    """Two values of a forwarded field are two spaces with two labels, however alike they look."""
    assert MODEL.with_parameters(one) != MODEL.with_parameters(other)
    assert MODEL.with_parameters(one).label != MODEL.with_parameters(other).label
    assert MODEL.with_parameters(one) != MODEL


def _deep(levels: int) -> object:
    return [_deep(levels - 1)] if levels else 1


@pytest.mark.parametrize("value", [object(), b"bytes", 1 << 70, {1: 2}, "\ud800", _deep(500)])
def test_a_field_that_is_no_json_is_refused(value):
    """What could not be sent on is the request's own fault and not a crash."""
    with pytest.raises(InvalidRequest, match="cannot be sent on"):
        MODEL.with_parameters({"task": value})


def test_parameters_leave_the_model_as_it_is():
    """A space with parameters keeps width, Matryoshka and tokenizer of its model."""
    space = Space("m", 8, matryoshka=True, tokenizer="cl100k_base")
    told = space.with_parameters({"task": "query"})
    assert (told.name, told.dimensions, told.matryoshka, told.tokenizer) == (
        "m",
        8,
        True,
        "cl100k_base",
    )


@given(st.text(min_size=1, max_size=20), st.none() | FIELDS)
@settings(deadline=None)
def test_a_label_can_stand_in_a_header(name, fields):
    """Whatever a model is called and a client asks for, the label is ASCII without blanks."""
    space = Space(name, 8)
    assert re.fullmatch(r"[!-~]+", (space.with_parameters(fields) if fields else space).label)


@pytest.mark.parametrize(
    ("name", "fields", "label"),
    [
        ("vendor/model", {}, "vendor/model"),
        ("vendor/model:free@2+1", {}, "vendor/model:free@2+1"),
        ("my model?", {}, "my%20model%3F"),
        ("m", {"b": "x/y", "a&": 1}, "m?a%26=~f6fc42039fba3776&b=~7128764fa4bbff10"),
    ],
)
def test_a_label_is_easily_read(name, fields, label):
    """A plain model's label is its name; parameters follow by name, with digests as values."""
    assert Space(name, 8).with_parameters(fields).label == label


@pytest.mark.parametrize(
    ("former", "label"),
    [
        ("m", "m"),
        ("m?task=%22q%22&n=1", "m?task=~12549ea7d2d841ef&n=~f6fc42039fba3776"),
        ("m?task=~12549ea7d2d841ef", "m?task=~12549ea7d2d841ef"),
        ("m?blake2b=00112233445566778899aabbccddeeff",) * 2,
    ],
)
def test_a_label_of_an_earlier_version_has_one_present_form(former, label):
    """Stored labels with values become those that the same spaces have now, in one step."""
    assert current_label(former) == label == current_label(label)


@given(FIELDS)
def test_every_former_label_leads_to_the_present_one(fields):
    """What an earlier version wrote of a space is found under its present label."""
    space = Space("m", 8).with_parameters(fields)
    assert current_label(space.former_label) == space.label


def test_a_label_holds_no_value():
    """Neither a short value nor a long one can be read in the label."""
    for secret in ("hunter2", "hunter2" * 100):
        label = Space("m", 8).with_parameters({"task": secret}).label
        assert "hunter2" not in label
        assert label.isascii()


def test_the_tree_that_is_drawn_is_the_tree_that_is_built():
    """Each error stands in the module's docstring under the class it inherits from, and only so."""
    drawn, path = {}, {}
    for line in errors.__doc__.splitlines():
        if match := re.match(r"    ([│├└─ ]*)(\w+)(?:  |$)", line):
            depth = len(match[1]) // 4
            path[depth] = match[2]
            drawn[match[2]] = path[depth - 1] if depth else "Exception"
    built = {
        name: kind.__mro__[1].__name__
        for name, kind in vars(errors).items()
        if isinstance(kind, type) and issubclass(kind, Exception)
    }
    assert drawn == built
    assert len(built) > 10


@pytest.mark.parametrize(
    ("refusal", "wait"), [(None, None), (Refusal(429, "slow", retry_after=2.5), 2.5)]
)
def test_a_failure_knows_its_provider_and_the_wait_it_asked_for(refusal, wait):
    """The message names the provider, and the wait is the refusal's if there was one."""
    error = RateLimited("acme", "slow down", refusal)
    assert isinstance(error, ProviderError)
    assert (str(error), error.provider, error.retry_after) == ("acme: slow down", "acme", wait)
