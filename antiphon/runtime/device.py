"""The former name of `antiphon.device.device`."""

from antiphon.device.device import *  # noqa: F403
