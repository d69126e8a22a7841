"""Ctrl-C during a long native call: Python delivers signals only between bytecodes of the main thread."""

from __future__ import annotations

import threading
from collections.abc import Callable
from typing import TypeVar

T = TypeVar("T")


def interruptible(call: Callable[[], T], abort: Callable[[], None]) -> T:
    """Returns `call()`, run in a worker thread so that the main thread can take a KeyboardInterrupt.

    On an interrupt `abort` is called until the worker has returned, then the interrupt goes on. Outside the
    main thread, where no signal arrives, `call` simply runs. `call` must do its own locking: a second
    interrupt may leave here while the worker is still on its way out.
    """
    if threading.current_thread() is not threading.main_thread():
        return call()
    results: list[T] = []
    errors: list[BaseException] = []
    done = threading.Event()
    turn = threading.Lock()  # of whoever is first: the worker, which then calls, or an interrupt before that

    def work() -> None:
        if not turn.acquire(blocking=False):
            return
        try:
            results.append(call())
        except BaseException as error:  # handed to the waiting thread, whatever it is
            errors.append(error)
        finally:
            done.set()

    try:
        threading.Thread(target=work, name="pyllm-eval", daemon=True).start()
        done.wait()
    except BaseException:
        if not turn.acquire(blocking=False):
            while not done.wait(0.01):
                abort()
        raise
    if errors:
        raise errors[0]
    return results[0]
