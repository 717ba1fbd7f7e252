"""Properties that the interpreter does not show: rows that the kernel's programs read and write."""

from types import SimpleNamespace

import hypothesis
import jax
import jax.numpy as jnp
import numpy as np
from hypothesis import strategies as st

from g4attn_jax.ops.head_norm.triton import choose_launch, rows_of_program
from tests.everyday import everyday

KINDS = st.lists(
    st.fixed_dictionaries({"first": st.integers(0, 3), "count": st.integers(1, 6)}),
    min_size=1,
    max_size=3,
)


@everyday()
@hypothesis.given(
    kinds=KINDS, groups=st.integers(1, 40), block_rows=st.sampled_from([1, 2, 4, 8, 16])
)
@hypothesis.settings(max_examples=60, deadline=None, derandomize=True)
def test_programs_share_out_the_rows(kinds, groups, block_rows):
    """Every head of every group is handled once, by one program, and no other row is touched.

    The interpreter drops what lies outside a buffer; a GPU would read and write it.
    """
    kinds = [SimpleNamespace(**k, rows_per_group=k["first"] + k["count"] + 1) for k in kinds]
    units = sum(k.count for k in kinds)
    programs = jnp.arange(-(-groups // block_rows) * units, dtype=jnp.int32)

    def rows(program):
        return [
            (mine, *rows[:3], jnp.ones_like(rows.row, bool) if rows.mask is None else rows.mask)
            for _, mine, rows in rows_of_program(
                program, kinds, groups=groups, block_rows=block_rows
            )
        ]

    per_kind = jax.jit(jax.vmap(rows))(programs)
    assert np.all(sum(np.asarray(mine, int) for mine, *_ in per_kind) == 1)
    for kind, (mine, group, row, head, mask) in zip(kinds, per_kind, strict=True):
        used = np.asarray(mine)[:, None] & np.asarray(mask)
        group, row, head = (np.asarray(x)[used] for x in (group, row, head))
        np.testing.assert_array_equal(np.sort(head), np.arange(groups * kind.count))
        expected_group, in_group = np.divmod(head, kind.count)
        np.testing.assert_array_equal(group, expected_group)
        np.testing.assert_array_equal(row, group * kind.rows_per_group + kind.first + in_group)


@hypothesis.given(num_rows=st.integers(1, 2**24), head_dim=st.integers(1, 512), wide=st.booleans())
def test_launches_are_ones_triton_takes(num_rows, head_dim, wide):
    row_bytes = (4 if wide else 2) * 2 ** (head_dim - 1).bit_length()
    launch = choose_launch(num_rows, row_bytes)
    for number in launch:
        assert number & (number - 1) == 0
    assert 1 <= launch.num_warps <= launch.block_rows <= 16
    if num_rows <= 32:  # a decode step's few heads: a program each
        assert launch.block_rows == 1 or row_bytes < 128


def test_a_program_has_two_kibibytes_at_gemma_4s_head_dims():
    for head_dim, block_rows in ((256, 4), (512, 2)):
        assert choose_launch(10**5, 2 * head_dim).block_rows == block_rows
        assert choose_launch(8, 2 * head_dim).block_rows == 1
