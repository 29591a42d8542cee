"""The former place of `antiphon.comm.usable_transports`."""

from antiphon.comm.registry import Usability as Usability
from antiphon.comm.registry import usable_transports as usable_transports
