"""The Phi-3 decoder in Flax linen, without a head and with the one for the next token.

Axis legend, used as suffixes of arrays and as letters of einsums:
  B batch               D model width          H head dim
  T tokens in the call  F mlp width            R rotary pairs
  S cache slots         V vocabulary           L layers
  K key-value heads     G query heads a key-value head (N = K * G query heads)
  C what one fused projection holds side by side: G + 2 for q, k, v; 2 for gate, up
"""

import operator
from typing import Any

import flax.linen as nn
import jax
import jax.core
import jax.numpy as jnp
import numpy as np

from phi3_jax.attention import Visible
from phi3_jax.attention_kernels import choose_implementation
from phi3_jax.cache import KVCache
from phi3_jax.config import Phi3Config
from phi3_jax.inputs import CallInputs, read_inputs
from phi3_jax.layers import (
    REMAT_POLICIES,
    DecoderLayer,
    Embedding,
    LayerInputs,
    Part,
    RMSNorm,
    VocabTable,
)
from phi3_jax.loss import causal_lm_loss
from phi3_jax.outputs import BaseModelOutput, CausalLMOutput, attentions_of
from phi3_jax.products import product
from phi3_jax.quantized import is_quantized
from phi3_jax.rope import RopeTables, rope_cos_sin, rope_tables, rows_are_long
from phi3_jax.sharding import constrain, default_device


class Model(Part):
    """What all models have.

    Attributes:
      generation_config: the GenerationConfig of the folder that the model came from, or None.
      attn_implementation: who computes the attention of calls without a filled cache: "xla",
        "splash" (TPU), "cudnn" (NVIDIA GPU), or "auto", which takes the platform's kernel where it
        can serve the call.
      remat: what a training step keeps of each layer: "none" (all of it is kept), "dots" (the
        results of matrix products), "attention" (those of qkv_proj and of the attention), or
        "full" (its input alone).
    """

    generation_config: Any = None
    attn_implementation: str = "auto"
    remat: str = "none"

    @property
    def whole(self) -> dict[str, Any]:
        """The attributes that a model with a head hands on to the decoder."""
        return {
            **self.alike,
            "attn_implementation": self.attn_implementation,
            "remat": self.remat,
        }


