"""Removes inputs from what an upstream says of a call: texts belong in no log and no status. Pure.

One call may hold the texts of several clients, and its error is told to each of them. So an error
repeats no text, not even to the client that sent it: that one knows its own. Where a text is found
only after decoding (see `readings`), the whole message is left out.
"""

from collections.abc import Iterable, Sequence

from .readings import readings

INPUT_MASK = "***"
NOT_SHOWN = "(the message repeats an input, and is not shown)"
MIN_QUOTED = 16
"""Characters of an input by which it is recognised. A shorter one may be a part of any sentence."""
_MAX_PIECES = 1 << 18


class QuotedInputs:
    """Finds the texts of one call in messages. Nothing is prepared before the first message.

    Blanks and upper or lower case make no difference. A part of a text is found if it is twice as
    long as MIN_QUOTED, and a shorter one if a text begins with it; in calls of more than 4 million
    characters only longer ones are.
    """

    def __init__(self, inputs: Iterable[object]) -> None:
        self._inputs = inputs
        self._texts: Sequence[str] = ()
        self._pieces: dict[str, tuple[int, int]] | None = None

    def hide(self, message: str) -> str:
        """Return a message of at most a few thousand characters with a mask for each quotation.

        >>> QuotedInputs(["my diary of this year"]).hide("Too long: 'My diary of this year'.")
        "Too long: '***'."
        """
        if len(message) < MIN_QUOTED:
            return message
        shown = self._masked(message)
        is_shown = all(self._masked(one) is one for one in readings(shown))
        return shown if is_shown else NOT_SHOWN

    def _masked(self, message: str) -> str:
        """Return a message with a mask for each quotation; the same object if it has none."""
        pieces = self._prepared()
        if not pieces:
            return message
        line = " ".join(message.split())
        lower = line.lower()
        if len(lower) != len(line):
            # Some letters have two lower ones, so that places do not agree.
            line = lower
        kept: list[str] = []
        end = at = 0
        while at <= len(lower) - MIN_QUOTED:
            found = pieces.get(lower[at : at + MIN_QUOTED])
            if found is None:
                at += 1
                continue
            text, place = self._texts[found[0]], found[1]
            # Of a text of megabytes no more is copied than the message is long.
            begin = max(0, place - (at - end))
            before = _common(lower[end:at][::-1], text[begin:place][::-1])
            after = _common(lower[at:], text[place : place + len(lower) - at])
            kept += [line[end : at - before], INPUT_MASK]
            end = at = at + after
        return "".join([*kept, line[end:]]) if kept else message

    def _prepared(self) -> dict[str, tuple[int, int]]:
        """Return where pieces of the texts stand: each of MIN_QUOTED characters, at equal steps."""
        if self._pieces is None:
            self._texts = [_plain(one) for one in self._inputs if isinstance(one, str)]
            size = sum(map(len, self._texts))
            step = MIN_QUOTED * (1 + size // (MIN_QUOTED * _MAX_PIECES))
            self._pieces = {
                text[at : at + MIN_QUOTED]: (i, at)
                for i, text in enumerate(self._texts)
                for at in range(0, len(text) - MIN_QUOTED + 1, step)
            }
        return self._pieces


def _common(one: str, other: str) -> int:
    """Return how many characters two texts have in common at their beginnings."""
    differing = (i for i, (a, b) in enumerate(zip(one, other, strict=False)) if a != b)
    return next(differing, min(len(one), len(other)))


def _plain(text: str) -> str:
    """Return a text in lower case, each run of blanks one blank."""
    return " ".join(text.split()).lower()
