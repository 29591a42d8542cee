"""Every failure gives one clear error in time, and leaves no process behind."""

from __future__ import annotations

import json
import os
import re
import shutil
import signal
import subprocess
import sys
import textwrap
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pytest

from antiphon import LLM, SamplingParams
from antiphon.core.bundled import bundled_model
from antiphon.core.errors import EngineError, ModelError, OptionError, PromptLengthError, RequestError
from antiphon.engine.messages import Failed
from antiphon.engine.worker import read_report
from tests.support.errors import raises
from tests.support.processes import assert_no_new_workers, worker_pids

PROMPTS = ["Once upon a time", "The ship", "My dear friend,", "One day the king"]
LONG = SamplingParams(max_tokens=1500, ignore_eos=True)


@contextmanager
def clean_end(within_s: float) -> Iterator[None]:
    """Assert that the block ends in time and leaves no worker behind."""
    before = worker_pids()
    start = time.monotonic()
    yield
    assert time.monotonic() - start < within_s
    assert_no_new_workers(before)


@pytest.mark.processes
def test_a_lane_that_raises_ends_the_engine_with_its_error() -> None:
    before = worker_pids()
    with LLM(ranks=2, transport="tests.support.transports:NoGreenlets", dbo="off") as llm:
        llm.generate(PROMPTS, SamplingParams(max_tokens=2))  # one lane is no greenlet
        llm.reconfigure(dbo="on")
        with clean_end(within_s=10), raises(EngineError, "dispatch layer 1", "LLM") as raised:
            llm.generate(PROMPTS, SamplingParams(max_tokens=2))
        assert_no_new_workers(before)
        assert "send_tokens" in "".join(raised.error.__notes__)
        with raises(EngineError, "dispatch layer 1"):
            llm.generate(PROMPTS)


@pytest.mark.processes
@pytest.mark.usefixtures("cold_ranks")
def test_a_killed_worker_is_named() -> None:
    before = worker_pids()
    with LLM(ranks=2, dbo="on") as llm:
        victim = next(pid for pid, rank in worker_pids().items() if rank == 1 and pid not in before)
        killed = False

        def kill(finished: int, total: int, tokens: int) -> None:
            nonlocal killed
            if tokens > 20 and not killed:
                killed = True
                os.kill(victim, signal.SIGKILL)

        with (
            clean_end(within_s=30),
            raises(EngineError, f"rank 1 (pid {victim})", "SIGKILL"),
        ):
            llm.generate(PROMPTS, LONG, progress=kill)
        assert_no_new_workers(before)


@pytest.mark.processes
def test_a_worker_that_is_killed_while_idle_is_named_at_the_next_call() -> None:
    before = worker_pids()
    with LLM(ranks=2) as llm:
        victim = next(pid for pid, rank in worker_pids().items() if rank == 0 and pid not in before)
        os.kill(victim, signal.SIGKILL)
        with clean_end(within_s=30), raises(EngineError, f"rank 0 (pid {victim})", "SIGKILL"):
            llm.generate(PROMPTS)
        assert_no_new_workers(before)


@pytest.mark.processes
def test_a_worker_that_ends_without_a_word_is_named() -> None:
    before = worker_pids()
    with (
        LLM(ranks=2, transport="tests.support.transports:DiesInCombine") as llm,
        raises(EngineError, "rank 1 (pid ", "code 7"),
    ):
        llm.generate(PROMPTS)
    assert_no_new_workers(before)


@pytest.mark.processes
def test_a_report_of_another_thread_ends_the_engine_at_once() -> None:
    """Long before the time limit, although the rank's own thread never returns to its socket."""
    before = worker_pids()
    with (
        LLM(ranks=2, transport="tests.support.transports:ReportsFromAnotherThread", timeout_s=100) as llm,
        clean_end(within_s=20),
        raises(EngineError, "rank 1", "generate", "combine layer") as raised,
    ):
        llm.generate(PROMPTS)
    assert_no_new_workers(before)
    assert not getattr(raised.error, "__notes__", [])


def test_a_report_is_there_whole_or_not_at_all(tmp_path: Path) -> None:
    assert read_report(0, tmp_path) is None
    code = (
        "import sys, pathlib; from antiphon.engine.worker import report_and_exit\n"
        "report_and_exit('the message', rank=3, folder=pathlib.Path(sys.argv[1]), kind='EngineError')"
    )
    assert subprocess.run([sys.executable, "-c", code, str(tmp_path)], check=False).returncode == 1
    assert [path.name for path in tmp_path.iterdir()] == ["failed-rank3.json"]
    assert read_report(3, tmp_path) == Failed(kind="EngineError", message="the message", traceback="")


