"""The Phi-3 decoder in Flax linen, from small to large.

Axis legend, used as suffixes of arrays and as letters of einsums:
  B batch               D model width          H head dim
  T tokens in the call  F mlp width            R rotary pairs
  S cache slots         V vocabulary           L layers
  K key-value heads     G query heads a key-value head (N = K * G query heads)
  C what one fused projection holds side by side: G + 2 for q, k, v; 2 for gate, up

Modules and parameters have the names of the Hugging Face checkpoint. The fused kernels keep their
parts on an axis of their own (qkv [D, K, G+2, H], gate_up [D, 2, F]), so that a tensor-parallel
shard holds whole key-value groups and cutting the parts apart moves nothing between devices.
"""

import operator
from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from phi3_jax.attention import attend, causal_mask
from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.rope import RopeTables, apply_rope, rope_cos_sin, rope_tables, rows_are_long
from phi3_jax.sharding import constrain

IGNORED_LABEL = -100

ACTIVATION_FUNCTIONS = {
    "gelu": partial(nn.gelu, approximate=False),
    "gelu_new": partial(nn.gelu, approximate=True),
    "gelu_pytorch_tanh": partial(nn.gelu, approximate=True),
    "quick_gelu": lambda x: x * nn.sigmoid(1.702 * x),
    "relu": nn.relu,
    "relu2": lambda x: jnp.square(nn.relu(x)),
    "relu6": nn.relu6,
    "sigmoid": nn.sigmoid,
    "silu": nn.silu,
    "swish": nn.silu,
    "tanh": jnp.tanh,
}


@flax.struct.dataclass
class BaseModelOutput:
    """What Phi3Model returns: last_hidden_state [B, T, D], and the cache where one was passed."""

    last_hidden_state: jax.Array
    cache: KVCache | None = None


@flax.struct.dataclass
class CausalLMOutput:
    """What Phi3ForCausalLM returns.

    logits is [B, T kept, V] in the model's dtype; loss a float32 scalar where labels were given;
    cache the grown one where one was passed.
    """

    logits: jax.Array
    loss: jax.Array | None = None
    cache: KVCache | None = None


class RMSNorm(nn.Module):
    """Root-mean-square norm over the last axis, in the cast order of the reference (Phi3RMSNorm).

    The statistics are float32 and the result is cast to the input's dtype BEFORE the weight
    multiplies it: in bfloat16 a quarter of the values differ the other way round.
    """

    config: Phi3Config
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        ones = nn.with_logical_partitioning(nn.initializers.ones, ("norm",))
        weight: Any = self.param("weight", ones, x.shape[-1:], self.param_dtype)
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.config.rms_norm_eps)).astype(x.dtype)
        if x.dtype != jnp.float32:
            # The compiler may keep more bits than the cast asks for; here the bits are the point.
            info = jnp.finfo(x.dtype)
            normed = jax.lax.reduce_precision(normed, info.nexp, info.nmant)
        return weight.astype(x.dtype) * normed


class Projection(nn.Module):
    """A linear map without bias, written as an einsum of its input and its weight."""

    config: Phi3Config
    equation: str
    shape: tuple[int, ...]
    names: tuple[str | None, ...]
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        normal = nn.initializers.normal(self.config.initializer_range)
        init = nn.with_logical_partitioning(normal, self.names)
        weight: Any = self.param("weight", init, self.shape, self.param_dtype)
        return jnp.einsum(self.equation, x.astype(self.dtype), weight.astype(self.dtype))


