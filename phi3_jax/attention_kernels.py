"""Fused attention that never holds a score matrix, and the choice of who computes it.

Causal self-attention over the tokens of one call: splash attention (a Pallas kernel of jax) on TPU,
cuDNN on GPU. What they cannot serve, a cache, dropout on the probabilities, a mask of another
shape, stays with XLA (`attention.attend`). Letters as in model.py.
"""

import functools
import math
from collections.abc import Callable
from typing import Any, Literal, cast, get_args

import jax
import jax.core
import jax.numpy as jnp
import numpy as np
from jax.experimental.pallas.ops.tpu.splash_attention import (
    BlockSizes,
    Mask,
    MultiHeadMask,
    QKVLayout,
    SegmentIds,
    make_splash_mha_single_device,
)
from jax.sharding import Mesh

from phi3_jax.sharding import logical_spec

Implementation = Literal["xla", "splash", "cudnn"]

# The name under which attention's results can be saved for the backward pass.
SAVED_NAME = "attention"

LANES = 128  # the width of a TPU register, which every splash block is a multiple of


def splash_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    window: int | None,
    mesh: Mesh | None,
    interpret: bool = False,
) -> jax.Array:
    """Causal grouped-query attention by the splash kernel of jax, with gradients.

    Args:
      q_BTKGH: queries, float32 or bfloat16; k_BTKH, v_BTKH in the same dtype.
      segment_BT: int32, a query sees keys of its own number only; None for one document a row.
      window: how many columns a query sees with its own, or None for all up to its own.
      mesh: where the arrays are sharded, batch and attention heads as `sharding.RULES` has them.
        Each device runs the kernel on its share: the compiler cannot divide a Pallas call.
      interpret: run the kernel as plain operations, on any platform, slowly (for tests).

    Returns:
      [B, T, K, G, H] in the dtype of q. Scores, softmax and sums are float32; in bfloat16 the
      scaled query is rounded once more. A token always sees itself: no row is ever empty.
    """
    B, T, K, G, H = q_BTKGH.shape
    padded, block = _splash_blocks(T)
    kernel = _splash_kernel(padded, block, _window_within(window, T), H % LANES != 0, interpret)

    def one_share(q_BTKGH, k_BTKH, v_BTKH, segment_BT):
        B, T, K, G, H = q_BTKGH.shape
        q_BNTH = _pad_tokens(q_BTKGH * H**-0.5, padded).reshape(B, padded, K * G, H).swapaxes(1, 2)
        k_BKTH, v_BKTH = (_pad_tokens(x, padded).swapaxes(1, 2) for x in (k_BTKH, v_BTKH))
        segments = None
        if segment_BT is not None:
            segments = SegmentIds(*[_pad_tokens(segment_BT, padded)] * 2)
        out_BNTH = jax.vmap(kernel)(q_BNTH, k_BKTH, v_BKTH, segments)
        return out_BNTH.swapaxes(1, 2)[:, :T].reshape(B, T, K, G, H)

    if mesh is None:
        return one_share(q_BTKGH, k_BTKH, v_BTKH, segment_BT)
    q_spec = logical_spec(("batch", None, "attention_heads", None, None), q_BTKGH.shape, mesh)
    kv_spec = logical_spec(("batch", None, "attention_heads", None), k_BTKH.shape, mesh)
    segment_spec = None if segment_BT is None else logical_spec(("batch", None), (B, T), mesh)
    # check_vma would want the kernel to declare what varies over which axis; Pallas calls do not.
    return jax.shard_map(
        one_share,
        mesh=mesh,
        in_specs=(q_spec, kv_spec, kv_spec, segment_spec),
        out_specs=q_spec,
        check_vma=False,
    )(q_BTKGH, k_BTKH, v_BTKH, segment_BT)


