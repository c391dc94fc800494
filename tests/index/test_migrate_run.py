"""A migration against writers, odd collections, doubtful claims and faults."""

import contextlib
import json
import random
import sqlite3

import numpy as np
import pytest
from embedding_proxy.index.client import Connection
from embedding_proxy.index.errors import Missing, OtherSpace, Rejected
from embedding_proxy.index.migration import qdrant
from embedding_proxy.index.migration.copy import copy, follow, verify_sample
from embedding_proxy.index.migration.cutover import (
    MissingLimit,
    count_missing,
    cutover,
    finalize,
    rollback,
)
from embedding_proxy.index.migration.plan import PASSES, Survey
from embedding_proxy.index.migration.points import Points
from embedding_proxy.index.migration.runner import (
    Migration,
    MigrationRefused,
    MigrationRequest,
    Pace,
    Regime,
    begin,
    restart,
    state_for,
)
from embedding_proxy.index.migration.snapshot import Snapshot
from embedding_proxy.index.migration.state import MigrationState, Phase
from embedding_proxy.index.migration.text_template import Rule
from embedding_proxy.index.migration.verify import verify
from embedding_proxy.providers.base import Space
from embedding_proxy.providers.errors import InvalidRequest
from embedding_proxy.providers.profile import Limits
from fault_server import vector_of
from qdrant_client import models
from qdrant_server import QdrantServer, overloaded

WIDTH = 8
SAME = 0.999
COSINE = models.VectorParams(size=WIDTH, distance=models.Distance.COSINE)


class FakeModel:
    """Vectors made from the texts; each text is bought once, and then in the cache."""

    name = requested_name = "new"
    space = Space("new", WIDTH, matryoshka=True)

    def __init__(self, dimensions=WIDTH, name="new"):
        self.dimensions = dimensions
        self.name = self.requested_name = name
        self.space = Space(name, WIDTH, matryoshka=True)
        self.cache = {}
        self.refused = set()
        self.meanwhile = []
        """What happens at the next calls, while they are answered."""

    def vector(self, text):
        whole = vector_of(self.name, text, WIDTH)
        head = whole[: self.dimensions]
        return (head / np.linalg.norm(head)).astype("<f4").tobytes()

    async def embed(self, texts, *, anew=False):
        if self.meanwhile:
            await self.meanwhile.pop(0)()
        for place, text in enumerate(texts):
            if text in self.refused:
                raise InvalidRequest("too long", index=place)
        bought = {text for text in texts if anew or text not in self.cache}
        for text in bought:
            self.cache[text] = self.vector(text)
        return [self.cache[text] for text in texts], len(bought)

    async def look(self, texts):
        return [Look(text.encode(), len(text), text in self.cache) for text in texts]


class Look:
    def __init__(self, key, tokens, cached):
        self.key, self.tokens, self.cached = key, tokens, cached


@contextlib.contextmanager
def silent(_what, _total):
    yield lambda _done: None


@pytest.fixture
async def server():
    async with QdrantServer() as server:
        yield server


@pytest.fixture
async def points(server):
    async def sleep(_):
        pass

    async with Connection(url=server.url) as connection:
        yield Points(connection, sleep=sleep)


@pytest.fixture
def made(points, tmp_path):
    """Give a function that begins a migration of `docs`."""

    async def make(model, *, pace=None, name="docs", **wanted):
        old = await qdrant.look(points, name, wanted.get("vector"))
        points.vector_name = old.vector
        asked = MigrationRequest(name, Rule.field("content"), **wanted)
        migration = Migration(
            points,
            model,
            MigrationState(tmp_path, "p", name),
            asked.rule,
            old,
            state_for(points, old, asked, asked.rule, model),
            pace=pace or Pace(page=4, ahead=2, sample=3),
            progress=silent,
            sleep=points._sleep,
        )
        await begin(migration)
        return migration

    return make


