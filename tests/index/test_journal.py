"""What a migration remembers."""

import pytest
from embedding_proxy.index.migration.state import (
    Counts,
    MigrationState,
    MigrationStateError,
    Phase,
    State,
)

STATE = State(
    place="http://localhost:6333",
    collection="docs",
    source="docs",
    target="docs__m-8",
    vector="",
    model="m",
    space="m",
    dimensions=8,
    rule="{content}",
    regime="reembed",
    why="because",
    offset="00000000-0000-4000-8000-000000000001",
    counts=Counts(points=3, bought=2),
    proved=[1, "x"],
)


@pytest.fixture
def journal(tmp_path):
    return MigrationState(tmp_path / "migrations", "http://localhost:6333", "docs")


def test_a_state_comes_back_as_it_was(journal):
    """Nothing is there at first; then what was written last is."""
    assert journal.load() is None
    journal.save(STATE)
    STATE.phase = Phase.COPIED
    journal.save(STATE)
    assert journal.load() == STATE
    journal.forget()
    journal.forget()
    assert journal.load() is None


def test_each_collection_of_each_place_has_its_own(tmp_path):
    """Names that look alike in a file's name, and one name at two places, are kept apart."""
    places = [("p", "a/b"), ("p", "a_b"), ("q", "a_b")]
    assert len({MigrationState(tmp_path, *place).path for place in places}) == 3
    assert all(MigrationState(tmp_path, *place).path.parent == tmp_path for place in places)


@pytest.mark.parametrize("content", [b"", b"[]", b"{}", b'{"format": 2}', b'{"format": 1}'])
def test_a_file_of_another_form_is_refused(journal, content):
    """What cannot be read is refused by name, and left as it is."""
    journal.path.parent.mkdir()
    journal.path.write_bytes(content)
    with pytest.raises(
        MigrationStateError, match=r"docs--\w+\.json is not what this version writes"
    ):
        journal.load()
    assert journal.path.read_bytes() == content


def test_dead_letters_are_added_and_replaced(journal):
    """Letters gather until a whole pass knows them all; none leave an empty file."""
    journal.append_dead_letters([])
    assert not journal.dead_letters.exists()
    journal.append_dead_letters([{"id": 1, "why": "a"}])
    journal.append_dead_letters([{"id": "x", "why": "b"}])
    assert journal.dead_letters.read_text() == '{"id":1,"why":"a"}\n{"id":"x","why":"b"}\n'
    journal.replace_dead_letters([])
    assert journal.dead_letters.read_text() == ""


def test_a_place_that_cannot_be_written_is_told(tmp_path):
    """Where no file can be, one line says so."""
    (tmp_path / "file").write_text("")
    journal = MigrationState(tmp_path / "file", "p", "docs")
    with pytest.raises(MigrationStateError, match=r"Not a directory|File exists"):
        journal.save(STATE)
    with pytest.raises(MigrationStateError, match=r"Not a directory|File exists"):
        journal.append_dead_letters([{"id": 1}])
    with pytest.raises(MigrationStateError, match="cannot be read"):
        journal.load()
