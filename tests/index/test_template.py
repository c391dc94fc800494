"""Which text a point stands for."""

import pytest
from embedding_proxy.index.migration.text_template import Rule, TemplateError

TICKET = {"title": "T", "description": "D", "tags": ["a", "b"], "meta": {"team": "x", "n": 3}}


@pytest.mark.parametrize(
    ("template", "text"),
    [
        ("{title} {title} {description} {tags} {tags}", "T T D a b a b"),
        ("{meta.team}/{meta.n}", "x/3"),
        ("{{{title}}}", "{T}"),
        ("{title}{missing}.", "T."),
        ("{missing} {meta.missing} {title.deep}", None),
    ],
)
def test_templates(template, text):
    """Fields are filled in, lists joined, braces doubled; what is missing is left out."""
    assert Rule.template(template).text(TICKET) == text


@pytest.mark.parametrize(
    ("payload", "text"),
    [
        ({"a.b": "whole name"}, "whole name"),
        ({"a": {"b": "two steps"}}, "two steps"),
        ({"a.b": ""}, None),
        ({"a.b": " \n"}, None),
        ({"a.b": None}, None),
        ({"a.b": []}, None),
        ({"a.b": ["x", None, "", "y"]}, "x y"),
        ({"a.b": 0}, "0"),
        ({}, None),
        (None, None),
    ],
)
def test_a_field(payload, text):
    """A field is found by its whole name or step by step, and a blank text is none."""
    assert Rule.field("a.b").text(payload) == text


def test_a_text_is_taken_as_it_is():
    """White space belongs to the text: the cache's key and the old vector were made with it."""
    assert Rule.field("content").text({"content": " x\n"}) == " x\n"


def test_a_rule_is_read_back_from_its_source():
    """The journal keeps a rule's source, which gives the same rule for fields and templates."""
    for rule in (Rule.field("content"), Rule.template("{a}: {b.c} {{}}")):
        assert Rule.template(rule.source) == rule
    assert Rule.template("{a} {b} {a}").fields == ("a", "b")


@pytest.mark.parametrize("template", ["no field", "", "{", "{}", "{a!r}", "{a:>5}", "a}"])
def test_templates_that_cannot_be_used(template):
    """What names no field, or more than a field, is refused."""
    with pytest.raises(TemplateError):
        Rule.template(template)


@pytest.mark.parametrize("name", ["", "a}{b", "a:b", "a!r"])
def test_names_that_cannot_be_fields(name):
    """A field whose name a template cannot say is refused."""
    with pytest.raises(TemplateError):
        Rule.field(name)