def cudnn_attention(
    q_BTKGH: jax.Array,
    k_BTKH: jax.Array,
    v_BTKH: jax.Array,
    segment_BT: jax.Array | None,
    window: int | None,
    implementation: Literal["cudnn", "xla"] = "cudnn",
) -> jax.Array:
    """Causal grouped-query attention by cuDNN, through `jax.nn.dot_product_attention`.

    Args:
      q_BTKGH, k_BTKH, v_BTKH, segment_BT, window: as in `splash_attention`; bfloat16 or float16.
        Segments cost a mask [B, 1, T, T], without heads: cuDNN has no segment numbers.
      implementation: "xla" computes the same request without cuDNN (for tests).

    Returns:
      [B, T, K, G, H] in the dtype of q. The compiler divides the call over batch and heads.
    """
    B, T, K, G, H = q_BTKGH.shape
    window = _window_within(window, T)
    even = T + T % 2  # cuDNN differentiates no others
    q_BTKGH, k_BTKH, v_BTKH = (_pad_tokens(x, even) for x in (q_BTKGH, k_BTKH, v_BTKH))
    mask_B1TS = None
    if segment_BT is not None:
        segment_BT = _pad_tokens(segment_BT, even)
        mask_B1TS = (segment_BT[:, :, None] == segment_BT[:, None, :])[:, None]
    out_BTNH = jax.nn.dot_product_attention(
        q_BTKGH.reshape(B, even, K * G, H),
        k_BTKH,
        v_BTKH,
        mask=mask_B1TS,
        is_causal=True,
        local_window_size=None if window is None else (window - 1, 0),
        implementation=implementation,
    )
    return out_BTNH[:, :T].reshape(B, T, K, G, H)


def choose_implementation(
    asked: str,
    device: Any,
    dtype: Any,
    head_dim: int,
    tokens: int,
    obstacle: str | None = None,
) -> Implementation:
    """Who computes a call's attention: "xla", "splash" or "cudnn".

    Args:
      asked: one of these, or "auto": the fused kernel of the platform wherever it can serve the
        call (and on TPU, from one block of tokens on), XLA where not.
      device: the jax.Device that the program is for; its platform and, on GPU, its compute
        capability are read.
      dtype: of queries, keys and values. head_dim, tokens: H and T of the call.
      obstacle: why only XLA can serve this call, in words ("output_attentions=True"), or None.

    Raises:
      ValueError: for an unknown name, or a kernel asked for by name that cannot serve the call.
    """
    if asked not in ("auto", *get_args(Implementation)):
        known = ", ".join(map(repr, ("auto", *get_args(Implementation))))
        raise ValueError(f"attn_implementation {asked!r} is not known; it is one of {known}")
    obstacles = {
        "splash": obstacle or _splash_obstacle(device, dtype),
        "cudnn": obstacle or _cudnn_obstacle(device, dtype, head_dim),
    }
    if asked == "auto":
        if obstacles["splash"] is None and tokens >= LANES:
            return "splash"
        return "cudnn" if obstacles["cudnn"] is None else "xla"
    if asked != "xla" and obstacles[asked] is not None:
        raise ValueError(
            f"attn_implementation={asked!r} cannot serve this call: {obstacles[asked]}; "
            "attn_implementation='auto' takes what can, 'xla' serves every call"
        )
    return cast(Implementation, asked)


def _splash_obstacle(device: Any, dtype: Any) -> str | None:
    if device.platform != "tpu":
        return f"it runs on TPU and the device is {device.platform!r}"
    if jnp.dtype(dtype) not in (jnp.float32, jnp.bfloat16):
        return f"dtype is {jnp.dtype(dtype).name}, it takes float32 and bfloat16"
    # The products in the kernel take this setting too, and the TPU compiler refuses the others.
    config: Any = jax.config
    precision = config.jax_default_matmul_precision
    exact = ("highest", "float32") if jnp.dtype(dtype) == jnp.float32 else ()
    if precision not in (None, "default", "fastest", "bfloat16", *exact):
        return (
            f"jax_default_matmul_precision is {precision!r}, which does not compile for "
            f"{jnp.dtype(dtype).name}; 'default' does"
        )
    return None


def _cudnn_obstacle(device: Any, dtype: Any, head_dim: int) -> str | None:
    # AMD devices are of the platform "gpu" too; theirs is a capability by name, as "gfx90a".
    capability = str(getattr(device, "compute_capability", ""))
    if device.platform not in ("gpu", "cuda") or not capability[:1].isdecimal():
        return f"it runs on NVIDIA GPUs and the device is {device.platform!r}"
    if float(capability) < 8:
        return f"the GPU has compute capability {capability}, it takes 8.0 (Ampere) and newer"
    if jnp.dtype(dtype) not in (jnp.bfloat16, jnp.float16):
        return f"dtype is {jnp.dtype(dtype).name}, it takes bfloat16 and float16"
    if head_dim % 8 or head_dim > 128:
        return f"head_dim is {head_dim}, it takes multiples of 8 up to 128"
    return None


