"""What the ranks of `test_processes` do; without torch, so that they start quickly."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time

from antiphon.launch import Place, end_with_launcher


def main() -> None:
    place = Place.from_arguments()
    end_with_launcher(place.folder)
    match os.environ["DEED"]:
        case "introduce":
            words = [place.rank, place.size, str(place.folder), place.front, place.meeting]
            (place.folder / f"said-{place.rank}").write_text(json.dumps(words))
        case "start a child":
            child = subprocess.Popen([sys.executable, "-S", "-c", "import time; time.sleep(1000)"])
            (place.folder / "new").write_text(str(child.pid))
            (place.folder / "new").rename(place.folder / "child")
            time.sleep(1000)
        case "fail on rank 1" if place.rank == 1:
            print("a word before the end", flush=True)
            sys.exit(7)
        case _:
            time.sleep(1000)


if __name__ == "__main__":
    main()
