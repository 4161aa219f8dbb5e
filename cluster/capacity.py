"""Check whether the hosts of Ray have room for the processes of a command, and wait for an autoscaler to add hosts.

A request that can never be met is refused at once. While a request waits for hosts, the log says what it waits for, up
to a time limit.
"""

import logging
import time
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING

from cluster.errors import KuzushijiError, OptionError, counted, one_line

if TYPE_CHECKING:
    from ray.autoscaler.v2.schema import ClusterStatus

log = logging.getLogger("kuzushiji")

START_LIMIT = 1800
SECONDS_BETWEEN_WAITS = 30.0
SECONDS_FOR_STATUS = 10


@dataclass(frozen=True)
class Request:
    """Processes that run at the same time. Each needs all its CPUs and GPUs on one host."""

    processes: int = 1
    cpus: int = 1
    """CPUs of each process."""
    gpus: int = 0
    """GPUs of each process."""

    def __str__(self) -> str:
        gpus = f" and {counted(self.gpus, 'GPU')}" if self.gpus else ""
        return f"{counted(self.processes, 'process', 'processes')} with {counted(self.cpus, 'CPU')}{gpus} each"

    def held_by(self, hosts: Iterable[Mapping[str, float]]) -> int:
        """Return how many such processes fit on hosts with these resources, which may be more than `processes`."""
        return sum(
            int(min(host.get(kind, 0) // each for kind, each in (("CPU", self.cpus), ("GPU", self.gpus)) if each))
            for host in hosts
        )


def hosts() -> list[Mapping[str, float]]:
    """Return the resources of each live host, used or not."""
    import ray

    return [node["Resources"] for node in ray.nodes() if node["Alive"]]


def has_autoscaler() -> bool:
    """Return whether the cluster was made by `ray up` (with the autoscaler v2, its default) or by KubeRay.

    It also returns True for a KubeRay cluster whose autoscaler is off.
    """
    # Both give each host a type. For any other host, Ray makes up a type from the host's id.
    status = _status()
    nodes = [*status.active_nodes, *status.idle_nodes]
    return any(node.ray_node_type_name != f"node_{node.node_id}" for node in nodes)


def check_room(request: Request) -> None:
    """Refuse a request that would wait forever.

    Raises:
        OptionError: the hosts can't hold all processes, even when nothing else runs, and no autoscaler adds hosts.
    """
    present = hosts()
    held = request.held_by(present)
    if held < request.processes and not has_autoscaler():
        cpus, gpus = (int(sum(host.get(kind, 0) for host in present)) for kind in ("CPU", "GPU"))
        raise OptionError(
            f"Ray must have room for all processes at the same time. Received: {request}; there is room for {held} on "
            f"{counted(len(present), 'host')} with {counted(cpus, 'CPU')} and {counted(gpus, 'GPU')} in all, and no "
            "autoscaler. Request less, or use a larger cluster (RAY_ADDRESS). See docs/faq.md"
        )


class Wait:
    """A wait for room on the hosts: logs every 30 s what it waits for, and fails after a time limit."""

    def __init__(self, request: Request, limit: float, who: str = "") -> None:
        """Start the clocks.

        Args:
            request: the processes that wait.
            limit: seconds until `check` fails.
            who: name in the log, such as that of an architecture.
        """
        self._request, self._limit, self._who = request, limit, f"{who}: " if who else ""
        self.restart()

    def restart(self) -> None:
        """Restart the clocks. Call this when the processes have started."""
        self._began = self._said = self._limit_began = time.monotonic()

    def check(self, limited: bool = True) -> None:
        """Log what is waited for, if the last line is 30 s old. Call this often.

        Args:
            limited: whether the time limit applies; False restarts its clock.

        Raises:
            KuzushijiError: the limit has passed.
        """
        now = time.monotonic()
        if now - self._said > SECONDS_BETWEEN_WAITS:
            self._said = now
            log.info("%swaiting for %.0f s: %s", self._who, now - self._began, self._state())
        if not limited:
            self._limit_began = now
        if now - self._limit_began > self._limit:
            raise KuzushijiError(
                f"the processes must start within {self._limit:g} s (--start-limit). Received: {self._state()}. "
                "Request less, raise the limit, or see `ray status` on the head. See docs/faq.md"
            )

    def _state(self) -> str:
        try:
            status = _status()
        except Exception as error:  # Ray raises several types; none may end the wait
            return f"{self._request} requested; the state of the cluster is unknown: {one_line(error)[:200]}"
        nodes = [*status.active_nodes, *status.idle_nodes]
        present = self._request.held_by(node.total_resources() for node in nodes)
        free = self._request.held_by(node.available_resources() for node in nodes)
        coming = Counter(node.ray_node_type_name for node in status.pending_nodes)
        for launch in status.pending_launches:
            coming[launch.ray_node_type_name] += launch.count
        hosts_coming = ", ".join(f"{count} of type {name}" for name, count in sorted(coming.items())) or "none"
        failed = [f"; failed: {launch.ray_node_type_name}: {launch.details}" for launch in status.failed_launches[-1:]]
        return (
            f"{self._request} requested; the hosts have room for {present} in total, {free} now; "
            f"pending hosts: {hosts_coming}{' '.join(failed)[:300]}"
        )


def _status() -> "ClusterStatus":
    import ray
    from ray.autoscaler.v2.sdk import get_cluster_status

    return get_cluster_status(ray.get_runtime_context().gcs_address, timeout=SECONDS_FOR_STATUS)
