"""The address of a Redis: one server, a cluster, or the master that sentinels name. Pure.

    redis://[user[:password]@]host[:port][/database]
    redis+cluster://host1:port,host2:port
    redis+sentinel://host1:port,host2:port/master[/database]
    unix:///path/of/the/socket[?db=database]

`rediss` in place of `redis` is TLS; `valkey` and `valkeys` mean the same as the two.
"""

import enum
import re
from dataclasses import dataclass, field
from urllib.parse import parse_qs, unquote, urlsplit

EXPECTED = (
    "expected an address like redis://host:6379/0, rediss://… for TLS, redis+cluster://h1,h2,"
    " redis+sentinel://h1,h2/master, or unix:///run/redis.sock"
)
PORT = 6379
SENTINEL_PORT = 26_379
_SCHEME = re.compile(r"(redis|rediss|valkey|valkeys)(?:\+(cluster|sentinel))?")
_HOST = re.compile(r"(\[[0-9A-Fa-f:.]+\]|[A-Za-z0-9_.-]+)(?::([0-9]{1,5}))?")


class Topology(enum.StrEnum):
    """How the servers behind an address work together."""

    SINGLE = "single"
    CLUSTER = "cluster"
    SENTINEL = "sentinel"


@dataclass(frozen=True, slots=True)
class Address:
    """Where a Redis is, and who asks it."""

    topology: Topology
    hosts: tuple[tuple[str, int], ...]
    """Host and port of the server, of some nodes of the cluster, or of the sentinels."""
    is_tls: bool = False
    path: str = ""
    """Of a Unix socket; then there are no hosts."""
    master: str = ""
    """The name that the sentinels know the server by."""
    database: int = 0
    username: str = ""
    password: str = field(default="", repr=False)

    def __str__(self) -> str:
        """Return it as a URL without user and password."""
        scheme = "rediss" if self.is_tls else "redis"
        if self.path:
            return f"unix://{self.path}"
        if self.topology is not Topology.SINGLE:
            scheme = f"{scheme}+{self.topology}"
        hosts = ",".join(f"[{h}]:{p}" if ":" in h else f"{h}:{p}" for h, p in self.hosts)
        master = f"/{self.master}" if self.master else ""
        return f"{scheme}://{hosts}{master}" + (f"/{self.database}" if self.database else "")


@dataclass(frozen=True, slots=True)
class RedisOptions:
    """What a client of Redis needs to know. Shown without secrets."""

    address: Address
    prefix: str = "embedding-proxy"
    """Of all keys."""
    username: str = ""
    """In place of the address' own, as the password is."""
    password: str = field(default="", repr=False)
    sentinel_password: str = field(default="", repr=False)
    ca_file: str | None = None
    """A PEM file with certificates that are trusted besides those of the system."""
    limit_s: float = 0.005
    """How long an exchange waits for a connection, and for a reply; longer for what is large."""
    max_connections: int = 16
    """To each server."""


def parse(url: str) -> Address:
    """Return what a URL says. Raises ValueError, whose text shows nothing of the URL.

    >>> str(parse("rediss+sentinel://a,b:7/main/2"))
    'rediss+sentinel://a:26379,b:7/main/2'
    """
    scheme, separator, rest = url.partition("://")
    if not separator or re.search(r"[\x00-\x20\x7f\\#]", url):
        raise ValueError(EXPECTED)
    if scheme == "unix":
        return _socket(url)
    match = _SCHEME.fullmatch(scheme.lower())
    if match is None:
        raise ValueError(EXPECTED)
    topology = Topology(match[2] or "single")
    authority, _, path = rest.partition("/")
    credentials, _, hosts = authority.rpartition("@")
    username, _, password = credentials.partition(":")
    port = SENTINEL_PORT if topology is Topology.SENTINEL else PORT
    parts = [unquote(part) for part in path.rstrip("/").split("/")] if path.rstrip("/") else []
    master = ""
    if topology is Topology.SENTINEL:
        if not parts or not parts[0]:
            raise ValueError(f"{EXPECTED}; the name of the master is missing")
        master = parts.pop(0)
    return Address(
        topology,
        _hosts(hosts, port, is_one=topology is Topology.SINGLE),
        is_tls=match[1] in ("rediss", "valkeys"),
        master=master,
        database=_database(parts, topology),
        username=unquote(username),
        password=unquote(password),
    )


def _socket(url: str) -> Address:
    parts = urlsplit(url)
    if parts.netloc or not parts.path.startswith("/"):
        raise ValueError(f"{EXPECTED}; a socket has an absolute path")
    database = _database(parse_qs(parts.query).get("db", []), Topology.SINGLE)
    return Address(Topology.SINGLE, (), path=unquote(parts.path), database=database)


def _hosts(text: str, port: int, *, is_one: bool) -> tuple[tuple[str, int], ...]:
    hosts = []
    for one in text.split(","):
        match = _HOST.fullmatch(one)
        if match is None:
            raise ValueError(f"{EXPECTED}; a host is missing, or is not one")
        number = int(match[2] or port)
        if not 1 <= number <= 65_535:
            raise ValueError(f"{EXPECTED}; a port is no number from 1 to 65535")
        hosts.append((match[1].strip("[]"), number))
    if is_one and len(hosts) > 1:
        raise ValueError(f"{EXPECTED}; several hosts are those of a cluster, or of sentinels")
    return tuple(hosts)


def _database(parts: list[str], topology: Topology) -> int:
    if not parts:
        return 0
    if len(parts) > 1 or not (parts[0].isascii() and parts[0].isdigit()):
        raise ValueError(f"{EXPECTED}; at the end stands the number of a database")
    if topology is Topology.CLUSTER and int(parts[0]):
        raise ValueError(f"{EXPECTED}; a cluster has no databases but 0")
    return int(parts[0])