@pytest.mark.processes
@pytest.mark.parametrize("how", [pytest.param("sleeps", marks=pytest.mark.slow), "is stopped"])
def test_a_peer_that_does_not_answer_is_named_within_the_time_limit(how: str) -> None:
    before = worker_pids()
    transport = "tests.support.transports:StopsInCombine" if how == "sleeps" else "alltoall"
    with LLM(ranks=2, transport=transport, dbo="on", timeout_s=3) as llm:
        victim = next(pid for pid, rank in worker_pids().items() if rank == 1 and pid not in before)

        def stop(finished: int, total: int, tokens: int) -> None:
            if how == "is stopped" and tokens > 20:
                os.kill(victim, signal.SIGSTOP)

        state = "running" if how == "sleeps" else "stopped"
        where = ("combine layer ", ", lane ") if how == "sleeps" else ()
        names = ("rank 0 ", *where, f"rank 1 (pid {victim}, {state})")
        with clean_end(within_s=12), raises(EngineError, *names) as raised:
            llm.generate(PROMPTS, LONG, progress=stop)
        assert re.search(r" [3-9]\.\d s ", str(raised.error))
    assert_no_new_workers(before)


@pytest.mark.processes
@pytest.mark.parametrize("phase", [pytest.param("dispatch", marks=pytest.mark.slow), "combine"])
def test_a_peer_that_stops_inside_an_exchange_of_slabs_is_named(phase: str) -> None:
    """Rank, layer, lane and phase; and the next start works."""
    before = worker_pids()
    transport = f"tests.support.transports:SlabStopsIn{phase.title()}"
    with (
        LLM(ranks=2, transport=transport, dbo="on", timeout_s=3) as llm,
        clean_end(within_s=12),
        raises(EngineError, "rank 0 ", f"{phase} layer ", "from rank 1", "rank 1 (pid ", ", running)") as raised,
    ):
        llm.generate(PROMPTS, LONG)
    assert re.search(rf" [3-9]\.\d s .*{phase} layer \d, lane \d", str(raised.error))
    assert_no_new_workers(before)
    with LLM(ranks=2, transport="shared-memory") as llm:
        assert llm.generate(PROMPTS)


def test_a_failed_request_leaves_the_engine_usable(one_rank: LLM) -> None:
    expected = [output.token_ids for output in one_rank.generate(PROMPTS)]
    too_long = [5] * 5000
    with raises(PromptLengthError, "prompt 1", "5000", "max_model_len=4096", "4095", option="prompts", value=5000):
        one_rank.generate(["fine", too_long])
    assert [output.token_ids for output in one_rank.generate(PROMPTS)] == expected
    assert one_rank.stats()["unfinished"] == 0


@pytest.mark.processes
def test_a_failed_request_leaves_two_ranks_usable(two_ranks: LLM) -> None:
    expected = [output.token_ids for output in two_ranks.generate(PROMPTS)]
    with raises(PromptLengthError, "5000"):
        two_ranks.generate(["fine", [5] * 5000])
    assert [output.token_ids for output in two_ranks.generate(PROMPTS)] == expected


class InterruptError(Exception):
    pass


@pytest.mark.processes
def test_an_interrupted_call_frees_everything_and_the_next_one_works(two_ranks: LLM) -> None:
    expected = [output.token_ids for output in two_ranks.generate(PROMPTS)]

    def interrupt(finished: int, total: int, tokens: int) -> None:
        if tokens > 10:
            raise InterruptError

    with pytest.raises(InterruptError):
        two_ranks.generate(PROMPTS, LONG, progress=interrupt)
    assert [output.token_ids for output in two_ranks.generate(PROMPTS)] == expected
    stats = two_ranks.stats()
    assert stats["unfinished"] == 0
    assert stats["kv_blocks"]["free"] == stats["kv_blocks"]["total"]


