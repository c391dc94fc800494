"""What a refusal is about is read from its status, its codes and the field it names."""

import pytest
from embedding_proxy.providers.base import InputRefused, RateLimited
from embedding_proxy.providers.batching.refusal import is_about_an_input, is_about_size


@pytest.mark.parametrize(
    ("refusal", "size", "one"),
    [
        (InputRefused("m"), False, True),
        (InputRefused("m", status=422), False, True),
        (InputRefused("m", param="input"), False, True),
        (InputRefused("m", param="input[3]"), False, True),
        (InputRefused("m", param="$.input"), False, True),
        (InputRefused("m", param="input", index=3), False, False),
        (InputRefused("m", param="input_type"), False, False),
        (InputRefused("m", param="model"), False, False),
        (InputRefused("m", status=403), False, True),
        (InputRefused("m", status=404), False, False),
        (InputRefused("m", status=413), True, False),
        (InputRefused("m", kind="max_tokens_per_request"), True, False),
        (InputRefused("m", code="max_tokens_per_request", param="input"), True, False),
        (RateLimited("p", "m"), False, False),
    ],
)
def test_refusals_are_told_apart(refusal, size, one):
    """Too large, one bad input, or something that all inputs share."""
    assert (is_about_size(refusal), is_about_an_input(refusal)) == (size, one)
