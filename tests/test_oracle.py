"""Some hundred of the mixed requests that `make oracle` makes by the hundred thousand."""

import oracle
import pytest


async def test_mixed_requests_get_the_right_vectors():
    """Every form, order, width and encoding, many at once: none wrong, none paid for twice."""
    seen = await oracle.run(300, seed=7)
    oracle.check(seen)
    assert seen.replies[200] == 300
    assert len(seen.bought) > 150
    assert seen.repeated > 0


@pytest.mark.parametrize("spoil", ["index", "width", "vector", "order"])
def test_the_oracle_sees_what_is_wrong(spoil):
    """A reply with one fault is told from the right one."""
    asked = {"dimensions": 10}
    meant = ["a", "b"]
    rows = [
        {"index": i, "embedding": [float(x) for x in oracle.expected(item, "", 10)]}
        for i, item in enumerate(meant)
    ]

    def told():
        return oracle.compare(asked, meant, oracle.orjson.dumps({"data": rows}))

    assert told() is None
    match spoil:
        case "index":
            rows[0]["index"] = 1
        case "width":
            rows[0]["embedding"].pop()
        case "vector":
            rows[1]["embedding"] = [number + 1e-5 for number in rows[1]["embedding"]]
        case "order":
            rows[0]["embedding"], rows[1]["embedding"] = rows[1]["embedding"], rows[0]["embedding"]
    assert told()


def test_what_is_bought_twice_is_seen():
    """The purchases are compared one by one, not by their number."""
    seen = oracle.Seen(asked={("", "", "a"), ("", "", "b")})
    seen.bought.update([("", "a"), ("", "b")])
    oracle.check(seen)
    seen.bought.subtract([("", "b")])
    seen.bought.update([("", "a")])
    with pytest.raises(AssertionError, match="bought otherwise"):
        oracle.check(seen)
