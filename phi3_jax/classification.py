"""The classification heads of a row and of each token. Letters as in model.py; n is num_labels.

Reference: GenericForSequenceClassification, GenericForTokenClassification and their losses in
transformers.
"""

import warnings
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
import numpy as np

from phi3_jax.cache import KVCache
from phi3_jax.layers import Part
from phi3_jax.loss import cross_entropy, mean_loss
from phi3_jax.model import Model, Phi3Model
from phi3_jax.outputs import Output
from phi3_jax.rope import RopeTables


@flax.struct.dataclass
class SequenceClassifierOutput(Output):
    """What Phi3ForSequenceClassification returns.

    Attributes:
      loss: float32 scalar, where labels were given.
      logits: [B, n].
      cache, hidden_states, attentions: as in BaseModelOutput.
    """

    loss: jax.Array | None
    logits: jax.Array
    cache: KVCache | None = None
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


@flax.struct.dataclass
class TokenClassifierOutput(Output):
    """What Phi3ForTokenClassification returns.

    Attributes:
      loss: float32 scalar, where labels were given.
      logits: [B, T, n].
      hidden_states, attentions: as in BaseModelOutput.
    """

    loss: jax.Array | None
    logits: jax.Array
    hidden_states: tuple[jax.Array, ...] | None = None
    attentions: tuple[jax.Array, ...] | None = None


class Score(Part, kw_only=True):
    """The linear head: weight [n, D] and, where asked for, bias [n]."""

    use_bias: bool

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        shape = (self.config.num_labels, self.config.hidden_size)
        weight = self.new_param("weight", self.normal(), shape, (None, "embed"))
        logits = jnp.einsum("...D,nD->...n", x.astype(self.dtype), weight.astype(self.dtype))
        if not self.use_bias:
            return logits
        zeros = nn.initializers.zeros
        return logits + self.new_param("bias", zeros, shape[:1], (None,)).astype(self.dtype)