class Phi3Model(Model):
    """The decoder without a head."""

    def setup(self):
        if self.remat != "none" and self.remat not in REMAT_POLICIES:
            known = ", ".join(map(repr, ("none", *REMAT_POLICIES)))
            raise ValueError(f"remat {self.remat!r} is not known; it is one of {known}")
        layer = DecoderLayer
        if self.remat != "none":
            # The scan keeps the compiler from undoing it, which prevent_cse is for.
            layer = nn.remat(layer, policy=REMAT_POLICIES[self.remat], prevent_cse=False)
        alike: Any = {**self.alike, "regathers": self.remat == "none"}
        self.embed_tokens = Embedding(**self.alike)
        self.layers = nn.scan(
            layer,
            variable_axes={"params": 0},
            split_rngs={"params": True, "dropout": True},
            length=self.config.num_hidden_layers,
            in_axes=(0, nn.broadcast),
            out_axes=0,
            metadata_params={nn.PARTITION_NAME: "layers"},
        )(**alike)
        self.norm = RMSNorm(**self.alike)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        cache: KVCache | None = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        *,
        segment_ids: Any = None,
        token_mask: Any = None,
        rope: RopeTables | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Runs the layers over the tokens of this call.

        Args:
          input_ids: int [B, T], ids below vocab_size. Others are refused in a list or numpy array;
            in a jax array NaN comes of them.
          attention_mask: [B, keys], nonzero is a token, zero is padding. The keys are the tokens of
            this call; where a cache holds some already, all tokens so far, or all slots (it
            remembers what was padding: without a mask only the new tokens are all taken for
            tokens). Or [B or 1, N or 1, T, keys], which then says alone what is seen, the future
            and the window too: bool, True keeps a key, or float, added to the scores. It,
            position_ids and segment_ids may have one row for all.
          position_ids: int [B, T]; by default the columns counted from the start of the cache,
            with padding or without, as in the reference's forward. Without mask and cache, a
            position that does not follow the one before begins a new document, as in the
            reference. As an argument of a compiled function they must be below
            max_position_embeddings, unless `rope` covers more; NaN comes of others.
          inputs_embeds: float [B, T, D], in place of input_ids.
          cache: what earlier calls left; the tokens of this call attend to it and are added to
            the cache that is returned. Keys stay rotated as they were: a row that a call takes
            past the longrope line has to be computed again from its start, as `generate` does.
          output_hidden_states: also return those that BaseModelOutput describes.
          output_attentions: the same for attention probabilities.
          deterministic: False turns dropout on, which needs rngs={"dropout": key} in `apply`.
          segment_ids: int [B, T], for rows that hold several documents: runs of one number, 0 for
            padding. A document sees itself alone, and has positions, window and longrope of its
            own.
          token_mask: [B, T], nonzero for the tokens of this call that are not padding; in place of
            an attention_mask, where a cache is filled and what it remembers is to stand.
          rope: tables from `phi3_jax.rope.rope_tables`; by default made here, as constants of the
            program.
          return_dict: False for a tuple of what is not None.

        Raises:
          ValueError: for shapes that do not agree, a mask that does not cover the keys, more
            tokens than the cache has room for, or an attn_implementation that cannot serve the
            call.
        """
        out, _ = self.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states,
            output_attentions, deterministic, segment_ids, rope, token_mask,
        )  # fmt: skip
        return out if return_dict else out.to_tuple()

    def run(
        self, input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states,
        output_attentions, deterministic, segment_ids, rope, token_mask=None,
    ) -> tuple[BaseModelOutput, CallInputs]:  # fmt: skip
        """The output, and what the arguments were read as; for the heads."""
        config = self.config
        B, T = _checked_tokens(config, input_ids, inputs_embeds)
        split = self._is_split
        if split and not deterministic:
            raise ValueError(
                "parameters with each layer by itself are for inference: they know no dropout "
                "(deterministic=False); train with the stacked ones"
            )
        if cache is not None:
            cache.check(config, B, T, self.mesh)
            cache = cache.split(split)
        inputs = read_inputs(
            config, B, T, attention_mask, position_ids, segment_ids, cache, token_mask
        )
        if rope is None:
            rope = rope_tables(config, _positions_in_use(config, position_ids, T, cache))
        cos_sin = rope_cos_sin(
            rope,
            inputs.position_BT,
            rows_are_long(config, inputs.position_BT, inputs.mask_BT, inputs.document_BT),
        )
        implementation = self._implementation(inputs, T, output_attentions, deterministic)
        cached, written_first = None, False
        if cache is not None and inputs.slots_BS is not None:
            plain = inputs.given_mask is None and not output_attentions
            cached = cache.slots_of_layers(inputs.mask_BT) if plain else None
            written_first = cached is not None
            cached = cache.layers() if cached is None else cached
        visible = Visible(
            segment_BT=inputs.segment_BT,
            masks=inputs.masks(config, written_first) if implementation == "xla" else (),
            window=config.sliding_window,
            implementation=implementation,
        )
        layer_inputs = LayerInputs(
            cos_sin=cos_sin,
            visible=visible,
            keep_kv=cache is not None,
            keep_hidden=output_hidden_states,
            keep_probs=output_attentions,
            deterministic=deterministic,
        )
        # Whole rows: attention has no others (`Attention`).
        rows = lambda x: constrain(x, "batch", *[None] * (x.ndim - 1), mesh=self.mesh)  # noqa: E731
        layer_inputs = jax.tree.map(rows, layer_inputs)
        if inputs_embeds is None:
            x_BTD = self.embed_tokens(jnp.asarray(input_ids, jnp.int32))
        else:
            _ = self.embed_tokens.weight  # `init` makes it all the same
            x_BTD = jnp.asarray(inputs_embeds).astype(self.dtype)
        x_BTD = embedded_BTD = self.laid_out(x_BTD)
        run = self._each_layer if split else self.layers
        x_BTD, (new_kv, hidden_LBTD, probs) = run(x_BTD, cached, layer_inputs)
        x_BTD = self.norm(x_BTD)
        attentions = attentions_of(probs, config, cache) if output_attentions else None
        hidden_states = None
        if output_hidden_states:
            hidden_states = (embedded_BTD, *hidden_LBTD[:-1], x_BTD)
        if cache is not None and written_first:
            cache = cache.written(*new_kv, T, inputs.mask_BT)
        elif cache is not None:
            cache = cache.write(*new_kv, inputs.mask_BT)
        return BaseModelOutput(x_BTD, cache, hidden_states, attentions), inputs

    @property
    def _is_split(self) -> bool:
        """Whether the parameters have each layer by itself (`phi3_jax.split_layers`)."""
        return "0" in (self.get_variable("params", "layers") or {})

    def _each_layer(self, x_BTD, cached, inputs: LayerInputs):
        """As `layers`, of parameters that have each layer by itself: no loop, and keys and values
        are tuples.
        """
        layer, params = DecoderLayer(**self.alike, parent=None), self.variables["params"]["layers"]
        kept = []
        for index in range(self.config.num_hidden_layers):
            of_layer = None if cached is None else cached[index]
            own = {"params": params[str(index)]}
            x_BTD, of_layer = layer.apply(own, x_BTD, of_layer, inputs)
            kept.append(of_layer)
        new_kv, *others = zip(*kept, strict=True)
        if inputs.keep_kv:
            new_kv = tuple(zip(*new_kv, strict=True))
        # Those not asked for are None.
        hidden, probs = (jax.tree.map(lambda *xs: jnp.stack(xs), *other) for other in others)
        return x_BTD, (new_kv, hidden, probs)

    def _implementation(self, inputs: CallInputs, tokens, output_attentions, deterministic) -> str:
        obstacle = None
        if inputs.slots_BS is not None:
            pass  # XLA's in any case: the others take no cache
        elif output_attentions:
            obstacle = "output_attentions=True"
        elif inputs.given_mask is not None:
            obstacle = "a 4D attention_mask"
        elif self.config.attention_dropout and not deterministic:
            obstacle = f"attention_dropout {self.config.attention_dropout} on the probabilities"
        device = default_device() if self.mesh is None else self.mesh.devices.flat[0]
        chosen = choose_implementation(
            self.attn_implementation, device, self.dtype, self.config.head_dim, tokens, obstacle
        )
        return chosen if inputs.slots_BS is None else "xla"


def _checked_tokens(config: Phi3Config, input_ids: Any, inputs_embeds: Any) -> tuple[int, int]:
    """Rows and tokens of a call."""
    if (input_ids is None) == (inputs_embeds is None):
        given = "both" if inputs_embeds is not None else "neither"
        raise ValueError(f"give either input_ids or inputs_embeds; {given} of them came")
    if inputs_embeds is None:
        shape, name, wanted = np.shape(input_ids), "input_ids", "[batch, tokens]"
        fits = len(shape) == 2
    else:
        shape, name = np.shape(inputs_embeds), "inputs_embeds"
        wanted = f"[batch, tokens, {config.hidden_size}]"
        fits = len(shape) == 3 and shape[2] == config.hidden_size
    if not fits or shape[1] == 0:
        raise ValueError(f"{name} has shape {shape}, expected {wanted}")
    if input_ids is not None:
        ids = input_ids if isinstance(input_ids, jax.Array) else np.asarray(input_ids)
        if not jnp.issubdtype(ids.dtype, jnp.integer):
            raise ValueError(f"input_ids are {ids.dtype}, must be whole numbers")
        is_known = isinstance(ids, np.ndarray)  # a traced array has no values yet
        if is_known and (unknown := ids[(ids < 0) | (ids >= config.vocab_size)].tolist()):
            raise ValueError(
                f"input_ids holds {unknown[0]}, outside the vocabulary of {config.vocab_size}; "
                "does the tokenizer belong to this model?"
            )
    return shape[0], shape[1]


def _positions_in_use(config, position_ids, tokens: int, cache: KVCache | None) -> int:
    """How many positions the tables must cover, as far as it is known before running."""
    if position_ids is None:
        return tokens if cache is None else cache.capacity
    if isinstance(position_ids, jax.core.Tracer):
        return config.max_position_embeddings
    with jax.ensure_compile_time_eval():  # known numbers, even inside of a compiled function
        return max(int(jnp.max(jnp.asarray(position_ids))), 0) + 1


class Phi3ForCausalLM(Model):
    """The decoder with a next-token head."""

    def setup(self):
        self.model = Phi3Model(**self.whole)
        if not self.config.tie_word_embeddings:
            self.lm_head = VocabTable(**self.alike)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        cache: KVCache | None = None,
        labels: Any = None,
        logits_to_keep: Any = 0,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        *,
        segment_ids: Any = None,
        token_mask: Any = None,
        num_items_in_batch: Any = None,
        rope: RopeTables | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Runs the model; arguments as in Phi3Model, and besides:

        Args:
          labels: int [B, T], the ids themselves (shifted here); -100 is left out of the loss, as
            are padding in segment_ids and the first token of each of its documents. Where none is
            left the loss is 0.
          logits_to_keep: n for the last n tokens, 0 for all; int [n] with their columns, int
            [B, n] with the columns of each row; or bool [B, T], and the logits are then those of
            all marked tokens in a row [n, V] (not in a compiled function: n must be known).
          num_items_in_batch: what to divide the summed loss by, in place of the labels counted
            here: the labels of all batches that are accumulated.

        A label outside the vocabulary gives a loss of NaN. The loss is computed in chunks and does
        not use the logits; in a compiled function that returns the loss alone, the logits are
        never there.

        Raises:
          ValueError: as Phi3Model, and for labels without the logits of all tokens.
        """
        out, inputs = self.model.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states,
            output_attentions, deterministic, segment_ids, rope, token_mask,
        )  # fmt: skip
        config, hidden_BTD = self.config, out.last_hidden_state
        table: Any = self.model.embed_tokens if config.tie_word_embeddings else self.lm_head
        loss = None
        if labels is not None:
            keeps_all = np.ndim(logits_to_keep) == 0 and not operator.index(logits_to_keep)
            if np.shape(labels) != hidden_BTD.shape[:2] or not keeps_all:
                raise ValueError(
                    f"labels have shape {np.shape(labels)} for tokens of {hidden_BTD.shape[:2]}, "
                    f"logits_to_keep is {logits_to_keep}; a loss needs a label for every token "
                    "(-100 for none) and logits_to_keep=0"
                )
            loss = causal_lm_loss(
                hidden_BTD,
                table.weight.astype(self.dtype) if is_quantized(table.weight) else table.weight,
                jnp.asarray(labels, jnp.int32),
                config.vocab_size,
                document_BT=None if segment_ids is None else inputs.segment_BT,
                num_items_in_batch=num_items_in_batch,
                mesh=self.mesh,
            )
        kept = _kept_tokens(hidden_BTD, logits_to_keep)
        rows = kept if kept.ndim == 3 else kept[None]
        weight = table.weight if is_quantized(table.weight) else table.weight.astype(kept.dtype)
        logits = product("BTD,VD->BTV", rows, weight, self.mesh)
        logits = logits.reshape(*kept.shape[:-1], -1)
        out = CausalLMOutput(
            loss, logits[..., : config.vocab_size], out.cache, out.hidden_states, out.attentions
        )
        return out if return_dict else out.to_tuple()


def _kept_tokens(hidden_BTD: jax.Array, logits_to_keep: Any) -> jax.Array:
    """The hidden states that logits_to_keep asks for (`slice_logits_to_keep` of transformers)."""
    if np.ndim(logits_to_keep) == 0:
        return hidden_BTD[:, -operator.index(logits_to_keep) :]
    kept = jnp.asarray(logits_to_keep)
    if kept.ndim == 1:
        return hidden_BTD[:, kept] if kept.dtype == bool else jnp.take(hidden_BTD, kept, axis=1)
    if kept.ndim != 2 or len(kept) != len(hidden_BTD):
        raise ValueError(
            f"logits_to_keep has shape {kept.shape}, expected a number, [n] or "
            f"[{len(hidden_BTD)}, n]"
        )
    if kept.dtype == bool:
        return hidden_BTD[kept]
    return jnp.take_along_axis(hidden_BTD, kept[..., None], axis=1, mode="fill")
