"""Who is admitted: nothing is lost, no promise is broken, nobody is passed for ever."""

from hypothesis import given
from hypothesis import strategies as st

from kvjax.engine.schedule import PASSES, Schedule

SEATS, PAGES = 3, (10, 6)
wants = st.tuples(st.tuples(st.integers(0, PAGES[0]), st.integers(0, PAGES[1])), st.integers(1, SEATS))


def promised(held):
    return [sum(pages[tier] for pages, _ in held.values()) for tier in range(len(PAGES))]


@given(st.lists(st.tuples(wants, st.integers(0, 3), st.booleans()), max_size=40))
def test_requests_come_and_go(events):
    """Each event: a request comes, some end, and one that waits may leave."""
    schedule, held, asked, order = Schedule(SEATS, PAGES, queue=100), {}, {}, []

    def admit():
        while (found := schedule.admit()) is not None:
            key, seats = found
            pages, count = asked[key]
            assert len(set(seats)) == len(seats) == count
            held[key] = pages, seats
            taken = [seat for _, seats in held.values() for seat in seats]
            assert len(set(taken)) == len(taken) <= SEATS
            assert all(used <= size for used, size in zip(promised(held), PAGES, strict=True))
            for other in order[: order.index(key)]:
                passed[other] = passed.get(other, 0) + 1
            order.remove(key)

    passed = {}
    for key, ((pages, count), ends, leaves) in enumerate(events):
        assert schedule.fits(pages, count, SEATS) and schedule.add(key, pages, count)
        asked[key] = pages, count
        order.append(key)
        if leaves and len(order) > 1:
            schedule.leave(order.pop(-2))
        for done in list(held)[:ends]:
            schedule.end(done)
            del held[done]
        admit()
    while held:
        schedule.end(next(iter(held)))
        del held[next(iter(held))]
        admit()
    assert not order and not schedule.waiting
    assert schedule.free == list(range(SEATS)) and schedule.promised == [0, 0]
    assert max(passed.values(), default=0) <= PASSES


def test_the_first_goes_first_and_is_passed_a_few_times_only():
    schedule = Schedule(4, (10,), queue=100)
    assert schedule.add("runs", (6,), 1) and schedule.admit() == ("runs", [0])
    schedule.add("large", (8,), 1)
    for number in range(PASSES):
        schedule.add(number, (1,), 1)
        assert schedule.admit() == (number, [1])
        schedule.end(number)
    schedule.add("late", (1,), 1)
    assert schedule.admit() is None
    schedule.end("runs")
    assert schedule.admit() == ("large", [0]) and schedule.admit() == ("late", [1])


def test_a_queue_ends():
    schedule = Schedule(1, (10,), queue=1)
    assert schedule.add("a", (1,), 1) and not schedule.add("b", (1,), 1)
    assert not schedule.fits((11,), 1, 1) and not schedule.fits((1,), 2, 1)
