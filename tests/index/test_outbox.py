"""The outbox: what was added stays, the newest of an id wins, poison steps aside."""

import os
import sqlite3
import time
from contextlib import closing

import pytest
from embedding_proxy.cache.key import checksum
from embedding_proxy.index import outbox as outbox_module
from embedding_proxy.index import outbox_db
from embedding_proxy.index.outbox import (
    FILE_NAME,
    JOURNAL,
    Outbox,
    OutboxFull,
    purge_points,
    select_entries,
)
from embedding_proxy.index.outbox_db import OutboxFile
from embedding_proxy.index.point import Point, Target, id_bytes

DOCS = Target("docs", "m", 2)
OTHER = Target("other", "m", 2)
GIB = 1 << 30


def point(number, content=b"{}", *, plain=True, new=False) -> Point:
    return Point(id_bytes(number), bytes(8), content, plain=plain, new=new)


@pytest.fixture
def outbox(tmp_path):
    with closing(Outbox(tmp_path, GIB)) as outbox:
        yield outbox


def ids(outbox, target=DOCS):
    return [int.from_bytes(one.id) for one in outbox.batch(target, GIB, 1000)]


def test_what_is_known_is_added_once_unless_it_is_new_or_has_other_content(outbox):
    """Equal points are passed over, sent or not; a new one, or one with a payload, is not."""
    assert outbox.add(DOCS, [point(1), point(2)]) == 2
    assert outbox.add(DOCS, [point(1), point(2), point(3)]) == 1
    outbox.ack(outbox.batch(DOCS, GIB, 1000))
    assert outbox.add(DOCS, [point(1)]) == 0
    assert outbox.add(OTHER, [point(1)]) == 1
    for _ in range(2):
        assert outbox.add(DOCS, [point(1, new=True), point(2, plain=False, new=True)]) == 2
    # Under the id of 2 there is something else now.
    assert outbox.add(DOCS, [point(1), point(2)]) == 1


def test_what_is_known_for_long_is_written_again(outbox, monkeypatch):
    """Nobody tells what others do in Qdrant; so nothing is known for ever."""
    outbox.add(DOCS, [point(1)])
    monkeypatch.setattr(outbox_module, "MAX_KNOWN_AGE_S", -1.0)
    assert outbox.add(DOCS, [point(1)]) == 1


def test_the_newest_of_an_id_wins_even_while_an_older_one_is_being_sent(outbox):
    """What was added during a write stays when the write is confirmed, and is sent later."""
    outbox.add(DOCS, [point(1, b"old"), point(2)])
    sending = outbox.batch(DOCS, GIB, 1000)
    outbox.add(DOCS, [point(1, b"new", new=True)])
    outbox.ack(sending)
    assert [one.payload for one in outbox.batch(DOCS, GIB, 1000)] == [b"new"]


def test_a_batch_is_bounded_by_bytes_and_count_and_never_empty(outbox):
    """A batch holds what fits, in the order of adding, and at least one point."""
    outbox.add(DOCS, [point(n, b"x" * 1000) for n in range(5)])
    assert len(outbox.batch(DOCS, 2500, 1000)) == 2
    assert len(outbox.batch(DOCS, GIB, 3)) == 3
    assert len(outbox.batch(DOCS, 1, 1000)) == 1
    assert ids(outbox) == [0, 1, 2, 3, 4]


def test_the_dead_step_aside_and_are_tried_again_after_a_start(outbox):
    """A refused point is counted with its reason; a start, or a newer point, brings it back."""
    outbox.add(DOCS, [point(1), point(2)])
    outbox.move_to_dead_letters(outbox.batch(DOCS, GIB, 1), "no such id", 0.0)
    assert ids(outbox) == [2]
    backlog = outbox.backlog()
    assert (backlog.points, backlog.dead) == (1, 1)
    assert backlog.reasons == (("docs", "no such id", 1),)
    assert outbox.requeue_dead_letters() == 1
    assert ids(outbox) == [2, 1]
    outbox.move_to_dead_letters(outbox.batch(DOCS, GIB, 1000), "no such id", 0.0)
    outbox.add(DOCS, [point(1, b"new", new=True)])
    assert outbox.backlog().dead == 1
    outbox.requeue_dead_letters()
    assert sorted(one.payload for one in outbox.batch(DOCS, GIB, 1000)) == [b"new", b"{}"]


def test_points_that_step_back_lose_nothing(outbox):
    """A point that goes to the end of the line keeps its content."""
    outbox.add(DOCS, [point(1, b"one"), point(2, b"two")])
    outbox.defer(outbox.batch(DOCS, GIB, 1))
    assert [one.payload for one in outbox.batch(DOCS, GIB, 1000)] == [b"two", b"one"]


