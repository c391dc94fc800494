"""What each script here is told, and what it says: texts on its input, vectors on its output.

    echo '{"one": "a text", "many": ["a text", "another"]}' | python try_openai.py

A script runs in the environment of its own client and knows nothing of the proxy but its address.

With the argument `give-up` a script makes one request of the text on its input, in its first way
and with the client's own retries, and says how it ended:

    echo '{"text": "a text"}' | python try_openai.py give-up
    {"versions": …, "ending": {"outcome": "gave up", "error": "RateLimitError", "status": 429,
                               "code": "rate_limit_exceeded", "seconds": 1.31}}
"""

import base64
import json
import random
import sys
import time
from array import array
from collections.abc import Callable, Iterable
from importlib.metadata import version


def _packed(vector: Iterable[float] | None) -> tuple[str | None, bool]:
    """Return a vector as float32 in base64, and whether its numbers were just these."""
    if vector is None:
        return None, True
    numbers = [float(number) for number in vector]
    single = array("f", numbers)
    return base64.b64encode(single.tobytes()).decode(), single.tolist() == numbers


def _answer(embed: Callable[[object], list], given: object) -> dict[str, object]:
    """Return what became of a case: vectors, or the status (else the name) of the error."""
    try:
        packed = [_packed(vector) for vector in embed(given)]
    except Exception as error:  # noqa: BLE001 - what a client raises is for the trial to judge
        return {"refused": getattr(error, "status_code", type(error).__name__)}
    return {"vectors": [text for text, _ in packed], "exact": all(same for _, same in packed)}


def _ending(embed: Callable[[object], list], text: str) -> dict[str, object]:
    """Make one request, and return how it ended and after how many seconds."""
    # The client's jitter is the same at each run, so that two runs can be compared.
    random.seed(1)
    ending: dict[str, object] = {"outcome": "ok", "error": None, "status": None, "code": None}
    begun = time.perf_counter()
    try:
        embed(text)
    except Exception as error:  # noqa: BLE001 - what a client raises is for the trial to judge
        ending["outcome"] = "gave up"
        ending["error"] = type(error).__name__
        ending["status"] = getattr(error, "status_code", None)
        ending["code"] = getattr(error, "code", None)
    return {**ending, "seconds": time.perf_counter() - begun}


def run(packages: list[str], **ways: Callable[[object], list]) -> None:
    """Answer every case in each of these ways; or with the argument `give-up`, make one request."""
    cases = json.load(sys.stdin)
    versions = {package: version(package) for package in packages}
    if sys.argv[1:] == ["give-up"]:
        ending = _ending(next(iter(ways.values())), cases["text"])
        json.dump({"versions": versions, "ending": ending}, sys.stdout)
        return
    answers = {
        f"{way}: {name}": _answer(embed, given)
        for way, embed in ways.items()
        for name, given in cases.items()
    }
    json.dump({"versions": versions, "answers": answers}, sys.stdout)
