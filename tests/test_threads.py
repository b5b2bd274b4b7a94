"""Making things ahead: the same things in the same order, whatever the threads."""

import threading

import pytest
import torch
from threadpoolctl import ThreadpoolController

from crlseq.threads import ahead, counted, in_parallel, on_threads, one_blas_thread, reporting


@pytest.mark.parametrize("threads", [1, 2])
@pytest.mark.parametrize("n", [0, 1, 5])
def test_what_is_made_ahead_comes_in_order(threads: int, n: int) -> None:
    with on_threads(threads):
        assert list(ahead(lambda i: i * i, range(n))) == [i * i for i in range(n)]
        assert torch.get_num_threads() == threads


def test_the_next_one_is_made_while_one_is_used() -> None:
    made: list[int] = []
    second = threading.Event()

    def make(i: int) -> int:
        made.append(i)
        if i == 1:
            second.set()
        return i

    with on_threads(2):
        for i in ahead(make, range(3)):
            if i == 0:
                assert second.wait(10)
                assert torch.get_num_threads() == 1  # the other thread has one of the two
    assert made == [0, 1, 2]


@pytest.mark.parametrize("threads", [1, 2])
def test_what_fails_is_raised_where_it_would_have_come(threads: int) -> None:
    def make(i: int) -> int:
        if i == 2:
            raise ValueError("the third")
        return i

    used: list[int] = []
    with on_threads(threads):
        with pytest.raises(ValueError, match="the third"):
            used.extend(ahead(make, range(4)))
        assert torch.get_num_threads() == threads
    assert used == [0, 1]


def test_counted_items_are_reported_once_they_are_used() -> None:
    """Each after its body, from where the count starts; what a loop within counts is not told."""
    said: list[tuple[int, int]] = []
    with reporting(lambda done, total: said.append((done, total))):
        for letter in counted("abc", 10, start=4):
            assert len(said) == "abc".index(letter)
            assert [*counted(range(7), 7)] == [*range(7)]
        assert said == [(5, 10), (6, 10), (7, 10)]
        for _ in counted("abc", 3):  # left before its end
            break
        assert [*counted("x", 1)] == ["x"] and said[3:] == [(1, 1)]
    assert [*counted("x", 1)] == ["x"] and len(said) == 4


def test_a_loop_that_was_left_does_not_bring_back_who_listened() -> None:
    said: list[tuple[int, int]] = []
    with reporting(lambda done, total: said.append((done, total))):
        left = counted("abc", 3)
        next(left)
    left.close()  # type: ignore[attr-defined]
    assert [*counted("x", 1)] == ["x"] and not said


@pytest.mark.parametrize("threads", [1, 2])
def test_a_loop_of_several_threads_is_reported_as_one(threads: int) -> None:
    said: list[tuple[int, int]] = []
    with reporting(lambda done, total: said.append((done, total))):
        made = [*counted(in_parallel(lambda i: sum(counted(range(i), i)), range(5), threads), 5)]
    assert made == [0, 0, 1, 3, 6] and said == [(i, 5) for i in range(1, 6)]


def threads_of_openblas() -> set[int]:
    return {library["num_threads"] for library in ThreadpoolController().select(internal_api="openblas").info()}


@pytest.mark.parametrize(("asked", "within"), [(None, 1), ("2", 2)])
def test_openblas_computes_on_one_thread_unless_it_was_asked_for_more(
    asked: str | None, within: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    if asked is None:
        monkeypatch.delenv("OPENBLAS_NUM_THREADS", raising=False)
    else:
        monkeypatch.setenv("OPENBLAS_NUM_THREADS", asked)
    controller = ThreadpoolController().select(internal_api="openblas")
    if not controller.info():
        pytest.skip("numpy has no OpenBLAS here")
    with controller.limit(limits=2):
        with one_blas_thread():
            assert threads_of_openblas() == {within}
        assert threads_of_openblas() == {2}