def test_dead_letters_are_due_after_growing_pauses(outbox):
    """Each refusal doubles the pause, up to six hours; a newer point begins anew."""
    outbox.add(DOCS, [point(1)])
    now, pauses = 0.0, []
    for _ in range(12):
        outbox.move_to_dead_letters(outbox.batch(DOCS, GIB, 1), "full", now)
        pause = 0.0
        while not outbox.requeue_dead_letters(now + pause):
            pause += 30
        pauses.append(pause)
        now += pause
    assert pauses == [60.0 * 2**n for n in range(9)] + [21_600.0] * 3
    outbox.add(DOCS, [point(1, new=True)])
    outbox.move_to_dead_letters(outbox.batch(DOCS, GIB, 1), "full", now)
    assert outbox.requeue_dead_letters(now + 60) == 1


def test_a_new_collection_is_filled_again(outbox):
    """Once a collection is found to be new, what was sent is no longer known, what waits is."""
    outbox.add(DOCS, [point(1)])
    outbox.ack(outbox.batch(DOCS, GIB, 1000))
    outbox.add(DOCS, [point(2)])
    before = outbox.forgotten
    assert outbox.forget(DOCS) == 1
    assert outbox.forgotten == before + 1
    assert outbox.add(DOCS, [point(1), point(2)]) == 1


def test_the_journal_makes_a_point_once_more(outbox):
    """It has what was added last under an id, with its payload, but for what waits."""
    outbox.add(DOCS, [point(1, b'{"text": "a"}'), point(2)])
    outbox.ack(outbox.batch(DOCS, GIB, 1000))
    outbox.add(DOCS, [point(2, new=True), point(1, b'{"text": "b"}', plain=False, new=True)])
    outbox.ack(outbox.batch(DOCS, GIB, 1000)[1:])
    assert outbox.journal_targets() == [DOCS]
    (entry,) = outbox.journal(DOCS, b"", 10)
    assert (entry.point, entry.payload) == (id_bytes(1), b'{"text": "b"}')
    assert outbox.journal(DOCS, entry.point, 10) == []


def test_the_journal_leaves_room_for_what_waits(tmp_path):
    """The oldest entries go; then a point is written again by the next answer with it."""
    noise = [os.urandom(100_000) for _ in range(12)]
    with closing(Outbox(tmp_path, 1 << 20)) as outbox:
        for n, payload in enumerate(noise):
            outbox.add(DOCS, [point(n, payload)])
            outbox.ack(outbox.batch(DOCS, GIB, 1000))
            outbox.tidy()
        assert outbox.size < 700_000
        assert outbox.add(DOCS, [point(0)]) == 1


def test_the_target_that_waits_longest_is_first(outbox):
    """Targets come in the order of their oldest points; one with none does not come."""
    outbox.add(OTHER, [point(1)])
    outbox.add(DOCS, [point(1)])
    assert outbox.targets() == [OTHER, DOCS]
    outbox.ack(outbox.batch(OTHER, GIB, 1000))
    assert outbox.targets() == [DOCS]


def test_several_processes_add_to_one_file(tmp_path, outbox):
    """A second connection sees what the first has added, and the reverse."""
    with closing(Outbox(tmp_path, GIB)) as second:
        outbox.add(DOCS, [point(1)])
        assert second.add(DOCS, [point(1), point(2)]) == 1
        assert ids(outbox) == ids(second) == [1, 2]


def test_a_space_is_purged_under_its_former_and_its_present_label(tmp_path, outbox):
    """What waits since before an update is found by either label, and nothing else is."""
    former, label = "m?task=%22q%22", "m?task=~12549ea7d2d841ef"
    for number, space in enumerate([former, label, "m?task=%22p%22"]):
        outbox.add(Target("docs", space, 2), [point(number)])
    file = OutboxFile(tmp_path)
    for asked in (former, label):
        picked = select_entries(file, space=asked)
        assert {int.from_bytes(one.point) for one in picked} == {0, 1}
    assert len(select_entries(file, space="m")) == 3
    file.close()


def test_what_was_added_before_a_purge_of_another_node_is_deleted(tmp_path, outbox):
    """A node may hear of it late: what was added since then stays."""
    outbox.add(DOCS, [point(0), point(1)])
    then = time.time() + 1
    choice = {"namespace": None, "space": "m", "address": None}
    assert purge_points(tmp_path, **choice, before=then - 3600) == 0
    assert ids(outbox) == [0, 1]
    one = {"namespace": None, "space": None, "address": id_bytes(1)}
    # Waiting, and in the journal.
    assert purge_points(tmp_path, **one, before=then) == 2
    assert ids(outbox) == [0]
    assert purge_points(tmp_path, **choice, before=then) == 2
    assert ids(outbox) == []
    assert purge_points(tmp_path / "none", **choice, before=then) == 0


