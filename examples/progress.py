"""A progress feed: a worker in a process of its own says how far it is, and whoever serves the bus shows it.

    python examples/progress.py serve ./progress.sock
    python examples/progress.py work ./progress.sock indexing

A worker makes a channel `job.NAME` for its job; when it leaves, or dies, the channel is gone and the feed ends.
"""

from __future__ import annotations

import sys
import threading
import time

import vbus
from vbus.bus import Channel

PREFIX = "job."


def show(job: Channel) -> None:
    """Print a job's progress as it comes, until its worker has left."""
    if not job.name.startswith(PREFIX):
        return
    name = job.name.removeprefix(PREFIX)
    for event in job:
        # A worker may say anything: what is no number between 0 and 100 is no progress.
        if event.data.isdigit() and int(event.data[:3]) <= 100:
            print(f"{name}: {int(event.data[:3])} %", flush=True)
    print(f"{name}: over", flush=True)


def serve(path: str, stop: threading.Event) -> None:
    """Show every job until `stop` is set."""
    with vbus.Bus("progress") as bus:
        bus.channels.on_open(
            lambda job: (
                threading.Thread(target=show, args=(job,), daemon=True).start() if job.name.startswith(PREFIX) else None
            )
        )
        print(f"serving at {bus.connect(vbus.connectors.Process(path)).address}", flush=True)
        stop.wait()


def work(path: str, name: str, steps: int = 4) -> None:
    """Do a job in steps."""
    with vbus.attach(path) as remote, remote.open_channel(PREFIX + name, create=True) as job:
        for step in range(1, steps + 1):
            time.sleep(0.05)
            job.wait_writable(10)
            job.send(b"%d" % (100 * step // steps))


if __name__ == "__main__":
    try:
        if sys.argv[1] == "serve":
            serve(sys.argv[2], threading.Event())
        else:
            work(sys.argv[2], sys.argv[3])
    except KeyboardInterrupt:
        pass
