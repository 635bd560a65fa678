"""The parts of the decoder, from a norm to a layer. Letters as in model.py.

Modules and parameters have the names of the Hugging Face checkpoint, and matrices its order of
dimensions: outputs first, inputs last. The fused ones keep their parts on an axis of their own (qkv
[K, G+2, H, D], gate_up [2, F, D]), so that a tensor-parallel shard holds whole key-value groups and
cutting the parts apart moves nothing between devices.
"""

from functools import partial
from typing import Any

import flax.linen as nn
import flax.struct
import jax
import jax.numpy as jnp
from jax.ad_checkpoint import checkpoint_name
from jax.sharding import Mesh

from phi3_jax.attention import Visible, attend
from phi3_jax.attention_kernels import SAVED_NAME
from phi3_jax.config import Phi3Config
from phi3_jax.gather import gathered
from phi3_jax.products import product
from phi3_jax.quantized import is_quantized
from phi3_jax.rope import apply_rope
from phi3_jax.sharding import Names, constrain, padded_shape
from phi3_jax.slots import LayerSlots, apart
from phi3_jax.split_layers import BITS

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

_save_names = jax.checkpoint_policies.save_only_these_names("qkv", SAVED_NAME)


def _save_attention(primitive, *arguments, **parameters):
    """Saves the results of qkv_proj and of the attention, and what cuDNN's backward pass needs."""
    cudnn = primitive.name.startswith("dot_product_attention_fwd")
    return cudnn or _save_names(primitive, *arguments, **parameters)


# What is kept of a layer for the backward pass; all else is computed again there.
REMAT_POLICIES = {
    "full": jax.checkpoint_policies.nothing_saveable,
    "attention": _save_attention,
    "dots": jax.checkpoint_policies.dots_with_no_batch_dims_saveable,
}


@flax.struct.dataclass
class LayerInputs:
    """What every layer gets alike.

    Attributes:
      cos_sin: of the rotary embedding, float32 [B, T, R] each.
      visible: what the queries see.
      keep_kv, keep_hidden, keep_probs: what a layer returns beside its output.
      deterministic: no dropout.
    """

    cos_sin: tuple[jax.Array, jax.Array]
    visible: Visible
    keep_kv: bool = flax.struct.field(pytree_node=False)
    keep_hidden: bool = flax.struct.field(pytree_node=False)
    keep_probs: bool = flax.struct.field(pytree_node=False)
    deterministic: bool = flax.struct.field(pytree_node=False)


class Part(nn.Module):
    """What all modules have.

    Attributes:
      config: sizes and settings.
      dtype: what activations are computed in; parameters are cast to it where they are used.
      param_dtype: what `init` makes parameters in.
      mesh: where the model is laid out, or None for one device.
      lora_dropout: of what enters a LoRA adapter, where the parameters hold adapters.
      regathers: gather weights once more for the backward pass; for layers that compute nothing
        again, which would keep them whole.
    """

    config: Phi3Config
    dtype: Any = jnp.float32
    param_dtype: Any = jnp.float32
    mesh: Mesh | None = None
    lora_dropout: float = 0.0
    regathers: bool = False

    @property
    def alike(self) -> dict[str, Any]:
        """The attributes that a module hands on to those inside of it."""
        names = ("config", "dtype", "param_dtype", "mesh", "lora_dropout", "regathers")
        return {name: getattr(self, name) for name in names}

    def new_param(self, name: str, init: Any, shape: tuple[int, ...], names: Names) -> Any:
        """A parameter with logical axis names, padded with zeros as the mesh needs it."""
        whole = padded_shape(names, shape, self.mesh)
        self._check_shape(name, whole)
        given = self.get_variable("params", name)
        if is_quantized(given):
            return given  # laid out already, and without a gradient
        padding = [(0, b - a) for a, b in zip(shape, whole, strict=True)]
        padded = lambda key, shape, dtype: jnp.pad(init(key, shape, dtype), padding)  # noqa: E731
        boxed = nn.with_logical_partitioning(padded, names)
        # The gradient gets this layout too; on its own it could be whole on every device.
        leaf: Any = self.param(name, boxed, shape, self.param_dtype)
        return constrain(leaf, *names, mesh=self.mesh)

    def _check_shape(self, name: str, shape: tuple[int, ...]) -> None:
        """Parameters made for one mesh do not serve another one that pads otherwise."""
        if not self.has_variable("params", name):
            return  # about to be made
        found = nn.meta.unbox(self.get_variable("params", name)).shape
        if found != shape:
            place = "without a mesh" if self.mesh is None else f"on mesh {dict(self.mesh.shape)}"
            raise ValueError(
                f"parameter {'.'.join((*self.path, name))} has shape {found}, this model {place} "
                f"has {shape}; load or make the parameters with the same config and mesh"
            )

    def normal(self) -> Any:
        """The initializer of all matrices, as measured in the reference: not truncated."""
        return nn.initializers.normal(self.config.initializer_range)

    def laid_out(self, x_BTD: jax.Array) -> jax.Array:
        """The residual stream: rows and their tokens over the mesh, whole in its width."""
        return constrain(x_BTD, "batch", "tokens", None, mesh=self.mesh)


