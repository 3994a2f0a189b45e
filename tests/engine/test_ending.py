"""A signal that ends a process is never lost, and never waits for the thread it interrupts."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading

from stratum.ending import Ending

# The handler comes when the main thread holds every lock that it takes while it waits: a profile function sees to that.
INTERRUPTED = """
import os, signal, sys, threading
from stratum.ending import Ending
ending = Ending.by_signals()
sent = []
def profile(frame, event, argument):
    if not sent and frame.f_code.co_name in {"wait", "_acquire_restore", "__enter__", "__exit__"} and event in {"call", "return"}:
        count.append(1)
        if len(count) == int(sys.argv[1]):
            sent.append(1)
            os.kill(os.getpid(), signal.SIGTERM)
count = []
print("begun", flush=True)
sys.setprofile(profile)
while not ending.wait(0.001):
    pass
"""


def test_a_signal_at_any_step_of_the_wait_ends_it() -> None:
    for step in range(1, 7):
        done = subprocess.run(
            [sys.executable, "-c", INTERRUPTED, str(step)], capture_output=True, text=True, timeout=60
        )
        assert (done.returncode, done.stdout, done.stderr) == (0, "begun\n", ""), step


def test_threads_that_wait_are_woken() -> None:
    ending = Ending()
    assert not ending.wait(0)
    found: list[bool] = []
    threads = [threading.Thread(target=lambda: found.append(ending.wait(60))) for _ in range(3)]
    for thread in threads:
        thread.start()
    for _ in range(70_000):
        ending.set()
    for thread in threads:
        thread.join(30)
    assert found == [True] * 3
    assert ending.wait(60)
    assert ending.is_set()


def test_a_signal_sets_it() -> None:
    before = {number: signal.getsignal(number) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        ending = Ending.by_signals()
        os.kill(os.getpid(), signal.SIGTERM)
        assert ending.wait(60)
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
