"""Keys: one for each list of parts, and none for two."""

import unicodedata

import pytest
from embedding_proxy.cache.key import (
    MAX_KEPT_PARAMETERS,
    Keyring,
    Namespace,
    checksum,
    input_part,
    keyring,
    part,
)
from embedding_proxy.providers.base import Space
from hypothesis import assume, given, settings
from hypothesis import strategies as st

from tests.cache.fakes import key_of

# Few letters, and among them those that mean something in the hashed bytes: what is drawn here
# often differs only in where one part ends and the next begins.
LETTERS = st.text("vnmp=st\x00\x01", max_size=3)
NAMESPACES = st.builds(Namespace, LETTERS)
SPACES = st.builds(
    Space,
    LETTERS,
    st.just(8),
    parameters=st.lists(
        st.tuples(LETTERS, LETTERS.map(str.encode)), max_size=2, unique_by=lambda p: p[0]
    ).map(lambda found: tuple(sorted(found))),
)
INPUTS = LETTERS | st.lists(st.sampled_from([0, 1, 115, 1 << 24, (1 << 32) - 1]), max_size=3).map(
    tuple
)
IDENTITIES = st.tuples(NAMESPACES, SPACES, INPUTS)
SPACE = Space("m", 8)


def _key(identity):
    namespace, space, item = identity
    return Keyring(space, namespace).key(item)


@settings(deadline=None)
@given(IDENTITIES, IDENTITIES)
def test_keys_are_equal_only_for_what_is_equal(one, other):
    """Whatever two differ in, both their addresses and their digests differ."""
    assume(one != other)
    assert _key(one).address != _key(other).address
    assert _key(one).digest != _key(other).digest


@settings(deadline=None)
@given(IDENTITIES)
def test_equal_parts_have_equal_keys(identity):
    """A key follows from its parts alone, whichever keyring makes it, and after whatever else."""
    namespace, space, item = identity
    shared = keyring(space, namespace)
    shared.key("another input")
    assert shared.key(item) == _key(identity) == shared.key(item)


@settings(deadline=None)
@given(st.lists(st.tuples(st.binary(min_size=1, max_size=1), st.binary(max_size=10)), max_size=4))
def test_joined_parts_can_be_told_apart_again(parts):
    """Reading tag, length and data from joined parts gives them back: no two lists join alike."""
    joined = b"".join(part(tag, data) for tag, data in parts)
    read = []
    while joined:
        end = 9 + int.from_bytes(joined[1:9], "little")
        read.append((joined[:1], joined[9:end]))
        joined = joined[end:]
    assert read == parts


def _forged(*parts):
    """Return text that, unquoted, would read as the end of one part and the parts after it."""
    return "".join(part(tag, data).decode() for tag, data in parts)


@pytest.mark.parametrize(
    ("one", "other"),
    [
        pytest.param(("123", SPACE), ((123,), SPACE), id="text and token"),
        pytest.param(("[1, 2]", SPACE), ((1, 2), SPACE), id="text and the tokens it shows"),
        pytest.param(("1,2", SPACE), ((1, 2), SPACE), id="text and tokens joined by commas"),
        pytest.param(("(1, 2)", SPACE), ((1, 2), SPACE), id="text and the tuple it shows"),
        pytest.param(("\x01\0\0\0", SPACE), ((1,), SPACE), id="text with the bytes of a token"),
        pytest.param(((1, 2), SPACE), ((2, 1), SPACE), id="order of tokens"),
        pytest.param(((12,), SPACE), ((1, 2), SPACE), id="digits of tokens"),
        pytest.param(((1,), SPACE), ((1, 0), SPACE), id="a token of zero"),
        pytest.param(((1,), SPACE), ((1 << 24,), SPACE), id="byte order of a token"),
        pytest.param(("", SPACE), ((), SPACE), id="empty text and no tokens"),
        pytest.param(("US", SPACE), ("us", SPACE), id="case"),
        pytest.param(("ß", SPACE), ("ss", SPACE), id="case folding"),
        pytest.param(("a", SPACE), (" a", SPACE), id="leading space"),
        pytest.param(("a", SPACE), ("a\n", SPACE), id="trailing newline"),
        pytest.param(("a b", SPACE), ("a  b", SPACE), id="inner space"),
        pytest.param(("a b", SPACE), ("a\u00a0b", SPACE), id="no-break space"),
        pytest.param(("a\r\n", SPACE), ("a\n", SPACE), id="line ends"),
        pytest.param(("a", SPACE), ("a\0", SPACE), id="trailing NUL"),
        pytest.param(("a", SPACE), ("\ufeffa", SPACE), id="byte order mark"),
        pytest.param(("a", Space("m", 8)), ("a", Space("M", 8)), id="case of the space"),
        pytest.param(("bc", Space("a", 8)), ("c", Space("ab", 8)), id="space runs into input"),
        pytest.param(
            ("hellodimensions: 256", SPACE),
            ("hello", SPACE.with_parameters({"dimensions": 256})),
            id="parameter runs into input",
        ),
        pytest.param(
            ("a", Space("m" + _forged((b"p", b"x"), (b"=", b"1")), 8)),
            ("a", Space("m", 8, parameters=(("x", b"1"),))),
            id="space that spells a parameter",
        ),
        pytest.param(
            ("a", Space("m", 8, parameters=(("x", b"1" + part(b"p", b"y") + part(b"=", b"2")),))),
            ("a", Space("m", 8, parameters=(("x", b"1"), ("y", b"2")))),
            id="value that spells a parameter",
        ),
    ],
)
def test_what_peers_mixed_up_is_kept_apart(one, other):
    """What looks alike, or runs together when it is joined, has keys of its own."""
    assert key_of(*one).address != key_of(*other).address
    assert key_of(*one).digest != key_of(*other).digest


