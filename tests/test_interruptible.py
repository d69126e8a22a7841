"""A Ctrl-C at the instants where a real one rarely falls: while a native call's worker is being started."""

from __future__ import annotations

import threading

import pytest

from pyllm.interruptible import interruptible

start_thread = threading.Thread.start


def test_an_interrupt_as_the_worker_starts_waits_for_it(monkeypatch: pytest.MonkeyPatch) -> None:
    running, aborted, returned = threading.Event(), threading.Event(), threading.Event()

    def call() -> None:
        running.set()
        assert aborted.wait(10)
        returned.set()

    def start(thread: threading.Thread) -> None:
        start_thread(thread)
        assert running.wait(10)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", start)
    with pytest.raises(KeyboardInterrupt):
        interruptible(call, aborted.set)
    assert returned.is_set()


def test_an_interrupt_before_the_worker_begins_keeps_it_from_calling(monkeypatch: pytest.MonkeyPatch) -> None:
    workers: list[threading.Thread] = []
    called = threading.Event()

    def interrupted(thread: threading.Thread) -> None:
        workers.append(thread)
        raise KeyboardInterrupt

    monkeypatch.setattr(threading.Thread, "start", interrupted)
    with pytest.raises(KeyboardInterrupt):
        interruptible(called.set, lambda: None)
    start_thread(workers[0])  # as one that the interrupt overtook: alive, but not yet running
    workers[0].join(10)
    assert not called.is_set()
