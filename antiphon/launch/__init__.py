"""How the processes of ranks are started, watched and ended: `Launcher` is the interface, `LocalLauncher` this host's.

The frontend, the benchmarks and the tests start ranks through it. It knows nothing of torch or of what ranks compute.

    with LocalLauncher().prepare(2) as ranks:
        ranks.start("package.module")  # which calls Place.from_arguments() and end_with_launcher()
        failure = ranks.wait(60)
"""

from antiphon.launch.base import Launcher, Place, RankProcesses, end_with_launcher
from antiphon.launch.local import LocalLauncher

__all__ = ["Launcher", "LocalLauncher", "Place", "RankProcesses", "end_with_launcher"]
