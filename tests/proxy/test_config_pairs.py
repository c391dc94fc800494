"""Two mistakes in one configuration: neither hides the other, and no third one is made up."""

import copy
import itertools
import re
from typing import NamedTuple

import pytest
import yaml
from embedding_proxy.proxy.config.loader import ConfigError, load, validate_content
from embedding_proxy.proxy.config.validation import known_keys
from hypothesis import example, given, settings
from hypothesis import strategies as st

BASE = {
    "server": {"port": 0},
    "cache": {"memory_mib": 1},
    "providers": {
        "mine": {"kind": "openai", "api_key_env": "MINE", "base_url": "http://h/v1"},
        "other": {"kind": "ollama"},
    },
    "models": {
        "m": {"space": "s", "dimensions": 8, "routes": [{"provider": "mine", "model": "m"}]},
        "n": {"space": "t", "dimensions": 8, "routes": [{"provider": "other", "model": "n"}]},
    },
    "index": {"qdrant": {"url": "http://h:1"}},
}
GONE = object()
"""Stands for a key that is removed."""


class Mistake(NamedTuple):
    """What is changed, which key must be named for it, and what is said of it."""

    change: dict
    key: str
    message: str
    needs: tuple[str, ...] = ()
    """Keys on which it depends: where one of them is wrong itself, nobody can tell."""


M, P = "models.m", "providers.mine"
# A key that ends in #2 is written twice.
MISTAKES = [
    Mistake({"server.prot": 1}, "server.prot", "did you mean port?"),
    Mistake({"server.port": "x"}, "server.port", "expected a whole number"),
    Mistake(
        {"server.host": "0.0.0.0"},
        "server.host",
        "can be reached",
        ("server.keys", "server.keys_file", "cache.directory"),
    ),
    Mistake({"server.keys": [{"key": "a"}, {"key": "a"}]}, "server.keys.1.key", "remove one"),
    Mistake({"server.keys": [{"key": ""}]}, "server.keys.0.key", "not an empty string"),
    Mistake({"server.keys": "abc"}, "server.keys", "expected a list"),
    Mistake({"sevrer": {"workers": 1}}, "sevrer", "did you mean server?"),
    Mistake({"cache.size_limit_gib": -1}, "cache.size_limit_gib", "greater than 0"),
    Mistake({"cache.directory": "${NOWHERE_AT_ALL}"}, "cache.directory", "is not set"),
    Mistake({f"{P}.api_key": "x"}, f"{P}.api_key", "does not belong in the file"),
    Mistake({f"{P}.timeout_s": 0}, f"{P}.timeout_s", "greater than 0"),
    Mistake({f"{P}.bas_url": "http://i"}, f"{P}.bas_url", "did you mean base_url?"),
    Mistake({f"{P}.kind": "opnai"}, f"{P}.kind", "did you mean openai?"),
    Mistake({f"{P}.limts": {"inputs": 0}}, f"{P}.limts", "did you mean limits?"),
    Mistake({f"{P}.kind": GONE}, f"{P}.kind", "is missing"),
    Mistake({f"{P}.api_key_env": GONE}, f"{P}.api_key_env", "is missing",
            (f"{P}.kind", f"{P}.api_key")),
    Mistake({f"{P}.options": {"a": 1}}, f"{P}.options.a", "unknown option", (f"{P}.kind",)),
    Mistake({f"{P}.share_cache": True}, f"{P}.share_cache", "is for auth: client", (f"{P}.auth",)),
    Mistake(
        {f"{P}.proxy": "http://h:1", f"{P}.trust_env": True}, f"{P}.trust_env", "exclude each other"
    ),
    Mistake({f"{P}.headers": {"Host": "h", "A": "é"}}, f"{P}.headers.Host", "is not to be set"),
    Mistake({"providers.opnai": {}}, "providers.opnai.kind", "did you mean openai?"),
    Mistake({"providers.mine#2": {"kind": "ollama"}}, P, "is written twice"),
    Mistake({"providers.other": 7}, "providers.other", "expected keys with values"),
    Mistake({f"{M}.space": GONE}, f"{M}.space", "is missing"),
    Mistake({f"{M}.spce": "s", f"{M}.space": GONE}, f"{M}.spce", "did you mean space?"),
    Mistake({f"{M}.dimensions": 0}, f"{M}.dimensions", "greater than or equal to 1"),
    Mistake(
        {f"{M}.truncate": "end", f"{M}.max_input_tokens": 9},
        f"{M}.truncate",
        "model's `tokenizer`",
    ),
    Mistake({f"{M}.routes": [{"provider": "mien", "model": "m"}]}, f"{M}.routes.0.provider", "no"),
    Mistake({f"{M}.routes": [{"provider": "mine"}]}, f"{M}.routes.0.model", "is missing"),
    Mistake({f"{M}.routes": []}, f"{M}.routes", "at least one entry"),
    Mistake({f"{M}.fallback": "nn"}, f"{M}.fallback", "no model of that name"),
    Mistake({f"{M}.fallback": [7]}, f"{M}.fallback.0", "expected keys with values"),
    Mistake({"models.n.fallback": "m", "models.n.dimensions": 9}, "models.n.fallback", "gives 8",
            (f"{M}.dimensions", f"{M}.space", f"{M}.spce", "models.n.space")),
    Mistake({"models.n.space": "s", "models.n.dimensions": 9}, "models.n.dimensions", "of the same",
            (f"{M}.space", f"{M}.spce", f"{M}.dimensions")),
    Mistake({"models.n#2": None}, "models.n", "is written twice"),
    Mistake({"index.qdrant.path": "/x"}, "index.qdrant", "set either url"),
    Mistake({"index.qdrant.timeout_s": 0}, "index.qdrant.timeout_s", "greater than or equal to 1"),
    Mistake({"index.qdrant": 7}, "index.qdrant", "expected keys with values"),
    Mistake({"passthrough": "mien"}, "passthrough", "there is no such provider"),
]  # fmt: skip


