"""Which modules a guest's kernel needs for a device class, by the names that Debian's kernel gives them."""

from __future__ import annotations

from vbus.virtio import DeviceID

_MODULES: dict[int, tuple[str, ...]] = {
    DeviceID.NETWORK: ("virtio_net",),
    # A disk is there to be mounted; the file system asks for its checksums by a name that is no module's.
    DeviceID.BLOCK: ("virtio_blk", "crc32c_generic", "ext4"),
    DeviceID.ENTROPY: ("virtio_rng",),
    DeviceID.SCSI: ("virtio_scsi", "sd_mod"),
    DeviceID.INPUT: ("virtio_input", "evdev"),
    DeviceID.SOCKET: ("vmw_vsock_virtio_transport",),
    DeviceID.FILE_SYSTEM: ("virtiofs",),
}


def modules_for(device_id: int) -> tuple[str, ...]:
    """The driver of a class and what makes use of it; nothing for a class that the kernel has no driver for."""
    return _MODULES.get(device_id, ())
