"""`python -m fake_cloud`, in tests/: run a cloud to try things out, until Ctrl-C."""

import signal
import sys

from fake_cloud.cloud import FakeCloud

if why := FakeCloud.cannot_run():
    sys.exit(why)
with FakeCloud() as cloud:
    enter = f"nsenter --target={cloud.laptop.pid} --mount --uts --ipc --net --pid env -i HOME=/root TERM=$TERM bash -l"
    sys.stdout.write(f"Project {cloud.project}, bucket demo-bucket. A shell on the laptop:\n\n  {enter}\n\n")
    sys.stdout.flush()
    try:
        signal.pause()
    except KeyboardInterrupt:
        sys.stdout.write("Gone.\n")
