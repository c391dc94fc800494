"""The text of a point: a field of its payload, or a template over several fields.

::

    Rule.field("content")
    Rule.template("{title} {title} {description} {tags} {tags}")

    Rule.from_name("acme_ticket")

A template says its fields in braces, `{meta.title}` one inside another, `{{` and `}}` for braces of
the text. Lists are joined by spaces; what is not there is left out. What has no text at all is
`None`, never a text of blanks: nobody would find it by what such a vector means.

What no template can say, a package can do: it brings an object with a `version` and a `text`, by an
entry point of the group `embedding_proxy.texts`, or a class that makes one without arguments. Some
are here already, see `READINGS`: for the payloads of LlamaIndex, LangChain and Mem0, and our own.
"""

import contextlib
import string
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Protocol, Self, runtime_checkable

import orjson
from embedding_proxy.providers import plugins

Payload = Mapping[str, object]


class TemplateError(ValueError):
    """The template or reading cannot be used; the message says why."""


@runtime_checkable
class Maker(Protocol):
    """Makes texts of payloads."""

    version: str
    """It changes whenever the texts change."""

    def text(self, payload: Payload) -> str | None:
        """Return the text of a point; None if it has none."""
        ...


@dataclass(slots=True)
class _Field:
    """Takes one field of the payload as the text."""

    name: str
    version: str = "1"

    def text(self, payload: Payload) -> str | None:
        """Return the field, if it is a text."""
        value = payload.get(self.name)
        return value if isinstance(value, str) else None


class _LlamaIndex:
    """The text of a node in JSON, with its metadata before it as LlamaIndex embeds it."""

    version = "1"

    def text(self, payload: Payload) -> str | None:
        """Return the text that LlamaIndex embedded; None if there is no node."""
        try:
            node = orjson.loads(str(payload.get("_node_content")))
        except orjson.JSONDecodeError:
            return None
        if not isinstance(node, dict):
            return None
        resource = node.get("text_resource")
        content = node.get("text") or (resource.get("text") if isinstance(resource, dict) else None)
        excluded = set(node.get("excluded_embed_metadata_keys") or ())
        form = node.get("metadata_template") or "{key}: {value}"
        separator = node.get("metadata_seperator") or node.get("metadata_separator") or "\n"
        lines = [
            form.format(key=key, value=str(value))
            for key, value in (node.get("metadata") or {}).items()
            if key not in excluded
        ]
        metadata = separator.join(lines).strip()
        if not metadata or not content:
            return content if isinstance(content, str) else None
        whole = node.get("text_template") or "{metadata_str}\n\n{content}"
        return str(whole.format(content=content, metadata_str=metadata)).strip()


READINGS: Mapping[str, Maker] = {
    "embedding-proxy": _Field("text"),
    "langchain": _Field("page_content"),
    "llamaindex": _LlamaIndex(),
    "mem0": _Field("data"),
}
"""The readings of payloads that other tools have written, by the names that users give."""


@dataclass(frozen=True, slots=True)
class Rule:
    """The rule that makes a text of a payload."""

    parts: tuple[tuple[str, str | None], ...]
    """Pieces of text, each followed by a field, or by none at the end."""
    source: str
    """As a template: `{content}`; else the name and version of what makes the texts, without
    braces. Two rules of one source are the same."""
    maker: Maker | None = field(default=None, compare=False)

    @classmethod
    def field(cls, name: str) -> Self:
        """Return the rule that takes one field as it is. Raises TemplateError.

        >>> Rule.field("content").source
        '{content}'
        """
        rule = cls.template(f"{{{name}}}")
        if rule.parts != (("", name),):
            raise TemplateError(f"`{name}` is no name of a field; see the template")
        return rule

    @classmethod
    def template(cls, template: str) -> Self:
        """Return the rule that fills a template. Raises TemplateError.

        >>> Rule.template("{title}: {tags}").text({"title": "a", "tags": ["b", "c"]})
        'a: b c'
        """
        parts = []
        try:
            for literal, name, form, conversion in string.Formatter().parse(template):
                if form or conversion:
                    raise TemplateError(f"`{template}`: a field is only a name in braces")
                if name == "":
                    raise TemplateError(f"`{template}`: empty braces name no field")
                parts.append((literal, name))
        except ValueError as error:
            if isinstance(error, TemplateError):
                raise
            raise TemplateError(f"`{template}`: {error}") from error
        if not any(name for _, name in parts):
            raise TemplateError(f"`{template}` names no field, such as {{title}}")
        return cls(tuple(parts), template)

    @classmethod
    def from_name(cls, name: str) -> Self:
        """Return the rule of READINGS, or of an installed package. Raises TemplateError."""
        if (reading := READINGS.get(name)) is not None:
            return cls((), f"{name} {reading.version}", reading)
        absent = f"no installed package brings a way to make texts called `{name}`"
        where, maker = plugins.load(plugins.TEXTS, name, TemplateError, absent)
        if not isinstance(maker, Maker):
            raise TemplateError(f"{where} has no version and text")
        return cls((), f"{name} {maker.version}", maker)

    @classmethod
    def read(cls, source: str) -> Self:
        """Return the rule of a source; an installed package must be unchanged.

        Raises TemplateError.
        """
        if "{" in source:
            return cls.template(source)
        rule = cls.from_name(source.partition(" ")[0])
        if rule.source != source:
            raise TemplateError(f"the texts were made by {source}, and {rule.source} is installed")
        return rule

    @property
    def fields(self) -> tuple[str, ...]:
        """The fields that it reads, each once."""
        return tuple(dict.fromkeys(name for _, name in self.parts if name))

    def text(self, payload: Payload | None) -> str | None:
        """Return the text of a point, or None if none of the fields holds any.

        >>> rule = Rule.field("content")
        >>> rule.text({"content": " as it is "}), rule.text({"content": " "}), rule.text({})
        (' as it is ', None, None)
        """
        if self.maker is not None:
            return self._text_from(self.maker, payload or {})
        values = {name: _text(_value(payload or {}, name)) for name in self.fields}
        if not any(value.strip() for value in values.values()):
            return None
        filled = (text + (values[name] if name else "") for text, name in self.parts)
        return "".join(filled)

    def _text_from(self, maker: Maker, payload: Payload) -> str | None:
        try:
            text = maker.text(payload)
        except Exception as error:
            why = f"{type(error).__name__}: {error}"
            raise TemplateError(f"{self.source} fails at a payload: {why}") from error
        if text is not None and not isinstance(text, str):
            raise TemplateError(f"{self.source} gives no text, but a {type(text).__name__}")
        return text if text and text.strip() else None


def _value(payload: Payload, name: str) -> object:
    """Return a field by its whole name, or step by step if there is no field of that name."""
    if name in payload:
        return payload[name]
    value: object = payload
    for step in name.split("."):
        value = value.get(step) if isinstance(value, Mapping) else None
    return value


def _text(value: object) -> str:
    """Return a value of a payload as text.

    >>> _text(None), _text(["a", 1]), _text(True), _text({"k": 1.5})
    ('', 'a 1', 'true', '{"k":1.5}')
    """
    if value is None:
        return ""
    if isinstance(value, str):
        return value
    if isinstance(value, Sequence):
        return " ".join(filter(None, map(_text, value)))
    return orjson.dumps(value).decode()


def readings_of(payloads: Sequence[Payload]) -> list[str]:
    """Return the names of READINGS that find a text in some of these payloads."""
    names = []
    for name in READINGS:
        rule = Rule.from_name(name)
        with contextlib.suppress(TemplateError):
            if any(rule.text(payload) is not None for payload in payloads):
                names.append(name)
    return names
