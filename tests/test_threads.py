"""Making things ahead: the same things in the same order, whatever the threads."""

import threading

import pytest
import torch

from crlseq.threads import ahead, on_threads, told


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


def test_a_long_computation_says_how_far_it_is(monkeypatch: pytest.MonkeyPatch) -> None:
    """Items of 20 s each: a note after the second, third and so on of five, but not after the last."""
    clock = iter(range(0, 1000, 20))
    monkeypatch.setattr("crlseq.threads.time.monotonic", lambda: next(clock))
    said: list[str] = []
    assert [*told("abcde", 5, "letters read", said.append)] == [*"abcde"]
    assert said == ["2 of 5 letters read; about 60 s to go.", "4 of 5 letters read; about 20 s to go."]
    said.clear()
    monkeypatch.setattr("crlseq.threads.time.monotonic", lambda: 0.0)
    assert [*told("ab", 2, "letters read", said.append)] == ["a", "b"] and said == []
