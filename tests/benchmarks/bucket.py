"""A bucket for measurements."""

import os
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from multiprocessing import get_context
from multiprocessing.connection import Connection

BUCKET = "demo"
Delay = Callable[[float], int]
"""Delays all following answers of the bucket by some seconds. Returns how many requests it has had so far."""


@contextmanager
def bucket() -> Iterator[Delay]:
    """Run a strict bucket in a process of its own, so that it takes no time of this one.

    This process's environment names it from then on. Google's client is created once, so a process can use one bucket
    only.
    """
    spawn = get_context("spawn")
    here, there = spawn.Pipe()
    server = spawn.Process(target=_serve, args=(there,), daemon=False)
    server.start()
    there.close()

    def delay(seconds: float) -> int:
        here.send(seconds)
        return int(here.recv())

    try:
        os.environ.update(here.recv())
        yield delay
    finally:
        here.close()
        server.join()


def _serve(there: Connection) -> None:
    from fake_cloud.bucket import StrictBucket

    with StrictBucket() as strict:
        strict.create(BUCKET)
        there.send(dict(strict.environment))
        with suppress(EOFError):
            while True:
                strict.delay(there.recv())
                there.send(len(strict.requests))
