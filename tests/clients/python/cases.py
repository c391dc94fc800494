"""What each script here is told, and what it says: texts on its input, vectors on its output.

    echo '{"one": "a text", "many": ["a text", "another"]}' | python try_openai.py

A script runs in the environment of its own client and knows nothing of the proxy but its address.
"""

import base64
import json
import sys
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


def run(packages: list[str], **ways: Callable[[object], list]) -> None:
    """Answer every case in each of these ways, one after another."""
    cases = json.load(sys.stdin)
    answers = {
        f"{way}: {name}": _answer(embed, given)
        for way, embed in ways.items()
        for name, given in cases.items()
    }
    versions = {package: version(package) for package in packages}
    json.dump({"versions": versions, "answers": answers}, sys.stdout)
