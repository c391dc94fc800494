"""embedding-proxy: HTTP, command line and configuration of a caching proxy for embeddings.

Four packages; each imports only those below it, and there are no circles::

    proxy      HTTP, command line, configuration, the embedding service
      └─ index       points in Qdrant
           └─ cache       looks up, coalesces, buys and keeps vectors
                └─ providers   turns inputs into vectors by asking an upstream

The folders of this package::

    cli           the commands
    diagnostics   what `check` and `compare` ask and measure
    http          the server: connections, routes, formats, passthrough, metrics
    service       from a model's name and inputs to vectors
    importers     readers of vectors that were bought elsewhere
    config        the configuration, validated

docs/architecture.md follows one request through these files and says where to add what.
docs/glossary.md defines the terms; each has one meaning in code, docs, logs and metrics.
"""