def _struct(number, text=None, **more):
    text = f"text {number}" if text is None else text
    vector = vector_of("old", text, WIDTH).tolist()
    return models.PointStruct(id=number, vector=vector, payload={"content": text, **more})


async def _fill(points, count=10, params=COSINE, name="docs"):
    await points.ask(lambda client: client.create_collection(name, params))
    structs = [_struct(number) for number in range(1, count + 1)]
    if structs:
        await _put(points, *structs, name=name)


async def _put(points, *structs, name="docs"):
    await points.ask(lambda client: client.upsert(name, list(structs)))


async def _drop(points, *ids, name="docs"):
    await points.delete(name, ids)


async def _run(migration):
    await verify_sample(migration, SAME)
    await copy(migration)
    await follow(migration)
    return migration.state


async def _verify(migration):
    with contextlib.closing(Snapshot(migration.state_file.snapshot)) as snapshot:
        return await verify(migration, SAME, snapshot)


async def _texts(server, name):
    """Return the text of each point, once its vector has been found to be of that text."""
    found = await server.points(name)
    for point in found.values():
        expected = vector_of("new", point["payload"]["content"], WIDTH)
        assert np.allclose(point["vector"], expected, atol=1e-6)
    return {one: point["payload"]["content"] for one, point in found.items()}


# Writers


async def test_what_is_written_and_deleted_meanwhile_follows(server, points, made):
    """Points that come, change and go behind the checkpoint are as in the old collection."""
    await _fill(points)
    model = FakeModel()

    async def first():
        await _put(points, _struct(1, "changed"), _struct(0, "before all"), _struct(20))

    async def second():
        await _drop(points, 2, 9)
        await _put(points, _struct(3, "text 3", note="another payload"))

    model.meanwhile = [first, second]
    migration = await made(model, pace=Pace(page=4, ahead=1))
    state = await _run(migration)
    assert state.phase is Phase.COPIED
    expected = {one: p["payload"]["content"] for one, p in (await server.points("docs")).items()}
    assert await _texts(server, state.target) == expected
    assert (await server.points(state.target))[3]["payload"]["note"] == "another payload"
    assert expected[1] == "changed"
    assert set(expected) == {0, 1, 3, 4, 5, 6, 7, 8, 10, 20}
    assert (state.counts.updated, state.counts.deleted) == (2, 1)


async def test_writers_without_end_are_told(points, made):
    """A collection of which much changes in every pass is not called equal."""
    await _fill(points)
    model = FakeModel()
    migration = await made(model, pace=Pace(page=2, ahead=1, passes=2))

    def again(number):
        async def write():
            await _put(points, *(_struct(one, f"version {number}") for one in range(1, 11)))

        return write

    model.meanwhile = [again(number) for number in range(20)]
    with pytest.raises(MigrationRefused, match="still changes after 2 passes"):
        await _run(migration)
    assert migration.state.phase is Phase.COPYING


async def test_a_text_that_goes_takes_its_old_vector_with_it(server, points, made):
    """A point whose text is gone, or is refused now, is not found by what it was."""
    await _fill(points, 3)
    model = FakeModel()
    migration = await made(model)
    await _run(migration)
    await _put(points, _struct(1, ""), _struct(2, "bad"))
    model.refused.add("bad")
    state = await _run(migration)
    assert await _texts(server, state.target) == {3: "text 3"}
    letters = migration.state_file.dead_letters.read_text()
    assert letters == '{"id":1,"why":"no text: nothing at `content`"}\n{"id":2,"why":"too long"}\n'
    await _put(points, _struct(1, "back"))
    state = await _run(migration)
    assert await _texts(server, state.target) == {1: "back", 3: "text 3"}
    assert state.counts.dead == 1


