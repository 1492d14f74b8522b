"""`python -m benchmarks.scoring_memory`: what scoring holds, from the compiled program's own memory analysis.

At 8 answers of 512 tokens and a vocabulary of 151,936, one float32 [B, T, V] array is 2.5 GB. The streamed head must
stay below one of them for policy and reference together; the unstreamed computation is compiled beside it to compare.
"""

import jax
import jax.numpy as jnp

from ppo_jax import scoring
from ppo_jax.models.decoder import abstract_params, head_logits
from ppo_jax.models.layers import DecoderSpec, LayerSpec
from ppo_jax.models.rope import RopeSpec, rope_frequencies
from ppo_jax.ops.kl import exact_token_kl
from ppo_jax.records import Rollout

BATCH, PROMPT, RESPONSE, VOCABULARY = 8, 64, 512, 151_936


def small_trunk() -> DecoderSpec:
    """A thin decoder under a full-sized vocabulary: what is measured is the head."""
    return DecoderSpec(
        vocab_size=VOCABULARY,
        width=128,
        heads=4,
        kv_heads=2,
        head_dim=32,
        mlp_width=256,
        max_positions=1024,
        layers=(LayerSpec(32**-0.5, rope=RopeSpec(tuple(rope_frequencies(32, 10000.0).tolist()))),) * 2,
        norm="rms",
        norm_eps=1e-6,
        activation="silu",
        gated_mlp=True,
        qkv_bias=False,
        out_bias=False,
        mlp_bias=False,
        tied_head=True,
    )


def shape(dtype, *sizes: int) -> jax.ShapeDtypeStruct:
    return jax.ShapeDtypeStruct(sizes, dtype)


def streamed_temporaries() -> tuple[int, int]:
    """Bytes of temporaries of compiled scoring, and bytes of one float32 [B, T, V] array."""
    spec = small_trunk()
    params, floats = abstract_params(spec), shape(jnp.float32, BATCH, RESPONSE)
    rollout = Rollout(
        prompt_tokens=shape(jnp.int32, BATCH, PROMPT),
        prompt_mask=shape(bool, BATCH, PROMPT),
        response_tokens=shape(jnp.int32, BATCH, RESPONSE),
        response_mask=shape(bool, BATCH, RESPONSE),
        behaviour_logprobs=floats,
        kept_mass=floats,
        finish_reason=shape(jnp.int32, BATCH),
        group_id=shape(jnp.int32, BATCH),
        policy_version=shape(jnp.int32),
    )
    how = scoring.Scoring(spec=spec, temperature=1.0, compute_dtype="float32", micro_batch_size=BATCH)
    lowered = scoring.score.lower(params, params, rollout, scoring=how)
    return lowered.compile().memory_analysis().temp_size_in_bytes, BATCH * RESPONSE * VOCABULARY * 4


def whole_temporaries() -> int:
    """Bytes of temporaries when both heads are applied at once, the trunk not counted."""
    spec = small_trunk()

    def whole(params, hidden, ref_hidden):
        logits, ref_logits = (head_logits(params, h, spec=spec) for h in (hidden, ref_hidden))
        return exact_token_kl(logits, ref_logits, temperature=1.0)

    hidden = shape(jnp.float32, BATCH, RESPONSE, spec.width)
    lowered = jax.jit(whole).lower(abstract_params(spec), hidden, hidden)
    return lowered.compile().memory_analysis().temp_size_in_bytes


def main() -> None:
    streamed, one = streamed_temporaries()
    print(f"one float32 [B {BATCH}, T {RESPONSE}, V {VOCABULARY}] array: {one / 1e9:.3f} GB ({jax.devices()[0]})")
    for name, size in (("streamed scoring, all of it", streamed), ("whole exact KL, heads only", whole_temporaries())):
        print(f"{name}: {size / 1e9:.3f} GB of temporaries, {size / one:.2f} of that array")


if __name__ == "__main__":
    main()