def test_a_full_outbox_takes_nothing_and_a_drained_one_shrinks(tmp_path):
    """Beyond its limit the file refuses points and does not know them; emptied it takes them."""
    with closing(Outbox(tmp_path, 1 << 20)) as outbox:
        big = b"x" * 300_000
        outbox.add(DOCS, [point(n, big) for n in range(4)])
        with pytest.raises(OutboxFull):
            outbox.add(DOCS, [point(9)])
        outbox.ack(outbox.batch(DOCS, GIB, 1000))
        assert outbox.size < 1 << 18
        assert outbox.add(DOCS, [point(9)]) == 1


def test_the_room_of_an_outage_is_given_back(tmp_path):
    """A file that has grown shrinks by and by once all has arrived."""
    with closing(Outbox(tmp_path, GIB)) as outbox:
        outbox.add(DOCS, [point(n, b"x" * 100_000) for n in range(300)])
        outbox.ack(outbox.batch(DOCS, GIB, 1000))
        for _ in range(5):
            outbox.tidy()
    assert (tmp_path / FILE_NAME).stat().st_size < 12_000_000


def test_a_damaged_file_is_moved_aside(tmp_path):
    """Rubbish in place of the file costs what waited, and no start."""
    with closing(Outbox(tmp_path, GIB)) as outbox:
        outbox.add(DOCS, [point(1)])
    (tmp_path / FILE_NAME).write_bytes(b"rubbish " * 1000)
    with closing(Outbox(tmp_path, GIB)) as fresh:
        assert fresh.add(DOCS, [point(1)]) == 1
    assert len(list(tmp_path.glob("*damaged*"))) == 1


def test_a_file_of_a_later_version_is_left_alone(tmp_path):
    """What a newer proxy wrote is neither read nor moved."""
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as sql:
        sql.execute("PRAGMA user_version = 99")
    with pytest.raises(sqlite3.OperationalError, match="later version"):
        Outbox(tmp_path, GIB)


# Damage that comes while it is open


