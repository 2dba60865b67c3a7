"""Device ids (virtio 1.4, section 5): which class of device something is."""

from __future__ import annotations

from enum import IntEnum


class DeviceID(IntEnum):
    """The ids that the specification assigns, those of device classes that it does not describe included."""

    NETWORK = 1
    BLOCK = 2
    CONSOLE = 3
    ENTROPY = 4
    BALLOON_LEGACY = 5
    IO_MEMORY = 6
    RPMSG = 7
    SCSI = 8
    NINEP = 9
    WLAN = 10
    RPROC_SERIAL = 11
    CAIF = 12
    BALLOON = 13
    GPU = 16
    RTC = 17
    INPUT = 18
    SOCKET = 19
    CRYPTO = 20
    SIGNAL_DISTRIBUTION = 21
    PSTORE = 22
    IOMMU = 23
    MEMORY = 24
    SOUND = 25
    FILE_SYSTEM = 26
    PMEM = 27
    RPMB = 28
    WLAN_SIMULATION = 29
    VIDEO_ENCODER = 30
    VIDEO_DECODER = 31
    SCMI = 32
    NITRO_SECURE_MODULE = 33
    I2C = 34
    WATCHDOG = 35
    CAN = 36
    PARAMETER_SERVER = 38
    AUDIO_POLICY = 39
    BLUETOOTH = 40
    GPIO = 41
    RDMA = 42
    CAMERA = 43
    ISM = 44
    SPI = 45
    TEE = 46
    CPU_BALLOON = 47
    MEDIA = 48
    USB = 49


_SHORT = {
    DeviceID.NETWORK: "net",
    DeviceID.BLOCK: "blk",
    DeviceID.ENTROPY: "rng",
    DeviceID.NINEP: "9p",
    DeviceID.FILE_SYSTEM: "fs",
    DeviceID.SOCKET: "vsock",
    DeviceID.MEMORY: "mem",
    DeviceID.RPROC_SERIAL: "rproc-serial",
}
"""Names that Linux uses and that differ from the specification's."""


def device_type_name(device_id: int) -> str:
    """The short name of a device class, as Linux's drivers are called; `device-N` for an id that is not assigned."""
    try:
        known = DeviceID(device_id)
    except ValueError:
        return f"device-{device_id}"
    return _SHORT.get(known, known.name.lower().replace("_", "-"))
