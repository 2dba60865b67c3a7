"""The smallest device: entropy, as in the README."""

import os

import vbus


class Rng(vbus.Device):
    """An entropy device (virtio 1.3, section 5.4)."""

    device_id = vbus.DeviceID.ENTROPY
    queues = ("requests",)

    def handle(self, queue: vbus.Queue, request: vbus.Request) -> None:
        """Fill whatever the driver gives."""
        request.write(os.urandom(request.writable))