class RMSNorm(Part):
    """Root-mean-square norm over the last axis, in the cast order of the reference (Phi3RMSNorm).

    The statistics are float32 and the result is cast to the input's dtype BEFORE the weight
    multiplies it: in bfloat16 a quarter of the values differ the other way round.
    """

    @nn.compact
    def __call__(self, x: jax.Array) -> jax.Array:
        weight = self.new_param("weight", nn.initializers.ones, x.shape[-1:], ("norm",))
        wide = x.astype(jnp.float32)
        variance = jnp.mean(jnp.square(wide), axis=-1, keepdims=True)
        normed = (wide * jax.lax.rsqrt(variance + self.config.rms_norm_eps)).astype(x.dtype)
        if x.dtype != jnp.float32:
            # The compiler may keep more bits than the cast asks for; here the bits are the point.
            info = jnp.finfo(x.dtype)
            normed = jax.lax.reduce_precision(normed, info.nexp, info.nmant)
        return weight.astype(x.dtype) * normed


class Projection(Part, kw_only=True):
    """A linear map without bias, written as an einsum of its input and its weight W [*out, *in].

    Where its parameters hold `lora_a` A and `lora_b` B besides, the result is W x + B A dropout(x).
    `init` makes neither; the scale of LoRA is in B (`train.lora.attach`).
    """

    equation: str
    shape: tuple[int, ...]
    names: Names

    @nn.compact
    def __call__(self, x: jax.Array, deterministic: bool) -> jax.Array:
        weight = self.new_param("weight", self.normal(), self.shape, self.names)
        x = x.astype(self.dtype)
        y = self._product(x, weight)
        if not self.has_variable("params", "lora_a"):
            return y
        x_axes, axes, y_axes = self.equation.replace("->", ",").split(",")
        cut = sum(axis in y_axes for axis in axes)  # outputs stand first
        a = self._adapter("lora_a", (None, *self.names[cut:]), (None, *self.shape[cut:]))
        b = self._adapter("lora_b", (*self.names[:cut], None), (*self.shape[:cut], None))
        if self.lora_dropout and not deterministic:
            x = self._drop(x)
        low = jnp.einsum(f"{x_axes},r{axes[cut:]}->BTr", x, a)
        return y + jnp.einsum(f"BTr,{axes[:cut]}r->{y_axes}", low, b)

    def _product(self, x: jax.Array, weight: Any) -> jax.Array:
        """W x."""
        multiply = partial(product, self.equation, mesh=self.mesh)
        if is_quantized(weight):
            return multiply(x, weight)
        tokens = x.shape[0] * x.shape[1]
        width = x.size // tokens
        if tokens * (width + weight.size // width) < weight.size:
            return multiply(x, weight.astype(self.dtype))  # the activations are less to send
        weight = jnp.asarray(weight)  # a NumPy one, outside of compiled functions, has no layout
        run = lambda x, weight: multiply(  # noqa: E731
            x, gathered(weight, self.dtype, self.names, self.mesh)
        )
        return (jax.checkpoint(run, prevent_cse=False) if self.regathers else run)(x, weight)

    def _drop(self, x: jax.Array) -> jax.Array:
        """Dropout whose draw does not depend on the padding of the first input axis."""
        rows, keep_rate = x.shape[:2], 1.0 - self.lora_dropout
        keep = jax.random.bernoulli(self.make_rng("dropout"), keep_rate, (*x.shape[2:], *rows))
        return jnp.where(jnp.moveaxis(keep, (-2, -1), (0, 1)), x / keep_rate, 0)

    def _adapter(self, name: str, names: Names, shape: tuple[int | None, ...]) -> jax.Array:
        """A matrix of an adapter, laid out as its weight; None in the shape is the rank."""
        leaf: Any = self.get_variable("params", name)
        rank = leaf.shape[shape.index(None)]
        whole = tuple(rank if size is None else size for size in shape)
        self._check_shape(name, padded_shape(names, whole, self.mesh))
        return constrain(leaf, *names, mesh=self.mesh).astype(self.dtype)


class VocabTable(Part):
    """A vector for each word [V, D]: the head, or the part of the embedding that a head shares."""

    def setup(self):
        shape = (self.config.vocab_size, self.config.hidden_size)
        self.weight: Any = self.new_param("weight", self.initializer(), shape, ("vocab", "embed"))

    def initializer(self) -> Any:
        """How `init` fills the table."""
        return self.normal()


class Embedding(VocabTable):
    """The table of the input tokens."""

    def initializer(self) -> Any:
        """As torch.nn.Embedding(padding_idx=...) begins: the padding's row is zero."""
        pad, normal = self.config.pad_token_id, self.normal()
        if pad is None:
            return normal
        return lambda key, shape, dtype: normal(key, shape, dtype).at[pad].set(0)

    def __call__(self, input_ids_BT: jax.Array) -> jax.Array:
        """The tokens' rows [B, T, D]; NaN for an id outside the vocabulary, not a neighbour's row.

        As in the reference (padding_idx) no gradient reaches the padding's row from here; a tied
        head still gives it one.
        """
        # A negative id would count from the end, one above it may meet the table's padding.
        known_BT = (input_ids_BT >= 0) & (input_ids_BT < self.config.vocab_size)
        rows_BT = jnp.where(known_BT, input_ids_BT, len(self.weight))
        # Whole in its width, since that of the result is whole: otherwise the compiler replicates
        # rows and width in turn. Cast after the lookup, so that the gradients of a frequent word
        # are summed in the parameter's dtype.
        table_VD = constrain(self.weight, "vocab", None, mesh=self.mesh)
        if self.has_variable("params", BITS):
            bits_VD: Any = self.get_variable("params", BITS)
            # All bits set, which stand for a row that is not there, are NaN.
            bits_BTD = jnp.take(bits_VD, rows_BT, axis=0)
            x_BTD = jax.lax.bitcast_convert_type(bits_BTD, table_VD.dtype)
        else:
            x_BTD = jnp.take(table_VD, rows_BT, axis=0)
        x_BTD = x_BTD.astype(self.dtype)
        if self.config.pad_token_id is None:
            return x_BTD
        is_pad = (input_ids_BT == self.config.pad_token_id)[..., None]
        return jnp.where(is_pad, jax.lax.stop_gradient(x_BTD), x_BTD)


class Attention(Part):
    """Grouped-query attention with rotary embedding and an optional window."""

    @nn.compact
    def __call__(self, x_BTD, cached, inputs: LayerInputs):
        """Returns the mixed values [B, T, D], this call's keys and values [B, T, K, H], or all of
        the slots that they were written to, and the probabilities [B, K, G, T, S] where the
        implementation has them.
        """
        config = self.config
        D, K, H = config.hidden_size, config.num_key_value_heads, config.head_dim
        G = config.num_attention_heads // K
        qkv_proj = Projection(
            **self.alike,
            equation="BTD,KCHD->BTKCH",
            shape=(K, G + 2, H, D),
            names=("kv_heads", None, None, "embed"),
            name="qkv_proj",
        )
        o_proj = Projection(
            **self.alike,
            equation="BTKGH,DKGH->BTD",
            shape=(D, K, G, H),
            names=("embed", "kv_heads", None, None),
            name="o_proj",
        )

        # Each key-value group holds its G query heads, then its key, then its value.
        qkv_BTKCH = self._whole_rows(qkv_proj(x_BTD, inputs.deterministic))
        qkv_BTKCH = checkpoint_name(qkv_BTKCH, "qkv")
        qk_BTKCH = apply_rope(qkv_BTKCH[:, :, :, : G + 1], *inputs.cos_sin)
        q_BTKGH, k_BTKH = qk_BTKCH[:, :, :, :G], qk_BTKCH[:, :, :, G]
        v_BTKH = qkv_BTKCH[:, :, :, G + 1]

        new_kv, keys, values = (k_BTKH, v_BTKH), [k_BTKH], [v_BTKH]
        if isinstance(cached, LayerSlots):
            new_kv = cached.write(*new_kv)
            keys, values = ([apart(slots, len(x_BTD)), None] for slots in new_kv)
        elif cached is not None:
            keys, values = [cached[0], *keys], [cached[1], *values]
        dropout = None
        if config.attention_dropout and not inputs.deterministic:
            dropout = (config.attention_dropout, self.make_rng("dropout"))
        mixed_BTKGH, probs = attend(q_BTKGH, keys, values, inputs.visible, self.mesh, dropout)
        mixed_BTKGH = self._whole_rows(mixed_BTKGH, back=True)
        return o_proj(mixed_BTKGH, inputs.deterministic), new_kv, probs

    def _whole_rows(self, x_BTKCH: jax.Array, back: bool = False) -> jax.Array:
        """From a share of the tokens to whole rows with a share of the heads, or back: one
        all-to-all over the sequence axis, and one for the gradient.
        """
        layouts = [
            ("batch", "tokens", "kv_heads", None, None),
            ("batch", None, "attention_heads", None, None),
        ]
        # Both are said, since the gradient passes them the other way round.
        for names in reversed(layouts) if back else layouts:
            x_BTKCH = constrain(x_BTKCH, *names, mesh=self.mesh)
        return x_BTKCH


class MLP(Part):
    """The gated feed-forward: down(up * act(gate))."""

    @nn.compact
    def __call__(self, x_BTD: jax.Array, deterministic: bool = True) -> jax.Array:
        D, F = self.config.hidden_size, self.config.intermediate_size
        gate_up_proj = Projection(
            **self.alike,
            equation="BTD,CFD->BTCF",
            shape=(2, F, D),
            names=(None, "mlp", "embed"),
            name="gate_up_proj",
        )
        down_proj = Projection(
            **self.alike,
            equation="BTF,DF->BTD",
            shape=(D, F),
            names=("embed", "mlp"),
            name="down_proj",
        )
        gate_up_BTCF = gate_up_proj(x_BTD, deterministic)
        act = ACTIVATION_FUNCTIONS[self.config.hidden_act]
        x_BTF = gate_up_BTCF[:, :, 1] * act(gate_up_BTCF[:, :, 0])
        return down_proj(x_BTF, deterministic)


class DecoderLayer(Part):
    """Two residual lines: attention, then the feed-forward, each on a normed input."""

    @nn.compact
    def __call__(self, x_BTD, cached, inputs: LayerInputs):
        """Returns the output [B, T, D], and what `inputs` asks to keep, None for the rest: keys and
        values, the output once more, the probabilities.
        """
        dropout = nn.Dropout(self.config.resid_pdrop, deterministic=inputs.deterministic)
        normed = RMSNorm(**self.alike, name="input_layernorm")(x_BTD)
        mixed, new_kv, probs = Attention(**self.alike, name="self_attn")(normed, cached, inputs)
        x_BTD = self.laid_out(x_BTD + dropout(mixed))
        normed = RMSNorm(**self.alike, name="post_attention_layernorm")(x_BTD)
        mlp = MLP(**self.alike, name="mlp")
        x_BTD = self.laid_out(x_BTD + dropout(mlp(normed, inputs.deterministic)))
        kept = (
            new_kv if inputs.keep_kv else None,
            x_BTD if inputs.keep_hidden else None,
            probs if inputs.keep_probs else None,
        )
        return x_BTD, kept
