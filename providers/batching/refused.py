"""What a refusal is about: the size of the call, one of its inputs, or what all inputs share."""

import re
from typing import TypeGuard

from providers.base import InputRefused

_INPUT = re.compile(r"(\$\.)?input($|[.\[])")


def is_about_size(failure: Exception) -> TypeGuard[InputRefused]:
    """Tell whether a call was refused as too large, which its parts may not be."""
    if not isinstance(failure, InputRefused):
        return False
    return failure.status == 413 or "max_tokens_per_request" in (failure.kind, failure.code)


def is_about_an_input(failure: Exception) -> TypeGuard[InputRefused]:
    """Tell whether a call was refused for one of its inputs, and it is not said which."""
    if not isinstance(failure, InputRefused) or is_about_size(failure):
        return False
    return failure.index is None and not is_about_a_field(failure)


def is_about_a_field(failure: InputRefused) -> bool:
    """Tell whether what is refused is not the input: then it is refused with every input."""
    if failure.status not in (400, 403, 413, 422):
        return True
    return failure.param is not None and not _INPUT.match(failure.param)
