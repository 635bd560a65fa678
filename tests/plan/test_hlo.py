"""What is read out of programs: some compiled for CPU here, some in the words of a TPU's."""

import jax
import jax.numpy as jnp
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from plan.hlo import count, read


def compiled(run, *shapes, dtype=jnp.float32):
    arrays = (jax.ShapeDtypeStruct(shape, dtype) for shape in shapes)
    return read(jax.jit(run).lower(*arrays).compile().as_text())


def scan_of(times):
    def run(x, w):
        return jax.lax.scan(lambda x, _: (jnp.tanh(x @ w), None), x, length=times)[0]

    return run


@pytest.mark.parametrize(
    "run, shapes, flops",
    [
        (lambda x, w: x @ w, [(32, 48), (48, 80)], 2 * 32 * 48 * 80),
        (lambda x, w: x @ w, [(5, 32, 48), (5, 48, 80)], 5 * 2 * 32 * 48 * 80),
        (scan_of(7), [(32, 48), (48, 48)], 7 * 2 * 32 * 48 * 48),
        (
            lambda q, k: jnp.einsum("BTKGH,BSKH->BKGTS", q, k),
            [(2, 16, 4, 3, 24), (2, 40, 4, 24)],
            2 * 2 * 4 * 3 * 16 * 40 * 24,
        ),
        (
            lambda w, x: jax.grad(lambda w: jnp.sum(jnp.tanh(x @ w)))(w),
            [(48, 80), (32, 48)],
            2 * 2 * 32 * 48 * 80,
        ),
    ],
)
def test_products_are_counted(run, shapes, flops):
    found = compiled(run, *shapes)
    assert found.flops == flops
    assert found.cycles is None and not found.unbounded


@pytest.mark.parametrize(
    "strides, padding, spread",
    [
        ((2, 1), "VALID", (1, 1)),
        ((1, 3), [(2, 2), (0, 1)], (1, 1)),
        ((1, 1), [(1, 1), (2, 0)], (3, 2)),
    ],
)
def test_a_convolution_counts_without_its_padding(strides, padding, spread):
    """As jax's own cost analysis of the same program, which counts the same products."""

    def run(x, w):
        return jax.lax.conv_general_dilated(x, w, strides, padding, spread, (2, 1))

    shapes = [jax.ShapeDtypeStruct(shape, jnp.float32) for shape in ((2, 3, 17, 9), (5, 3, 3, 4))]
    lowered = jax.jit(run).lower(*shapes)
    found = read(lowered.compile().as_text())
    assert found.flops == lowered.cost_analysis()["flops"]


def test_a_loop_that_depends_on_data_counts_once_and_is_named():
    def run(x, w):
        return jax.lax.while_loop(lambda x: x[0, 0] < 1, lambda x: jnp.tanh(x @ w), x)

    found = compiled(run, (32, 48), (48, 48))
    assert found.flops == 2 * 32 * 48 * 48
    assert [name.endswith("while") for name in found.unbounded] == [True]


def test_a_conditional_counts_its_dearest_branch():
    def run(x, w):
        return jax.lax.switch(
            x[0, 0].astype(int), [lambda: x, lambda: jnp.sin(x @ w @ w), lambda: x @ w]
        )

    assert compiled(run, (32, 48), (48, 48)).flops == 2 * 2 * 32 * 48 * 48


def test_of_a_stack_a_loop_reads_and_writes_its_parts():
    """Seven rows through a carried stack: neither is read or written as a whole each time."""

    def run(stack, x):
        def body(i, stack):
            return jax.lax.dynamic_update_index_in_dim(stack, stack[i] * x, i, 0)

        return jax.lax.fori_loop(0, 7, body, stack)

    row = 4 * 64 * 1024
    found = compiled(run, (7, 64, 1024), (64, 1024)).hbm_bytes
    # A row is read, multiplied by x and written, on the way perhaps written and read once more;
    # at the beginning the stack is copied.
    assert 7 * 3 * row <= found <= 7 * 5 * row + 2 * 7 * row + 4096


def test_bytes_of_a_sum():
    assert compiled(lambda x, y: x + y, (64, 1024), (64, 1024)).hbm_bytes == 3 * 4 * 64 * 1024


