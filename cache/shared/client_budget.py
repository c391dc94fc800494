"""What clients with budgets have spent on all nodes, and what is reserved for purchases under way.

For each client and period there is one hash: what each node's ledger says that it has billed, and a
reservation for each purchase, which lapses when it is not renewed. A node tells the whole sum of
its ledger each time, and the higher one stays: telling it again, or late, changes nothing. A script
compares and reserves in one step, so no two nodes spend the same rest of a budget.
"""

from collections.abc import Iterable

from embedding_proxy.providers.charge import LEASE_S, Decision, SpendingAnswer

from .client import RedisClient
from .script import Script, Word

_MAX_OTHERS = 10_000
_KEPT_S = 400 * 86_400
"""Sums of a period that has ended are of no use; those of a budget for ever are told again."""

_SCRIPT = Script("""
local time = redis.call('TIME')
local now = time[1] * 1000 + math.floor(time[2] / 1000)
local mine, here = 'b:' .. ARGV[1], tonumber(ARGV[2])
local limit, amount, id, lease = tonumber(ARGV[3]), ARGV[4], 'r:' .. ARGV[5], tonumber(ARGV[6])
for i = 9, #ARGV do redis.call('HDEL', KEYS[1], 'r:' .. ARGV[i]) end
local others, reserved, purchases = 0, 0, 0
local all = redis.call('HGETALL', KEYS[1])
for i = 1, #all, 2 do
  local field, value = all[i], all[i + 1]
  if field == mine then
    here = math.max(here, tonumber(value))
  elseif string.sub(field, 1, 2) == 'b:' then
    others = others + tonumber(value)
  elseif field ~= id then
    local cost, ends = string.match(value, '(%d+) (%d+)')
    if tonumber(ends) <= now then
      redis.call('HDEL', KEYS[1], field)
    else
      reserved, purchases = reserved + tonumber(cost), purchases + 1
    end
  end
end
-- An emptied server knows less than this node did.
others = math.max(others, tonumber(ARGV[8]))
local decision = 1
if limit > 0 then
  local cost = tonumber(amount)
  if others + here >= limit then
    decision = 2
  elseif purchases > 0 and (cost == 0 or others + here + reserved + cost > limit) then
    decision = 0
  end
end
if decision == 1 and lease > 0 then
  redis.call('HSET', KEYS[1], id, amount .. ' ' .. string.format('%.0f', now + lease))
end
redis.call('HSET', KEYS[1], mine, string.format('%.0f', here))
redis.call('EXPIRE', KEYS[1], ARGV[7])
return {decision, string.format('%.0f', others)}
""")


class SharedSpending:
    """The budgets of clients as all nodes know them. `node` is the id of this one's ledger."""

    def __init__(self, client: RedisClient, node: str) -> None:
        self._client = client
        self._node = node
        self._others: dict[bytes, int] = {}
        """What other nodes had billed when that was asked last, by key."""

    async def reserve(  # noqa: PLR0913 - by name
        self, name: str, first_day: int, *, here: int, limit: int, amount: int, purchase: str
    ) -> SpendingAnswer | None:
        """Reserve `amount` nanodollars for a purchase, if they fit into a client's budget.

        `here` is what this node has billed in the period that began on `first_day`. None = the
        server cannot be asked now.
        """
        terms = (limit, amount, purchase, LEASE_S * 1000)
        return await self._run(name, first_day, here, terms)

    async def renew(
        self, name: str, first_day: int, *, here: int, amount: int, purchase: str
    ) -> None:
        """Keep the reservation of a purchase that is under way, also on an emptied server."""
        await self._run(name, first_day, here, (0, amount, purchase, LEASE_S * 1000))

    async def settle(
        self, name: str, first_day: int, *, here: int, ended: Iterable[str] = ()
    ) -> SpendingAnswer | None:
        """Tell what this node has billed, and which purchases have ended."""
        return await self._run(name, first_day, here, (0, 0, "", 0), ended)

    async def _run(
        self,
        name: str,
        first_day: int,
        here: int,
        terms: tuple[int, int, str, int],
        ended: Iterable[str] = (),
    ) -> SpendingAnswer | None:
        key = self._client.key("budget", f"{first_day}:{name}".encode())
        known = self._others.get(key, 0)
        arguments: list[Word] = [self._node, here, *terms, _KEPT_S, known, *ended]
        reply = await _SCRIPT.run(self._client, [key], arguments)
        if reply is None:
            return None
        if key not in self._others and len(self._others) >= _MAX_OTHERS:
            self._others.clear()
        self._others[key] = int(reply[1])
        return SpendingAnswer(Decision(reply[0]), int(reply[1]))