async def test_what_is_in_the_new_collection_is_not_overwritten_by_the_first_pass(points, made):
    """A point that somebody wrote there first, also just now, is left as it is."""
    await _fill(points, 3)
    model = FakeModel()
    migration = await made(model)
    target = migration.state.target

    def theirs(number):
        vector = [1.0] + [0.0] * 7
        return models.PointStruct(id=number, vector=vector, payload={"content": f"text {number}"})

    async def just_now():
        await _put(points, theirs(3), name=target)

    await _put(points, theirs(2), name=target)
    model.meanwhile = [just_now]
    await _run(migration)
    there = await points.get_points(target, [1, 2, 3], vectors=True)
    assert [np.frombuffer(there[one].vector, "<f4")[0] == 1.0 for one in (1, 2, 3)] == [
        False,
        True,
        True,
    ]
    assert "text 2" not in model.cache


# Claims


async def test_a_wrong_claim_is_found_out_by_the_sample(server, points, made):
    """Vectors that are said to be the new model's, and are not, are not copied."""
    await _fill(points)
    migration = await made(FakeModel(), old_space=FakeModel.space)
    assert migration.regime is Regime.REUSE
    with pytest.raises(MigrationRefused, match=r"3 of 3 sampled texts .* --regime reembed"):
        await _run(migration)
    assert await server.points(migration.state.target) == {}
    assert migration.state.counts.bought == 3


async def test_a_collection_that_says_whose_it_is_needs_no_claim(points, made):
    """Provenance decides without --from, and a claim against it is refused."""
    space = {"embedding_proxy": {"space": "old", "dimensions": WIDTH, "version": 1}}
    await points.ask(lambda client: client.create_collection("docs", COSINE, metadata=space))
    assert (await made(FakeModel(name="old"))).regime is Regime.REUSE
    with pytest.raises(MigrationRefused, match="says that its vectors are of old"):
        await made(FakeModel(), old_space=FakeModel.space)


async def test_vectors_of_a_matryoshka_model_are_cut(server, points, made):
    """Half the width is the head of each vector, renormalised; only the sample is bought."""
    await _fill(points)
    model = FakeModel(4, "old")
    migration = await made(model, old_space=model.space)
    state = await _run(migration)
    assert (state.regime, state.counts.copied, state.counts.bought) == ("truncate", 10, 3)
    for point in (await server.points(state.target)).values():
        expected = np.frombuffer(model.vector(point["payload"]["content"]), "<f4")
        assert np.allclose(point["vector"], expected, atol=1e-6)
    assert (await _verify(migration)).good
    # A vector that is changed later, without its payload, follows too.
    turned = models.PointVectors(id=1, vector=[1.0] * WIDTH)
    wrong = _struct(1).model_copy(update={"vector": turned.vector})
    await _put(points, wrong)
    await _run(migration)
    there = (await points.get_points(state.target, [1], vectors=True))[1].vector
    assert np.allclose(np.frombuffer(there, "<f4"), 0.5)


async def test_without_any_text_nothing_can_be_proved(points, made):
    """Where no sampled point has a text, vectors are not copied on trust."""
    await _fill(points, 0)
    old = FakeModel(name="old")
    assert (await _run(await made(old, old_space=old.space))).counts.points == 0
    await _put(points, _struct(1, ""))
    migration = await made(old, old_space=old.space)
    with pytest.raises(MigrationRefused, match="nothing proves"):
        await _run(migration)


# Collections of every form


