"""The limits of a provider a minute, as one allowance of all nodes: a bucket in Redis.

A script refills the bucket by the server's clock, and reserves room for a call in one step. A call
that has to wait reserves its room at once, so calls of all nodes are in one queue. The bucket may
be lost with the server's memory: each process then tells what it has taken of late, once for each
bucket, which is known by its number.
"""

from collections.abc import Callable, Mapping

from embedding_proxy.providers.allowance import Reservation

from .client import RedisClient
from .script import Script

KINDS = ("requests", "tokens")

_RESERVE = Script(
    """
local time = redis.call('TIME')
local now = time[1] + time[2] / 1000000
local known = redis.call('HMGET', KEYS[1], 'at', 'number', 'requests', 'tokens')
local at = math.min(tonumber(known[1]) or now, now)
local number = known[2] or (time[1] .. '.' .. time[2])
local is_other = ARGV[2] ~= '' and ARGV[2] ~= number
local wait, longest, levels = 0, 0, {}
for i = 0, 1 do
  local limit, cost = tonumber(ARGV[3 + 5 * i]), tonumber(ARGV[4 + 5 * i])
  if limit > 0 then
    local level = math.min(limit, (tonumber(known[3 + i]) or limit) + (now - at) * limit / 60)
    level = level - tonumber(ARGV[5 + 5 * i])
    if is_other then level = level - tonumber(ARGV[6 + 5 * i]) end
    level = math.min(limit, level + tonumber(ARGV[7 + 5 * i]))
    wait = math.max(wait, (math.min(cost, limit) - level) * 60 / limit)
    levels[i] = level
  end
end
local is_reserved = wait == 0 or wait < tonumber(ARGV[1])
for i = 0, 1 do
  if levels[i] then
    local limit, cost = tonumber(ARGV[3 + 5 * i]), tonumber(ARGV[4 + 5 * i])
    if is_reserved then levels[i] = levels[i] - cost end
    longest = math.max(longest, (limit - levels[i]) * 60 / limit)
    redis.call('HSET', KEYS[1], KIND[i], levels[i])
  end
end
redis.call('HSET', KEYS[1], 'at', now, 'number', number)
redis.call('EXPIRE', KEYS[1], math.ceil(longest) + 1)
return {is_reserved and 1 or 0, string.format('%.6f', wait), number}
""".replace("KIND[i]", "i == 0 and 'requests' or 'tokens'")
)


class Allowance:
    """The limits of one provider for all nodes, as `providers.allowance.SharedAllowance`.

    `limits` are those a minute, by kind; a kind without a limit is left out.
    """

    def __init__(
        self,
        client: RedisClient,
        name: str,
        limits: Mapping[str, float],
        count_nodes: Callable[[], int] = lambda: 1,
    ) -> None:
        self._client = client
        self._key = client.key("limits", name.encode())
        self._limits = limits
        self._count_nodes = count_nodes
        self._number = b""
        """The bucket that this process knows of."""
        self._returned = dict.fromkeys(KINDS, 0.0)
        """What was given back and not told."""

    @property
    def nodes(self) -> int:
        """How many nodes share it, as far as is known."""
        return max(1, self._count_nodes())

    async def reserve(
        self,
        cost: Mapping[str, float],
        max_wait_s: float,
        deficits: Mapping[str, float],
        untold: Mapping[str, float],
    ) -> Reservation | None:
        """Reserve room for one call; see `SharedAllowance`."""
        returned, self._returned = self._returned, dict.fromkeys(KINDS, 0.0)
        # One call at a time names the bucket: what was taken of late is told once.
        number, self._number = self._number, b""
        arguments: list[bytes | float] = [max_wait_s, number]
        for kind in KINDS:
            arguments += [
                *(self._limits.get(kind, 0.0), cost[kind]),
                *(untold.get(kind, 0.0), deficits.get(kind, 0.0), returned[kind]),
            ]
        # After a failure it is not known whether what was returned was heard; so it counts as used.
        reply = await _RESERVE.run(self._client, [self._key], arguments)
        if reply is None:
            self._number = self._number or number
            return None
        is_reserved, wait_s, self._number = reply
        return Reservation(float(wait_s), bool(is_reserved))

    def give_back(self, cost: Mapping[str, float]) -> None:
        """Give back what was reserved for a call that was not made; told with the next one."""
        for kind in KINDS:
            self._returned[kind] += cost[kind]