def test_collectives_on_cpu_with_their_loops():
    mesh = jax.make_mesh((4, 2), ("a", "b"))
    spec = PartitionSpec("a", "b")

    def run(x):
        def body(x, _):
            return jax.lax.ppermute(x, "a", [(0, 1), (1, 2), (2, 3), (3, 0)]), None

        x = jax.lax.scan(body, x, length=5)[0]
        x = jax.lax.all_gather(x, "a", axis=0, tiled=True)  # [16, 16]
        x = jax.lax.psum(x * 2, "b")
        x = jax.lax.all_to_all(x * 2, "a", 1, 0, tiled=True)  # [64, 4]
        return jax.lax.psum_scatter(x * 2, "b", scatter_dimension=0, tiled=True)  # [32, 4]

    run = jax.jit(jax.shard_map(run, mesh=mesh, in_specs=spec, out_specs=spec, check_vma=False))
    x = jax.ShapeDtypeStruct((16, 32), jnp.float32, sharding=NamedSharding(mesh, spec))
    found = {one.kind: one for one in read(run.lower(x).compile().as_text()).collectives}
    shard = 4 * 4 * 16  # of the argument
    whole = 4 * shard  # of the arrays in between

    def facts(kind):
        one = found[kind]
        return one.nbytes, one.sent, one.times, one.depth, one.group

    assert facts("collective-permute") == (shard, shard, 5, 1, 4)
    assert facts("all-gather") == (whole, whole * 3 // 4, 1, 0, 4)
    assert facts("all-reduce") == (whole, whole, 1, 0, 2)
    assert facts("all-to-all") == (whole, whole * 3 // 4, 1, 0, 4)
    assert facts("reduce-scatter") == (whole, whole // 2, 1, 0, 2)
    assert not any(one.asynchronous for one in found.values())
    assert {one.network for one in found.values()} == {"ici"}
    assert "ppermute" in found["collective-permute"].op_name
    assert count(list(found.values()), depth=1) == {"collective-permute": 1}


@pytest.mark.parametrize(
    "groups, size",
    [
        ("{{0,1},{2,3},{4,5},{6,7}}", 2),
        ("{{0,1,2,3,4,5,6,7}}", 8),
        ("{}", 8),
        ("[4,2]<=[8]", 2),
        ("[2,4]<=[4,2]T(1,0)", 4),
        ("mesh['x'=4,'y'=1,'z'=2] {'x'}", 4),
        ("mesh['x'=4,'y'=2] {'x','y'}", 8),
        ("mesh['x'=8] {'x':(2)4}", 4),
    ],
)
def test_groups_in_all_their_forms(groups, size):
    text = f"""HloModule m, is_scheduled=true, num_partitions=8

%add (a: f32[], b: f32[]) -> f32[] {{
  %a = f32[] parameter(0)
  %b = f32[] parameter(1)
  ROOT %sum = f32[] add(%a, %b)
}}

ENTRY %main (x: f32[6,4]) -> f32[6,4] {{
  %x = f32[6,4]{{1,0}} parameter(0)
  ROOT %all-reduce.1 = f32[6,4]{{1,0}} all-reduce(%x), channel_id=1, replica_groups={groups}, \
use_global_device_ids=true, to_apply=%add
}}
"""
    (one,) = read(text).collectives
    assert (one.group, one.nbytes, one.sent) == (size, 96, 96 * 2 * (size - 1) // size)


# What follows is in the words of libtpu's programs, cut down.
LAYOUT = "{1,0:T(8,128)}"

ASYNC = """HloModule gathers, is_scheduled=true, num_partitions=8

%begin (a: bf16[32,128]) -> (bf16[32,128], bf16[256,128], u32[]) {
  %a = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %all-gather.1 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %start = (bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[256,128]{1,0:T(8,128)(2,1)}, \
u32[]{:S(2)}) custom-call(%all-gather.1), custom_call_target="AsyncCollectiveStart"
}

%go_on (a: bf16[32,128], b: bf16[256,128], x: f32[64,128], w: f32[128,512]) -> \
(f32[64,512], bf16[32,128], bf16[256,128]) {
  %x = f32[64,128]{1,0:T(8,128)S(1)} parameter(2)
  %w = f32[128,512]{1,0:T(8,128)} parameter(3)
  %product = f32[64,512]{1,0:T(8,128)} convolution(%x, %w), dim_labels=bf_io->bf
  %a = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.2 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %tuple.1 = (f32[64,512]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, \
bf16[256,128]{1,0:T(8,128)(2,1)}) tuple(%product, %a, %all-gather.2)
}

%finish (a: bf16[32,128], b: bf16[256,128]) -> bf16[256,128] {
  %a = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %b = bf16[256,128]{1,0:T(8,128)(2,1)} parameter(1)
  %all-gather.3 = bf16[256,128]{1,0:T(8,128)(2,1)} all-gather(%a), channel_id=9, \
replica_groups=[1,8]<=[8], dimensions={0}
  ROOT %done = bf16[256,128]{1,0:T(8,128)(2,1)} custom-call(%a, %b, %all-gather.3), \
custom_call_target="AsyncCollectiveDone"
}

ENTRY %main (a: bf16[32,128], x: f32[64,128], w: f32[128,512]) -> bf16[256,128] {
  %a = bf16[32,128]{1,0:T(8,128)(2,1)} parameter(0)
  %x = f32[64,128]{1,0:T(8,128)} parameter(1)
  %w = f32[128,512]{1,0:T(8,128)} parameter(2)
  %copy-start = (f32[64,128]{1,0:T(8,128)S(1)}, f32[64,128]{1,0:T(8,128)}, u32[]{:S(2)}) \
copy-start(%x)
  %begun = (bf16[32,128]{1,0:T(8,128)(2,1)}, bf16[256,128]{1,0:T(8,128)(2,1)}, u32[]{:S(2)}) \
fusion(%a), kind=kCustom, calls=%begin
  %a.1 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=0
  %b.1 = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%begun), index=1
  %copy-done = f32[64,128]{1,0:T(8,128)S(1)} copy-done(%copy-start)
  %gone_on = (f32[64,512]{1,0:T(8,128)}, bf16[32,128]{1,0:T(8,128)(2,1)}, \
bf16[256,128]{1,0:T(8,128)(2,1)}) fusion(%a.1, %b.1, %copy-done, %w), kind=kOutput, \
calls=%go_on, metadata={op_name="here"}, backend_config={"window_config":{"estimated_cycles":"7"}}
  %a.2 = bf16[32,128]{1,0:T(8,128)(2,1)} get-tuple-element(%gone_on), index=1
  %b.2 = bf16[256,128]{1,0:T(8,128)(2,1)} get-tuple-element(%gone_on), index=2
  ROOT %finished = bf16[256,128]{1,0:T(8,128)(2,1)} fusion(%a.2, %b.2), kind=kCustom, \
calls=%finish
}
"""


def test_a_gather_in_three_fusions_counts_once():
    found = read(ASYNC)
    (one,) = found.collectives
    assert one.kind == "all-gather" and one.asynchronous and one.times == 1
    assert (one.nbytes, one.sent) == (2 * 256 * 128, 2 * 224 * 128)
    assert found.flops == 2 * 64 * 128 * 512
    assert found.cycles == 7
    x, w, product = (4 * rows * cols for rows, cols in ((64, 128), (128, 512), (64, 512)))
    a, b = 2 * 32 * 128, 2 * 256 * 128
    assert found.hbm_bytes == x + w + product + a + b  # x is copied to the chip, once


SCATTER = """HloModule scatter, is_scheduled=true, num_partitions=4

%add (p: f32[], q: f32[]) -> f32[] {
  %p = f32[] parameter(0)
  %q = f32[] parameter(1)
  ROOT %sum = f32[] add(%p, %q)
}

%all-reduce-scatter.1 (input: f32[64,512]) -> f32[64,128] {
  %input = f32[64,512]{1,0:T(8,128)} parameter(0)
  %all-reduce.1 = f32[64,512]{1,0:T(8,128)} all-reduce(%input), channel_id=3, \
replica_groups={{0,1,2,3}}, use_global_device_ids=true, to_apply=%add
  %zero = u32[] constant(0)
  %id = u32[] partition-id()
  ROOT %share = f32[64,128]{1,0:T(8,128)} dynamic-slice(%all-reduce.1, %zero, %id), \
dynamic_slice_sizes={64,128}
}

ENTRY %main (x: f32[64,512]) -> f32[64,128] {
  %x = f32[64,512]{1,0:T(8,128)} parameter(0)
  ROOT %fusion.1 = f32[64,128]{1,0:T(8,128)} fusion(%x), kind=kCustom, \
calls=%all-reduce-scatter.1, metadata={op_name="here"}
}
"""


def test_a_sum_of_which_a_share_is_kept_is_a_reduce_scatter():
    found = read(SCATTER)
    (one,) = found.collectives
    assert (one.kind, one.nbytes, one.sent) == ("reduce-scatter", 4 * 64 * 512, 4 * 64 * 384)
    assert not one.asynchronous and one.op_name == "here"
    assert found.hbm_bytes == 4 * 64 * (512 + 128)


@pytest.mark.parametrize(
    "target, slices",
    [
        ('"{1,2}x{0:7}"', 2),
        ('"{1,2,3}x{0:7}"', 3),
        ("{{100000,300000},{100001,300001},{200000,400000}}", 2),
    ],
)
@pytest.mark.parametrize("kind, whole, sent", [("all-reduce", 1, 2), ("all-gather", 0, 1)])
def test_between_slices(target, slices, kind, whole, sent):
    attributes = (
        'is_host_transfer=true, frontend_attributes={_xla_host_transfer_handler_name="xla",'
        f'_xla_host_transfer_rendezvous="{kind}.2_0",_xla_megascale_reduce_operation="SUM",'
        f"_xla_megascale_target={target}}}"
    )
    array = f"f32[256,128]{LAYOUT}"
    text = f"""HloModule slices, is_scheduled=true, num_partitions=8

ENTRY %main (x: f32[256,128]) -> f32[256,128] {{
  %x = {array} parameter(0)
  %go = token[] after-all()
  %send = ({array}, u32[], token[]) send(%x, %go), channel_id=2, {attributes}
  %recv = ({array}, u32[], token[]) recv(%go), channel_id=1, {attributes}
  %send-done = token[] send-done(%send), channel_id=2, is_host_transfer=true
  %recv-done = ({array}, token[]) recv-done(%recv), channel_id=1, is_host_transfer=true
  ROOT %sum = {array} get-tuple-element(%recv-done), index=0
}}
"""
    found = read(text)
    (one,) = found.collectives
    nbytes = 4 * 256 * 128 * (1 if whole else slices)
    assert (one.kind, one.network, one.group, one.nbytes) == (kind, "dcn", slices, nbytes)
    assert one.sent == round(sent * (slices - 1) / slices * nbytes) and one.asynchronous
    assert found.hbm_bytes == 2 * 4 * 256 * 128


@pytest.mark.parametrize("is_sync", [False, True])
def test_a_pair_that_the_gpu_compiler_calls_sync_is_not_asynchronous(is_sync):
    text = """HloModule pair, is_scheduled=true, num_partitions=8

ENTRY %main (x: bf16[6,4]) -> bf16[48,4] {
  %x = bf16[6,4]{1,0} parameter(0)
  %all-gather-start.1 = (bf16[6,4]{1,0}, bf16[48,4]{1,0}) all-gather-start(%x), channel_id=1, \
replica_groups=[1,8]<=[8], dimensions={0}, metadata={op_name="here"}, \
backend_config={"collective_backend_config":{"is_sync":IS_SYNC}}
  ROOT %all-gather-done.1 = bf16[48,4]{1,0} all-gather-done(%all-gather-start.1)
}
"""
    found = read(text.replace("IS_SYNC", "true" if is_sync else "false"))
    (one,) = found.collectives
    assert one.asynchronous != is_sync
    assert one.nbytes == 2 * 48 * 4 and found.hbm_bytes == 2 * (6 + 48) * 4
    assert "metadata" not in one.line and "all-gather-start(%x), channel_id=1" in one.line


def test_a_branch_that_is_not_taken_is_listed_and_not_counted():
    text = """HloModule branches, is_scheduled=true, num_partitions=2

%dear (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %y = f32[64,128]{1,0} copy(%x)
  ROOT %z = f32[64,128]{1,0} collective-permute(%y), channel_id=1, \
source_target_pairs={{0,1},{1,0}}
}

%cheap (x: f32[64,128]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  ROOT %z = f32[64,128]{1,0} all-to-all(%x), channel_id=2, replica_groups={{0,1}}, dimensions={0}
}

ENTRY %main (x: f32[64,128], p: pred[]) -> f32[64,128] {
  %x = f32[64,128]{1,0} parameter(0)
  %p = pred[] parameter(1)
  ROOT %y = f32[64,128]{1,0} conditional(%p, %x, %x), BRANCHES
}
"""
    for branches in (
        "true_computation=%dear, false_computation=%cheap",
        "branch_computations={%cheap, %dear}",
    ):
        found = read(text.replace("BRANCHES", branches))
        assert {one.kind: one.times for one in found.collectives} == {
            "collective-permute": 1,
            "all-to-all": 0,
        }
        assert found.hbm_bytes == 4 * 4 * 64 * 128


def test_a_kernel_with_braces_and_lines_of_its_own():
    text = """HloModule kernel, is_scheduled=true

ENTRY %main (x: bf16[8,96]) -> bf16[8,96] {
  %x = bf16[8,96]{1,0:T(8,128)(2,1)} parameter(0)
  %buffer = bf16[8,96]{1,0:T(8,128)(2,1)} custom-call(), custom_call_target="AllocateBuffer"
  ROOT %kernel.1 = bf16[8,96]{1,0:T(8,128)(2,1)} custom-call(%x), \
custom_call_target="tpu_custom_call", frontend_attributes={kernel_metadata={
"blocks":"{}"
}}, metadata={op_name="attention/pallas_call"}
}
"""
    found = read(text)
    assert [(one.target, one.op_name, one.times) for one in found.kernels] == [
        ("tpu_custom_call", "attention/pallas_call", 1)
    ]
    assert found.hbm_bytes == 2 * 2 * 8 * 128  # padded
