"""Ray: the one of the cluster where RAY_ADDRESS names it, else a local one for the time of a command."""

import logging
import os
import secrets
import sys
from collections.abc import Iterator
from contextlib import contextmanager

from cluster.bucket import explained
from cluster.errors import KuzushijiError
from cluster.progress import waiting

log = logging.getLogger("kuzushiji")

START_TIMED_OUT = (
    "Ray must start within 30 s, a limit of its own. It did not, as where too much else runs on a machine. Run the "
    "same command again; if that does not help, Ray's logs tell why"
)


@contextmanager
def ray_session(at_least_cpus: int = 1) -> Iterator[None]:
    """Connect to Ray for the time of the block; a Ray that this process is connected to already is used as it is.

    at_least_cpus: a local Ray pretends to have so many where the machine has fewer, or the work would never be placed.
    """
    with waiting("Ray starts ..."):
        started = _start(at_least_cpus)
    try:
        yield
    finally:
        if started:
            import ray

            ray.shutdown()


def _start(at_least_cpus: int) -> bool:
    """Whether there was none that this process is connected to."""
    _set_environment()
    import ray

    if ray.is_initialized():
        return False
    if address := os.environ.get("RAY_ADDRESS"):
        log.info("using the Ray at %s", address)
        ray.init(logging_level=logging.WARNING, log_to_driver=False)
        return True
    cpus = os.cpu_count() or 1
    if at_least_cpus > cpus:
        log.warning("%d CPUs are asked for and this machine has %d: the work shares them", at_least_cpus, cpus)
    try:
        ray.init(
            address="local",
            num_cpus=max(cpus, at_least_cpus),
            include_dashboard=False,
            logging_level=logging.WARNING,
            log_to_driver=False,
        )
    except Exception as error:
        # Ray raises no type of its own, and its limits can't be set (github.com/ray-project/ray/issues/65983).
        if "timed out during startup" not in str(error):
            raise
        raise KuzushijiError(START_TIMED_OUT) from error
    return True


def _set_environment() -> None:
    """What a Ray of our own inherits. It reads the environment when it is imported, so this comes before."""
    # Nothing is sent home without being asked for.
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")
    os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "2")
    if "RAY_ADDRESS" not in os.environ and "ray" not in sys.modules:
        # Ray asks for a token by default, but keeps it in a file that others can read (0644): one of this process's
        # own.
        os.environ.setdefault("RAY_AUTH_MODE", "token")
        if "RAY_AUTH_TOKEN_PATH" not in os.environ:
            os.environ.setdefault("RAY_AUTH_TOKEN", secrets.token_hex(32))


def cause_of(error: BaseException) -> BaseException:
    """What failed on a worker, out of the wrappers that Ray puts around it."""
    from ray.exceptions import ActorDiedError, RayError
    from ray.train import TrainingFailedError

    seen = error
    while isinstance(seen, RayError | TrainingFailedError):
        inner = getattr(seen, "cause", None) or seen.__cause__
        if inner is None:
            failures = getattr(seen, "worker_failures", None)
            inner = next(iter(failures.values()), None) if failures else None
        if inner is None:
            break
        seen = inner
    if isinstance(seen, ActorDiedError) and "Error: " in (last := str(seen).strip().splitlines()[-1]):
        return KuzushijiError(last)  # an actor that failed to begin: Ray keeps no more than the text of its traceback
    if isinstance(seen, KuzushijiError):  # to whose text Ray Data adds where it was
        return type(seen)(str(seen).partition("\nFailed to ")[0])
    return explained(seen) or seen
