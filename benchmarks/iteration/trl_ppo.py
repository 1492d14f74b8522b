"""TRL's PPOTrainer (1.12.0, the last release that has one), gradient checkpointing off, fused AdamW.

Its reward and value models are stand-ins that cost nothing, so what is timed is the policy's and the reference's work:
a real critic would make it slower. One iteration of `train` is let through at a time by a callback.
"""

import os
import tempfile
import threading
import time
import warnings
from collections.abc import Callable
from types import SimpleNamespace

import torch
from datasets import Dataset
from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback

from benchmarks.iteration.workloads import Workload, prompts

ITERATIONS = 1000


class Costless(torch.nn.Module):
    """A sequence classifier whose hidden states are zeros of width 1."""

    base_model_prefix = "trunk"

    def __init__(self) -> None:
        super().__init__()
        self.score = torch.nn.Linear(1, 1, bias=False)

    def trunk(self, input_ids: torch.Tensor, **_) -> SimpleNamespace:
        return SimpleNamespace(hidden_states=[self.score.weight.new_zeros(*input_ids.shape, 1)])


class Gate(TrainerCallback):
    """Holds the trainer at the end of every iteration until the next one is asked for."""

    def __init__(self) -> None:
        self.go, self.done = threading.Semaphore(0), threading.Semaphore(0)
        self.marks: list[float] = []
        self.failure: BaseException | None = None

    def mark(self) -> None:
        if torch.cuda.is_available():
            torch.cuda.synchronize()
        self.marks.append(time.perf_counter())

    def on_step_end(self, *_, **__) -> None:
        self.mark()
        self.done.release()
        self.go.acquire()


def start(workload: Workload) -> Callable[[], dict[str, float]]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        from trl.experimental.ppo import PPOConfig, PPOTrainer
        from trl.experimental.ppo import ppo_trainer as module
    dtype = getattr(torch, workload.dtype)
    tokenizer = AutoTokenizer.from_pretrained(workload.model, padding_side="left")
    if tokenizer.pad_token_id is None:
        tokenizer.pad_token = tokenizer.eos_token
    model, ref_model = (AutoModelForCausalLM.from_pretrained(workload.model, dtype=dtype) for _ in range(2))
    ids = tokenizer(prompts(workload))["input_ids"]
    micro = workload.batch if workload.micro_batch is None else workload.micro_batch
    arguments = PPOConfig(
        output_dir=tempfile.mkdtemp(),
        per_device_train_batch_size=micro,
        gradient_accumulation_steps=workload.batch // micro,
        num_mini_batches=1,
        local_rollout_forward_batch_size=workload.batch,
        total_episodes=ITERATIONS * workload.batch,
        num_ppo_epochs=workload.epochs,
        response_length=workload.new_tokens,
        temperature=1.0,
        learning_rate=1e-6,
        gradient_checkpointing=False,
        bf16=False,
        use_cpu=not torch.cuda.is_available(),
        optim="adamw_torch_fused",
        num_sample_generations=0,
        report_to=[],
        save_strategy="no",
        logging_strategy="no",
        disable_tqdm=True,
    )
    gate = Gate()
    trainer = PPOTrainer(
        args=arguments,
        processing_class=tokenizer,
        model=model,
        ref_model=ref_model,
        reward_model=Costless().to(dtype),
        value_model=Costless().to(dtype),
        train_dataset=Dataset.from_dict({"input_ids": ids}),
        eval_dataset=Dataset.from_dict({"input_ids": ids}),
        callbacks=[gate],
    )
    generation, masked_whiten = module.batch_generation, module.masked_whiten

    def timed_generation(*of, **named):
        gate.mark()
        made = generation(*of, **named)
        gate.mark()
        return made

    def timed_whitening(*of, **named):  # the last thing before the update
        made = masked_whiten(*of, **named)
        gate.mark()
        return made

    module.batch_generation, module.masked_whiten = timed_generation, timed_whitening

    def run() -> None:
        gate.go.acquire()
        try:
            trainer.train()
        except BaseException as failure:
            gate.failure = failure
            gate.done.release()

    threading.Thread(target=run, daemon=True).start()

    def iteration() -> dict[str, float]:
        gate.marks.clear()
        gate.go.release()
        gate.done.acquire()
        if gate.failure is not None:
            raise gate.failure
        begin, generated, ready, end = gate.marks
        return {"rollout": generated - begin, "score": ready - generated, "update": end - ready}

    return iteration


def device_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
