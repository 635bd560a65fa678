"""Arrays, loops and devices in the text of a program."""

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from jax.sharding import NamedSharding, PartitionSpec

from plan.hlo import read
from plan.hlo_text import Array, Program


@pytest.mark.parametrize(
    "array, nbytes, stored",
    [
        (Array("f32", (32, 4096, 96), "2,1,0:T(8,128)"), 4 * 32 * 4096 * 96, 4 * 32 * 4096 * 128),
        (Array("bf16", (32, 4096, 96), "1,2,0:T(8,128)(2,1)"), 2**18 * 96, 2**18 * 96),
        (Array("bf16", (4, 3), "1,0:T(8,128)(2,1)S(1)"), 24, 0),
        (Array("f32", (5, 3), "1,0"), 60, 60),
        (Array("pred", (3000,), "0:T(1024)"), 3000, 3072),
        (Array("s4", (8, 10), "1,0"), 40, 40),
        (Array("f8e4m3fn", (8, 10), "1,0"), 80, 80),
        (Array("s32", (), ":T(128)"), 4, 4),
        (Array("token", (), ""), 0, 0),
    ],
)
def test_bytes_of_an_array(array, nbytes, stored):
    assert (array.nbytes, array.stored) == (nbytes, stored)


# In the words of libtpu's programs.
LOOPS = """HloModule loops, is_scheduled=true

%body (state: (s32[], s32[], f32[256,128])) -> (s32[], s32[], f32[256,128]) {
  %state = (s32[], s32[], f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} get-tuple-element(%state), index=1
  %x = f32[256,128]{1,0:T(8,128)} get-tuple-element(%state), index=2
  %step = s32[]{:T(128)} constant(STEP)
  %next = s32[]{:T(128)} ADD(%i, %step)
  %y = f32[256,128]{1,0:T(8,128)} negate(%x), backend_config={"window_config":{\
"estimated_cycles":"100"}}
  ROOT %out = (s32[], s32[], f32[256,128]{1,0:T(8,128)}) tuple(%next, %n, %y)
}

%condition (state: (s32[], s32[], f32[256,128])) -> pred[] {
  %state = (s32[], s32[], f32[256,128]{1,0:T(8,128)}) parameter(0)
  %i = s32[]{:T(128)} get-tuple-element(%state), index=0
  %n = s32[]{:T(128)} get-tuple-element(%state), index=1
  ROOT %more = pred[] compare(%i, %n), direction=DIRECTION
}

ENTRY %main (x: f32[256,128]) -> f32[256,128] {
  %x = f32[256,128]{1,0:T(8,128)} parameter(0)
  %start = s32[]{:T(128)} constant(START)
  %end = s32[]{:T(128)} constant(END)
  %first = s32[]{:T(128)} copy(%start)
  %state = (s32[], s32[], f32[256,128]{1,0:T(8,128)}) tuple(%first, %end, %x)
  %loop = (s32[], s32[], f32[256,128]{1,0:T(8,128)}) while(%state), condition=%condition, \
body=%body
  ROOT %y = f32[256,128]{1,0:T(8,128)} get-tuple-element(%loop), index=2
}
"""


@pytest.mark.parametrize(
    "start, end, step, add, direction, trips",
    [
        (0, 7, 1, "add", "LT", 7),
        (0, 8, 3, "add", "LT", 3),
        (2, 8, 2, "add", "LE", 4),
        (6, -1, 1, "subtract", "GT", 7),
        (6, 0, -2, "add", "GE", 4),
        (9, 7, 1, "add", "LT", 0),
    ],
)
def test_trips_of_a_tpu_loop(start, end, step, add, direction, trips):
    """The bound is carried through the loop, and the start is copied."""
    text = LOOPS.replace("START", str(start)).replace("END", str(end)).replace("STEP", str(step))
    text = text.replace("ADD", add).replace("DIRECTION", direction)
    found = read(text)
    assert found.cycles == 100 * trips
    # The counters, and the condition's scalars, are a few bytes.
    assert found.hbm_bytes == pytest.approx(trips * 2 * 4 * 256 * 128, abs=64 * (trips + 1))
    assert not found.unbounded


def test_a_bound_that_is_an_argument_is_not_known():
    text = LOOPS.replace("constant(END)", "parameter(1)").replace("START", "0").replace("STEP", "1")
    found = read(text.replace("ADD", "add").replace("DIRECTION", "LT"))
    assert found.unbounded == ["loop"] and found.cycles == 100


def test_devices_of_a_program():
    mesh = jax.sharding.Mesh(np.array(jax.devices()).reshape(8), ("a",))
    x = jax.ShapeDtypeStruct((8,), jnp.float32, sharding=NamedSharding(mesh, PartitionSpec("a")))
    text = jax.jit(lambda x: x + 1).lower(x).compile().as_text()
    assert Program(text).devices == 8
