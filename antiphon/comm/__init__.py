"""Process groups, and the transports that move tokens to experts and back.

Works on the streams that it is given, never switches lanes, and is the only room that calls `torch.distributed`.
Entry points: `RankGroup`, `Mesh`, `create_transport`.

    group = RankGroup.connect(rank=0, size=2, init_method="file:///tmp/meet", timeout_s=60)
    transport = create_transport("alltoall", shape, group=group, streams=CpuStreams(), num_lanes=2)
    rows = finish(transport.dispatch(x_TD, routes))
    y_TD = finish(transport.combine(experts(rows)))
"""

from antiphon.comm.group import RankGroup
from antiphon.comm.mesh import Mesh
from antiphon.comm.needs import Refusal, Way, World, peers_forbidden
from antiphon.comm.progress import ProgressBoard
from antiphon.comm.registry import (
    TransportSpec,
    Usability,
    choose_transport,
    create_transport,
    load_transport,
    parse_transport,
    refused,
    usable_transports,
)
from antiphon.comm.simulated import Link
from antiphon.comm.tokens import ExpertShape, Routes, Rows
from antiphon.comm.transport import DataPath, Flight, Transport
from antiphon.core.errors import AntiphonError, OptionError, PeerError

__all__ = [
    "AntiphonError",
    "DataPath",
    "ExpertShape",
    "Flight",
    "Link",
    "Mesh",
    "OptionError",
    "PeerError",
    "ProgressBoard",
    "RankGroup",
    "Refusal",
    "Routes",
    "Rows",
    "Transport",
    "TransportSpec",
    "Usability",
    "Way",
    "World",
    "choose_transport",
    "create_transport",
    "load_transport",
    "parse_transport",
    "peers_forbidden",
    "refused",
    "usable_transports",
]
