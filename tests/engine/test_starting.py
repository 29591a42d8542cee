"""The start: its progress reports, and a time limit that does not depend on the size of the model."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path

import pytest

from antiphon import LLM, SamplingParams
from antiphon.comm import DataPath
from antiphon.config.cache import CacheSize
from antiphon.config.engine_config import EngineConfig
from antiphon.config.graph_sizes import CaptureReport
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import ModelError
from antiphon.engine.messages import (
    LOADING,
    AllLoaded,
    FromWorker,
    Loaded,
    Ready,
    Starting,
    Throttle,
    ToWorker,
    describe_start,
)
from antiphon.frontend.worker_client import WorkerClient
from tests.models.twin import rewrite_config
from tests.support.errors import raises
from tests.support.hub import LocalHub, local_hub


def test_one_rank_reports_its_progress() -> None:
    said: list[str] = []
    with LLM(on_start=said.append):
        pass
    assert said[0] == "making the transport"
    loading = [text for text in said if text.startswith(f"{LOADING}: ")]
    assert len(loading) > 20
    assert loading[-1].startswith("loading the model: 100% of ")
    assert said[-1] == "making the KV cache"


@pytest.mark.processes
def test_two_ranks_report_their_progress() -> None:
    said: list[str] = []
    with LLM(ranks=2, on_start=said.append):
        pass
    assert said[0] == "starting 2 ranks"
    assert any(text.startswith(f"{LOADING}: ") for text in said)
    assert said[-1] == "making the KV cache"


@pytest.mark.parametrize(
    ("by_rank", "rank", "text"),
    [
        ({0: Starting(what="making the transport")}, 0, "making the transport"),
        (
            {0: Starting(what=LOADING, bytes_read=1_500_000_000, num_bytes=3_000_000_000)},
            0,
            f"{LOADING}: 50% of 3.0 GB",
        ),
        (
            {
                0: Starting(what=LOADING, bytes_read=1_000_000, num_bytes=2_000_000),
                1: Starting(what=LOADING, bytes_read=0, num_bytes=2_000_000),
            },
            0,
            f"{LOADING}: 25% of 4.0 MB",
        ),
        # A rank that has loaded does not hide one that is still loading.
        ({0: Starting(what="waiting"), 1: Starting(what=LOADING, bytes_read=1, num_bytes=4)}, 0, f"{LOADING}: 25% of "),
        ({0: Starting(what="waiting"), 1: Starting(what="ready")}, 1, "ready"),
    ],
)
def test_the_line_for_all_ranks(by_rank: dict[int, Starting], rank: int, text: str) -> None:
    assert describe_start(by_rank, rank).startswith(text)


def test_the_throttle_passes_every_change_and_little_else() -> None:
    sent: list[Starting] = []
    throttle = Throttle(sent.append, interval_s=1000)
    for number in range(5):
        throttle(Starting(what=LOADING, bytes_read=number, num_bytes=5))
    throttle(Starting(what="waiting"))
    assert [str(one) for one in sent] == [f"{LOADING}: 0% of 0.0 MB", "waiting"]
    throttle = Throttle(sent.append, interval_s=0)
    throttle(Starting(what=LOADING))
    throttle(Starting(what=LOADING))
    assert len(sent) == 4


@pytest.mark.slow
@pytest.mark.processes
def test_a_rank_that_loads_for_longer_than_a_peer_may_take_is_waited_for() -> None:
    """Ranks wait 2 s for a peer; rank 1 takes 4 s to load before the first exchange."""
    said: list[str] = []
    start = time.monotonic()
    with LLM(ranks=2, transport="tests.support.transports:LoadsSlowly", timeout_s=2, on_start=said.append) as llm:
        assert time.monotonic() - start > 4
        assert len(llm.timelines()) == 2
    assert len([text for text in said if text.startswith(LOADING)]) > 5  # most of rank 1, while rank 0 waits
    assert all(text == "making the KV cache" for text in said[-2:])


class Script(WorkerClient):
    """A client whose ranks send the messages of a script."""

    def __init__(self, script: list[tuple[int, FromWorker]]) -> None:
        self._ranks = 2
        self._wave = 0
        self._script = script
        self.sent: list[tuple[int, ToWorker]] = []  # (messages of the script that were left, message)

    def _receive(self, what: str) -> list[tuple[int, FromWorker]]:
        return [self._script.pop(0)]

    def _send_all(self, message: ToWorker) -> None:
        self.sent.append((len(self._script), message))


def test_the_ranks_go_on_together_when_the_last_one_has_loaded() -> None:
    ready = Ready(
        device_name="CPU",
        transport_name="alltoall",
        data_path=DataPath.HOST,
        cache=CacheSize(num_blocks=2, source="why"),
        captured=CaptureReport(),
    )
    loading = Starting(what=LOADING, bytes_read=1, num_bytes=2)
    script: list[tuple[int, FromWorker]] = [(0, loading), (0, Loaded()), (1, loading), (1, Loaded())]
    script += [(0, ready), (1, Starting(what="making the KV cache")), (1, ready)]
    client, said = Script(script), []
    client._wait_for_ready(said.append)
    assert client.sent == [(3, AllLoaded(wave=0))]
    assert said == ["starting 2 ranks", *["loading the model: 50% of 0.0 MB"] * 3]
    assert client.ready == ready


# ---- models of the hub


HUB_RUN = """
import json, logging, os, sys
from antiphon import LLM, SamplingParams
logging.basicConfig(level=logging.WARNING)
for revision in (None, "v2"):
    with LLM("choir/tiny", ranks=2, revision=revision) as llm:
        text = llm.generate("Once upon a time", SamplingParams(max_tokens=4))[0].text
        print(json.dumps([text, llm.config.max_model_len, llm.config.options.model]))
try:
    LLM("choir/tiny", revision="v3")
except ValueError as error:
    print(json.dumps(str(error)))
"""


@pytest.mark.slow  # tests/models/test_hub.py has the hub, and this that the workers get its folder
@pytest.mark.processes
def test_a_model_is_an_id_on_the_hub(one_rank: LLM, tmp_path: Path) -> None:
    """The workers get the folder in the hub's cache, and send no requests to the hub."""
    main, second = tmp_path / "main", tmp_path / "second"
    shutil.copytree(bundled_model(), main)
    shutil.copytree(bundled_model(), second)
    rewrite_config(second, max_position_embeddings=512)
    with local_hub(LocalHub({"choir/tiny": {"main": main, "v2": second}})) as hub:
        variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
        variables |= {"HF_HOME": str(tmp_path / "home"), "HF_ENDPOINT": hub.endpoint}
        ended = subprocess.run(
            [sys.executable, "-c", HUB_RUN], env=variables, capture_output=True, text=True, timeout=100
        )
    assert ended.returncode == 0, ended.stderr
    first, other, error = map(json.loads, ended.stdout.splitlines())
    text = one_rank.generate("Once upon a time", SamplingParams(max_tokens=4))[0].text
    assert first[:2] == [text, 4096]
    assert other[:2] == [text, 512]
    assert first[2].startswith(str(tmp_path / "home")) and first[2] != other[2]
    assert "has no revision 'v3'" in error
    assert "has no effect" not in ended.stderr


def test_a_path_is_never_an_id_on_the_hub() -> None:
    with raises(ModelError, "choir/tiny"):
        LLM(Path("choir/tiny"))  # type: ignore[arg-type]


def test_a_revision_without_effect_is_named(caplog: pytest.LogCaptureFixture) -> None:
    EngineConfig(revision="v2").resolve()
    assert caplog.messages == ["revision='v2' has no effect: tiny-deepseek is bundled"]
