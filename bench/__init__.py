"""The figures of this machine against the targets, measured side by side. `make bench`.

`__main__` runs what was asked for; `process` starts servers and reads what they use; `client` makes
the load; `material` makes inputs, requests and stores. What is measured: `hits` (T1 to T4),
`misses` (T5 to T7, T13, T14), `scale` (T8 to T11), `shared` (T17), `beside` (T12, several workers,
memory after bulk replies), `peers` (in an `environment` of their own). What it is measured against:
`bare`, the limit of the stack, and `upstream`, a provider that does as it is told. `table` and
`chart` show a run, `record` keeps it and puts it onto `pages`. On demand: `profile` tells where a
hit's time goes, `eviction` and `index` what these cost a hit, `ten_million` what a store of many
small vectors does, `scale_simulation` what texts cost on several nodes, `nodes` whether real ones
agree.
"""
