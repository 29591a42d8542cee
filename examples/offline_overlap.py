"""The same prompts with overlap off and on, on 2 CPU ranks over a simulated link: python examples/offline_overlap.py"""

from antiphon import LLM, SamplingParams

NAMES = ["Ben", "Lucy", "Tom", "Maya", "Ravi", "Diego", "Kenji", "Carlos"]
prompts = [
    f"Question: {name} has {3 + k} boxes with {2 + k % 7} apples each. Then {name} gives {1 + k % 5} of them away. "
    f"How many apples does {name} have now?\nAnswer:"
    for k in range(12)
    for name in NAMES
]
params = SamplingParams(max_tokens=2)

# CPU ranks copy through memory, which takes processor time. This simulated link only takes time, like a copy engine.
link = "simulated:alltoall:80MB/s:1ms"

tokens = {}
with LLM(ranks=2, device="cpu", transport=link, prefix_caching=False) as llm:
    llm.generate(prompts, params)  # warm-up
    for dbo, plan in (("off", "serial"), ("on", "dual")):
        llm.reconfigure(dbo=dbo)
        before = llm.stats()["overlap"].get(plan, {})
        tokens[dbo] = [output.token_ids for _ in range(3) for output in llm.generate(prompts, params)]
        after = llm.stats()["overlap"][plan]
        time, link_busy, hidden = (
            after[name] - before.get(name, 0) for name in ("time_s", "communication_s", "hidden_s")
        )
        print(
            f"dbo {dbo:<3}: {time:.2f} s; communication took {link_busy:.2f} s, "
            f"of which {hidden:.2f} s ({hidden / link_busy:.0%}) were hidden"
        )
print("the tokens are", "equal" if tokens["off"] == tokens["on"] else "DIFFERENT")
