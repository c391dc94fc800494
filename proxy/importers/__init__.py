"""What people already own and can take in: files, folders and collections of texts and vectors."""

from pathlib import Path

from embedding_proxy.cache.maintenance.import_source import Source, SourceError
from embedding_proxy.index.migration.text_template import Rule

from .jsonl import JsonLines, is_jsonl
from .langchain import LangChain
from .parquet import Parquet
from .qdrant import SCHEMES, TextSource

FORMATS = ("jsonl", "parquet", "langchain", "qdrant")


def open_source(  # noqa: PLR0913 - one parameter an option
    location: str,
    *,
    format: str | None = None,  # noqa: A002 - its name on the command line
    text_field: str = "text",
    vector_field: str | None = None,
    texts: Path | None = None,
    rule: Rule | None = None,
) -> Source:
    """Return the pairs at a location. Raises SourceError if it is seen at once that there are none.

    The format follows from the location unless it is given: `….jsonl` or `….ndjson`, gzipped or
    not, `….parquet`, a folder of LangChain, or a collection of Qdrant (see `qdrant`).

    `text_field` and `vector_field` name the fields, or columns, `text` and `embedding` if not
    given. For Qdrant `vector_field` is a named vector, for LangChain a namespace; there it is
    needed where there are several. `texts` is the file of LangChain's texts. `rule` makes the
    texts of the payloads of Qdrant.
    """
    format = format or _format_of(location)  # noqa: A001
    if format not in FORMATS:
        raise SourceError(f"there is no format `{format}`; formats: {', '.join(FORMATS)}")
    if (texts is None) == (format == "langchain"):
        raise SourceError(
            "the texts of LangChain's vectors are not in its folder: name a file of them, --texts"
            if texts is None
            else f"the texts of {format} come with the vectors: leave out --texts"
        )
    if rule is not None and format != "qdrant":
        raise SourceError(f"the texts of {format} are in a field: leave out --text-by")
    path = Path(location)
    if format == "qdrant":
        return TextSource(location, text_field, vector_field, rule)
    if texts is not None:
        return LangChain(path, texts, text_field, vector_field)
    reader = JsonLines if format == "jsonl" else Parquet
    return reader(path, text_field, "embedding" if vector_field is None else vector_field)


def _format_of(location: str) -> str:
    path = Path(location)
    if location.startswith(SCHEMES):
        return "qdrant"
    if path.is_dir():
        return "langchain"
    if is_jsonl(path):
        return "jsonl"
    if path.suffix.lower() == ".parquet":
        return "parquet"
    raise SourceError(f"it cannot be told what {location} is: say so with --format")
