"""Batches of training rows: worker processes generate problems and stories, a thread mixes them with prose.

    worker processes   make_rows(job) --+   chunks of 1,024 rows, in any order
    thread "collect"                    +--> pools --+
    thread "mix"       pools + prose -> batch -------+--> queue of 16 batches
    caller                                                +--> next_batch()

A row is SEQ_LEN + 1 token ids: inputs are row[:-1], labels row[1:]. Which chunk comes first depends on the workers, so
two runs see the same rows in different orders. Generated rows are seen once, unless training is faster than the
workers; prose is passed over again and again.
"""

from __future__ import annotations

import functools
import multiprocessing
import os
import queue
import threading
import time
from pathlib import Path
from random import Random
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
import torch

from .documents import problem_doc, story_doc
from .tokenizer import BOS

if TYPE_CHECKING:
    from collections.abc import Iterable

    from tokenizers import Tokenizer

SEQ_LEN = 1024
MIX = (("problems", 0.45), ("stories", 0.12), ("prose", 0.43))  # share of training rows
ROWS_PER_CHUNK = 1024
DOCS_PER_CALL = 64  # documents given to the tokenizer at once


class Job(NamedTuple):
    """A chunk of rows for a worker to generate."""

    kind: str  # "problems" or "stories"
    seed: int
    num_rows: int


@functools.cache
def load_tokenizer(path: str) -> Tokenizer:
    """The tokenizer of a worker process, which takes one core and so uses one thread."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"
    from tokenizers import Tokenizer

    return Tokenizer.from_file(path)


def make_rows(tokenizer_path: str, job: Job) -> tuple[str, np.ndarray]:
    """The job's kind and uint16 rows [num_rows, SEQ_LEN + 1]; each row starts with a new document."""
    tok = load_tokenizer(tokenizer_path)
    r = Random(f"{job.kind}-{job.seed}")
    make_doc = problem_doc if job.kind == "problems" else story_doc
    rows: list[list[int]] = []
    current: list[int] = []
    while len(rows) < job.num_rows:
        docs = [make_doc(r) for _ in range(DOCS_PER_CALL)]
        for encoding in tok.encode_batch(docs, add_special_tokens=False):
            current.extend(encoding.ids)
            if len(current) > SEQ_LEN:
                rows.append(current[: SEQ_LEN + 1])
                current = []
    return job.kind, np.array(rows[: job.num_rows], dtype=np.uint16)


def make_jobs(num_chunks: int) -> list[Job]:
    """`num_chunks` jobs for problems, with a quarter as many for stories (at least two) spread among them."""
    jobs = [Job("problems", i, ROWS_PER_CHUNK) for i in range(num_chunks)]
    for i in range(max(2, num_chunks // 4)):
        jobs.insert(min(len(jobs), 1 + 5 * i), Job("stories", i, ROWS_PER_CHUNK))
    return jobs


class Feed:
    """Batches of rows, made from the start of its life until `close()`.

    Create it before anything touches the GPU: the worker processes are forked. Batches are int32
    [batch, SEQ_LEN + 1] in pinned memory for a CUDA device; the caller may keep and change them.
    """

    def __init__(
        self, prose_path: Path, tokenizer_path: Path, num_workers: int, batch: int, device: str, num_chunks: int
    ):
        stored = np.load(prose_path)
        ids, starts = stored["ids"], stored["starts"]
        self.ids, self.starts = ids, starts[starts < len(ids) - SEQ_LEN]
        if not len(self.starts):
            raise ValueError(
                f"{prose_path} has {len(ids)} tokens, fewer than one row of {SEQ_LEN} after a paragraph start; "
                "run --stage prepare with more books"
            )
        self.rng, self.batch, self.device = np.random.default_rng(0), batch, device
        self.order, self.next_start = self.rng.permutation(len(self.starts)), 0  # of the paragraph starts
        self.pools: dict[str, list[np.ndarray]] = {"problems": [], "stories": []}
        self.positions = {"problems": 0, "stories": 0}  # rows taken from each pool
        self.batches: queue.Queue[torch.Tensor] = queue.Queue(maxsize=16)
        self.is_closed = False

        self.workers = multiprocessing.get_context("fork").Pool(num_workers)
        make = functools.partial(make_rows, str(tokenizer_path))
        chunks = self.workers.imap_unordered(make, make_jobs(num_chunks))
        threading.Thread(target=self._collect, args=(chunks,), daemon=True).start()
        threading.Thread(target=self._mix, daemon=True).start()

    def next_batch(self) -> torch.Tensor:
        """The next batch, int32 [batch, SEQ_LEN + 1]; waits for it."""
        return self.batches.get()

    def state(self) -> str:
        """For the log: chunks made of each kind, chunks used of each kind, batches waiting."""
        made = [len(pool) for pool in self.pools.values()]
        used = [rows // ROWS_PER_CHUNK for rows in self.positions.values()]
        return f"pool {made} pos {used} q {self.batches.qsize()}"

    def close(self) -> None:
        """End the threads and the worker processes."""
        self.is_closed = True
        self.workers.terminate()

    def _collect(self, chunks: Iterable[tuple[str, np.ndarray]]) -> None:
        for kind, rows in chunks:
            self.pools[kind].append(rows)
            if self.is_closed:
                break

    def _mix(self) -> None:
        while not self.is_closed:
            num_problems, num_stories = (int(share * self.batch + self.rng.random()) for _, share in MIX[:2])
            rows = np.concatenate(
                [
                    self._generated("problems", num_problems),
                    self._generated("stories", num_stories),
                    self._prose(self.batch - num_problems - num_stories),
                ]
            )
            batch = torch.from_numpy(rows.astype(np.int32))
            self.batches.put(batch.pin_memory() if self.device == "cuda" else batch)

    def _generated(self, kind: str, num_rows: int) -> np.ndarray:
        """The next rows of a pool, uint16 [num_rows, SEQ_LEN + 1]; waits for the first chunk."""
        parts = [np.empty((0, SEQ_LEN + 1), dtype=np.uint16)]
        pool = self.pools[kind]
        while num_rows:
            if not pool:
                time.sleep(0.05)
                continue
            chunk, offset = divmod(self.positions[kind], ROWS_PER_CHUNK)
            if chunk >= len(pool):  # all rows made so far were used: start again
                self.positions[kind] = 0
                continue
            parts.append(pool[chunk][offset : offset + num_rows])
            self.positions[kind] += len(parts[-1])
            num_rows -= len(parts[-1])
        return np.concatenate(parts)

    def _prose(self, num_rows: int) -> np.ndarray:
        """Rows that begin at a random paragraph, uint16 [num_rows, SEQ_LEN + 1].

        A pass over the permutation covers each token about as often as any other.
        """
        out = np.empty((num_rows, SEQ_LEN + 1), dtype=np.uint16)
        for row in out:
            if self.next_start >= len(self.order):
                self.order, self.next_start = self.rng.permutation(len(self.starts)), 0
            start = self.starts[self.order[self.next_start]]
            self.next_start += 1
            row[0] = BOS
            row[1:] = self.ids[start : start + SEQ_LEN]
        return out
