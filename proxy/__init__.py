"""embedding-proxy: the map of the house, and its words.

Rooms, and who may call whom (never upward, no circles)::

    proxy      the face: HTTP, command line, configuration
      └─ index       the Qdrant side
           └─ cache       never pays twice for one vector
                └─ providers   turns inputs into vectors by asking an upstream

What users and the other rooms ask for stands at the top of a package (`proxy.service`,
`cache.embedder`); what such a file is made of, in the folder beside it.

One request walks: `embeddings` (HTTP) -> `wire` (parse) -> `service` (which model) ->
`cache.embedder` (look up, wait, buy) -> `providers.scheduling` (batches, retries; which route:
`providers.routing`) -> a provider's `ask` -> `providers.answer` (checks) ->
`cache.tiered` (disk, then memory) -> `wire` (render).
A full hit never leaves `cache`.

Any other `/v1` call walks `onward.passthrough` -> `onward.origin` and back, chunk by chunk, and
meets no cache.

Words, one meaning each::

    request     one client call, of 1…N inputs
    input       a string or a token array
    model       the name the client sends; upstream model: the name sent on
    space       all that decides the numbers; vectors compare only within one
    key         the address of (format version, namespace, space, input), and its check digest
    vector      the float32 numbers of one input ("embedding" only for the wire object)
    record      the bytes kept under a key; entry: what they say
    row         an entry outside the process: address, record, and where it belongs
    partition   the entries of one namespace in one space: counted and purged together
    pair        a text and its vector that somebody already owns
    tier        memory, disk
    glance      a read from disk in the event loop's own thread, where nobody need wait for it
    worker      a process that serves; several may share the port and the store
    hit, join, miss   exclusive outcomes of a distinct input;
                inputs = duplicates + hits + joins + misses
    fetch       the one task that buys some keys, in flight until it ends: ask, check, store, hand
                out; its leader began it, its waiters wait for it
    provider    an embedder that asks an upstream; route: provider + upstream model
    kind        a sort of provider; profile: what it declares of its upstream, as data
    batch       inputs sent in one upstream call; attempt: one try of it
    origin      the provider that calls which are not ours are passed to
    retry       another attempt at the same route; a budget bounds them, and hedges
    cooldown    the time for which a provider wants no call for a model: its rate limit said so
    probe       the one call let through to a provider whose breaker is half-open
    usage       tokens and dollars, billed or saved; ledger: their sums since ever
    charge      what an upstream says a call costs; bill: that, shared among the call's inputs
    account     on whose name a request goes, and what its tokens are worth
    terms       how a request may be answered: from which entries, with which trace, at what cost
    namespace   a tenant's part of the cache
"""