async def test_named_and_sparse_vectors_are_carried(tmp_path):
    """Of several vectors one is migrated, and the others are carried as they are."""
    async with Connection(path=tmp_path / "qdrant") as connection:
        points = Points(connection)
        params = {"text": COSINE, "image": models.VectorParams(size=2, distance="Dot")}
        sparse = {"words": models.SparseVectorParams()}
        await points.ask(
            lambda c: c.create_collection("docs", params, sparse_vectors_config=sparse)
        )
        words = models.SparseVector(indices=[1, 5], values=[0.5, 2.0])
        vector = {"text": [1.0] * WIDTH, "image": [3.0, 4.0], "words": words}
        one = models.PointStruct(id=1, vector=vector, payload={"content": "x"})
        await _put(points, one)
        with pytest.raises(Rejected, match="--vector: text, image"):
            await qdrant.look(points, "docs")
        old = await qdrant.look(points, "docs", "text")
        points.vector_name = old.vector
        wanted = MigrationRequest("docs", Rule.field("content"), vector="text")
        model = FakeModel()
        state = state_for(points, old, wanted, wanted.rule, model)
        journal = MigrationState(tmp_path, "p", "docs")
        pace = Pace(sample=3)
        migration = Migration(points, model, journal, wanted.rule, old, state, pace, silent)
        await begin(migration)
        await _run(migration)
        found, _ = await points.ask(lambda c: c.scroll(state.target, with_vectors=True))
        assert found[0].vector["image"] == [3.0, 4.0]
        assert found[0].vector["words"] == words
        assert np.allclose(found[0].vector["text"], vector_of("new", "x", WIDTH), atol=1e-6)
        assert (await _verify(migration)).good


async def test_what_cannot_be_migrated_is_refused(points):
    """Multivectors, and collections that are not there, are told by name."""
    many = models.MultiVectorConfig(comparator=models.MultiVectorComparator.MAX_SIM)
    params = COSINE.model_copy(update={"multivector_config": many})
    await points.ask(lambda client: client.create_collection("many", params))
    with pytest.raises(Rejected, match="multivector"):
        await qdrant.look(points, "many")
    with pytest.raises(Missing, match="no collection or alias `nothing`"):
        await qdrant.look(points, "nothing")


async def test_faults_of_qdrant_are_waited_for(server, points, made):
    """A server that is overloaded now and then keeps nothing back."""
    await _fill(points)
    migration = await made(FakeModel())
    for _ in range(3):
        server.script.extend([overloaded(1)] * 2)
    state = await _run(migration)
    assert await _texts(server, state.target) == {one: f"text {one}" for one in range(1, 11)}


async def test_it_goes_no_faster_than_it_may(points, made):
    """Each page waits as long as its points are worth."""
    await _fill(points)
    waits = []

    async def sleep(seconds):
        waits.append(seconds)

    migration = await made(FakeModel(), pace=Pace(page=4, points_per_second=2))
    migration.sleep = sleep
    await _run(migration)
    assert waits == [2.0, 2.0, 1.0]


# Beginning, going on, beginning anew


async def test_a_checkpoint_follows_what_has_landed(server, points, made, monkeypatch):
    """After a write that failed, the journal stands at the page before, and a new start goes on."""
    await _fill(points)
    migration = await made(FakeModel(), pace=Pace(page=4, ahead=1))
    write, pages = points.write, []

    async def once(collection, some, *options):
        pages.append([point.id for point in some])
        if len(pages) == 2:
            raise Rejected("no")
        await write(collection, some, *options)

    monkeypatch.setattr(points, "write", once)
    with pytest.raises(Rejected):
        await _run(migration)
    left = migration.state_file.load()
    assert (left.offset, left.counts.points, left.first_pass_done) == (5, 4, False)
    assert set(await server.points(left.target)) == {1, 2, 3, 4}
    again = await made(FakeModel(), pace=Pace(page=4, ahead=1))
    assert again.state == left
    await _run(again)
    assert pages == [[1, 2, 3, 4], [5, 6, 7, 8], [5, 6, 7, 8], [9, 10]] + [[]] * 3


async def test_another_migration_of_the_same_collection_is_refused(points, made):
    """While one is under way, another one needs --restart; that deletes what the first made."""
    await _fill(points)
    migration = await made(FakeModel())
    await _run(migration)
    with pytest.raises(MigrationRefused, match=r"under way \(new, 8 numbers"):
        await made(FakeModel(4))
    await restart(points, migration.state_file)
    assert not await qdrant.exists(points, migration.state.target)
    await made(FakeModel(4))


