"""The former name of `antiphon.device.device`."""

from antiphon.device.device import activate as activate
from antiphon.device.device import device_for_rank as device_for_rank
