"""Starts, watches and ends the processes of ranks: `Launcher` is the interface.

`LocalLauncher` starts them on this host. The frontend, the benchmarks and the tests start ranks through a launcher,
which does not depend on torch or on what the ranks compute.

    with LocalLauncher().prepare(2) as ranks:
        ranks.start("package.module")  # which calls Place.from_arguments() and end_with_launcher()
        failure = ranks.wait(60)
"""

from antiphon.launch.base import Launcher, Place, RankProcesses, end_with_launcher
from antiphon.launch.local import LocalLauncher

__all__ = ["Launcher", "LocalLauncher", "Place", "RankProcesses", "end_with_launcher"]
