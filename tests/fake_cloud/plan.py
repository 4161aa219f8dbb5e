"""The plan of a host: its files, which overlay those of the real machine."""

import io
import sys
import tarfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from fake_cloud.room import SYSTEM_PATH

CHECKOUT = Path(__file__).parents[2]
# Folders of the real machine that hosts see read-only at the same paths: the checkout, and Python if it is elsewhere.
VISIBLE = sorted({str(CHECKOUT), sys.prefix, sys.base_prefix} - {"/usr"})
SSHD = """PermitRootLogin prohibit-password
PasswordAuthentication no
UsePAM no
AuthorizedKeysFile /etc/ssh/keys/%u
HostKey /etc/ssh/ssh_host_ed25519_key
MaxSessions 100
MaxStartups 100
PidFile none
Subsystem sftp internal-sftp
"""


@dataclass(frozen=True)
class Plan:
    """The plan of a host.

    keys: public SSH keys of each login user. names: lines of /etc/hosts. environment: of every session. files: content
    and mode by path.
    """

    name: str
    keys: Mapping[str, Sequence[str]] = field(default_factory=dict)
    names: Sequence[str] = ()
    environment: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, tuple[str, int]] = field(default_factory=dict)

    @property
    def variables(self) -> dict[str, str]:
        """The environment of a session, without the user's own variables."""
        return {"PATH": f"{sys.prefix}/bin:{SYSTEM_PATH}", "LANG": "C.UTF-8", **self.environment}

    def tar(self, address: str) -> bytes:
        """Return a tar archive of all files that differ from the real machine's."""
        files = {**self._system(address), **self._ssh(), **self.files}
        out = io.BytesIO()
        with tarfile.open(fileobj=out, mode="w") as tar:
            for path, (content, mode) in files.items():
                entry = tarfile.TarInfo(path.lstrip("/"))
                entry.size, entry.mode, entry.mtime = len(content.encode()), mode, int(time.time())
                tar.addfile(entry, io.BytesIO(content.encode()))
        return out.getvalue()

    def _system(self, address: str) -> dict[str, tuple[str, int]]:
        hosts = ["127.0.0.1 localhost", f"{address} {self.name}", *self.names]
        return {
            "/etc/hostname": (self.name + "\n", 0o644),
            "/etc/hosts": ("\n".join(hosts) + "\n", 0o644),
            "/etc/resolv.conf": ("", 0o644),
        }

    def _ssh(self) -> dict[str, tuple[str, int]]:
        # sshd sets these variables in every session. A login shell sets PATH again in /etc/profile.
        setenv = "SetEnv " + " ".join(f"{name}={value}" for name, value in self.variables.items())
        profile = "".join(f"export {name}='{value}'\n" for name, value in self.variables.items())
        return {
            "/etc/ssh/sshd_config": (SSHD + setenv + "\n", 0o644),
            "/etc/profile.d/fake-cloud.sh": (profile, 0o644),
            **{f"/etc/ssh/keys/{user}": ("\n".join(keys) + "\n", 0o644) for user, keys in self.keys.items()},
        }