async def test_somebody_elses_collection_is_left_alone(points, made):
    """A collection of the new one's name that is not ours is neither filled nor deleted."""
    await _fill(points)
    await _fill(points, name="docs__new-8")
    with pytest.raises(MigrationRefused, match="10 points already"):
        await made(FakeModel())
    wide = models.VectorParams(size=3, distance="Dot")
    await points.ask(lambda client: client.create_collection("narrow", wide))
    with pytest.raises(OtherSpace, match="other vectors"):
        await made(FakeModel(), into="narrow")


async def test_a_plan_counts_what_is_cached(points):
    """Dollars are those of texts that nobody has bought; equal texts count once, over all."""
    await _fill(points, 4)
    await _fill(points, 4, name="more")
    await _put(points, _struct(5, "text 1"), _struct(6, ""), _struct(7, "seventh"))
    model = FakeModel()
    model.cache["text 2"] = b""
    survey = Survey(points, model, price=2.0, pace=Pace(page=3))
    plans = []
    for name in ("docs", "more"):
        old = await qdrant.look(points, name)
        plans.append(await survey.plan(MigrationRequest(name, Rule.field("content")), old, silent))
    first, second = plans
    assert (first.points, first.without_text, first.dead, first.first_dead) == (7, 1, 1, [6])
    assert (first.to_embed, first.distinct, first.cached, first.to_buy) == (6, 5, 1, 4)
    assert (first.tokens, first.tokens_to_buy) == (4 * 6 + 7, 3 * 6 + 7)
    assert first.dollars == pytest.approx(25 * 2.0 / 1e6)
    assert (second.to_embed, second.distinct, second.to_buy, second.dollars) == (4, 0, 0, 0)
    assert (first.calls, second.calls) == (2, 0)
    assert first.seconds > second.seconds > 0


@pytest.mark.parametrize(
    ("limits", "seconds"),
    [
        (Limits(), 1),
        (Limits(concurrency=1), 2),
        (Limits(inputs=1, concurrency=3), 2),
        (Limits(tokens=10), 2),
        (Limits(requests_per_minute=1), 120),
        (Limits(tokens_per_minute=12), 150),
    ],
)
async def test_a_plan_tells_how_long_it_takes(points, limits, seconds):
    """By the calls that the provider takes at a time and in a minute, and by what reading took."""
    await _fill(points, 5)
    times = iter(range(100))
    pace = Pace(page=3, ahead=2)
    survey = Survey(points, FakeModel(), 1.0, pace, limits, clock=lambda: next(times))
    old = await qdrant.look(points, "docs")
    plan = await survey.plan(MigrationRequest("docs", Rule.field("content")), old, silent)
    # Two pages, each a second of this clock.
    assert (plan.seconds_buying, plan.seconds_moving) == (seconds, 2 * PASSES)
    assert plan.seconds == plan.seconds_buying + plan.seconds_moving


# The switch


async def test_a_spoilt_collection_is_not_switched_to(points, made):
    """A vector that is not its text's is found by the sample, and no alias changes."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    target = migration.state.target
    wrong = models.PointStruct(id=2, vector=[1.0] * WIDTH, payload={"content": "text 2"})
    await _put(points, wrong, name=target)
    with pytest.raises(MigrationRefused, match="point 2 of docs__new-8 has another vector"):
        await cutover(migration, SAME, "live")
    assert migration.state.phase is Phase.COPIED
    assert await qdrant.aliases_of(points, target) == []


async def test_what_a_search_or_a_count_does_not_find_is_told(points, made, monkeypatch):
    """Points that are not found, or do not add up, keep the aliases where they are."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    count = points.count

    async def one_more(name):
        return await count(name) + (name == migration.state.target)

    async def others(collection, to, most):
        found = await points.get_points(collection, [1, 2, 3], vectors=True)
        return [one for one in found.values() if one.vector != to]

    with monkeypatch.context() as patched:
        patched.setattr(points, "count", one_more)
        patched.setattr(points, "nearest", others)
        verdict = await _verify(migration)
    assert verdict.problems[0].startswith(
        "4 points in docs__new-8, and not the 3 that were carried"
    )
    assert [line.rpartition(" for ")[2] for line in sorted(verdict.problems[1:])] == [
        f"point {number} does not find it" for number in (1, 2, 3)
    ]
    verdict = await _verify(migration)
    assert (verdict.good, verdict.recalled) == (True, 3)


