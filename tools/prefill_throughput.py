"""Prefill tokens per second and GPU of the whole engine: dummy weights, random prompts, one output token each.

    python -m tools.prefill_throughput qwen3-30b-a3b --ranks 2 --transport auto --json out.json

With several ranks, runs with overlap off and on are interleaved. Prints one JSON object as its last line.
"""

from __future__ import annotations

import argparse
import random
import statistics
import time
from pathlib import Path

from antiphon import LLM, SamplingParams
from antiphon.bench.conditions import check_writable, conditions, write_json
from antiphon.device.table import rank_device
from antiphon.machine.versions import versions


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("model")
    parser.add_argument("--ranks", type=int, default=1)
    parser.add_argument("--transport", default="auto")
    parser.add_argument("--no-peer-access", action="store_true")
    parser.add_argument("--num-layers", type=int)
    parser.add_argument("--prompts", type=int, default=64, help="per GPU")
    parser.add_argument("--length", type=int, default=2048, help="tokens per prompt")
    parser.add_argument("--batched-tokens", type=int, default=8192, help="per step and GPU")
    parser.add_argument("--routing", default="uniform")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--device", default="auto")
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    check_writable(options.json, "json")

    llm = LLM(
        options.model,
        ranks=options.ranks,
        device=options.device,
        transport=options.transport,
        peer_access=not options.no_peer_access,
        load_format="dummy",
        num_layers=options.num_layers,
        routing=options.routing,
        dbo="off",
        prefix_caching=False,  # every repeat computes all of its prompts
        max_num_batched_tokens=options.batched_tokens,
        max_model_len=max(options.batched_tokens, options.length + 1),
    )
    with llm:
        kind = llm.config.device_kind
        vocabulary = llm.config.model.vocab_size
        numbers = random.Random(0)
        num_prompts = options.prompts * options.ranks
        prompts = [[numbers.randrange(vocabulary) for _ in range(options.length)] for _ in range(num_prompts)]
        params = SamplingParams(max_tokens=1, ignore_eos=True)
        arms: dict[str, list[float]] = {"off": []} if options.ranks == 1 else {"off": [], "on": []}
        tokens: dict[str, list[list[int]]] = {}
        for repeat in range(1 + options.repeats):
            for dbo, rates in arms.items():
                llm.reconfigure(dbo=dbo)
                start = time.perf_counter()
                outputs = llm.generate(prompts, params)
                seconds = time.perf_counter() - start
                tokens[dbo] = [output.token_ids for output in outputs]
                if repeat:  # the first one is a warm-up
                    rates.append(options.prompts * options.length / seconds)
        stats = llm.stats()
        equal = sum(a == b for a, b in zip(tokens["off"], tokens.get("on", tokens["off"]), strict=True))
    where = [{"device": rank_device(kind, rank).describe(), "versions": versions()} for rank in range(options.ranks)]
    recorded = {name: str(value) if isinstance(value, Path) else value for name, value in vars(options).items()}
    result = {
        "bench": "prefill throughput",
        "what": "prefill tokens per second and GPU, from LLM.generate to its return",
        **conditions(where, recorded),
        "transport": stats.transport,
        "steps_by_plan": stats.steps_by_plan,
        "kv_cache": stats.kv_cache,
        "equal_first_tokens": f"{equal} of {num_prompts}",
        "tokens_per_s_and_gpu": {
            dbo: {
                "median": round(statistics.median(rates), 1),
                "best": round(max(rates), 1),
                "worst": round(min(rates), 1),
            }
            for dbo, rates in arms.items()
        },
    }
    write_json(result, options.json)


if __name__ == "__main__":
    main()