class Embedding(nn.Module):
    """The token table [V, D]; a tied head uses it again."""

    config: Phi3Config
    dtype: Any
    param_dtype: Any

    def setup(self):
        config = self.config

        def init(key, shape, dtype):
            table = nn.initializers.normal(config.initializer_range)(key, shape, dtype)
            # As torch.nn.Embedding(padding_idx=...) begins.
            return table if config.pad_token_id is None else table.at[config.pad_token_id].set(0)

        boxed = nn.with_logical_partitioning(init, ("vocab", "embed"))
        shape = (config.vocab_size, config.hidden_size)
        self.weight: Any = self.param("weight", boxed, shape, self.param_dtype)

    def __call__(self, input_ids_BT: jax.Array) -> jax.Array:
        """The tokens' rows [B, T, D]; NaN for an id outside the table, not a neighbour's row."""
        rows = jnp.where(
            input_ids_BT < 0, len(self.weight), input_ids_BT
        )  # would count from the end
        return jnp.take(self.weight.astype(self.dtype), rows, axis=0)

    def attend(self, x_BTD: jax.Array) -> jax.Array:
        """Logits [B, T, V] of a head that shares the table."""
        return jnp.einsum("BTD,VD->BTV", x_BTD, self.weight.astype(self.dtype))


class Attention(nn.Module):
    """Grouped-query attention with rotary embedding and an optional window."""

    config: Phi3Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD, cached, rope, masks):
        """Returns the mixed values [B, T, D] and this call's keys and values [B, T, K, H]."""
        config = self.config
        D, K, H = config.hidden_size, config.num_key_value_heads, config.head_dim
        G = config.num_attention_heads // K
        linear = partial(Projection, config=config, dtype=self.dtype, param_dtype=self.param_dtype)
        qkv_names = ("embed", "kv_heads", None, None)
        qkv_proj = linear(
            equation="BTD,DKCH->BTKCH", shape=(D, K, G + 2, H), names=qkv_names, name="qkv_proj"
        )
        o_names = ("kv_heads", None, None, "embed")
        o_proj = linear(
            equation="BTKGH,KGHD->BTD", shape=(K, G, H, D), names=o_names, name="o_proj"
        )

        # Each key-value group holds its G query heads, then its key, then its value.
        qkv_BTKCH = qkv_proj(x_BTD)
        qk_BTKCH = apply_rope(qkv_BTKCH[:, :, :, : G + 1], *rope)
        q_BTKGH, k_BTKH = qk_BTKCH[:, :, :, :G], qk_BTKCH[:, :, :, G]
        v_BTKH = qkv_BTKCH[:, :, :, G + 1]

        keys, values = ([k_BTKH], [v_BTKH])
        if cached is not None:
            keys, values = [cached[0], *keys], [cached[1], *values]
        return o_proj(attend(q_BTKGH, keys, values, masks)), (k_BTKH, v_BTKH)


class MLP(nn.Module):
    """The gated feed-forward: down(up * act(gate))."""

    config: Phi3Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD: jax.Array) -> jax.Array:
        D, F = self.config.hidden_size, self.config.intermediate_size
        linear = partial(
            Projection, config=self.config, dtype=self.dtype, param_dtype=self.param_dtype
        )
        gate_up_proj = linear(
            equation="BTD,DCF->BTCF",
            shape=(D, 2, F),
            names=("embed", None, "mlp"),
            name="gate_up_proj",
        )
        down_proj = linear(
            equation="BTF,FD->BTD", shape=(F, D), names=("mlp", "embed"), name="down_proj"
        )
        gate_up_BTCF = gate_up_proj(x_BTD)
        act = ACTIVATION_FUNCTIONS[self.config.hidden_act]
        return down_proj(gate_up_BTCF[:, :, 1] * act(gate_up_BTCF[:, :, 0]))


class DecoderLayer(nn.Module):
    """Two residual lines: attention, then the feed-forward, each on a normed input."""

    config: Phi3Config
    dtype: Any
    param_dtype: Any

    @nn.compact
    def __call__(self, x_BTD, cached, rope, masks, keep_kv: bool):
        kinds: dict[str, Any] = dict(config=self.config, param_dtype=self.param_dtype)
        attention = Attention(**kinds, dtype=self.dtype, name="self_attn")
        mlp = MLP(**kinds, dtype=self.dtype, name="mlp")
        normed = RMSNorm(**kinds, name="input_layernorm")(x_BTD)
        mixed, new_kv = attention(normed, cached, rope, masks)
        x_BTD = constrain(x_BTD + mixed, "batch", None, None)
        x_BTD = x_BTD + mlp(RMSNorm(**kinds, name="post_attention_layernorm")(x_BTD))
        return constrain(x_BTD, "batch", None, None), new_kv if keep_kv else None