async def test_writes_until_the_cutover_are_carried(server, points, made):
    """The verification follows what was written since `run` ended."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    await _put(points, _struct(4))
    await _drop(points, 1)
    await cutover(migration, SAME, "live")
    assert set(await _texts(server, "live")) == {2, 3, 4}


class Meddler:
    """Does something before the n-th call to Qdrant of a migration."""

    def __init__(self, points, deed, at):
        self.calls, self.deed, self.at = 0, deed, at
        self._ask = points.ask

    async def ask(self, work, payloads=()):
        self.calls += 1
        if self.calls == self.at:
            await self.deed()
        return await self._ask(work)


@pytest.mark.untraced
async def test_no_write_is_lost_at_any_moment_of_a_cutover(server, made, points, monkeypatch):
    """Clients that use the alias find all that they wrote and nothing that they deleted."""
    model, late = FakeModel(), []
    pace = Pace(page=2, ahead=1, sample=1)
    # After the first cutover, undisturbed, it is known when the next ones switch.
    moments = [0]
    async with Connection(url=server.url) as own:
        client = Points(own)

        async def deed():
            await _put(client, _struct(100, "added"), _struct(2, "changed"), name="live")
            await client.delete("live", [3])

        for moment in moments:
            await _fill(points, 4)
            await qdrant.switch(points, "docs", ["live"])
            migration = await made(model, pace=pace)
            await _run(migration)
            meddler = Meddler(points, deed, moment)
            switched = []
            switch = qdrant.switch

            async def noted(*arguments, switch=switch, switched=switched, meddler=meddler):
                switched.append(meddler.calls)
                await switch(*arguments)

            with monkeypatch.context() as patch:
                patch.setattr(points, "ask", meddler.ask)
                patch.setattr(qdrant, "switch", noted)
                verdict = await cutover(migration, SAME, None)
            assert verdict.late.quiet
            if moment == 0:
                await deed()
                (at,) = switched
                # The switch reads the aliases, and changes them: what comes between is not seen.
                near = range(at - 1, at + 4)
                others = {*range(1, meddler.calls + 1)} - {*near}
                moments += [*random.sample(sorted(others), 5), *near]
            late.append((verdict.late.written, verdict.late.deleted, verdict.late.left))
            found = await server.points("live")
            texts = {1: "text 1", 2: "changed", 4: "text 4", 100: "added"}
            assert {one: point["payload"]["content"] for one, point in found.items()} == texts
            for one, text in texts.items():
                mine = np.frombuffer(model.vector(text), "<f4")
                theirs = vector_of("old", text, WIDTH)
                right = [mine] if one in (1, 4) else [mine, theirs]
                assert any(np.allclose(found[one]["vector"], each, atol=1e-5) for each in right)
            assert not migration.state_file.snapshot.exists()
            await finalize(points, migration.state_file)
            await points.ask(lambda client: client.delete_collection(migration.state.target))  # noqa: B023
    # Some of these moments lie between the last look and the switch, and some after it.
    assert {(2, 1, 0), (0, 0, 0)} <= set(late)


async def test_late_changes_of_what_was_changed_since_stay_as_they_are(server, points, made):
    """What a client wrote or deleted after the switch is newer than what reached the old one."""
    await _fill(points, 5)
    migration = await made(FakeModel())
    await _run(migration)
    switch = qdrant.switch

    async def slow(*arguments):
        await _put(points, *(_struct(number, "late") for number in (1, 2, 6)))
        await _drop(points, 3)
        await _drop(points, 4)
        await switch(*arguments)
        await _put(
            points, _struct(1, "newer"), _struct(3, "newer"), _struct(6, "newer"), name="live"
        )
        await points.delete("live", [2])

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", slow)
        verdict = await cutover(migration, SAME, "live")
    found = {one: p["payload"]["content"] for one, p in (await server.points("live")).items()}
    assert found == {1: "newer", 3: "newer", 5: "text 5", 6: "newer"}
    late = verdict.late
    assert (late.written, late.deleted, late.left, late.quiet) == (0, 1, 4, True)


async def test_late_points_without_text_are_dead_letters(server, points, made):
    """What cannot be carried after the switch is told, and an old vector does not stay for it."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    switch = qdrant.switch

    async def slow(*arguments):
        await _put(points, _struct(2, ""), _struct(4, ""))
        await switch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", slow)
        verdict = await cutover(migration, SAME, "live")
    assert set(await _texts(server, "live")) == {1, 3}
    assert (verdict.late.dead, verdict.late.written, migration.state.counts.dead) == (2, 0, 2)
    assert migration.state_file.dead_letters.read_text().count("no text") == 2


