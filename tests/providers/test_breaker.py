"""The breaker against a model of it, and each of its rules by example; the clock is ours."""

import pytest
from clock import Clock
from embedding_proxy.providers.routing.circuit_breaker import (
    FIRST_OPEN_S,
    JITTER,
    MAX_FAILURES,
    MAX_OPEN_S,
    MIN_CALLS,
    PROBE_WAIT_S,
    WINDOW_S,
    CircuitBreaker,
    State,
    Verdict,
)
from hypothesis import settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    Bundle,
    RuleBasedStateMachine,
    consumes,
    invariant,
    precondition,
    rule,
)


def made(chance=0.0):
    """Return a breaker and its clock; with chance 0 openings have their full length."""
    clock = Clock()
    return CircuitBreaker(clock, lambda: chance), clock


def play(breaker, *verdicts):
    """Make one call after another."""
    for verdict in verdicts:
        breaker.release(breaker.acquire(), verdict)


GOOD, BAD, NONE = Verdict.SUCCESS, Verdict.FAILURE, Verdict.NONE


def test_five_failures_in_a_row_open_it():
    """Four do not, and a success in between begins the row anew."""
    breaker, _ = made()
    play(breaker, *[BAD] * (MAX_FAILURES - 1), GOOD, *[BAD] * (MAX_FAILURES - 1))
    assert breaker.state is State.CLOSED
    play(breaker, BAD)
    assert (breaker.state, breaker.times_opened, breaker.wait_s) == (State.OPEN, 1, FIRST_OPEN_S)
    assert breaker.acquire() is None


def test_calls_without_a_verdict_do_not_break_a_row():
    """A cancelled call or a rate limit says nothing of the service, either way."""
    breaker, _ = made()
    play(breaker, BAD, BAD, NONE, NONE, BAD, BAD, NONE, BAD)
    assert breaker.state is State.OPEN


