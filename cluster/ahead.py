"""Read ahead: several requests at once, whose answers are used in order."""

from collections import deque
from collections.abc import Callable, Generator, Iterable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import closing, contextmanager

# The size of what it brings, in bytes, and the request itself.
Request = tuple[int, Callable[[], bytes]]


@contextmanager
def ahead(requests: Iterable[Request], at_once: int, most_bytes: int) -> Iterator[Iterator[Future[bytes]]]:
    """Yield the answers, in order. A request that failed raises when the result of its answer is asked for.

    While an answer is used, the next ones are read: at most `at_once`, of at most `most_bytes` in all. What is larger
    is read at its turn. When the block ends, requests that have not begun are dropped, and the others are not awaited:
    each may take the client's two minutes.
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
            yield coming.popleft()[1]  # kept in no variable: its bytes are freed once they were used
    finally:
        pool.shutdown(wait=False, cancel_futures=True)
