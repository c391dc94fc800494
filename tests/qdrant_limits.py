"""What a server's strict mode and its keys refuse: statuses and words as those of Qdrant 1.18."""

from typing import Any


def refusal(  # noqa: PLR0911 - a table
    limits: dict[str, Any], method: str, what: str, body: Any, points: int
) -> tuple[int, str] | None:
    """Return status and words if strict mode refuses a call to `…/points{what}`; else None.

    `limits` is the strict mode of the collection, `points` how many points it has.
    """
    if not limits.get("enabled"):
        return None
    if method != "PUT" or what:
        asked = body.get("limit") if isinstance(body, dict) else None
        most = limits.get("max_query_limit")
        if what in {"/scroll", "/query"} and most is not None and asked and asked > most:
            return 400, _over(asked, most, "limit")
        return None
    count = len(body.get("points") or body["batch"]["ids"])
    most = limits.get("upsert_max_batchsize")
    if most is not None and count > most:
        return 400, _over(count, most, "upsert limit")
    most = limits.get("max_points_count")
    if most is not None and points >= most:
        return 400, f"Bad request: Max points count limit of {most} reached!"
    rate = limits.get("write_rate_limit")
    if rate is not None and count > rate:
        return 429, (
            "Rate limiting exceeded: Write rate limit exceeded, request larger than rate limiter"
            " capacity, please try to split your request"
        )
    return None


def _over(asked: int, most: int, name: str) -> str:
    return (
        f'Bad request: Limit exceeded {asked} > {most} for "{name}". Help: Reduce the "{name}"'
        f" parameter to or below {most}."
    )


def denial(  # noqa: PLR0911 - a table
    rights: dict[str, str] | None, method: str, path: str
) -> str | None:
    """Return the words of a 403 if a key may not do this; None if it may.

    `rights` are `r` or `rw` by the names of collections, "*" for all and for making them.
    """
    if rights is None:
        return None
    parts = path.strip("/").split("/")
    is_read = (
        method == "GET"
        or parts[-1] in {"scroll", "count", "query"}
        or (method == "POST" and parts[-1] == "points")
    )
    if rights.get("*") == "rw" or (rights.get("*") == "r" and is_read):
        return None
    if "*" in rights:
        return "Forbidden: Global manage access is required"
    if len(parts) < 2 or parts[1] == "aliases" or (len(parts) == 2 and not is_read):
        return None if method == "GET" else "Forbidden: Global access is required"
    own = rights.get(parts[1])
    if own is None:
        return f"Forbidden: Access to collection {parts[1]} is required"
    if is_read or own == "rw":
        return None
    return f"Forbidden: Write access to collection {parts[1]} is required"
