"""A front-end that nobody here wrote: DPDK's virtio-user gets back every packet that it sends through a loopback."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import time
from pathlib import Path

import pytest

import vbus
from vbus.connectors import VhostUser
from vbus.devices.net import Net
from vbus.virtio import features

TESTPMD = shutil.which("dpdk-testpmd")
PACKETS = 2000


@pytest.mark.skipif(TESTPMD is None, reason="no dpdk-testpmd: apt-get install dpdk-dev")
@pytest.mark.parametrize("packed", [0, 1])
@pytest.mark.parametrize(("pairs", "in_order"), [(1, 0), (1, 1), (2, 1)])
def test_every_packet_comes_back(tmp_path: Path, pairs: int, in_order: int, packed: int) -> None:
    with vbus.Bus("dpdk") as bus:
        net = bus.plug(Net(queue_pairs=pairs), "net0")
        bus.connect(VhostUser(net, tmp_path / "net0.sock"), "vm")
        port = f"net_virtio_user0,path={tmp_path / 'net0.sock'},queues={pairs},queue_size=256"
        port += f",packed_vq={packed},in_order={in_order}"
        eal = ["--no-huge", "-m", "256", "--no-pci", "--single-file-segments", "--iova-mode=va", "--no-telemetry"]
        eal += ["-l", "0-1", "--file-prefix", f"vbus-{os.getpid()}", "--vdev", port]
        forward = ["--interactive", "--forward-mode=io", f"--rxq={pairs}", f"--txq={pairs}", "--total-num-mbufs=4096"]
        assert TESTPMD is not None
        peer = subprocess.Popen(
            [TESTPMD, *eal, "--", *forward],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.STDOUT,
            text=True,
        )
        try:
            assert peer.stdin is not None
            # A burst on each queue, which is then sent round and round.
            peer.stdin.write("start tx_first\n")
            peer.stdin.flush()
            deadline = time.monotonic() + 60
            while sum(queue.core.counters[0] for queue in net._queues[1::2][:pairs]) < PACKETS:
                assert peer.poll() is None, peer.stdout.read() if peer.stdout else ""
                assert time.monotonic() < deadline, f"{net.rx_packets} packets"
                time.sleep(0.01)
            assert net.pairs == pairs
            taken = features.TRANSPORT.names_of(net.negotiated)
            assert ("RING_PACKED" in taken, "IN_ORDER" in taken) == (bool(packed), bool(in_order))
            out, _ = peer.communicate("stop\nquit\n", timeout=60)
        finally:
            peer.kill()
            peer.wait()
        queues = [queue.core.counters[0] for queue in net._queues]
        assert all(count > 0 for count in queues[: 2 * pairs]), queues
        # Receive queues are stopped first: what is sent just then has no way back any more.
        sent, given_back = sum(queues[1 : 2 * pairs : 2]), sum(queues[: 2 * pairs : 2])
        assert sent == given_back + net.rx_dropped, (queues, net.rx_dropped)
        assert net.rx_dropped <= 32 * pairs
        told = {key: int(number) for key, number in re.findall(r"([RT]X-\w+): (\d+)", _totals(out))}
        assert told["RX-packets"] >= PACKETS - 32 * pairs, out
        assert told["RX-dropped"] == told["TX-dropped"] == 0, out
        assert not bus.slot("net0").violations


def _totals(out: str) -> str:
    """The part of its last words that is about all ports."""
    return out[out.index("Accumulated forward statistics for all ports") :]