def test_an_interrupted_call_on_one_rank_frees_everything_and_the_next_one_works(
    one_rank: LLM, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Ctrl-C in the middle of a layer."""
    expected = [output.token_ids for output in one_rank.generate(PROMPTS)]
    transport = one_rank._client._engine.transport  # type: ignore[attr-defined]

    def interrupt(*_: object, **__: object) -> None:
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(transport, "send_partials", interrupt)
        with pytest.raises(KeyboardInterrupt):
            one_rank.generate(PROMPTS)
    assert [output.token_ids for output in one_rank.generate(PROMPTS)] == expected
    assert one_rank.stats()["unfinished"] == 0


@pytest.mark.processes
def test_a_message_takes_effect_at_the_same_step_on_all_ranks(two_ranks: LLM) -> None:
    """Calls in quick succession take as many steps as tokens, whichever rank gets the message first."""
    for _ in range(15):
        before = two_ranks.stats()["steps"]
        two_ranks.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True))
        two_ranks.generate(PROMPTS, SamplingParams(max_tokens=2, ignore_eos=True))
        assert two_ranks.stats()["steps"] == before + 4


@pytest.mark.processes
def test_huge_numbers_in_sampling_params_are_cut_to_the_model(two_ranks: LLM) -> None:
    params = [SamplingParams(max_tokens=3), SamplingParams(max_tokens=2**70, top_k=2**70, temperature=1.0)]
    short, long = two_ranks.generate(["Once", "Question: 1 + 1"], params)
    assert len(short.token_ids) == 3
    assert len(long.token_ids) <= 4095


@pytest.mark.processes
def test_a_module_of_the_users_folder_does_not_hide_one_of_the_library(tmp_path: Path) -> None:
    (tmp_path / "random.py").write_text("raise SystemExit('the wrong module')")
    code = (
        "import sys; sys.path.remove('')\n"
        "from antiphon import LLM\n"
        "with LLM(ranks=2) as llm: print(len(llm.generate('Once')))"
    )
    ended = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True, check=False)
    assert ended.stdout.strip() == "1", ended.stderr


@pytest.mark.parametrize(
    ("prompts", "names"),
    [
        ([[]], ["prompt 0"]),
        ([["a"]], ["prompt 0", "'a'", "4095"]),
        ([[4096]], ["prompt 0", "4096", "4095"]),
        ([[-1]], ["-1"]),
        ([[True, 5]], ["True"]),
        (b"abc", ["prompts", "bytes"]),
        ([b"abc"], ["prompt 0", "bytes"]),
        (["\ud800"], ["prompt 0", "surrogates not allowed"]),
        (3, ["prompts", "int"]),
        (["fine", 3], ["prompt 1", "int"]),
    ],
)
def test_prompts_that_cannot_be_served(one_rank: LLM, prompts: Any, names: list[str]) -> None:
    with raises(RequestError, *names):
        one_rank.generate(prompts)


@pytest.mark.parametrize(
    ("options", "names"),
    [
        ({"dbo": "onn"}, ["dbo", "'on'"]),
        ({"transport": "altoall"}, ["transport", "'alltoall'"]),
        ({"transport": "simulated:alltoall:3"}, ["'3'", "200MB/s"]),
        ({"transport": "no.such.module:Thing"}, ["no.such.module:Thing"]),
        ({"transport": "local", "ranks": 2}, ["transport 'local'", "2"]),
        ({"dtype": "float16"}, ["dtype='float16'", "'bfloat16'", "'float32'"]),
        ({"split": "requests"}, ["split", "'request-boundary'"]),
        ({"micro_batches": 9}, ["micro_batches=9", "2 to 8"]),
        ({"ranks": 3}, ["num_experts=32", "ranks=3", "1, 2, 4, 8, 16, 32"]),
        ({"ranks": 0}, ["ranks=0"]),
        ({"rank": 2}, ["'rank'", "'ranks'"]),
        ({"max_num_seqs": 0}, ["max_num_seqs=0"]),
        ({"max_model_len": 5000}, ["max_model_len=5000", "4096"]),
        ({"kv_cache_memory": 10}, ["kv_cache_memory=10", "2"]),
        ({"gpu_memory_utilization": 0}, ["gpu_memory_utilization=0"]),
        ({"gpu_memory_utilization": 1.5}, ["gpu_memory_utilization=1.5"]),
        ({"device": "gpu"}, ["device='gpu'", "auto, cpu, cuda"]),
        ({"device": "cuda", "ranks": 64}, ["device='cuda'", "ranks=64"]),
        ({"peer_access": "no"}, ["peer_access='no'", "True", "False"]),
        ({"load_format": "dumy"}, ["load_format", "'dummy'"]),
        ({"num_layers": 0}, ["num_layers=0"]),
        ({"routing": "uniform"}, ["routing='uniform'", "dummy"]),
        ({"routing": "unifrom", "load_format": "dummy"}, ["routing", "'uniform'"]),
        ({"model": "qwen3-30b-a3b"}, ["'qwen3-30b-a3b'", "load_format='dummy'"]),
        ({"timeout_s": 0}, ["timeout_s=0"]),
        ({"timeout_s": float("inf")}, ["timeout_s=inf"]),
        ({"timeout_s": "x"}, ["timeout_s='x'"]),
        ({"seed": "x"}, ["seed='x'"]),
        ({"kv_cache_memory": 10**18}, ["kv_cache_memory", "931322575 GiB"]),
        ({"dbo_prefill_token_threshold": -1}, ["dbo_prefill_token_threshold=-1"]),
        ({"prefix_caching": "no"}, ["prefix_caching='no'", "True", "False"]),
        ({"chunked_prefill": 1}, ["chunked_prefill=1", "True", "False"]),
        ({"dbo_start_layer": 6}, ["dbo_start_layer=6", "6 layers", "5"]),
        ({"dbo_end_layer": 7}, ["dbo_end_layer=7", "6 layers"]),
        ({"num_layers": 2, "dbo_end_layer": 3}, ["dbo_end_layer=3", "2 layers"]),
        ({"min_prefill_tokens_to_split": -1}, ["min_prefill_tokens_to_split=-1"]),
    ],
)
def test_options_that_cannot_work_are_refused_before_anything_starts(options: dict[str, Any], names: list[str]) -> None:
    with clean_end(within_s=10), raises(OptionError, *names):
        LLM(**options)


def copy_of_the_model(folder: Path) -> Path:
    shutil.copytree(bundled_model(), folder)
    return folder


def test_a_checkpoint_with_a_missing_tensor_is_refused(tmp_path: Path) -> None:
    folder = copy_of_the_model(tmp_path / "model")
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    name = "model.layers.3.mlp.experts.7.up_proj.weight"
    del index["weight_map"][name]
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    with clean_end(within_s=10), raises(ModelError, name):
        LLM(str(folder), ranks=2)


@pytest.mark.parametrize(
    ("file_name", "content", "named"),
    [
        ("config.json", '{"architectures": ["DeepseekV4ForCausalLM"]}', "DeepseekV3ForCausalLM"),
        ("config.json", "{", "config.json"),
        ("model-00001-of-00002.safetensors", "no safetensors", "model-00001-of-00002.safetensors"),
        ("tokenizer.json", "{}", "tokenizer"),
    ],
)
def test_broken_model_files_are_refused(tmp_path: Path, file_name: str, content: str, named: str) -> None:
    folder = copy_of_the_model(tmp_path / "model")
    (folder / file_name).write_text(content)
    with clean_end(within_s=10), raises(ModelError, named):
        LLM(str(folder), ranks=2)


def test_a_model_that_is_not_there_is_refused() -> None:
    with raises(ModelError, "/no/such/model"):
        LLM("/no/such/model")


@pytest.mark.processes
def test_workers_end_with_a_script_that_is_killed(tmp_path: Path) -> None:
    """A plain script without a __main__ guard; its end by SIGKILL takes the workers along."""
    script = tmp_path / "script.py"
    script.write_text(
        textwrap.dedent(
            """
            from antiphon import LLM, SamplingParams
            llm = LLM(ranks=2, dbo="on")
            print(llm.generate("Once upon a time", SamplingParams(max_tokens=4))[0].text, flush=True)
            llm.generate("The ship", SamplingParams(max_tokens=4000, ignore_eos=True))
            """
        )
    )
    with subprocess.Popen([sys.executable, script], stdout=subprocess.PIPE, text=True) as process:
        assert process.stdout is not None
        assert process.stdout.readline().strip()
        workers = worker_pids(process.pid)
        assert sorted(workers.values()) == [0, 1]
        process.kill()
    deadline = time.monotonic() + 5
    while any(Path(f"/proc/{pid}/exe").exists() for pid in workers) and time.monotonic() < deadline:
        time.sleep(0.05)
    assert not any(Path(f"/proc/{pid}/exe").exists() for pid in workers)


@pytest.mark.processes
@pytest.mark.usefixtures("cold_ranks")
def test_leaving_the_context_ends_every_worker_and_one_rank_starts_none() -> None:
    before = worker_pids()
    with LLM(ranks=1) as llm:
        llm.generate("Once", SamplingParams(max_tokens=1))
        assert worker_pids() == before
    with LLM(ranks=2) as llm:
        assert len(worker_pids()) == len(before) + 2
    assert_no_new_workers(before)
    with raises(EngineError, "closed", "LLM"):
        llm.generate("Once")
