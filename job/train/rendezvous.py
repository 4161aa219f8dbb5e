"""What the workers of a training tell each other: their addresses, and a failure of one that ends all.

`Rendezvous` is a Ray Train backend that tells the TensorFlow processes each other's addresses.

`ray.train.tensorflow` does the same, but it imports TensorFlow in the driver and in Ray Train's controller too, before
any worker starts. That costs 5 seconds and 700 MB in each of them.
"""

import json
import os
import re
import socket
import subprocess
import sys
from typing import Any

import ray
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import barrier


class Rendezvous(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """The `backend_config` of a trainer."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Setup


class _Setup(Backend):  # type: ignore[misc]  # Ray has no types
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Set the addresses before the workers run; called at each start and restart."""
        addresses = worker_group.execute(_free_address)
        ranks = range(len(addresses))
        ray.get([worker_group.execute_single_async(rank, _set_addresses, addresses, rank) for rank in ranks])


def _free_address() -> str:
    """Return `host:port` of this node with a free port."""
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as probe:
        probe.bind(("", 0))
        port: int = probe.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


SECONDS_FOR_REASON = 120
FIND_GPUS = """
import tensorflow as tf
tf.config.list_physical_devices("GPU")
"""


def fault_of_gpus(wanted: int) -> str | None:
    """Return in one line why TensorFlow sees fewer GPUs than `wanted` in this process; None if it sees them."""
    from job.model.load_tensorflow import choose_backend, without_chatter

    choose_backend()
    with without_chatter():
        import tensorflow as tf

        found = len(tf.config.list_physical_devices("GPU"))
    if found >= wanted:
        return None
    return (
        f"TensorFlow must see the GPUs of --gpus-per-worker. Received: {found} of {wanted} on {socket.gethostname()}: "
        f"{_why_no_gpus()}. Install requirements-gpu.lock and a driver for CUDA 12 there, or use --gpus-per-worker 0"
    )


def _why_no_gpus() -> str:
    """Ask TensorFlow in a new process: it says why on standard error alone, and once in a process."""
    done = subprocess.run(  # noqa: S603 - our own script
        [sys.executable, "-c", FIND_GPUS],
        env=os.environ | {"TF_CPP_MIN_LOG_LEVEL": "0"},
        capture_output=True,
        text=True,
        errors="replace",
        timeout=SECONDS_FOR_REASON,
        check=False,
    )
    lines = [line.rpartition("] ")[2].rstrip(".") for line in done.stderr.splitlines()]
    reasons = [line for line in lines if re.search("cuda|dlopen", line, re.IGNORECASE)]
    return "; ".join(dict.fromkeys(reasons)) or "no reason given"


def _set_addresses(addresses: list[str], rank: int) -> None:
    """Set `TF_CONFIG` for MultiWorkerMirroredStrategy (tensorflow.org/guide/distributed_training#TF_CONFIG)."""
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    os.environ["TF_CONFIG"] = json.dumps(cluster)


def shared_failure(board: Any, architecture: str, own: Any) -> Any:
    """Return the failure of one worker on all workers; None if no worker has one. All workers call it together.

    board: handle of the actor `display.Board`. own: the `run.Failure` of this worker, or None.
    """
    # The addresses are others at each restart: a failure counts for the attempt that it was found in.
    attempt = f"{architecture} {json.loads(os.environ.get('TF_CONFIG', '{}')).get('cluster')}"
    try:
        if own:
            ray.get(board.add_failure.remote(attempt, own))
        barrier()
        return ray.get(board.failure_of.remote(attempt))
    except RayActorError:  # no board: a training goes on without its display
        return own