@pytest.mark.parametrize("text", ["\u00e9", "\u1e9b\u0323", "\ufb01", "\uac00", "\u212b"])
def test_unicode_normal_forms_are_distinct(text):
    """A text and its normal forms share a key exactly when they are the same characters."""
    forms = {text} | {unicodedata.normalize(f, text) for f in ("NFC", "NFD", "NFKC", "NFKD")}
    assert len(forms) > 1
    assert len({key_of(form, SPACE) for form in forms}) == len(forms)


def test_the_order_of_parameters_does_not_matter():
    """Neither the order of the fields nor that of the keys inside them is part of the key."""
    one = SPACE.with_parameters({"task": "query", "options": {"a": 1, "b": [1, 2]}})
    other = SPACE.with_parameters({"options": {"b": [1, 2], "a": 1}, "task": "query"})
    assert key_of("a", one) == key_of("a", other)


def test_every_value_of_a_parameter_is_its_own():
    """Names, values, their JSON types and the order inside an array all decide the key."""
    fields = [
        {},
        {"task": None},
        {"task": True},
        {"task": 1},
        {"task": 1.0},
        {"task": "1"},
        {"task": [1]},
        {"task": [1, 2]},
        {"task": [2, 1]},
        {"task": {"1": 1}},
        {"task": "query"},
        {"task": "passage"},
        {"Task": "query"},
        {"input_type": "query"},
        {"input_type": "query", "task": "query"},
        {"input_type": "query", "task": "passage"},
        {"input_type": "passage", "task": "query"},
    ]
    spaces = [SPACE.with_parameters(some) for some in fields]
    assert len({key_of("a", space) for space in spaces}) == len(fields)


@pytest.mark.parametrize(
    "same",
    [Space("m", 4), Space("m", 8, matryoshka=True), Space("m", 8, tokenizer="cl100k_base")],
    ids=["dimensions", "matryoshka", "tokenizer"],
)
def test_what_follows_from_the_model_is_no_part_of_the_key(same):
    """How a model is described changes no number of its vectors, hence no key."""
    assert key_of("a", same) == key_of("a", SPACE)


def test_a_secret_makes_other_digests_and_no_other_addresses():
    """Without a namespace's secret its digests cannot be made; the address needs none."""
    keys = [key_of("a", SPACE, Namespace("n", secret)) for secret in (b"", b"one", b"two")]
    assert len({key.digest for key in keys}) == 3
    assert len({key.address for key in keys}) == 1


def test_equal_secrets_do_not_join_namespaces():
    """Two namespaces are apart by name, also when their secrets are the same."""
    one, other = (key_of("a", SPACE, Namespace(name, b"secret")) for name in ("one", "other"))
    assert one.address != other.address
    assert one.digest != other.digest


def test_a_secret_is_at_most_64_bytes():
    """The longest key of BLAKE2b is taken whole, and a longer one is refused, not cut."""
    longest = [key_of("a", SPACE, Namespace("n", bytes(63) + end)) for end in (b"a", b"b")]
    assert longest[0] != longest[1]
    with pytest.raises(ValueError, match="64"):
        Keyring(SPACE, Namespace("n", bytes(65)))


def test_keys_have_the_sizes_the_record_and_the_store_expect():
    """Address and digest are 16 bytes each, for inputs of any length."""
    for item in ("", "a" * 100_000, (), (1,) * 10_000):
        assert [len(part) for part in key_of(item, SPACE)] == [16, 16]


def test_text_goes_in_as_its_utf_8_bytes():
    """The part of a text holds its UTF-8 form, counted in bytes and not in characters."""
    assert input_part("é") == b"s" + (2).to_bytes(8, "little") + b"\xc3\xa9"


@settings(deadline=None)
@given(st.binary(min_size=1, max_size=64), st.data())
def test_the_checksum_sees_any_changed_byte(data, draw):
    """Changing one byte, whichever, changes the checksum."""
    place = draw.draw(st.integers(0, len(data) - 1))
    changed = bytearray(data)
    changed[place] ^= draw.draw(st.integers(1, 255))
    assert checksum(bytes(changed)) != checksum(data)


def test_no_keyring_of_large_fields_is_kept():
    """A client's further fields may be as long as a request: they are not kept for the next one."""
    small = Space("m", 8).with_parameters({"task": "query"})
    assert keyring(small) is keyring(small)
    large = Space("m", 8).with_parameters({"task": "x" * MAX_KEPT_PARAMETERS})
    assert keyring(large) is not keyring(large)
    assert keyring(large).key("a") == keyring(large).key("a") != keyring(small).key("a")
