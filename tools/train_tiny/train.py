"""Stage "train": the training loop, after "prepare".

The learning-rate schedule follows the clock (or --steps): warm-up by steps, constant to 30% of the training time, then
linear to nearly zero. On CUDA the clock starts after two steps, when compilation is over. Experts are balanced
without an auxiliary loss: after every step the correction bias of each expert moves towards the mean load.
"""

from __future__ import annotations

import time
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor

from .checkpoint import save
from .feed import SEQ_LEN, Feed
from .model import TrainingForward, make_model
from .optimizer import Optimizers

SEED = 0
WARM_UP_STEPS = 150
COMPILE_STEPS = 2  # on CUDA, steps before the clock starts
CHECKPOINTS_AT = (0.5, 0.8)  # shares of the training time


@dataclass(frozen=True, slots=True, kw_only=True)
class TrainOptions:
    """The command line, as far as training needs it."""

    out: Path  # holds tokenizer.json; receives the checkpoint
    work: Path  # holds prose.npz
    device: str
    minutes: float  # training time
    deadline_s: float  # end this many seconds after started_s, 0: no deadline
    num_steps: int  # train this many steps instead of `minutes`, 0: by the clock
    batch: int  # rows a step
    peak_lr: float
    num_workers: int
    num_chunks: int
    log_every: int  # steps
    checkpoints: bool
    started_s: float  # time.time() at the start of the program


class Clock:
    """The share of training that is done, by steps or by time; 0 until `start()`."""

    def __init__(self, options: TrainOptions):
        self.num_steps, self.budget_s = options.num_steps, options.minutes * 60
        self.deadline_s, self.started_s = options.deadline_s, options.started_s
        self.training_since_s: float | None = None

    def start(self) -> None:
        """Training time counts from now."""
        self.training_since_s = time.time()
        if self.deadline_s:
            self.budget_s = min(self.budget_s, self.deadline_s - (self.training_since_s - self.started_s))

    def fraction(self, step: int) -> float:
        """0 at the start of training; at 1 or more, training is over."""
        if self.training_since_s is None:
            return 0.0
        if self.num_steps:
            return step / self.num_steps
        if self.budget_s <= 0:  # the deadline has passed already
            return 1.0
        return (time.time() - self.training_since_s) / self.budget_s


class Log:
    """Prints a line every `log_every` steps: loss and expert load, speed, and the state of the feed."""

    def __init__(self, options: TrainOptions):
        self.options = options
        self.losses: list[Tensor] = []  # of the steps since the last line
        self.last: tuple[float, int] | None = None  # time.time() and step from which the speed is counted

    def restart(self, step: int) -> None:
        """Count the speed from now."""
        self.last = (time.time(), step)

    def step(self, step: int, fraction: float, lr: float, loss: Tensor, loads: list[Tensor], feed: Feed) -> None:
        self.losses.append(loss.detach())
        if step % self.options.log_every:
            return
        now, mean_loss = time.time(), torch.stack(self.losses).mean().item()
        skew = [round((load.max() / load.mean()).item(), 2) for load in loads]
        tokens_per_s = 0.0
        if self.last:
            tokens_per_s = (step - self.last[1]) * self.options.batch * SEQ_LEN / (now - self.last[0])
        print(
            f"step {step} t {now - self.options.started_s:.0f}s frac {fraction:.3f} lr {lr:.2e} loss {mean_loss:.4f} "
            f"tok/s {tokens_per_s / 1e6:.2f}M skew {skew} {feed.state()}",
            flush=True,
        )
        self.last, self.losses = (now, step), []


def learning_rate(peak_lr: float, step: int, fraction: float) -> float:
    """Warm-up by steps, then constant, then linear to 0.3% of the peak from 30% of the training on."""
    return peak_lr * min(1.0, (step + 1) / WARM_UP_STEPS) * min(1.0, (1.0 - fraction) / 0.7 + 0.003)


@torch.no_grad()
def balance_experts(biases: list[Tensor], loads: list[Tensor], fraction: float) -> None:
    """Nudge the bias of under-loaded experts up and of over-loaded ones down, in place.

    Method: "Auxiliary-Loss-Free Load Balancing Strategy for Mixture-of-Experts" (Wang et al., 2024).
    """
    rate = 1e-3 if fraction < 0.85 else 1e-4
    for bias, load in zip(biases, loads, strict=True):
        bias.add_(rate * torch.sign(load.mean() - load))


def train(options: TrainOptions) -> None:
    """Train from random weights on the corpus in WORK and save the model in OUT."""
    cuda = options.device == "cuda"

    # 1. The feed first: its worker processes are forked, and that must be before anything touches the GPU.
    feed = Feed(
        options.work / "prose.npz",
        options.out / "tokenizer.json",
        options.num_workers,
        options.batch,
        options.device,
        options.num_chunks,
    )

    # 2. Model and optimizers.
    torch.manual_seed(SEED)
    torch.backends.cuda.matmul.allow_tf32 = False
    hf = make_model(options.device)
    forward = TrainingForward(hf, torch.bfloat16 if cuda else torch.float32, compile=cuda)
    optimizers = Optimizers(hf, options.peak_lr)
    num_parameters = sum(p.numel() for p in hf.parameters())
    print(
        f"{num_parameters / 1e6:.2f} M parameters; set-up {time.time() - options.started_s:.1f} s",
        flush=True,
    )

    # 3. Steps, until the clock says 1.
    clock, log, step = Clock(options), Log(options), 0
    pending_checkpoints = list(CHECKPOINTS_AT) if options.checkpoints else []
    if not cuda:
        clock.start()
    while True:
        if cuda and step == COMPILE_STEPS:
            torch.cuda.synchronize()
            clock.start()
            log.restart(step)
            print(f"compiled; {time.time() - options.started_s:.1f} s since start", flush=True)
        fraction = clock.fraction(step)
        if fraction >= 1:
            break
        lr = learning_rate(options.peak_lr, step, fraction)
        rows = feed.next_batch().to(options.device, non_blocking=True).long()
        loss, loads = forward(rows[:, :-1], rows[:, 1:])
        loss.backward()
        optimizers.step(lr)
        hf.zero_grad(set_to_none=True)
        balance_experts(forward.biases, loads, fraction)
        step += 1
        log.step(step, fraction, lr, loss, loads, feed)
        if pending_checkpoints and fraction >= pending_checkpoints[0]:
            pending_checkpoints.pop(0)
            save(hf, options.out)

    # 4. Save.
    feed.close()
    save(hf, options.out)
    now = time.time()
    print(
        f"done: {step} steps, {step * options.batch * SEQ_LEN / 1e6:.0f} M tokens, "
        f"{now - clock.training_since_s:.0f} s of training, {now - options.started_s:.0f} s in all",
        flush=True,
    )
