"""
Processes that help the main one: they leave signals to it, and they never outlive it.

Loading batches (data.py) and indexing a dataset (rlds_index.py) have such workers.
"""

import atexit
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from multiprocessing.connection import wait

# What stops a run: Ctrl-C, `kill`, and Slurm's warning before the time is up
STOP_SIGNALS = (signal.SIGINT, signal.SIGTERM, signal.SIGUSR1)


def serve_main_process():
    """
    Run first in each worker: signals that stop a run are for the main process, which still needs the worker until it
    has saved; and the worker ends when the main process does, even if that was killed.
    """
    for number in STOP_SIGNALS:
        signal.signal(number, signal.SIG_IGN)
    threading.Thread(target=end_with_parent, daemon=True).start()


def end_with_parent():
    wait([multiprocessing.parent_process().sentinel])
    os._exit(1)


@contextmanager
def ignored_signals() -> Iterator[None]:
    """Ignore the signals that stop a run. (Signals can be set in the main thread only; elsewhere nothing happens.)"""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, signal.SIG_IGN) for number in STOP_SIGNALS}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


@atexit.register  # behind multiprocessing's own function, as that is imported above, so it is called before it
def kill_workers():
    """
    End the workers that are left when Python ends, after an error for example. multiprocessing would send them SIGTERM,
    which they ignore, and wait for them for ever.
    """
    signal.signal(signal.SIGCHLD, signal.SIG_DFL)  # the DataLoader would call it an error that they end
    for process in multiprocessing.active_children():
        if process.daemon:
            process.kill()