class Phi3ForSequenceClassification(Model):
    """The decoder with a head that classifies rows, by their last token that is not padding."""

    def setup(self):
        self.model = Phi3Model(**self.whole)
        self.score = Score(**self.alike, use_bias=False)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        cache: KVCache | None = None,
        labels: Any = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        *,
        rope: RopeTables | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Runs the model; arguments as in Phi3Model, and besides:

        Args:
          labels: int [B], classes; or float [B, n], the targets of each; see
            `sequence_classification_loss`.

        A row is classified by its right-most token whose id is not config.pad_token_id, the first
        one where all are; the attention_mask has no part in it. Rows of inputs_embeds are
        classified by their last token, with a warning.

        Raises:
          ValueError: as Phi3Model, for several rows where the config has no pad_token_id, and for
            labels that do not fit.
        """
        out, _ = self.model.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states,
            output_attentions, deterministic, None, rope,
        )  # fmt: skip
        pad_id, rows = self.config.pad_token_id, len(out.last_hidden_state)
        if pad_id is None and rows != 1:
            raise ValueError(
                f"{rows} rows cannot be classified without a pad_token_id in the config, which "
                "tells where a row ends; set it, or pass one row at a time"
            )
        if input_ids is None and pad_id is not None:
            warnings.warn(
                "padding cannot be seen in inputs_embeds: each row is classified by its last token",
                stacklevel=2,
            )
        hidden_BTD = out.last_hidden_state
        if input_ids is None or pad_id is None:
            pooled_BD = hidden_BTD[:, -1]
        else:
            columns_T = jnp.arange(hidden_BTD.shape[1])
            last_B = jnp.max(jnp.where(jnp.asarray(input_ids) != pad_id, columns_T, 0), axis=1)
            pooled_BD = jnp.take_along_axis(hidden_BTD, last_B[:, None, None], axis=1)[:, 0]
        logits_Bn = self.score(pooled_BD)
        loss = None
        if labels is not None:
            problem_type = self.config.problem_type
            loss = sequence_classification_loss(logits_Bn, jnp.asarray(labels), problem_type)
        out = SequenceClassifierOutput(
            loss, logits_Bn, out.cache, out.hidden_states, out.attentions
        )
        return out if return_dict else out.to_tuple()


class Phi3ForTokenClassification(Model):
    """The decoder with a head that classifies each token."""

    def setup(self):
        config = self.config
        self.model = Phi3Model(**self.whole)
        rate = config.classifier_dropout
        if rate is None:
            rate = 0.1 if config.hidden_dropout is None else config.hidden_dropout
        self.dropout = nn.Dropout(rate)
        self.score = Score(**self.alike, use_bias=config.token_classification_bias)

    def __call__(
        self,
        input_ids: Any = None,
        attention_mask: Any = None,
        position_ids: Any = None,
        inputs_embeds: Any = None,
        cache: KVCache | None = None,
        labels: Any = None,
        output_hidden_states: bool = False,
        output_attentions: bool = False,
        deterministic: bool = True,
        *,
        segment_ids: Any = None,
        rope: RopeTables | None = None,
        return_dict: bool = True,
    ) -> Any:
        """Runs the model; arguments as in Phi3Model, and besides:

        Args:
          labels: int [B, T], the class of each token, -100 for none; padding counts too where it
            has a label. Where none is left the loss is 0.

        A cache is read, and not returned, as in the reference.

        Raises:
          ValueError: as Phi3Model, and for labels of another shape.
        """
        out, _ = self.model.run(
            input_ids, attention_mask, position_ids, inputs_embeds, cache, output_hidden_states,
            output_attentions, deterministic, segment_ids, rope,
        )  # fmt: skip
        hidden_BTD = self.dropout(out.last_hidden_state, deterministic=deterministic)
        logits_BTn = self.score(hidden_BTD)
        loss = None
        if labels is not None:
            if np.shape(labels) != logits_BTn.shape[:2]:
                raise ValueError(
                    f"labels have shape {np.shape(labels)}, expected {logits_BTn.shape[:2]}, a "
                    "class for each token"
                )
            loss = mean_loss(*cross_entropy(logits_BTn, jnp.asarray(labels, jnp.int32)))
        out = TokenClassifierOutput(loss, logits_BTn, out.hidden_states, out.attentions)
        return out if return_dict else out.to_tuple()


def sequence_classification_loss(
    logits_Bn: jax.Array, labels: jax.Array, problem_type: str | None
) -> jax.Array:
    """The loss of one label, or one set of targets, a row (`ForSequenceClassificationLoss`).

    Args:
      logits_Bn: any float dtype; the loss is float32.
      labels: see problem_type.
      problem_type: "regression": mean squared error, labels [B, n] ([B] where n is 1).
        "single_label_classification": cross-entropy, labels int [B], -100 left out, 0 where none
        is left. "multi_label_classification": binary cross-entropy, labels [B, n] in [0, 1].
        None: regression for n = 1, else the second for int labels and the third for float.

    Raises:
      ValueError: for labels of another shape.
    """
    rows, classes = logits_Bn.shape
    if problem_type is None:
        kinds = jnp.issubdtype(labels.dtype, jnp.integer)
        several = "single_label_classification" if kinds else "multi_label_classification"
        problem_type = "regression" if classes == 1 else several
    single = problem_type == "single_label_classification"
    one_each = single or (problem_type == "regression" and classes == 1)
    shape = (rows,) if one_each else (rows, classes)
    if labels.size != np.prod(shape) or (not one_each and labels.shape != shape):
        raise ValueError(f"labels have shape {labels.shape}, expected {shape} for {problem_type}")
    if single:
        return mean_loss(*cross_entropy(logits_Bn, labels.reshape(shape).astype(jnp.int32)))
    logits, targets = logits_Bn.astype(jnp.float32), labels.astype(jnp.float32).reshape(rows, -1)
    if problem_type == "regression":
        return jnp.mean(jnp.square(logits - targets))
    return -jnp.mean(
        targets * jax.nn.log_sigmoid(logits) + (1 - targets) * jax.nn.log_sigmoid(-logits)
    )