async def test_late_vectors_are_copied_where_vectors_are(server, points, made):
    """A vector that is changed during the switch follows, though its payload is the same."""
    await _fill(points, 3)
    model = FakeModel(name="old")
    migration = await made(model, old_space=model.space)
    await _run(migration)
    switch = qdrant.switch

    async def slow(*arguments):
        moved = _struct(2)
        moved.vector = vector_of("old", "moved", WIDTH).tolist()
        await _put(points, moved)
        await switch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", slow)
        verdict = await cutover(migration, SAME, "live")
    assert verdict.late.written == 1
    found = await server.points("live")
    assert np.allclose(found[2]["vector"], vector_of("old", "moved", WIDTH), atol=1e-5)


async def test_who_goes_on_writing_by_the_old_name_is_told(points, made):
    """Some passes follow such writes; then the cutover ends, and says that they go on."""
    await _fill(points, 3)
    migration = await made(FakeModel(), pace=Pace(page=4, sample=1, passes=2))
    await _run(migration)
    model, number = migration.model, 10
    switch = qdrant.switch

    async def again():
        nonlocal number
        number += 1
        await _put(points, _struct(number))
        model.meanwhile.append(again)

    async def slow(*arguments):
        await again()
        await switch(*arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", slow)
        verdict = await cutover(migration, SAME, "live")
    assert (verdict.late.written, verdict.late.quiet) == (2, False)
    assert migration.state_file.load().phase is Phase.SWITCHED


@pytest.mark.parametrize("percent", range(101))
def test_a_share_of_points_is_exact(percent):
    """As many of a hundred points as it says, and not one more."""
    limit = MissingLimit(share=percent / 100)
    assert limit.allows(percent, 100)
    assert not limit.allows(percent + 1, 100)


async def test_clients_of_the_real_name(points, made):
    """A collection that has no alias needs one; its name goes to the new one at the end."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    journal, target = migration.state_file, migration.state.target
    with pytest.raises(MigrationRefused, match="`run` has not come to its end"):
        await cutover(migration, SAME, "live")
    await _run(migration)
    with pytest.raises(MigrationRefused, match="give --alias NAME"):
        await cutover(migration, SAME, None)
    with pytest.raises(MigrationRefused, match="--alias docs: there is a collection"):
        await cutover(migration, SAME, "docs")
    await cutover(migration, SAME, "live")
    assert await qdrant.aliases_of(points, target) == ["live"]
    await _put(points, _struct(9), name="live")
    state = await rollback(points, journal)
    assert await count_missing(points, state.target, state.source) == 1
    assert await qdrant.aliases_of(points, state.source) == ["live"]
    assert (await rollback(points, journal)).phase is Phase.ROLLED_BACK
    await qdrant.switch(points, target, ["live"])
    with pytest.raises(MigrationRefused, match="rolled back"):
        await rollback(points, journal)
    await qdrant.switch(points, state.source, ["live"])

    again = await made(FakeModel())
    await _run(again)
    await cutover(again, SAME, None)
    assert not (await cutover(again, SAME, "live")).verified  # It is done already.
    with pytest.raises(MigrationRefused, match="`cutover` has been done"):
        await cutover(again, SAME, "other")
    with pytest.raises(MigrationRefused, match="is in use: `rollback` first"):
        await restart(points, journal)
    with pytest.raises(MigrationRefused, match="the cutover has begun"):
        await made(FakeModel())
    state = await finalize(points, journal, take_name=True)
    assert state.phase is Phase.FINALIZED
    assert await qdrant.aliases_of(points, target) == ["docs", "live"]
    assert (await finalize(points, journal)).phase is Phase.FINALIZED
    assert await points.count("docs") == 3
    with pytest.raises(MigrationRefused, match="it is finalized"):
        await rollback(points, journal)


async def test_an_interrupted_cutover_goes_on_without_touching_new_writes(server, points, made):
    """Killed right after the switch, it carries what is late, and leaves what clients wrote."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    switch = qdrant.switch

    async def dies(*arguments):
        await _put(points, _struct(4))
        await switch(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", dies)
        with pytest.raises(KeyboardInterrupt):
            await cutover(migration, SAME, "live")
    assert migration.state_file.load().phase is Phase.SWITCHING
    await _put(points, _struct(9), name="live")
    verdict = await cutover(migration, SAME, None)
    assert (verdict.verified, verdict.late.written) == (False, 1)
    assert migration.state_file.load().phase is Phase.SWITCHED
    assert set(await server.points("live")) == {1, 2, 3, 4, 9}


async def test_an_alias_that_was_moved_elsewhere_keeps_the_old_collection(points, made):
    """What clients use is not what the migration knows of: then nothing is deleted."""
    await _fill(points, 3)
    migration = await made(FakeModel())
    await _run(migration)
    await cutover(migration, SAME, "live")
    await qdrant.switch(points, "docs", ["live"])
    with pytest.raises(MigrationRefused, match="were changed since the cutover"):
        await finalize(points, migration.state_file)
    assert await points.count("docs") == 3


async def test_a_cutover_that_an_earlier_version_began_goes_on(server, points, made):
    """Its snapshot has fewer columns, and its state fewer fields."""
    await _fill(points, 4)
    migration = await made(FakeModel())
    await _run(migration)
    path = migration.state_file.snapshot
    switch = qdrant.switch

    async def dies(*arguments):
        await _put(points, _struct(2, "late"), _struct(5))
        await _drop(points, 3)
        await switch(*arguments)
        raise KeyboardInterrupt

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(qdrant, "switch", dies)
        with pytest.raises(KeyboardInterrupt):
            await cutover(migration, SAME, "live")
    with contextlib.closing(sqlite3.connect(path)) as sql, sql:
        sql.execute("ALTER TABLE seen DROP COLUMN vectors")
        sql.execute("ALTER TABLE seen DROP COLUMN text")
    content = json.loads(migration.state_file.path.read_text())
    del content["counts"]["without_vector"], content["snapshot"]
    migration.state_file.path.write_text(json.dumps(content))
    migration.state = migration.state_file.load()
    await _put(points, _struct(1, "newer"), name="live")
    verdict = await cutover(migration, SAME, None)
    assert (verdict.late.written, verdict.late.deleted, verdict.late.quiet) == (2, 1, True)
    found = {one: p["payload"]["content"] for one, p in (await server.points("live")).items()}
    assert found == {1: "newer", 2: "late", 4: "text 4", 5: "text 5"}
    assert migration.state_file.load().phase is Phase.SWITCHED
