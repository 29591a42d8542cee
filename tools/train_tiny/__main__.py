"""Command line; run it from the root of the repository.

    python -m tools.train_tiny --out DIR                    # everything: corpus, tokenizer, training, checks
    python -m tools.train_tiny --stage prepare --out DIR    # corpus + tokenizer only (no GPU needed)
    python -m tools.train_tiny --stage train --out DIR      # training only, after "prepare"
    python -m tools.train_tiny --stage eval --out DIR       # the figures of the model card, on any machine

The corpus has three parts:

  * word problems   generated: 40 templates in the manner of grade-school mathematics, one to three steps of
                    reasoning in words, the last line "#### <number>";
  * short stories   generated from a small grammar, plus a few lines of chat;
  * prose           public-domain English fiction: the authors named in prose.BOOK_AUTHORS, read from a checkout of
                    the public GitHub repository mlschmitt/classic-books-markdown (--books DIR; without it the
                    program runs `git clone`). Passages of 37 of the books are held out, as heldout.txt.

Needs: torch >= 2.9, transformers >= 5.17, tokenizers, safetensors, numpy. The checkpoint of the project,
antiphon/data/tiny-deepseek, was trained on one NVIDIA H200 with the defaults below (9 minutes, 13,503 steps,
1.77 billion tokens); its MODEL_CARD.md has the figures. `--minutes` sets the training time, and the learning-rate
schedule follows the clock: on a slower GPU give more minutes, or --steps.
"""

import argparse
import os
import time
from pathlib import Path

import torch

from .corpus import prepare
from .evaluate import evaluate
from .train import TrainOptions, train
from .word_problems import NUM_TEST_PROBLEMS


def make_parser() -> argparse.ArgumentParser:
    """The command line's options."""
    parser = argparse.ArgumentParser(
        prog="python -m tools.train_tiny", description="Build, train and evaluate tiny-deepseek."
    )
    add = parser.add_argument
    add("--out", type=Path, required=True, help="folder for the model")
    add("--work", type=Path, help="folder for intermediate files (default: OUT/work)")
    add("--books", type=Path, help="a checkout of mlschmitt/classic-books-markdown (default: git clone it into WORK)")
    add("--stage", choices=["all", "prepare", "train", "eval"], default="all")
    add("--minutes", type=float, default=9.0, help="training time; the learning-rate schedule follows it")
    add("--deadline", type=float, default=0, help="end training this many seconds after the start, before --minutes")
    add("--steps", type=int, default=0, help="train this many steps, whatever --minutes and --deadline say")
    add("--batch", type=int, default=128, help="rows of 1024 tokens a step")
    add("--lr", type=float, default=4e-3, help="peak learning rate")
    add("--workers", type=int, default=max(1, (os.cpu_count() or 2) - 3), help="processes that generate rows")
    add("--chunks", type=int, default=800, help="chunks of 1024 rows of word problems to generate")
    add("--log-every", type=int, default=50, help="steps between lines of the training log")
    add("--checkpoints", action="store_true", help="also save at 50%% and 80%% of the training time")
    add("--limit", type=int, default=NUM_TEST_PROBLEMS, help="word problems to evaluate")
    add("--full", action="store_true", help="evaluate the 5-shot prompt too")
    add("--device", help="default: cuda if there is one, else cpu")
    return parser


def main() -> None:
    """Run the stages that the command line names."""
    started_s = time.time()
    args = make_parser().parse_args()
    device = args.device or ("cuda" if torch.cuda.is_available() else "cpu")
    work = args.work or args.out / "work"
    if args.stage in ("all", "prepare"):
        prepare(args.out, work, args.books)
    if args.stage in ("all", "train"):
        train(
            TrainOptions(
                out=args.out,
                work=work,
                device=device,
                minutes=args.minutes,
                deadline_s=args.deadline,
                num_steps=args.steps,
                batch=args.batch,
                peak_lr=args.lr,
                num_workers=args.workers,
                num_chunks=args.chunks,
                log_every=args.log_every,
                checkpoints=args.checkpoints,
                started_s=started_s,
            )
        )
    if args.stage in ("all", "eval"):
        evaluate(args.out, device, args.limit, args.full)


if __name__ == "__main__":
    main()