def test_half_of_ten_failures_open_it():
    """Half of the calls is enough when there are ten of them, and no sooner."""
    breaker, _ = made()
    play(breaker, *[GOOD, BAD] * (MIN_CALLS // 2 - 1), GOOD)
    assert breaker.state is State.CLOSED
    play(breaker, BAD)
    assert breaker.state is State.OPEN
    assert "5 of its last 10" in breaker.reason


def test_less_than_half_does_not_open_it():
    """A provider that mostly answers is asked on."""
    breaker, _ = made()
    play(breaker, *[GOOD, GOOD, BAD] * 30)
    assert breaker.state is State.CLOSED


def test_old_calls_are_forgotten():
    """What was more than thirty seconds ago counts neither for it nor against it."""
    breaker, clock = made()
    play(breaker, *[GOOD] * 9)
    clock.now += WINDOW_S
    play(breaker, *[BAD, BAD, GOOD] * 3)
    assert breaker.state is State.CLOSED
    play(breaker, BAD)
    assert breaker.state is State.OPEN


def test_each_failed_probe_opens_it_for_twice_as_long():
    """1, 2, 4 … seconds, up to five minutes; a success begins again at one."""
    breaker, clock = made()
    play(breaker, *[BAD] * MAX_FAILURES)
    lengths = []
    for _ in range(11):
        lengths.append(breaker.wait_s)
        clock.now += breaker.wait_s
        assert breaker.state is State.HALF_OPEN
        play(breaker, BAD)
    assert lengths == [1, 2, 4, 8, 16, 32, 64, 128, 256, MAX_OPEN_S, MAX_OPEN_S]
    clock.now += MAX_OPEN_S
    play(breaker, GOOD)
    assert (breaker.state, breaker.wait_s, breaker.reason) == (State.CLOSED, 0, "")
    play(breaker, *[BAD] * MAX_FAILURES)
    assert breaker.wait_s == FIRST_OPEN_S


def test_chance_makes_an_opening_shorter_by_up_to_a_fifth():
    """Many proxies do not probe at the same moment."""
    breaker, _ = made(chance=0.5)
    play(breaker, *[BAD] * MAX_FAILURES)
    assert breaker.wait_s == pytest.approx(FIRST_OPEN_S * (1 - JITTER / 2))


def test_one_probe_at_a_time():
    """While one call is the probe, no other goes through, and those who come are told to wait."""
    breaker, clock = made()
    play(breaker, *[BAD] * MAX_FAILURES)
    clock.now += FIRST_OPEN_S
    probe = breaker.acquire()
    assert probe.is_probe
    assert breaker.acquire() is None
    assert breaker.wait_s == PROBE_WAIT_S
    breaker.release(probe, GOOD)
    assert breaker.state is State.CLOSED
    assert not breaker.acquire().is_probe


def test_a_cancelled_probe_frees_its_place():
    """The next call is the probe then; nothing is decided."""
    breaker, clock = made()
    play(breaker, *[BAD] * MAX_FAILURES)
    clock.now += FIRST_OPEN_S
    play(breaker, NONE, NONE)
    assert breaker.state is State.HALF_OPEN
    assert breaker.acquire().is_probe


@pytest.mark.parametrize("verdict", Verdict)
def test_who_began_before_it_opened_decides_nothing(verdict):
    """Late failures of a crowd do not open it for longer, and late successes do not close it."""
    breaker, clock = made()
    late = [breaker.acquire() for _ in range(20)]
    play(breaker, *[BAD] * MAX_FAILURES)
    for permit in late[:10]:
        breaker.release(permit, verdict)
    assert (breaker.state, breaker.times_opened, breaker.wait_s) == (State.OPEN, 1, FIRST_OPEN_S)
    clock.now += FIRST_OPEN_S
    probe = breaker.acquire()
    breaker.release(late[10], verdict)
    assert breaker.acquire() is None
    breaker.release(probe, GOOD)
    for permit in late[11:]:
        breaker.release(permit, verdict)
    assert (breaker.state, breaker.failures) == (State.CLOSED, 0)


def test_a_trip_is_proved_over_by_one_call():
    """After a bill is paid, one call tells; of a crowd that was refused, the first one counts."""
    breaker, clock = made()
    crowd = [breaker.acquire() for _ in range(5)]
    for permit in crowd:
        breaker.open(permit, 300, "out of credit")
        clock.now += 1
    assert (breaker.state, breaker.times_opened, breaker.reason) == (State.OPEN, 1, "out of credit")
    assert breaker.wait_s == 295
    clock.now += 295
    assert breaker.acquire().is_probe
    assert breaker.acquire() is None


class Model(RuleBasedStateMachine):
    """Calls that overlap at will, and time that goes on, against the rules told plainly."""

    permits = Bundle("permits")

    def __init__(self):
        super().__init__()
        self.breaker, self.clock = made()
        self.open_until = None
        self.length = 0.0
        self.is_probe = None
        self.current = set()
        self.history = []

    def may(self):
        now = self.clock.now
        return self.open_until is None or (now >= self.open_until and self.is_probe is None)

    @rule(target=permits)
    def enter(self):
        permit = self.breaker.acquire()
        assert (permit is not None) == self.may()
        if permit is None:
            return None
        assert permit.is_probe == (self.open_until is not None)
        if permit.is_probe:
            self.is_probe = permit
        self.current.add(permit)
        return permit

    @rule(permit=consumes(permits), verdict=st.sampled_from(Verdict))
    def leave(self, permit, verdict):
        if permit is None:
            return
        self.breaker.release(permit, verdict)
        if permit not in self.current:
            return
        self.current.discard(permit)
        was_probe, self.is_probe = (
            permit is self.is_probe,
            None if permit is self.is_probe else self.is_probe,
        )
        if verdict is NONE:
            return
        if was_probe:
            self._move(opens=verdict is BAD)
            return
        self.history.append((self.clock.now, verdict))
        recent = [v for t, v in self.history if t > self.clock.now - WINDOW_S]
        row = [v for _, v in self.history][-MAX_FAILURES:]
        in_a_row = len(row) == MAX_FAILURES and set(row) == {BAD}
        half = len(recent) >= MIN_CALLS and recent.count(BAD) * 2 >= len(recent)
        if verdict is BAD and (in_a_row or half):
            self._move(opens=True)

    def _move(self, *, opens):
        self.current.clear()
        self.history.clear()
        self.length = min(max(self.length * 2, FIRST_OPEN_S), MAX_OPEN_S) if opens else 0.0
        self.open_until = self.clock.now + self.length if opens else None

    @rule(seconds=st.sampled_from([0.25, 1.0, 7.0, WINDOW_S, MAX_OPEN_S]))
    def time_goes_on(self, seconds):
        self.clock.now += seconds

    @precondition(lambda self: self.open_until is not None)
    @rule()
    def the_opening_ends(self):
        self.clock.now = max(self.clock.now, self.open_until)

    @invariant()
    def they_agree(self):
        now = self.clock.now
        if self.open_until is not None and now < self.open_until:
            expected = State.OPEN
        else:
            expected = State.CLOSED if self.open_until is None else State.HALF_OPEN
        assert self.breaker.state is expected
        assert self.breaker.is_ready == self.may()
        assert (self.breaker.wait_s == 0) == self.may()


TestModel = pytest.mark.untraced(Model.TestCase)
TestModel.settings = settings(deadline=None, max_examples=100, stateful_step_count=60)
