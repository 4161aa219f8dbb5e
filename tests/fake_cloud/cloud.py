"""A Google Cloud on one machine: `with FakeCloud() as cloud:`. Unmodified Ray starts clusters in it."""

import contextlib
from collections.abc import Sequence
from types import TracebackType
from typing import Self

from fake_cloud.bucket import StrictBucket
from fake_cloud.compute import Compute
from fake_cloud.google import NAMES, Google, LoggedRequest
from fake_cloud.hosts import Host
from fake_cloud.identity import Identity
from fake_cloud.machines import Instance, Machines
from fake_cloud.plan import Plan
from fake_cloud.room import GATEWAY, METADATA_ADDRESS, Room, why_none

AUTHORITIES = "/etc/ssl/certs/ca-certificates.crt"
CREDENTIALS = "/root/.config/gcloud/application_default_credentials.json"  # where Google's libraries look for it
ENVIRONMENT = {
    # The libraries have certificate authorities of their own. These variables make each of them trust the fake's, too.
    **dict.fromkeys(("CURL_CA_BUNDLE", "HTTPLIB2_CA_CERTS", "REQUESTS_CA_BUNDLE", "SSL_CERT_FILE"), AUTHORITIES),
    "GCSFS_EXPERIMENTAL_ZB_HNS_SUPPORT": "false",  # otherwise gcsfs first uses gRPC, which the fake does not support
    "RAY_USAGE_STATS_ENABLED": "0",
}


class FakeCloud:
    """Hosts, Google's endpoints and a bucket. All end with the block, and with this process, however it ends.

    laptop: a host outside the cluster, as a user's machine. Its application default credentials are the project
    owner's. bucket: the bucket behind storage.googleapis.com, with its faults.
    """

    laptop: Host
    bucket: StrictBucket

    def __init__(self, project: str = "demo-project-1", buckets: Sequence[str] = ("demo-bucket",)) -> None:
        self.project, self._buckets = project, set(buckets)
        self.owner = self.account("owner")
        self._stack = contextlib.ExitStack()

    @staticmethod
    def cannot_run() -> str | None:
        """Return why the cloud cannot run here, in one line, or None."""
        why = why_none()
        return f"the fake cloud cannot run here: {why}" if why else None

    def __enter__(self) -> Self:
        with contextlib.ExitStack() as stack:
            self.bucket = stack.enter_context(StrictBucket())
            for bucket in self._buckets:
                self.bucket.create(bucket)
            self._identity = Identity(self.project)
            room = Room()
            self._machines = Machines(room, self._plan)
            compute = Compute(self._machines, self._identity)
            stack.callback(compute.close)
            stack.enter_context(room)
            stack.callback(self._machines.closing.set)
            self._google = Google(compute, self._identity, self.bucket.url, self._buckets)
            stack.enter_context(self._google)
            self.add_account(self.owner, "roles/owner")
            self.laptop = Host(room, self._laptop_plan(), room.address())
            self._google.names[self.laptop.address] = self.laptop.name
            self._stack = stack.pop_all()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._stack.close()

    def account(self, name: str) -> str:
        """Return the address of a service account of the project."""
        return f"{name}@{self.project}.iam.gserviceaccount.com"

    def add_account(self, email: str, *roles: str) -> None:
        """Create a service account with roles in the whole project: keys of `identity.RIGHTS`."""
        self._identity.add_account(email, *roles)

    def grant(self, email: str, bucket: str) -> None:
        """Allow an account to read and write the objects of one bucket."""
        self._identity.grant(email, "objects", bucket)

    def grant_use(self, email: str, other: str) -> None:
        """Allow an account to assign another one to instances that it creates (serviceAccountUser on that one only)."""
        self._identity.grant(email, "use accounts", other)

    def instances(self) -> list[Instance]:
        return list(self._machines.instances.values())

    def instance(self, name: str) -> Instance:
        return self._machines.instances[name]

    def delete(self, name: str) -> None:
        """Remove a machine at once, without Ray's knowledge. Nothing runs on it before."""
        self._machines.lose(name)

    def preempt(self, name: str) -> None:
        """Preempt a spot machine: the metadata say so, its shutdown script runs for at most 30 s, and it is gone."""
        self._machines.preempt(name)

    @property
    def requests(self) -> list[LoggedRequest]:
        """The requests to the endpoints, in the order of their answers."""
        return list(self._google.requests)

    def _plan(self, name: str, keys: dict[str, list[str]]) -> Plan:
        """Return the plan of an instance."""
        names = [f"{GATEWAY} {' '.join(NAMES)}", f"{METADATA_ADDRESS} metadata.google.internal metadata"]
        return Plan(name, keys, names, ENVIRONMENT, {AUTHORITIES: (self._authorities(), 0o644)})

    def _laptop_plan(self) -> Plan:
        files = {AUTHORITIES: (self._authorities(), 0o644), CREDENTIALS: (self._identity.key(self.owner), 0o600)}
        return Plan("laptop", {}, [f"{GATEWAY} {' '.join(NAMES)}"], ENVIRONMENT, files)

    def _authorities(self) -> str:
        return self._google.authority.cert_pem.bytes().decode()
