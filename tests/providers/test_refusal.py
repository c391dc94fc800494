"""What a refusal is about is read from its status, its codes and the field it names."""

import pytest
from embedding_proxy.providers.errors import InvalidRequest, RateLimited
from embedding_proxy.providers.scheduling.refusal import is_about_an_input, is_about_size


@pytest.mark.parametrize(
    ("refusal", "size", "one"),
    [
        (InvalidRequest("m"), False, True),
        (InvalidRequest("m", status=422), False, True),
        (InvalidRequest("m", param="input"), False, True),
        (InvalidRequest("m", param="input[3]"), False, True),
        (InvalidRequest("m", param="$.input"), False, True),
        (InvalidRequest("m", param="input", index=3), False, False),
        (InvalidRequest("m", param="input_type"), False, False),
        (InvalidRequest("m", param="model"), False, False),
        (InvalidRequest("m", status=403), False, True),
        (InvalidRequest("m", status=404), False, False),
        (InvalidRequest("m", status=413), True, False),
        (InvalidRequest("m", kind="max_tokens_per_request"), True, False),
        (InvalidRequest("m", code="max_tokens_per_request", param="input"), True, False),
        (RateLimited("p", "m"), False, False),
    ],
)
def test_refusals_are_told_apart(refusal, size, one):
    """Too large, one bad input, or something that all inputs share."""
    assert (is_about_size(refusal), is_about_an_input(refusal)) == (size, one)
