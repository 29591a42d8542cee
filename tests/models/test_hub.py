"""Models by hub id, against a hub on this machine: downloads, the cache, and every way in which it can fail.

The library of the hub reads its environment when it is imported, so each environment is a process of its own.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from antiphon.core.bundled import BUNDLED_MODEL, bundled_model
from antiphon.core.errors import ModelError
from antiphon.models import Checkpoint, check_checkpoint, read_config, resolve_model, skeleton
from antiphon.models.checkpoint.hub import is_hub_id
from tests.models.twin import rewrite_config
from tests.support.errors import raises
from tests.support.hub import LocalHub, local_hub

MODEL = "choir/tiny"

_ASK = """
import json, sys
from antiphon.core.errors import ModelError
from antiphon.models.checkpoint.hub import resolve_model
for arguments in json.load(sys.stdin):
    try:
        print(json.dumps(str(resolve_model(arguments.pop("name"), **arguments))))
    except ModelError as error:
        print(json.dumps({**error.fields(), "value": error.value}))
"""


def ask(home: Path, endpoint: str, *calls: dict[str, Any], **environment: str) -> list[Any]:
    """What `resolve_model` answers in a new process: folders, or objects with the fields of the error."""
    variables = {name: value for name, value in os.environ.items() if not name.startswith(("HF_", "HUGGING"))}
    variables |= {"HF_HOME": str(home), "HF_ENDPOINT": endpoint, "HF_HUB_DISABLE_PROGRESS_BARS": "1"} | environment
    done = subprocess.run(
        [sys.executable, "-c", _ASK], input=json.dumps(calls), env=variables, capture_output=True, text=True, timeout=90
    )
    assert done.returncode == 0, done.stderr
    return [json.loads(line) for line in done.stdout.splitlines()]


def error_of(answer: Any, *names: str, option: str = "model", value: str = MODEL, remedy: str = "") -> ModelError:
    """The error in an answer, on one line, with these names in its sentence; see `raises`."""
    assert isinstance(answer, dict), answer
    with raises(ModelError, *names, option=option, value=value, remedy=remedy) as raised:
        raise ModelError(**answer)
    assert "\n" not in str(raised.error)
    assert isinstance(raised.error, ModelError)
    return raised.error


@pytest.fixture
def hub(tmp_path: Path) -> Iterator[LocalHub]:
    """The bundled model under an id, with files that are not to be downloaded, and a second revision of it."""
    main, second = tmp_path / "main", tmp_path / "second"
    shutil.copytree(bundled_model(), main)
    (main / "consolidated.safetensors").write_bytes(b"a copy of the weights")
    (main / "pytorch_model.bin").write_bytes(b"another copy")
    (main / "original").mkdir()
    (main / "original" / "params.json").write_text("{}")
    shutil.copytree(bundled_model(), second)
    rewrite_config(second, max_position_embeddings=512)
    models = {MODEL: {"main": main, "v2": second}, "choir/gated": {"main": main}, "choir/private": {"main": second}}
    with local_hub(LocalHub(models, gated=frozenset({"choir/gated"}), private=frozenset({"choir/private"}))) as served:
        yield served


def downloads(hub: LocalHub) -> list[str]:
    return [line.rpartition("/")[2] for line in hub.asked if line.startswith("GET") and "/resolve/" in line]


@pytest.mark.processes
def test_a_model_is_downloaded_once(hub: LocalHub, tmp_path: Path) -> None:
    home = tmp_path / "home"
    (first,) = ask(home, hub.endpoint, {"name": MODEL})
    folder = Path(first)
    assert home in folder.parents
    check_checkpoint(Checkpoint(folder), skeleton(read_config(folder)).checkpoint_tensors())
    names = {path.name for path in folder.iterdir()}
    assert {"config.json", "tokenizer.json", "chat_template.jinja", "model.safetensors.index.json"} <= names
    assert not names & {"consolidated.safetensors", "pytorch_model.bin", "original"}
    assert sorted(downloads(hub)) == sorted(names)

    hub.asked.clear()
    again, other = ask(home, hub.endpoint, {"name": MODEL}, {"name": MODEL, "revision": "v2"})
    assert again == first
    assert set(downloads(hub)) == {"config.json"}  # the only file that differs in the other revision
    assert (read_config(folder).max_positions, read_config(Path(other)).max_positions) == (4096, 512)

    hub.asked.clear()
    by_commit = {"name": MODEL, "revision": hub.commit(MODEL, "v2")}
    offline = ask(home, hub.endpoint, {"name": MODEL}, {"name": MODEL, "revision": "v2"}, by_commit, HF_HUB_OFFLINE="1")
    assert offline == [first, other, other]
    assert hub.asked == []


@pytest.mark.processes
def test_what_the_hub_does_not_give(hub: LocalHub, tmp_path: Path) -> None:
    unknown, gated, private, revision = ask(
        tmp_path / "home",
        hub.endpoint,
        {"name": "choir/unknown"},
        {"name": "choir/gated"},
        {"name": "choir/private"},
        {"name": MODEL, "revision": "v3"},
    )
    error_of(unknown, "'choir/unknown'", hub.endpoint, "folder", value="choir/unknown", remedy="HF_TOKEN")
    error_of(gated, "choir/gated is gated", hub.endpoint, value="choir/gated", remedy="HF_TOKEN")
    error_of(private, "'choir/private'", "or it is private", value="choir/private", remedy="HF_TOKEN")
    error_of(revision, MODEL, "'v3'", hub.endpoint, option="revision", value="v3", remedy="tag")
    assert downloads(hub) == []
    (found,) = ask(tmp_path / "home", hub.endpoint, {"name": "choir/private"}, HF_TOKEN="secret")
    assert isinstance(found, str)


@pytest.mark.processes
def test_offline_without_a_cache(hub: LocalHub, tmp_path: Path) -> None:
    (answer,) = ask(tmp_path / "home", hub.endpoint, {"name": MODEL, "revision": "v2"}, HF_HUB_OFFLINE="1")
    error = error_of(answer, f"{MODEL}, revision 'v2'", str(tmp_path / "home"), remedy="unset HF_HUB_OFFLINE")
    assert "HF_HUB_OFFLINE" in error.fact and "folder" in error.remedy
    assert hub.asked == []


@pytest.mark.processes
def test_offline_with_a_part_in_the_cache(hub: LocalHub, tmp_path: Path) -> None:
    """What dummy weights leave there, or a download that broke off."""
    home = tmp_path / "home"
    (config_only,) = ask(home, hub.endpoint, {"name": MODEL, "weights": False})
    again, answer = ask(home, hub.endpoint, {"name": MODEL, "weights": False}, {"name": MODEL}, HF_HUB_OFFLINE="1")
    assert again == config_only
    assert "HF_HUB_OFFLINE" in error_of(answer, MODEL, str(home), remedy="unset HF_HUB_OFFLINE").fact


@pytest.mark.slow  # many processes; the parts of it are in the tests of downloads, of offline use and of checkpoints
@pytest.mark.processes
def test_only_what_a_run_with_dummy_weights_needs(hub: LocalHub, tmp_path: Path) -> None:
    light, full = {"name": MODEL, "weights": False}, {"name": MODEL}
    (folder,) = ask(tmp_path / "home", hub.endpoint, light)
    assert all(name.endswith(".json") for name in downloads(hub))
    read_config(Path(folder))
    assert ask(tmp_path / "home", hub.endpoint, light, HF_HUB_OFFLINE="1") == [folder]
    answer = ask(tmp_path / "home", hub.endpoint, full, HF_HUB_OFFLINE="1")[0]
    if answer == folder:  # an older library of the hub does not know what is missing, but the checkpoint does
        with raises(ModelError, "safetensors"):
            check_checkpoint(Checkpoint(Path(folder)), skeleton(read_config(Path(folder))).checkpoint_tensors())
    else:
        error_of(answer, MODEL, str(tmp_path / "home"), remedy="unset HF_HUB_OFFLINE")
    assert ask(tmp_path / "home", hub.endpoint, full) == [folder]
    assert (Path(folder) / "model-00001-of-00002.safetensors").exists()


@pytest.mark.processes
@pytest.mark.parametrize(
    "trouble", ["gone", *(pytest.param(name, marks=pytest.mark.slow) for name in ("silent", "failing"))]
)
def test_a_hub_that_does_not_answer(hub: LocalHub, tmp_path: Path, trouble: str) -> None:
    """What is in the cache is enough; what is not is an error, and soon."""
    (folder,) = ask(tmp_path / "home", hub.endpoint, {"name": MODEL})
    with local_hub(LocalHub({})) as other:
        endpoint = other.endpoint
        other.silent, other.status = trouble == "silent", 503 if trouble == "failing" else 200
        if trouble != "gone":
            check_trouble(endpoint, folder, tmp_path / "home", trouble)
    if trouble == "gone":
        check_trouble(endpoint, folder, tmp_path / "home", trouble)


def check_trouble(endpoint: str, folder: str, home: Path, trouble: str) -> None:
    start = time.monotonic()
    cached, missing = ask(home, endpoint, {"name": MODEL}, {"name": MODEL, "revision": "v2"}, HF_HUB_ETAG_TIMEOUT="2")
    assert time.monotonic() - start < 45
    assert cached == folder
    reason = "answers 503" if trouble == "failing" else "cannot be reached"
    error = error_of(missing, f"{MODEL}, revision 'v2'", f"{endpoint} {reason}", remedy="HF_ENDPOINT")
    assert "folder" in error.remedy and "HF_HUB_OFFLINE" not in str(error)


# ---- without a hub


def test_a_folder_is_itself(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture) -> None:
    assert resolve_model(tmp_path) == tmp_path
    assert resolve_model(str(tmp_path)) == tmp_path
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "choir" / "tiny").mkdir(parents=True)
    assert resolve_model("~/choir") == tmp_path / "choir"
    monkeypatch.chdir(tmp_path)
    assert not caplog.records
    with caplog.at_level(logging.WARNING, logger="antiphon.models"):
        assert resolve_model(MODEL, revision="v2") == Path(MODEL)  # a folder wins over an id
    assert "revision='v2' has no effect: the model choir/tiny is a folder" in caplog.text


@pytest.mark.parametrize(
    "name", ["/no/such", "./choir/tiny", "~/no-such", "qwen3", "", "a/b/c", "a b/c", "org/", "/name", Path("org/name")]
)
def test_neither_a_folder_nor_an_id(name: str | Path) -> None:
    with raises(ModelError, repr(str(name)), "org/name", option="model", value=name, remedy=repr(BUNDLED_MODEL)):
        resolve_model(name)


def test_a_misspelled_preset_is_recognised() -> None:
    with raises(ModelError, option="model", value="qwen3-30b", remedy="'qwen3-30b-a3b'?"):
        resolve_model("qwen3-30b")


def test_ids() -> None:
    assert all(map(is_hub_id, ["deepseek-ai/DeepSeek-V2-Lite", "Qwen/Qwen3-30B-A3B", "zai-org/GLM-4.5-Air", "a/b_1.0"]))
