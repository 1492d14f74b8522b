"""The article's loop, literally, on Hugging Face's `generate`: what it leaves open is filled in the plainest way.

Its KL is one number for the batch, and so cancels against its own baseline; its KL and losses run over whole sequences.
What costs time is as it stands there: two forward passes for the KL, one for each epoch, clipped gradients.
"""

import copy
import os
import time
from collections.abc import Callable

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer

from benchmarks.iteration.workloads import Workload, prompts

BETA, EPS, MAX_NORM = 0.05, 0.2, 1.0


def start(workload: Workload) -> Callable[[], dict[str, float]]:
    torch.set_num_threads(len(os.sched_getaffinity(0)))
    device = "cuda" if torch.cuda.is_available() else "cpu"
    model = AutoModelForCausalLM.from_pretrained(workload.model, dtype=getattr(torch, workload.dtype)).to(device)
    ref_model = copy.deepcopy(model).eval()
    for parameter in ref_model.parameters():
        parameter.requires_grad = False
    tokenizer = AutoTokenizer.from_pretrained(workload.model)
    optimizer = torch.optim.AdamW(model.parameters(), lr=1e-6, fused=True)
    prompt_ids = tokenizer(prompts(workload), return_tensors="pt")["input_ids"].to(device)
    prompt, new = workload.prompt_tokens, workload.new_tokens
    micro = workload.batch if workload.micro_batch is None else workload.micro_batch

    def logprobs_of(logits: torch.Tensor, sequences: torch.Tensor) -> torch.Tensor:
        log_probs = torch.log_softmax(logits[:, prompt - 1 : -1], dim=-1)
        return log_probs.gather(-1, sequences[:, prompt:, None])[..., 0]

    def compute_kl(logits: torch.Tensor, ref_logits: torch.Tensor) -> torch.Tensor:
        log_probs, ref_log_probs = torch.log_softmax(logits, dim=-1), torch.log_softmax(ref_logits, dim=-1)
        return torch.sum(torch.exp(log_probs) * (log_probs - ref_log_probs), dim=-1).mean()

    def iteration() -> dict[str, float]:
        times = [_now()]
        with torch.no_grad():
            sequences = model.generate(
                input_ids=prompt_ids,
                attention_mask=torch.ones_like(prompt_ids),
                max_new_tokens=new,
                min_new_tokens=new,
                do_sample=True,
                top_p=0.9,
                temperature=1.0,
                pad_token_id=tokenizer.pad_token_id,
            )
        times.append(_now())
        answers = tokenizer.batch_decode(sequences[:, prompt:], skip_special_tokens=True)
        reward = torch.tensor([float(len(answer)) for answer in answers], device=device)
        with torch.no_grad():
            kls, old = [], []
            for rows in sequences.split(micro):
                logits = model(rows).logits
                kls.append(compute_kl(logits, ref_model(rows).logits))
                old.append(logprobs_of(logits, rows))
            kl, old_logprobs = torch.stack(kls).mean(), torch.cat(old)
        total_reward = reward - BETA * kl
        advantage = (total_reward - total_reward.mean())[:, None]
        times.append(_now())
        for _ in range(workload.epochs):
            for rows, old_rows, of_rows in zip(
                sequences.split(micro), old_logprobs.split(micro), advantage.split(micro), strict=True
            ):
                ratio = torch.exp(logprobs_of(model(rows).logits, rows) - old_rows)
                clipped = torch.clamp(ratio, 1 - EPS, 1 + EPS)
                loss = -torch.mean(torch.min(ratio * of_rows, clipped * of_rows)) * len(rows) / workload.batch
                loss.backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), MAX_NORM)
            optimizer.step()
            optimizer.zero_grad()
        times.append(_now())
        phases = zip(("rollout", "score", "update"), times, times[1:], strict=False)
        return {phase: end - begin for phase, begin, end in phases}

    return iteration


def _now() -> float:
    if torch.cuda.is_available():
        torch.cuda.synchronize()
    return time.perf_counter()


def device_memory() -> int | None:
    return torch.cuda.max_memory_allocated() if torch.cuda.is_available() else None
