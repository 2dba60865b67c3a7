"""The entropy device (virtio 1.3, section 5.4): one queue, no features, no config space."""

from __future__ import annotations

from vbus.virtio.config import Config
from vbus.virtio.features import features

FEATURES = features()
REQUESTQ = 0

__all__ = ["FEATURES", "REQUESTQ", "Config"]