class Phi3Model(nn.Module):
    """The decoder without a head.

    Attributes:
      config: sizes and settings.
      dtype: what activations are computed in; parameters are cast to it where they are used.
      param_dtype: what `init` makes parameters in.
      generation_config: the GenerationConfig of the folder that the model came from, or None.
    """

    config: Phi3Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    generation_config: Any = None

    def setup(self):
        config, dtype = self.config, jnp.dtype(self.dtype)
        kinds: dict[str, Any] = dict(config=config, param_dtype=self.param_dtype)
        self.embed_tokens = Embedding(**kinds, dtype=dtype)
        self.layers = nn.scan(
            DecoderLayer,
            variable_axes={"params": 0},
            split_rngs={"params": True},
            length=config.num_hidden_layers,
            in_axes=(0, nn.broadcast, nn.broadcast, nn.broadcast),
            out_axes=0,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**kinds, dtype=dtype)
        self.norm = RMSNorm(**kinds)

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        rope: RopeTables | None = None,
    ) -> BaseModelOutput:
        """Runs the layers over the tokens of this call.

        Args:
          input_ids: int [B, T], ids below vocab_size.
          attention_mask: [B, T] for the tokens of this call; nonzero is a token, zero is padding.
            It and position_ids may be [1, T], for all rows.
          position_ids: int [B, T]; by default the columns counted from the start of the cache,
            with padding or without, as in the reference's forward.
          cache: what earlier calls left; the tokens of this call attend to it and are added to
            the cache that is returned. Keys stay rotated as they were: a row that a call takes
            past the longrope line has to be computed again from its start, as `generate` does.
          rope: tables from `rope_tables`; by default made here, as constants of the program.

        Raises:
          ValueError: for shapes that do not agree, or more tokens than the cache has room for.
        """
        config = self.config
        input_ids = jnp.asarray(input_ids)
        if input_ids.ndim != 2 or input_ids.shape[1] == 0:
            raise ValueError(f"input_ids has shape {input_ids.shape}, expected [batch, tokens]")
        B, T = input_ids.shape
        for name, array in (("attention_mask", attention_mask), ("position_ids", position_ids)):
            if array is not None and np.shape(array) not in ((B, T), (1, T)):
                raise ValueError(
                    f"{name} has shape {np.shape(array)}, expected that of input_ids, {(B, T)}"
                )
        if cache is not None:
            cache.check(config, B, T)
        if position_ids is not None:
            position_ids = jnp.asarray(position_ids)
        mask_BT = None
        if attention_mask is not None:
            mask_BT = jnp.broadcast_to(jnp.asarray(attention_mask) != 0, (B, T))
        columns_T = jnp.arange(T) + (0 if cache is None else cache.length)
        if rope is None:
            rope = rope_tables(config, _positions_in_use(config, position_ids, T, cache))
        position_ids = jnp.broadcast_to(columns_T if position_ids is None else position_ids, (B, T))
        if mask_BT is not None:
            # What padding computes is never looked at, but it must stay finite.
            position_ids = jnp.where(mask_BT, position_ids, 0)
        long_B = rows_are_long(config, position_ids, mask_BT)
        cos_sin = rope_cos_sin(rope, position_ids, long_B)

        masks = [causal_mask(columns_T, columns_T, config.sliding_window)[None]]
        if mask_BT is not None:
            masks[0] = masks[0] & mask_BT[:, None, :]
        cached = None
        if cache is not None and cache.filled:
            slots_S = jnp.arange(cache.capacity)
            old = causal_mask(columns_T, slots_S, config.sliding_window)[None]
            masks = [old & cache.valid_BS[:, None, :], *masks]
            cached = (cache.k_LBSKH, cache.v_LBSKH)

        x_BTD = constrain(self.embed_tokens(input_ids), "batch", None, None)
        x_BTD, new_kv = self.layers(x_BTD, cached, cos_sin, masks, cache is not None)
        if cache is not None:
            cache = cache.write(*new_kv, mask_BT)
        return BaseModelOutput(last_hidden_state=self.norm(x_BTD), cache=cache)