def _with(content: dict, changes: dict) -> dict:
    made = copy.deepcopy(content)
    for path, value in changes.items():
        *parents, last = path.split(".")
        place = made
        for part in parents:
            place = place[part]
        if value is GONE:
            place.pop(last, None)
        else:
            place[last] = value
    return made


def _told(changes: dict, file) -> set[tuple[str, str]]:
    """Return the mistakes that are told, as (key, message without what is known instead)."""
    text = yaml.safe_dump(_with(BASE, changes), sort_keys=False, allow_unicode=True)
    file.write_text(text.replace("#2:", ":"), encoding="utf-8")
    with pytest.raises(ConfigError) as caught:
        load(file, purpose="serve")
    line = re.compile(rf"{re.escape(str(file))}:[1-9]\d*: (\S+): (.+?)(?:; known|, first in|$)")
    found = [line.match(problem) for problem in caught.value.problems]
    assert all(found), caught.value.problems
    return {one.groups() for one in found}


def _is_above(path: str, other: str) -> bool:
    return f"{other}.".startswith(f"{path}.")


def _exclude(first: Mistake, second: Mistake) -> bool:
    """Tell whether both cannot be made in one file."""
    return any(
        _is_above(one, other) or _is_above(other, one)
        for one, other in itertools.product(first.change, second.change)
    )


def _is_open(mistake: Mistake, other: Mistake) -> bool:
    """Tell whether a mistake cannot be known beside the other one."""
    return any(
        _is_above(place, need) or _is_above(need, place)
        for place, need in itertools.product(other.change, mistake.needs)
    )


@pytest.fixture(scope="module")
def alone(tmp_path_factory):
    """Give what is told of each mistake alone."""
    file = tmp_path_factory.mktemp("alone") / "config.yaml"
    return [_told(one.change, file) for one in MISTAKES]


def test_each_mistake_is_told(alone):
    """As the table says, and nothing that only follows from it."""
    for mistake, told in zip(MISTAKES, alone, strict=True):
        assert any(key == mistake.key and mistake.message in text for key, text in told), told
        assert all(key.startswith(mistake.key.rpartition(".")[0]) for key, _ in told), told


@pytest.mark.parametrize("i", range(len(MISTAKES)), ids=lambda i: MISTAKES[i].key)
def test_no_mistake_hides_another(i, alone, tmp_path):
    """Beside any other mistake each is told, and no third one."""
    first = MISTAKES[i]
    for k in range(i + 1, len(MISTAKES)):
        second = MISTAKES[k]
        if _exclude(first, second):
            continue
        told = _told({**first.change, **second.change}, tmp_path / "config.yaml")
        wanted = (alone[i] if not _is_open(first, second) else set()) | (
            alone[k] if not _is_open(second, first) else set()
        )
        assert told == wanted, (first, second)


SECTIONS = [("server",), ("providers", "x"), ("models", "x"), ("index", "qdrant")]
NAMES = ["openai", "mine", "my own", "m", "", 1, True, None, 2.5, "zzz"]
ANY_KEY = st.sampled_from(
    [*NAMES, *{key for part in SECTIONS for key in known_keys(part)}, "modles", "tmeout_s"]
)
SCALARS = st.sampled_from(
    [*(None, True, 0, -3, 2.5, "x", "", "openai", "client", "http://h:1/v1", "${NOWHERE}", "off")]
)
ANYTHING = st.recursive(
    SCALARS,
    lambda below: (
        st.lists(below, max_size=3) | st.dictionaries(ANY_KEY, below, min_size=1, max_size=4)
    ),
    max_leaves=8,
)


@settings(max_examples=100)
@given(
    server=ANYTHING,
    provider=st.dictionaries(ANY_KEY, ANYTHING, max_size=4),
    model=st.dictionaries(ANY_KEY, ANYTHING, max_size=4),
    qdrant=ANYTHING,
    names=st.tuples(st.sampled_from(NAMES), st.sampled_from(NAMES)),
)
@example({}, {}, {None: {None: 1, "m": {"routes": {}}}}, {}, ("m", None))
@example({}, {}, {}, {"payload_indexes": [{}]}, ("m", "m"))
def test_any_content_is_read_or_refused(server, provider, model, qdrant, names):
    """Whatever stands where, each mistake is a line; nothing fails in another way."""
    content = {
        "server": server,
        "providers": {names[0]: provider},
        "models": {names[1]: model},
        "index": {"qdrant": qdrant},
        "modles": {names[0]: model},
    }
    with pytest.raises(ConfigError) as caught:
        validate_content(content, "a file")
    assert all(line.startswith("a file: ") for line in caught.value.problems)