def _window_within(window: int | None, tokens: int) -> int | None:
    """None for a window that hides nothing, so that it costs nothing."""
    return None if window is None or window >= tokens else window


def _pad_tokens(x: jax.Array, tokens: int) -> jax.Array:
    """Zeros to [B, tokens, ...], behind every query: causality keeps those from looking there."""
    return jnp.pad(x, ((0, 0), (0, tokens - x.shape[1]), *((0, 0),) * (x.ndim - 2)))


def _splash_blocks(tokens: int) -> tuple[int, int]:
    """(padded length, block): equal blocks that waste less than a register's width each.

    A block of scores is float32 in on-chip memory (512 x 512: 1 MiB), and every pair of blocks is
    a step of the kernel's grid, hidden pairs too. 512 fills the matrix unit and leaves room for
    the backward pass; where there are very many pairs, larger blocks keep the table of pairs
    within the scalar memory and the steps over hidden pairs few.
    """
    largest = 512 if tokens <= 16384 else 1024
    count = math.ceil(tokens / largest)
    block = math.ceil(tokens / (count * LANES)) * LANES
    return count * block, block


class _CausalWindow(Mask):
    """The causal mask with a window, as the splash kernel wants to be told of it.

    jax's own CausalMask and LocalMask evaluate every block of [T, T], several times over: minutes
    where T is 131,072. Here the corners tell whether a block is all seen or all hidden.
    """

    def __init__(self, tokens: int, window: int | None):
        self.tokens = tokens
        self.window = window
        # With these two the kernel computes the mask from the numbers of the columns.
        self.q_sequence = np.arange(tokens, dtype=np.int32)
        self.mask_function = self.seen

    @property
    def shape(self) -> tuple[int, int]:
        return self.tokens, self.tokens

    def seen(self, query: Any, key: Any) -> Any:
        if self.window is None:
            return key <= query
        return (key <= query) & (key > query - self.window)

    def __getitem__(self, idx: tuple[slice, slice]) -> np.ndarray:
        rows, columns = idx
        first, last = (rows.start, columns.start), (rows.stop - 1, columns.stop - 1)
        nearest, farthest = last[0] - first[1], first[0] - last[1]  # how far back a key can lie
        if nearest < 0 or (self.window is not None and farthest >= self.window):
            return np.zeros((1, 1), bool)
        if farthest >= 0 and (self.window is None or nearest < self.window):
            return np.ones((1, 1), bool)
        return self.seen(
            self.q_sequence[rows, None], np.arange(columns.start, columns.stop)[None, :]
        )


# The kernel holds the table of its blocks, whose making costs seconds for long rows.
@functools.lru_cache(maxsize=32)
def _splash_kernel(
    tokens: int, block: int, window: int | None, seq_minor: bool, interpret: bool
) -> Callable[..., jax.Array]:
    # A minor axis of 96 would be padded to 128, in copies of q, k and v.
    layout = QKVLayout.SEQ_MINOR if seq_minor else QKVLayout.HEAD_DIM_MINOR
    sizes = BlockSizes(
        block_q=block,
        block_kv=block,
        block_q_dkv=block,
        block_kv_dkv=block,
        block_q_dq=block,
        block_kv_dq=block,
        q_layout=layout,
        k_layout=layout,
        v_layout=layout,
    )
    # A mask of one head serves any number of heads.
    mask = MultiHeadMask([_CausalWindow(tokens, window)])
    # Inside the scan of a linen module jax.ensure_compile_time_eval does not end the tracing.
    with jax.core.eval_context():
        kernel = make_splash_mha_single_device(
            mask,
            block_sizes=sizes,
            # Kept with the output, so that a policy which saves it need not run the kernel again.
            residual_checkpoint_name=SAVED_NAME,
            interpret=interpret,
        )
    # Kept across programs, so neither tracers nor arrays of one device.
    return jax.tree.map(np.asarray, kernel)
