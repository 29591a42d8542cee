"""What a client sees with overlap off and on: alternating servers, each under the load of `antiphon bench serve`.

    python -m tools.serve_by_turns qwen3-30b-a3b --json out.json --ranks 2 --load-format dummy --no-prefix-caching

Unknown options are passed on to `antiphon serve`. A round starts a server with `--dbo off` and one with `--dbo on` (the
next round in reverse order) and runs `--runs` loads on each, all with different prompts. Ratios compare loads at the
same position of the same round. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import socket
import subprocess
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx

from antiphon.bench.conditions import check_writable, conditions, write_json
from antiphon.bench.dbo import compare_modes
from antiphon.bench.serve.load import ServeOptions, run_serve
from antiphon.bench.serve.workload import Workload
from antiphon.config.resolve import resolve_device
from antiphon.device.table import rank_device
from antiphon.machine.versions import versions

MODES = ("off", "on")
_START_S = 600.0
_END_S = 60.0


def main() -> None:
    parser = argparse.ArgumentParser(
        description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter, allow_abbrev=False
    )
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--device")
    parser.add_argument("--no-peer-access", action="store_true")
    parser.add_argument("--input-len", type=int, default=4096)
    parser.add_argument("--output-len", type=int, default=1)
    parser.add_argument("--num-prompts", type=int, default=200)
    parser.add_argument("--vocab-size", type=int, default=4000)
    parser.add_argument("--max-concurrency", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--runs", type=int, default=2, help="loads on each server")
    parser.add_argument("--json", type=Path)
    options, others = parser.parse_known_args()
    words = ["--ranks", str(options.ranks)]
    words += ["--device", options.device] if options.device else []
    words += ["--no-peer-access"] if options.no_peer_access else []
    words += others

    check_writable(options.json, "json")
    runs: dict[str, list[dict[str, Any]]] = {mode: [] for mode in MODES}
    for number in range(options.rounds):
        for mode in MODES[:: 1 if number % 2 == 0 else -1]:
            with server([options.model, *words, "--dbo", mode]) as url:
                for _ in range(options.runs):
                    run = one_load(url, options, seed=len(runs[mode]) * len(MODES) + MODES.index(mode))
                    runs[mode].append(run)
                    print(f"dbo {mode}: {run['request_throughput']:.2f} requests/s", file=sys.stderr)
    write_json(to_result(options, words, runs), options.json)


@contextmanager
def server(words: list[str]) -> Iterator[str]:
    """The URL of a server that is ready; its log goes to stderr. Raises `SystemExit` if it does not get ready."""
    with socket.create_server(("127.0.0.1", 0)) as free:
        port = free.getsockname()[1]
    command = [sys.executable, "-m", "antiphon.cli", "serve", *words, "--port", str(port)]
    url, deadline = f"http://127.0.0.1:{port}", time.monotonic() + _START_S
    with subprocess.Popen([*command, "--log-level", "warning"], stdout=sys.stderr) as process:
        try:
            while not is_ready(url):
                status = process.poll()
                if status is not None or time.monotonic() > deadline:
                    what = f"was not ready after {_START_S:g} s" if status is None else f"ended with {status}"
                    raise SystemExit(f"the server {what}; the command was {' '.join(command)}")
                time.sleep(0.2)
            yield url
        finally:
            process.terminate()
            try:
                process.wait(_END_S)
            except subprocess.TimeoutExpired:
                process.kill()


def is_ready(url: str) -> bool:
    try:
        return httpx.get(f"{url}/ready", timeout=5.0).status_code == 200
    except httpx.HTTPError:
        return False


def one_load(url: str, options: argparse.Namespace, *, seed: int) -> dict[str, Any]:
    """Figures of one load. Raises `SystemExit` if a request failed, because a partial load is faster."""
    workload = Workload(
        num_prompts=options.num_prompts,
        input_len=options.input_len,
        output_len=options.output_len,
        vocab_size=options.vocab_size,
        seed=seed,
    )
    run = run_serve(
        ServeOptions(base_url=url, workload=workload, max_concurrency=options.max_concurrency, ignore_eos=True)
    )
    if run["failed"]:
        raise SystemExit(f"{run['failed']} of {options.num_prompts} requests failed: {run['failures']}")
    return run


def to_result(options: argparse.Namespace, words: list[str], runs: dict[str, list[dict[str, Any]]]) -> dict[str, Any]:
    kind, _ = resolve_device(options.device or "auto", options.ranks)
    where = [{"device": rank_device(kind, rank).describe(), "versions": versions()} for rank in range(options.ranks)]
    told = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    return {
        "bench": "serve by turns",
        "what": "alternating servers with overlap off and on, the same kind of load on each, as an HTTP client sees it",
        **conditions(where, told | {"serve": words, "repeats": len(runs[MODES[0]])}),
        "model": options.model,
        **compare_modes(runs),
        "runs": runs,
    }


if __name__ == "__main__":
    main()
