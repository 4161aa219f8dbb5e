"""Ray sessions, and the causes of failures in Ray's processes.

A session connects to the cluster that RAY_ADDRESS names. If it is unset, a local Ray starts, and ends with the command.
"""

import logging
import os
import secrets
import signal
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

from cluster.bucket_errors import explained
from cluster.capacity import Request, check_room
from cluster.errors import KuzushijiError, OptionError, one_line
from cluster.progress import waiting
from cluster.ray_address import check_address

log = logging.getLogger("kuzushiji")

START_TIMED_OUT = (
    "Ray must start within 30 s, Ray's own limit. Received: no answer, as happens on an overloaded machine. Run the "
    "same command again; if that does not help, see docs/faq.md and Ray's logs, by default in "
    "/tmp/ray/session_latest/logs"
)

CGROUP_QUOTA = Path("/sys/fs/cgroup/cpu.max")
MOST_DECLARED = 8  # CPUs that a local Ray may declare for each CPU that this process can use


@dataclass
class Session:
    """A connection to Ray."""

    shuts_down: bool
    """Whether Ray is shut down when the block ends. Set this to False while threads wait for Ray: a shutdown would then
    end this process before it can print its error. Ray then ends with the process."""


@contextmanager
def ray_session(request: Request = Request()) -> Iterator[Session]:  # noqa: B008 - frozen
    """Connect to Ray while the block runs. An existing connection of this process is used and left open.

    Args:
        request: processes that must run at the same time. A local Ray declares CPUs for all of them, up to 8 times
            those of this machine.

    Raises:
        OptionError: a local Ray can't declare so many CPUs; or the request would wait forever, since the hosts have no
            room for it and there is no autoscaler.
        KuzushijiError: a local Ray did not start in time, or can't use its folder; or no Ray answers at RAY_ADDRESS.
    """
    with waiting("Starting Ray ..."):
        session = Session(_start(request.processes * request.cpus))
    try:
        check_room(request)
        with _sigterm_as_ctrl_c():
            yield session
    finally:
        if session.shuts_down:
            import ray

            ray.shutdown()


@contextmanager
def _sigterm_as_ctrl_c() -> Iterator[None]:
    """Raise KeyboardInterrupt in the block on SIGTERM, on which Ray's handler would print a stack trace."""
    on_main_thread = threading.current_thread() is threading.main_thread()  # only this one can set handlers
    before = signal.getsignal(signal.SIGTERM)
    if not on_main_thread or before == signal.SIG_IGN:
        yield
        return
    signal.signal(signal.SIGTERM, signal.default_int_handler)
    try:
        yield
    finally:
        signal.signal(signal.SIGTERM, before or signal.SIG_DFL)


def uses_cluster() -> bool:
    """Return whether RAY_ADDRESS names a cluster; if it is unset, empty or `local`, Ray is local."""
    return os.environ.get("RAY_ADDRESS", "") not in ("", "local")


def _start(at_least_cpus: int) -> bool:
    """Connect to Ray. Return False if this process was connected already."""
    _set_environment()
    import ray

    if ray.is_initialized():
        return False
    if uses_cluster():
        check_address(os.environ["RAY_ADDRESS"])
        log.info("using the Ray cluster at %s", os.environ["RAY_ADDRESS"])
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
        return True
    cpus = usable_cpus()
    if at_least_cpus > MOST_DECLARED * cpus:
        raise OptionError(
            f"all workers on this machine must have at most {MOST_DECLARED * cpus} CPUs, {MOST_DECLARED} times its "
            f"own. Received: {at_least_cpus}. Lower --workers or --cpus-per-worker, or set RAY_ADDRESS to use a cluster"
        )
    if at_least_cpus > cpus:
        log.warning("%d CPUs requested, this machine has %d: processes share them", at_least_cpus, cpus)
    try:
        ray.init(
            address="local",
            num_cpus=max(cpus, at_least_cpus),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:
        if getattr(error, "filename", None) or "AF_UNIX" in str(error):
            raise KuzushijiError(
                "Ray's folder must have a short path, and you must be able to write in it. "
                f"Received: {one_line(error)}. Set RAY_TMPDIR to a folder of your own, such as /tmp/YOU. "
                "See docs/faq.md"
            ) from error
        # Ray raises a plain Exception, and its timeout can't be set (github.com/ray-project/ray/issues/65983). A second
        # attempt in this process would share the machine with the first one, whose processes end only with this one.
        if "timed out during startup" not in str(error):
            raise
        raise KuzushijiError(START_TIMED_OUT) from error
    return True


def usable_cpus() -> int:
    """Return how many CPUs this process can use, at least 1.

    The limits are its affinity (`taskset`) and its container's quota (`docker run --cpus`, with cgroup v2).
    """
    cpus = len(os.sched_getaffinity(0))
    try:
        quota, period = CGROUP_QUOTA.read_text().split()  # docs.kernel.org/admin-guide/cgroup-v2.html, cpu.max
        return max(1, min(cpus, int(quota) // int(period)))
    except (OSError, ValueError):  # no cgroup v2, or no quota: "max"
        return cpus


def _set_environment() -> None:
    """Set environment variables of Ray and TensorFlow. Call this before the import of Ray, which reads them."""
    # No usage statistics unless the user asks for them.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if not uses_cluster() and "ray" not in sys.modules:
        # Ray requires a token by default, but stores it in a file that other users can read (mode 0644). Use a token of
        # this process instead.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def is_collateral(failure: BaseException) -> bool:
    """Return whether a worker failed only because another one did: TensorFlow then aborts its collectives."""
    return "Collective ops is aborted" in str(failure)


def cause_of(error: BaseException) -> BaseException:
    """Return the exception that a worker raised, without the exceptions that Ray wraps around it."""
    from ray.exceptions import ActorDiedError, RayError
    from ray.train import TrainingFailedError

    cause = error
    while isinstance(cause, RayError | TrainingFailedError):
        inner = getattr(cause, "cause", None) or cause.__cause__
        if inner is None:
            # Of several workers, take one that failed by itself. When one dies, the collectives of the others abort.
            failures = getattr(cause, "worker_failures", None) or {}
            inner = min(failures.values(), key=is_collateral, default=None)
        if inner is None:
            break
        cause = inner
    if isinstance(cause, ActorDiedError) and "Error: " in (last := str(cause).strip().splitlines()[-1]):
        return KuzushijiError(last)  # an actor whose constructor failed: Ray keeps only the text of its traceback
    if isinstance(cause, KuzushijiError):  # Ray Data appends its own text
        return type(cause)(str(cause).partition("\nFailed to ")[0])
    return explained(cause) or cause
