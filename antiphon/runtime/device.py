"""The former name of `antiphon.device.table`."""

from antiphon.device.table import activate as activate
from antiphon.device.table import device_for_rank as device_for_rank