def _positions_in_use(config, position_ids, tokens: int, cache: KVCache | None) -> int:
    """How many positions the tables must cover, as far as it is known before running."""
    if position_ids is None:
        return tokens if cache is None else cache.capacity
    if isinstance(position_ids, jax.core.Tracer):
        return config.max_position_embeddings
    return max(int(jnp.max(position_ids)), 0) + 1


class Phi3ForCausalLM(nn.Module):
    """The decoder with a next-token head; attributes as in Phi3Model."""

    config: Phi3Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    generation_config: Any = None

    def setup(self):
        config, kinds = self.config, dict(dtype=self.dtype, param_dtype=self.param_dtype)
        self.model = Phi3Model(config, **kinds)
        if not config.tie_word_embeddings:
            self.lm_head = Projection(
                config=config,
                equation="BTD,VD->BTV",
                shape=(config.vocab_size, config.hidden_size),
                names=("vocab", "embed"),
                **kinds,
            )

    def __call__(
        self,
        input_ids: jax.Array,
        attention_mask: jax.Array | None = None,
        position_ids: jax.Array | None = None,
        *,
        cache: KVCache | None = None,
        labels: jax.Array | None = None,
        logits_to_keep: Any = 0,
        rope: RopeTables | None = None,
    ) -> CausalLMOutput:
        """Runs the model; arguments as in Phi3Model, and besides:

        Args:
          labels: int [B, T], the ids themselves (shifted here); -100 is left out of the loss.
          logits_to_keep: n for the last n tokens, 0 for all; or int [n] with their columns.

        Raises:
          ValueError: as Phi3Model, and for labels that do not have the shape of the logits.
        """
        out = self.model(input_ids, attention_mask, position_ids, cache=cache, rope=rope)
        hidden_BTD = out.last_hidden_state
        if np.ndim(logits_to_keep) == 0:
            hidden_BTD = hidden_BTD[:, -operator.index(logits_to_keep) :]
        else:
            hidden_BTD = jnp.take(hidden_BTD, jnp.asarray(logits_to_keep), axis=1)
        tied = self.config.tie_word_embeddings
        logits_BTV = (self.model.embed_tokens.attend if tied else self.lm_head)(hidden_BTD)
        loss = None if labels is None else causal_lm_loss(logits_BTV, jnp.asarray(labels))
        return CausalLMOutput(logits=logits_BTV, loss=loss, cache=out.cache)


def causal_lm_loss(logits_BTV: jax.Array, labels_BT: jax.Array) -> jax.Array:
    """Mean cross-entropy of each next token over the labels that are not -100, float32 scalar.

    Labels are shifted here. Where every label is -100 the loss is 0, not NaN as in the reference
    (`ForCausalLMLoss`), so that an empty batch leaves the parameters alone.

    Raises:
      ValueError: where labels do not have the shape of the logits.
    """
    if labels_BT.shape != logits_BTV.shape[:2]:
        raise ValueError(
            f"labels have shape {labels_BT.shape} and logits {logits_BTV.shape[:2]}; "
            "a loss needs the logits of all tokens (logits_to_keep=0)"
        )
    targets = labels_BT[:, 1:]
    counted = targets != IGNORED_LABEL
    log_probs = jax.nn.log_softmax(logits_BTV[:, :-1].astype(jnp.float32), axis=-1)
    safe = jnp.where(counted, targets, 0)
    safe = jnp.where(safe < 0, logits_BTV.shape[-1], safe)  # NaN, as above the vocabulary
    picked = jnp.take_along_axis(log_probs, safe[..., None], axis=-1)[..., 0]
    return -jnp.sum(jnp.where(counted, picked, 0.0)) / jnp.maximum(counted.sum(), 1)
