"""A driver for the entropy device (virtio 1.3, section 5.4): random bytes as `bytes`."""

from __future__ import annotations

import errno

from vbus import virtio
from vbus.errors import DriverError
from vbus.proxy.driver import Driver
from vbus.proxy.drivers.waiting import wait

MOST = 64 << 10
"""Bytes that one request asks for at most."""


class Rng(Driver):
    """Reads random bytes."""

    device_id = virtio.DeviceID.ENTROPY
    features = virtio.entropy.FEATURES
    queue_count = 1

    def read(self, size: int) -> bytes:
        """Exactly `size` random bytes, in as many requests as the device needs; each may take `timeout` seconds.

        DriverError: ENODEV, EIO, ECONNRESET, ETIMEDOUT. ValueError for a negative size.
        """
        if size < 0:
            raise ValueError(f"{size} is no number of bytes")
        most = min(MOST, self.device.max_request or MOST)
        data = bytearray()
        while len(data) < size:
            part = wait(self.queue(0).submit([], min(size - len(data), most)), self.timeout, "an entropy request")
            if not part:
                # A device must give at least one byte (section 5.4.6.2); a bad one would hold us here for ever.
                raise DriverError(errno.EIO, f"{self.device.name} gave no bytes")
            data += part
        return bytes(data)
