"""What the workers of a training exchange: their addresses, a failure that ends all of them, and parts of tables.

`Rendezvous` is a Ray Train backend that gives each TensorFlow process the addresses of all of them.

`ray.train.tensorflow` does the same, but also imports TensorFlow in the driver and in Ray Train's controller, before
any worker starts. That costs 5 seconds and 700 MB in each of them.
"""

import json
import os
import socket
from typing import Any, TypeVar

import ray
import ray.train
from ray.exceptions import RayActorError
from ray.train.backend import Backend, BackendConfig
from ray.train.collective import barrier

from job.train.job import Failure

T = TypeVar("T")


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


def _set_addresses(addresses: list[str], rank: int) -> None:
    """Set `TF_CONFIG` for MultiWorkerMirroredStrategy (tensorflow.org/guide/distributed_training#TF_CONFIG)."""
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    os.environ["TF_CONFIG"] = json.dumps(cluster)


def shared_failure(board: Any, architecture: str, own: Failure | None) -> Failure | None:
    """Return the same failure on all workers: the first one reported, or None if no worker has one.

    All workers call it together. board: handle of the actor `board.Board`. own: the failure of this worker, or None.
    """
    attempt = _attempt(architecture)
    try:
        if own:
            ray.get(board.add_failure.remote(attempt, own))
        barrier()
        shared: Failure | None = ray.get(board.failure_of.remote(attempt))
    except RayActorError:  # the board is lost: a training continues without it
        return own
    return shared


def gathered(board: Any, architecture: str, own: T) -> list[T]:
    """Return what each worker passes as `own`, in the order of their ranks, on worker 0; an empty list on the others.

    All workers call it together, once per attempt.

    Raises:
        RayActorError: the board is lost.
    """
    attempt, rank = _attempt(architecture), ray.train.get_context().get_world_rank()
    ray.get(board.add_part.remote(attempt, rank, [ray.put(own)]))
    barrier()
    parts: list[T] = ray.get(ray.get(board.parts_of.remote(attempt))) if rank == 0 else []
    barrier()  # Ray frees a worker's object when its process ends
    return parts


def _attempt(architecture: str) -> str:
    """Return a key of this attempt to train a run. Each restart has new addresses."""
    return f"{architecture} {json.loads(os.environ.get('TF_CONFIG', '{}')).get('cluster')}"