def _overwrite(folder, at=0, length=1 << 20):
    """Spoil the file in place, as a medium does, and what is in its log."""
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        path = folder / name
        if path.exists():
            with path.open("r+b") as file:
                file.seek(at)
                file.write(b"rubbish " * (min(length, path.stat().st_size) // 8))


def _truncate(folder, *_):
    for name in (FILE_NAME, f"{FILE_NAME}-wal"):
        if (folder / name).exists():
            os.truncate(folder / name, 100)


def _remove(folder, *_):
    for path in folder.glob(f"{FILE_NAME}*"):
        path.unlink()


@pytest.mark.parametrize("harm", [_overwrite, _truncate, _remove])
@pytest.mark.parametrize(
    "work",
    [
        lambda one: one.add(DOCS, [point(22)]),
        lambda one: one.batch(DOCS, GIB, 10),
        Outbox.backlog,
        Outbox.requeue_dead_letters,
        lambda one: one.forgotten,
    ],
)
def test_damage_while_it_is_open_costs_what_waited_and_nothing_else(tmp_path, harm, work):
    """Whatever is done next finds a new file, in every process, and the old one is set aside."""
    with closing(Outbox(tmp_path, GIB)) as outbox, closing(Outbox(tmp_path, GIB)) as other:
        for one in (outbox, other):
            one.add(DOCS, [point(n, b"x" * 9000) for n in range(20)])
        harm(tmp_path)
        outbox.guarded(work)
        # Who still has the pages in its memory may go on for a while; another process finds out.
        assert outbox.guarded(lambda one: one.add(DOCS, [point(33)])) == 1
        assert other.guarded(lambda one: one.add(DOCS, [point(33), point(34)])) >= 1
        assert {33, 34} <= {*outbox.guarded(ids)}
        assert (outbox.renewed, other.renewed) == (1, 1)
        aside = [*tmp_path.glob("*.db.damaged-*")]
        assert len(aside) == outbox.damaged + other.damaged == (0 if harm is _remove else 1)


def test_damage_that_two_processes_find_is_set_aside_once(tmp_path):
    """The second finds a new file, and leaves it where it is."""
    damage = sqlite3.DatabaseError("file is not a database")
    with closing(OutboxFile(tmp_path)) as one, closing(OutboxFile(tmp_path)) as other:
        one._renew(damage)
        other._renew(damage)
        assert len([*tmp_path.glob("*.db.damaged-*")]) == 1
        assert (one.damaged, other.damaged) == (1, 0)
        assert not one.replaced
        assert not other.replaced


def test_what_is_written_while_another_process_sets_the_file_aside_is_not_lost(tmp_path):
    """A change to the file that is gone is made to the new one instead."""
    with closing(Outbox(tmp_path, GIB)) as outbox, closing(OutboxFile(tmp_path)) as other:

        def late(one):
            if not other.damaged:
                other._renew(sqlite3.DatabaseError("file is not a database"))
            return one.add(DOCS, [point(1)])

        assert outbox.guarded(late) == 1
    with closing(Outbox(tmp_path, GIB)) as fresh:
        assert ids(fresh) == [1]


def test_a_point_that_is_not_as_it_was_written_is_never_sent(tmp_path, outbox):
    """A flipped bit in a vector would be a wrong vector: the point is let go of, and comes anew."""
    outbox.add(DOCS, [point(n) for n in range(4)])
    with closing(sqlite3.connect(tmp_path / FILE_NAME)) as sql, sql:
        sql.execute("UPDATE waiting SET vector = x'0000000100000000' WHERE seq = 2")
        sql.execute("UPDATE waiting SET payload = x'7b20' WHERE seq = 3")
    before = outbox.forgotten
    assert ids(outbox) == [0, 3]
    assert (outbox.damaged, outbox.forgotten) == (2, before + 1)
    assert outbox.add(DOCS, [point(n) for n in range(4)]) == 2
    assert ids(outbox) == [0, 3, 1, 2]


def test_an_error_of_the_moment_is_no_damage(tmp_path, outbox):
    """What another process holds is there when it lets go; nothing is moved."""

    def locked(_):
        raise sqlite3.OperationalError("database is locked")

    with pytest.raises(sqlite3.OperationalError):
        outbox.guarded(locked)
    assert not [*tmp_path.glob("*damaged*")]


def test_a_file_of_the_second_version_is_taken_over(tmp_path):
    """What waits is sent, what was refused is tried, and what is known needs not be written."""
    path = tmp_path / FILE_NAME
    with closing(sqlite3.connect(path)) as sql:
        sql.executescript(outbox_db._LAYOUT + outbox_db._SECOND + "PRAGMA user_version = 2;")
        sql.execute("INSERT INTO target VALUES (1, 'docs', 'm', 2)")
        sum_ = checksum(id_bytes(1) + bytes(8) + b"{}")
        row = (id_bytes(1), 10, 0.0, b"{}", bytes(8), sum_, id_bytes(1), "")
        sql.execute("INSERT INTO waiting VALUES (NULL, 1, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        row = (id_bytes(2), 10, 0.0, 0.0, "no", b"{}", bytes(8), None, id_bytes(2), "")
        sql.execute("INSERT INTO dead VALUES (1, ?, ?, ?, ?, ?, ?, ?, ?, ?, ?)", row)
        known = [(1, 0), (2, 0), (3, 0), (4, 99)]
        sql.executemany(
            "INSERT INTO known VALUES (1, ?, ?)", [(id_bytes(n), mark) for n, mark in known]
        )
        sql.commit()
    with closing(Outbox(tmp_path, GIB)) as outbox:
        assert outbox.requeue_dead_letters(time.time()) == 1
        assert ids(outbox) == [1, 2]
        # Of 4 another content was known.
        assert outbox.add(DOCS, [point(3), point(4)]) == 1
        outbox.ack(outbox.batch(DOCS, GIB, 10))
        assert [one.payload for one in outbox.journal(DOCS, b"", 9)] == [b"{}", b"{}", None, b"{}"]
        outbox.forget(DOCS)
        assert outbox.add(DOCS, [point(3)]) == 1
    with closing(OutboxFile(tmp_path)) as file:
        (found,) = select_entries(file, address=id_bytes(1), tables=JOURNAL)
        assert found.point == id_bytes(1)


def test_a_file_of_the_first_version_is_taken_over(tmp_path):
    """What waits in it is sent, and found by a purge: its namespace stands in its payload."""
    path = tmp_path / FILE_NAME
    with closing(sqlite3.connect(path)) as sql:
        sql.executescript(outbox_db._LAYOUT + "PRAGMA user_version = 1;")
        sql.execute("INSERT INTO target VALUES (1, 'docs', 'm', 2)")
        for number, payload in enumerate((b'{"namespace": "n"}', b"{}")):
            row = (id_bytes(number), 8, 0.0, payload, bytes(8))
            sql.execute("INSERT INTO waiting VALUES (NULL, 1, ?, ?, ?, ?, ?)", row)
        sql.commit()
    with closing(Outbox(tmp_path, GIB)) as outbox:
        assert ids(outbox) == [0, 1]
        outbox.defer(outbox.batch(DOCS, GIB, 1))
        assert ids(outbox) == [1, 0]
    with closing(OutboxFile(tmp_path)) as file:
        assert [one.point for one in select_entries(file, namespace="n")] == [id_bytes(0)]
        assert [one.point for one in select_entries(file, address=id_bytes(1))] == [id_bytes(1)]
