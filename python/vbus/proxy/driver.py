"""What every driver is: a class that negotiates with one device and speaks its requests.

A driver knows queues of requests and the device's config space; it never knows what carries them.
"""

from __future__ import annotations

import contextlib
import errno
from typing import TYPE_CHECKING, ClassVar

from vbus.errors import DriverError
from vbus.proxy.queue import RemoteQueue
from vbus.virtio import Config as ConfigSpace
from vbus.virtio import FeatureSet

if TYPE_CHECKING:
    from vbus.proxy.remote import RemoteDevice


class Driver:
    """Drives one device, from DRIVER_OK until `close`. DriverError when the device cannot be had."""

    device_id: ClassVar[int]
    features: ClassVar[FeatureSet]
    """The named bits of the device class."""
    wanted: ClassVar[tuple[str, ...]] = ()
    """Names of the bits that this driver understands."""
    queue_count: ClassVar[int] = 1
    queue_size: ClassVar[int] = 128
    Config: ClassVar[type[ConfigSpace]] = ConfigSpace

    def __init__(self, device: RemoteDevice) -> None:
        self.device = device
        self.timeout = device.remote.connector.timeout
        device.begin(self.features.mask(self.wanted), self.queue_count, self.queue_size)
        device.driver = self
        try:
            device.go()
            self.started()
        except BaseException:
            # Leave the device as it was found: free.
            with contextlib.suppress(DriverError):
                self.close()
            raise

    def started(self) -> None:
        """The device serves: post receive buffers, read config space."""

    def config_changed(self) -> None:
        """Config space changed. On the hooks' thread, which may ask the bus."""

    def removed(self) -> None:
        """The device is gone, or its bus; what was outstanding has failed already. On the hooks' thread."""

    @property
    def config(self) -> ConfigSpace:
        """Config space as it is now. DriverError."""
        return self.Config.from_bytes(self.device.config())

    def has(self, feature: str) -> bool:
        """Whether the feature of this name was negotiated."""
        return bool(self.device.negotiated & self.features.mask([feature]))

    def queue(self, index: int) -> RemoteQueue:
        """The queue of this index. DriverError ENODEV, ESHUTDOWN when the driver has it no more."""
        if self.device.driver is not self or index >= len(self.device.queues):
            raise self._not_ours()
        return self.device.queues[index]

    def _not_ours(self) -> DriverError:
        if not self.device.present:
            return DriverError(errno.ENODEV, f"{self.device.name} was removed")
        return DriverError(errno.ESHUTDOWN, f"this driver of {self.device.name} is closed")

    def close(self) -> None:
        """Reset the device and let go of it."""
        if self.device.driver is self:
            self.device.driver = None
            if self.device.present and self.device.remote.lost is None:
                self.device.reset()
