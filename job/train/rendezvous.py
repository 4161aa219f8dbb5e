"""How the TensorFlow processes of a run's workers find one another, for Ray Train.

`ray.train.tensorflow` does the same, but loads TensorFlow wherever it is named: in the driver, then in Ray Train's
controller, before any worker starts. That is 5 seconds and 700 MB each.
"""

import json
import os
import socket
from typing import Any

import ray
from ray.train.backend import Backend, BackendConfig


class Rendezvous(BackendConfig):  # type: ignore[misc]  # Ray has no types
    """Give it to a trainer as `backend_config`."""

    @property
    def backend_cls(self) -> type[Backend]:
        return _Setup


class _Setup(Backend):  # type: ignore[misc]  # Ray has no types
    def on_start(self, worker_group: Any, backend_config: BackendConfig) -> None:
        """Before the workers begin, each time that they are started."""
        addresses = worker_group.execute(_free_address)
        ranks = range(len(addresses))
        ray.get([worker_group.execute_single_async(rank, _set_addresses, addresses, rank) for rank in ranks])


def _free_address() -> str:
    host = ray.util.get_node_ip_address()
    family = socket.AF_INET6 if ":" in host else socket.AF_INET
    with socket.socket(family) as free:
        free.bind(("", 0))
        port: int = free.getsockname()[1]
    return f"[{host}]:{port}" if family == socket.AF_INET6 else f"{host}:{port}"


def _set_addresses(addresses: list[str], rank: int) -> None:
    """For TensorFlow's MultiWorkerMirroredStrategy (tensorflow.org/guide/distributed_training#TF_CONFIG)."""
    cluster = {"cluster": {"worker": addresses}, "task": {"type": "worker", "index": rank}}
    os.environ["TF_CONFIG"] = json.dumps(cluster)
