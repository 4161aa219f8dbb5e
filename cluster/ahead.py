"""Read ahead: run several requests at once, and use their answers in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

# The size of its answer in bytes, and the function that returns the answer.
Request = tuple[int, Callable[[], bytes]]


@contextmanager
def ahead(requests: Iterable[Request], at_once: int, most_bytes: int) -> Iterator[Iterator[Future[bytes]]]:
    """Yield an iterator over the answers, in order. The `result()` of an answer raises what its request raised.

    While the caller uses an answer, the next ones are read: at most `at_once`, with at most `most_bytes` in all. A
    request for more bytes starts when its turn comes. When the block ends, requests that have not started are dropped.
    Running requests are not awaited, since each may take the client's two minutes. Python awaits them when it exits.
    """
    with closing(_answers(requests, at_once, most_bytes)) as answers:
        yield answers


def _answers(requests: Iterable[Request], at_once: int, most_bytes: int) -> Generator[Future[bytes], None, None]:
    waiting = deque(requests)
    coming: deque[tuple[int, Future[bytes]]] = deque()
    pool = ThreadPoolExecutor(at_once)
    try:
        while waiting or coming:
            if not coming:
                size, request = waiting.popleft()
                coming.append((size, pool.submit(request)))
            ahead_bytes = sum(size for size, _ in coming) - coming[0][0]
            while waiting and len(coming) <= at_once and ahead_bytes + waiting[0][0] <= most_bytes:
                size, request = waiting.popleft()
                ahead_bytes += size
                coming.append((size, pool.submit(request)))
            yield coming.popleft()[1]  # no variable keeps it, so its bytes are freed after use
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
