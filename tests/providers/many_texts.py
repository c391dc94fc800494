"""3,000 texts of every script, made anew from a seed; and the program that had tiktoken count them.

`data/tiktoken_counts.json` holds how many tokens tiktoken finds in each, and a digest of the texts.
It was made by `python tests/providers/many_texts.py` in an environment with tiktoken 0.14.0 and
splintr-rs 0.22.0: the splitting and merging is tiktoken's own; the vocabularies, which tiktoken's
wheel lacks, were written out of splintr's, and tiktoken took them for it found their SHA-256 to be
that of OpenAI's files. `data/scripts.json` holds the code points of each script of Unicode 17, at
most six ranges of them.
"""

import base64
import hashlib
import json
import os
import random
import tempfile
from collections.abc import Iterator
from itertools import islice
from pathlib import Path

DATA = Path(__file__).parent / "data"
COUNT = 3000
ENCODINGS = {"cl100k_base": 100_256, "o200k_base": 199_998}
"""How many tokens each has, special ones aside."""

SPECIAL = ["<|endoftext|>", "<|fim_prefix|>", "<|fim_middle|>", "<|fim_suffix|>", "<|endofprompt|>"]
SPECIAL += ["<|im_start|>", "<|im_end|>", "<|startoftext|>", "<|endof", "|>", "<|"]
BETWEEN = [" ", "  ", "\t", "\n", "\r\n", "\r"]
SPACES = [*BETWEEN, " \n", "\n ", "\n\n", "\n/"]
SPACES += "\u00a0\u2003\u3000\u2028\u0085\x0b\x1c\u200b\ufeff\u180e"
MARKS = "\u0301\u0308\u0327\u20dd\u0345\u093c\u0e31\u3099\u1ab0\ufe0f\ufe0e\u05b0\u064b"
EMOJI = ["👩‍👩‍👧‍👦", "🏳️‍🌈", "🇩🇪🇫🇷", "👍🏽", "❤️", "🧑🏿‍🚀", "1️⃣", "🏴󠁧󠁢󠁳󠁣󠁴󠁿", "😀", "☺"]
CODE = [
    "def f(x: int) -> str:\n\treturn f'{x!r}'\n",
    "for (int i=0;i<n;++i){\r\n  a[i]+=b[i]*2;\r\n}\r\n",
    "SELECT * FROM t WHERE a='it''s' AND b>=1.5e-3; -- x\n",
    '{"key":[1,2.50,-3e10,null],"é":"\\u00e9"}',
    '<p class="a">x&nbsp;y</p><!-- z -->\n',
    "https://example.com/a/b?c=d&e=%20f#g",
    "0xDEADBEEF 1_000_000 3.14159 1,234,567.89 ١٢٣٤ ⅷ½² 12345678901234567890",
    "I'm you're he'LL WE'VE i'd it'S don'T l'été 'ſ 'K rock'n'roll o'clock' ''s",
    "camelCaseHTTPRequest snake_case_name SCREAMING_CASE ǅungla ﬁre İstanbul ßẞ",
    "$ git commit -m 'x' && echo \"$?\" | tee -a ~/log.txt\n\n\n",
]


def texts() -> list[str]:
    """Return the texts: the same ones on every machine and every Python."""
    # Of all that `random` has, only `random()` itself is promised to stay the same.
    draw = random.Random(20_261_122).random

    def below(n: int) -> int:
        return int(draw() * n)

    return list(islice(dict.fromkeys(_more_than_enough(below)), COUNT))


def _more_than_enough(below) -> Iterator[str]:
    scripts = list(json.loads((DATA / "scripts.json").read_text(encoding="utf-8")).values())

    def of(ranges: list[list[int]]) -> str:
        first, last = ranges[below(len(ranges))]
        return chr(first + below(last - first + 1))

    def pick(some):
        return some[below(len(some))]

    def word(ranges: list[list[int]]) -> str:
        return "".join(of(ranges) for _ in range(1 + below(9)))

    def anything() -> str:
        code = below(0x110000 - 0x800)
        return chr(code if code < 0xD800 else code + 0x800)

    latin = [[0x61, 0x7A], [0x41, 0x5A], [0xC0, 0x24F]]
    for turn in range(3 * len(scripts)):
        script = scripts[turn % len(scripts)]
        yield "".join(word(script) + pick(BETWEEN) for _ in range(1 + below(12)))
        mixed = [word(script), word(latin), *BETWEEN, "'s", "'LL", ".", "7", "/"]
        yield "".join(pick(mixed) for _ in range(12))
        yield "".join(of(script) + pick(MARKS) * below(4) for _ in range(1 + below(20)))
        if turn % 2:
            yield "".join(pick([*EMOJI, pick(SPACES), word(script)]) for _ in range(1 + below(15)))
            yield "".join(pick([*SPECIAL, pick(SPACES), word(latin)]) for _ in range(1 + below(9)))
            yield "".join(pick(SPACES) * (1 + below(40)) for _ in range(1 + below(9)))
        else:
            yield "".join(pick(CODE) + pick(SPACES) * below(5) for _ in range(1 + below(4)))
            yield "".join(anything() for _ in range(1 + below(60)))
            yield "".join(str(below(10**9)) + pick(["", ".", ",", " ", "-"]) for _ in range(9))
        if turn % 16 == 0:
            yield "".join(of(script) for _ in range(200 + below(3000)))
            yield pick(["a", "ab", "=", "0", " ", "\n", "日", "é", "\u0301"]) * (500 + below(3000))


def digest(some: list[str]) -> str:
    """Return what tells these texts from all others."""
    told = hashlib.blake2b(digest_size=16)
    for text in some:
        raw = text.encode()
        told.update(len(raw).to_bytes(8, "little") + raw)
    return told.hexdigest()


def write_vocabulary(name: str, folder: Path) -> None:
    """Put the vocabulary of an encoding where tiktoken keeps what it has downloaded."""
    import splintr  # noqa: PLC0415 - the tests count without it

    token = splintr.Tokenizer.from_pretrained(name).decode_token_bytes
    lines = (b"%b %d\n" % (base64.b64encode(token(i)), i) for i in range(ENCODINGS[name]))
    url = f"https://openaipublic.blob.core.windows.net/encodings/{name}.tiktoken"
    (folder / hashlib.sha1(url.encode()).hexdigest()).write_bytes(b"".join(lines))


def _count_by_tiktoken() -> None:
    """Write the fixture."""
    import tiktoken  # noqa: PLC0415 - the tests count without it

    made = texts()
    fixture: dict[str, object] = {"tiktoken": tiktoken.__version__, "digest": digest(made)}
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TIKTOKEN_CACHE_DIR"] = folder
        for name in ENCODINGS:
            write_vocabulary(name, Path(folder))
            # It takes the file only with the SHA-256 that it knows.
            encoding = tiktoken.get_encoding(name)
            fixture[name] = [len(encoding.encode(text, disallowed_special=())) for text in made]
    (DATA / "tiktoken_counts.json").write_text(json.dumps(fixture) + "\n", encoding="utf-8")


if __name__ == "__main__":
    _count_by_tiktoken()
