import dataclasses
import functools

import jax
import jax.numpy as jnp
import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from g4attn_jax.layout import (
    UNPLACED,
    Contiguous,
    LayerType,
    Paged,
    Ring,
    StepPlan,
    key_positions,
    plan_step,
)
from g4attn_jax.rope import rope_cos_sin
from tests.everyday import everyday
from tests.test_attention import K_EQ_V

SLIDING, FULL = K_EQ_V.attention_spec(0), K_EQ_V.attention_spec(1)
WINDOW = SLIDING.sliding_window
INT32_MAX, INT32_MIN = 2**31 - 1, -(2**31)
FAR = [INT32_MIN, -300, -2, INT32_MAX - 1, INT32_MAX]


def slot_of(position, pages, *, page_size, num_pages, wraps=False):
    """Slot of a token by the rule of layout.py: `pages` is its sequence's row of the table."""
    capacity = len(pages) * page_size
    if position < 0 or position == INT32_MAX or (position >= capacity and not wraps):
        return -1
    column, row = divmod(position % capacity, page_size)
    exists = 0 <= pages[column] < num_pages
    return int(pages[column]) * page_size + row if exists else -1


def slots_by_the_rule(layout, positions):
    rule = {"page_size": layout.page_size, "num_pages": layout.num_pages}
    wraps = isinstance(layout, Ring)
    table = layout.page_table if isinstance(layout, Paged) else np.arange(layout.batch)[:, None]
    rows = zip(positions, table, strict=True)
    return [[slot_of(int(p), pages, wraps=wraps, **rule) for p in row] for row, pages in rows]


def every_position(layout, rounds=1):
    """[B, T], from before the first to past the capacity, several times round."""
    one = [*range(-2, rounds * layout.capacity + 3), *FAR]
    return np.array([one] * layout.batch, np.int32)


@pytest.mark.parametrize("layout", [Contiguous(1, 1), Contiguous(3, 7), Contiguous(2, 300)])
def test_slots_of_a_contiguous_cache(layout):
    positions = every_position(layout)
    slots = np.asarray(layout.slots(positions))
    np.testing.assert_array_equal(slots, slots_by_the_rule(layout, positions))
    used = slots[slots >= 0]
    assert sorted(used) == list(range(layout.batch * layout.capacity))


@pytest.mark.parametrize("layout", [Ring(1, 5, 8), Ring(3, 60, 4), Ring(2, 60, 5)])
def test_slots_of_a_ring(layout):
    positions = every_position(layout, rounds=4)
    slots = np.asarray(layout.slots(positions))
    np.testing.assert_array_equal(slots, slots_by_the_rule(layout, positions))
    assert slots.min() == -1
    assert slots.max() == layout.batch * layout.capacity - 1
    for b, row in enumerate(slots):
        assert set(row[row >= 0] // layout.capacity) == {b}


@pytest.mark.parametrize(
    ("window", "max_new_tokens", "capacity"),
    [(5, 8, 64), (60, 4, 64), (60, 5, 128), (1, 1, 64), (512, 1, 576), (1024, 16, 1088)],
)
def test_capacity_of_a_ring(window, max_new_tokens, capacity):
    assert Ring(3, window, max_new_tokens).capacity == capacity


def test_shapes_of_the_caches():
    for layout, shape, capacity in (
        (Contiguous(3, 7), (3, 7), 7),
        (Ring(3, 5, 8), (3, 64), 64),
        (Paged(9, 16, np.zeros((3, 2), np.int32)), (9, 16), 32),
    ):
        assert (layout.num_pages, layout.page_size) == shape
        assert (layout.batch, layout.capacity) == (3, capacity)
        array = jnp.zeros((*shape, 2, 4))
        assert layout.sequences(array).shape == (3, capacity, 2, 4)


@st.composite
def page_tables(draw, batch=3, columns=4, num_pages=13):
    """Pages dealt in any order, some entries being no page at all."""
    pages = draw(st.permutations(range(num_pages)))[: batch * columns]
    none = st.sampled_from([-1, -7, num_pages, num_pages + 1, INT32_MAX, INT32_MIN])
    entries = [draw(st.one_of(st.just(page), st.just(page), none)) for page in pages]
    return np.array(entries, np.int32).reshape(batch, columns)


@settings(derandomize=True, deadline=None, max_examples=50)
@given(table=page_tables(), page_size=st.sampled_from([16, 48, 256]))
def test_slots_of_pages(table, page_size):
    layout = Paged(13, page_size, table)
    positions = every_position(Paged(13, 256, table))  # one shape for all: compiled once
    slots = np.asarray(layout.slots(positions))
    np.testing.assert_array_equal(slots, slots_by_the_rule(layout, positions))
    used = slots[slots >= 0]
    assert slots.min() == -1
    assert slots.max() < 13 * page_size
    assert len(np.unique(used)) == len(used)


@pytest.mark.parametrize(
    ("dtype", "num_pages"),
    [
        (np.int8, 125),
        (np.int8, 300),
        (np.uint8, 100),
        (np.uint8, 300),
        (np.uint16, 100),
        (np.int32, 100),
        (np.uint32, 100),
        (np.int64, 100),
    ],
)
def test_page_tables_of_any_integer_dtype(dtype, num_pages):
    """Also where the dtype holds neither -1 nor the number of pages."""
    table = np.array([[2, 0, 100], [1, 99, 120]])
    positions = np.array([[0, 17, 33], [15, 16, 34]])
    layout = Paged(num_pages, 16, table.astype(dtype))
    by_the_rule = slots_by_the_rule(Paged(num_pages, 16, table), positions)
    np.testing.assert_array_equal(layout.slots(positions), by_the_rule)
    has_page = np.array([[True, True, num_pages > 100], [True, True, num_pages > 120]])
    np.testing.assert_array_equal(layout.pages(), np.where(has_page, table, -1))
    array = jnp.arange(1.0, 101)[:, None] * jnp.ones(16)
    held = layout.sequences(jnp.pad(array, ((0, num_pages - 100), (0, 0)), constant_values=7))
    at = np.take_along_axis(np.asarray(held), positions, axis=1)
    np.testing.assert_array_equal(at[:, :2], table[:, :2] + 1)
    np.testing.assert_array_equal(at[:, 2], np.where(has_page[:, 2], 7, 0))


def test_page_ids_that_int32_does_not_hold_are_no_pages():
    layout = Paged(2, 16, np.array([[2**32, 2**32 + 1, 1]]))
    np.testing.assert_array_equal(layout.slots(np.array([[0, 16, 32]])), [[-1, -1, 16]])
    np.testing.assert_array_equal(layout.pages(), [[-1, -1, 1]])


@pytest.mark.parametrize("integer", [np.int8, np.uint8, np.int64])
def test_sizes_may_be_numpy_integers(integer):
    ring = Ring(integer(2), integer(100), integer(100))
    assert (ring.capacity, ring.num_pages) == (256, 2)
    assert Paged(integer(7), integer(64), np.zeros((1, 7), int)).capacity == 448
    with jax.enable_x64(True):
        plan = plan_step(FULL, np.array([[3], [99]]), Contiguous(integer(2), integer(100)))
    assert plan.slots.dtype == key_positions(plan.placed, plan.layout).dtype == "int32"
    np.testing.assert_array_equal(plan.slots, [[3], [199]])


def test_sequences_gather_pages_and_fill_holes_with_zero():
    array = jnp.arange(1, 4 * 16 + 1, dtype=jnp.float32).reshape(4, 16, 1)
    table = np.array([[3, -1, 0], [99, 2, -5]], np.int32)
    expected = np.zeros((2, 3, 16, 1))
    for b, column, page in ((0, 0, 3), (0, 2, 0), (1, 1, 2)):
        expected[b, column] = array[page]
    actual = Paged(4, 16, table).sequences(array)
    np.testing.assert_array_equal(actual, expected.reshape(2, 48, 1))


@functools.partial(jax.jit, static_argnums=0)
def slots_and_their_positions(spec, positions, layout):
    plan = plan_step(spec, positions, layout)
    return plan.slots, key_positions(plan.placed, plan.layout)


@jax.jit
def of_each_sequence(layout, array):
    return layout.sequences(array)


class Simulation:
    """Steps that put a number of their own into the slot of every token.

    A token of a step sees, at every position that it may look at, the newest number put there, and
    nothing else: what was rolled back is never seen.
    """

    width = 8  # of every step, padded: compiled once

    def __init__(self, spec, layout, starts=(0, 0)):
        self.spec, self.layout, self.starts, self.count = spec, layout, starts, 0
        self.slots = np.zeros((layout.num_pages, layout.page_size), np.int32)
        self.tokens = [{}, {}]  # of a sequence, the number at each position
        self.lengths = list(starts)

    def step(self, written, kept):
        positions = np.full((2, self.width), -1, np.int32)
        for b, n in enumerate(written):
            positions[b, :n] = self.lengths[b] + np.arange(n)
        slots, of_slot = map(
            np.asarray, slots_and_their_positions(self.spec, positions, self.layout)
        )
        for b, t in np.argwhere(positions >= 0):
            self.count += 1
            self.tokens[b][int(positions[b, t])] = self.count
            self.slots.reshape(-1)[slots[b, t]] = self.count
        held = np.asarray(of_each_sequence(self.layout, self.slots))
        assert of_slot.shape == held.shape == (2, self.layout.capacity)
        for b, t in np.argwhere(positions >= 0):
            query = int(positions[b, t])
            window = self.spec.sliding_window or query + 1
            first = max(query - window + 1, 0)
            if first < self.starts[b]:
                continue  # some that it may look at were never put anywhere
            seen = (of_slot[b] >= first) & (of_slot[b] <= query)
            actual = sorted(zip(of_slot[b][seen].tolist(), held[b][seen].tolist(), strict=True))
            assert actual == [(p, self.tokens[b][p]) for p in range(first, query + 1)]
        for b, n in enumerate(written):
            assert 0 <= kept[b] <= n
            for p in range(self.lengths[b] + kept[b], self.lengths[b] + n):
                del self.tokens[b][p]
            self.lengths[b] += kept[b]


def holey_pages():
    """Pages in no order; the last column of each sequence was never dealt."""
    pages = np.random.default_rng(0).permutation(14)[:12].reshape(2, 6)
    return Paged(14, 16, np.concatenate([pages, [[-1], [-1]]], axis=1).astype(np.int32))


# 56 keys and 8 new tokens: no slot of the 64 is to spare.
WIDE = dataclasses.replace(SLIDING, sliding_window=56)
SIMULATED = [
    (SLIDING, Contiguous(2, 96)),
    (SLIDING, Ring(2, WINDOW, 8)),
    (WIDE, Ring(2, 56, 8)),
    (SLIDING, holey_pages()),
    (FULL, Contiguous(2, 96)),
    (FULL, holey_pages()),
]
on_every_layout = pytest.mark.parametrize(
    ("spec", "layout"),
    SIMULATED,
    ids=[
        "sliding-contiguous",
        "sliding-ring",
        "tight-ring",
        "sliding-paged",
        "full-contiguous",
        "full-paged",
    ],
)
counts = st.tuples(*[st.integers(0, 8)] * 2)


@on_every_layout
@settings(derandomize=True, deadline=None, max_examples=10)
@given(steps=st.lists(st.tuples(counts, counts), min_size=30, max_size=30))
def test_a_visible_key_is_the_token_that_is_there(spec, layout, steps):
    simulation = Simulation(spec, layout)
    for written, kept in steps:
        if not isinstance(layout, Ring):
            room = [96 - length for length in simulation.lengths]
            written = [min(n, most) for n, most in zip(written, room, strict=True)]
        simulation.step(written, [min(k, n) for k, n in zip(kept, written, strict=True)])


@pytest.mark.parametrize("start", [0, 3 * 64 - 4, 2**24 + 60, INT32_MAX - 200])
def test_a_ring_after_several_rounds(start):
    simulation = Simulation(WIDE, Ring(2, 56, 8), starts=(start, 0))
    for _ in range(24):  # three times round
        simulation.step((8, 1), (8, 1))
    assert simulation.lengths == [start + 192, 24]


def test_rejected_tokens_of_many_steps_in_a_ring():
    """Every step overwrites the last rejected tokens, and at worst the oldest that it may."""
    simulation = Simulation(WIDE, Ring(2, 56, 8))
    for _ in range(70):
        simulation.step((8, 8), (1, 2))
        simulation.step((8, 1), (0, 1))
    assert simulation.lengths == [70, 210]


@everyday()
def test_a_sequence_that_does_not_step_has_no_keys():
    for layout in (Contiguous(2, 64), Ring(2, WINDOW, 8), holey_pages()):
        plan = plan_step(SLIDING, np.array([[40, 41], [-1, -1]]), layout)
        assert int(key_positions(plan.placed, plan.layout)[1].max()) < 0
        none = plan_step(SLIDING, np.zeros((2, 0), int), layout)
        assert int(key_positions(none.placed, none.layout).max()) < 0


@on_every_layout
def test_a_plan_has_positions_cos_and_sin(spec, layout):
    positions = np.array([[40, -1, 3], [-1, 11, 12]])
    plan = plan_step(spec, positions, layout)
    cos, sin = rope_cos_sin(
        jnp.asarray(positions),
        theta=spec.rope_theta,
        head_dim=spec.head_dim,
        rotary_dim=spec.rotary_dim,
    )
    np.testing.assert_array_equal(plan.positions, positions)
    np.testing.assert_array_equal(plan.cos, cos)
    np.testing.assert_array_equal(plan.sin, sin)
    assert plan.cos.shape == (2, 3, spec.rotary_dim // 2)
    assert {a.dtype.name for a in (plan.positions, plan.slots)} == {"int32"}
    assert {a.dtype.name for a in (plan.cos, plan.sin)} == {"float32"}
    assert plan.layer_type == LayerType.of(spec)
    assert not bool((plan.placed == UNPLACED).any())


@on_every_layout
def test_layouts_and_plans_pass_through_jit(spec, layout):
    positions = np.array([[40, -1, 3], [-1, 11, 12]])
    plan = plan_step(spec, positions, layout)
    passed = jax.jit(lambda plan: plan)(plan)
    assert isinstance(passed, StepPlan)
    assert type(passed.layout) is type(layout)
    made = jax.jit(lambda p, layout: plan_step(spec, p, layout))(positions, layout)
    for other in (passed, made):
        assert jax.tree.structure(other) == jax.tree.structure(plan)
        jax.tree.map(lambda a, b: np.testing.assert_allclose(a, b, rtol=0, atol=1e-6), other, plan)
        np.testing.assert_array_equal(other.slots, plan.slots)
        np.testing.assert_array_equal(
            key_positions(other.placed, other.layout), key_positions(plan.placed, plan.layout)
        )
    sizes = layout.batch, layout.capacity, layout.num_pages, layout.page_size
    again = passed.layout
    assert (again.batch, again.capacity, again.num_pages, again.page_size) == sizes


def test_a_new_page_table_is_not_a_new_program():
    traces = []

    @jax.jit
    def slots(layout):
        traces.append(layout)
        return layout.slots(jnp.array([[0, 16]]))

    for table in ([[0, 1]], [[2, 0]]):
        expected = [[16 * page for page in table[0]]]
        np.testing.assert_array_equal(slots(Paged(3, 16, np.array(table))), expected)
    assert len(traces) == 1


@pytest.mark.parametrize(
    ("layout", "positions", "unplaced"),
    [
        (Contiguous(1, 4), [3, 4, -1, -5], [False, True, False, False]),
        (Contiguous(1, 4), [INT32_MAX, 0, INT32_MIN, 2], [True, False, False, False]),
        (Ring(1, WINDOW, 8), [64, INT32_MAX, -1, 1], [False, True, False, False]),
        (Paged(2, 16, np.array([[1, -1, 9]])), [15, 16, 32, 48], [False, True, True, True]),
        (Paged(2, 16, np.array([[0, 0]])), [1, 17, 1, -3], [False, False, False, False]),
    ],
)
def test_under_jit_unplaced_says_which_tokens_have_no_slot(layout, positions, unplaced):
    plan = jax.jit(lambda p, layout: plan_step(SLIDING, p, layout))(np.array([positions]), layout)
    np.testing.assert_array_equal(plan.placed == UNPLACED, [unplaced])
    np.testing.assert_array_equal(plan.slots, slots_by_the_rule(layout, [positions]))


@pytest.mark.parametrize("layout", [Contiguous(1, 32), Paged(2, 16, np.array([[0, 1]]))])
def test_under_jit_an_unplaced_token_hides_no_key_of_the_others(layout):
    plan = jax.jit(lambda p, layout: plan_step(FULL, p, layout))(np.array([[31, 32]]), layout)
    np.testing.assert_array_equal(key_positions(plan.placed, plan.layout), [list(range(32))])


@pytest.mark.parametrize("no_page", [-1, -7, 2, 9, INT32_MAX])
def test_a_page_that_does_not_exist_holds_no_keys(no_page):
    layout = Paged(2, 16, np.array([[1, no_page, 0]]))
    plan = jax.jit(lambda p, layout: plan_step(FULL, p, layout))(np.array([[40]]), layout)
    expected = [*range(16), *[-1] * 16, *range(32, 41)]
    np.testing.assert_array_equal(key_positions(plan.placed, plan.layout)[0, :41], expected)


def test_positions_that_int32_does_not_hold():
    far = np.array([[2**32, 2**31, 2**63 - 1, -(2**40)]])
    for layout in (Contiguous(1, 64), Ring(1, WINDOW, 8), Paged(2, 16, np.array([[0, 1]]))):
        for i, position in enumerate(far[0, :3]):
            with pytest.raises(ValueError, match=f"positions has {position}, for which sequence 0"):
                plan_step(SLIDING, far[:, i : i + 1], layout)
        with pytest.raises(ValueError, match=f"positions has {far[0, 3]}"):
            plan_step(SLIDING, far, layout)
        with jax.enable_x64(True):
            plan = jax.jit(lambda p, layout: plan_step(SLIDING, p, layout))(far, layout)
        np.testing.assert_array_equal(plan.placed == UNPLACED, [[True, True, True, False]])


CONTIGUOUS, RING = Contiguous(2, 64), Ring(2, WINDOW, 8)
PAGED = Paged(4, 16, np.array([[0, 1, -1], [2, 3, -1]]))


@pytest.mark.parametrize("layout", [CONTIGUOUS, RING, PAGED])
@pytest.mark.parametrize(
    ("positions", "message"),
    [
        (np.array([[0], [-2]]), r"positions has -2"),
        (
            np.array([[0, 1], [7, 7]]),
            "positions has 7 in sequence 1 and 7 in sequence 1, which have",
        ),
        (np.array([[3, -1, 3], [0, 1, 2]]), "have the same slot; accepted: one for every token"),
        (np.array([[0], [INT32_MAX]]), "positions has 2147483647, for which sequence 1 has no sl"),
        (np.zeros((2, 3)), "positions has dtype float64"),
        (np.zeros((2, 3), np.uint32), "positions has dtype uint32"),
        (np.zeros((2, 3), bool), "positions has dtype bool"),
        (
            np.zeros((3, 1), int),
            r"positions has shape \(3, 1\)",
        ),
        (np.zeros(2, int), r"positions has shape \(2,\)"),
        (np.zeros((2, 1, 1), int), r"positions has shape \(2, 1, 1\)"),
        (np.int32(0), r"positions has shape \(\)"),
    ],
)
def test_positions_refused(layout, positions, message):
    with pytest.raises(ValueError, match=message):
        plan_step(SLIDING, positions, layout)


@pytest.mark.parametrize(
    ("layout", "positions", "message"),
    [
        (CONTIGUOUS, [[0], [64]], r"positions has 64, for which sequence 1 .* 0 to 63, within its"),
        (PAGED, [[31], [48]], r"positions has 48, for which sequence 1 .* 0 to 47, within its pag"),
        (PAGED, [[32], [0]], "positions has 32, for which sequence 0 has no slot"),
        (PAGED, [[0], [32]], "positions has 32, for which sequence 1 has no slot"),
        (
            RING,
            np.tile(np.arange(9), (2, 1)),
            "positions has 9 tokens a sequence",
        ),
        (
            Paged(4, 16, np.array([[0, 0], [1, 2]])),
            [[3, 19], [0, 1]],
            "positions has 3 in sequence 0 and 19 in sequence 0, which have the same slot",
        ),
        (
            Paged(4, 16, np.array([[0, 1], [3, 1]])),
            [[20], [20]],
            "positions has 20 in sequence 0 and 20 in sequence 1, which have the same slot",
        ),
        (
            RING,
            [[0, 1], [3, 67]],
            "positions has 3 in sequence 1 and 67 in sequence 1, which have the same slot",
        ),
    ],
)
def test_tokens_without_a_slot_of_their_own_are_refused(layout, positions, message):
    with pytest.raises(ValueError, match=message):
        plan_step(SLIDING, np.array(positions), layout)


@pytest.mark.parametrize("page", [-2, 4, INT32_MAX])
def test_a_page_table_that_names_another_page_is_refused(page):
    layout = Paged(4, 16, np.array([[0, 1], [page, 2]]))
    with pytest.raises(ValueError, match=rf"page_table has {page}"):
        plan_step(SLIDING, np.array([[3], [17]]), layout)


def test_a_shared_page_is_fine_where_nobody_writes_it():
    layout = Paged(4, 16, np.array([[0, 1], [0, 2]]))
    plan = plan_step(FULL, np.array([[16, 17], [16, 17]]), layout)
    np.testing.assert_array_equal(plan.slots, [[16, 17], [32, 33]])
    np.testing.assert_array_equal(
        key_positions(plan.placed, plan.layout)[:, :18], [list(range(18))] * 2
    )


def test_a_ring_is_for_layers_of_its_window():
    positions = np.array([[0], [0]])
    message = "the layer has sliding_window None"
    with pytest.raises(ValueError, match=message):
        plan_step(FULL, positions, RING)
    with pytest.raises(ValueError, match="the layer has sliding_window 5"):
        plan_step(SLIDING, positions, Ring(2, 6, 8))


def test_what_shapes_tell_is_refused_under_jit_too():
    for spec, layout, positions, message in (
        (FULL, RING, np.zeros((2, 1), int), "sliding_window None"),
        (SLIDING, RING, np.zeros((2, 9), int), "positions has 9 tokens"),
        (SLIDING, PAGED, np.zeros((3, 1), int), r"positions has shape \(3, 1\)"),
        (SLIDING, PAGED, np.zeros((2, 1)), "positions has dtype float32"),
    ):
        with pytest.raises(ValueError, match=message):
            jax.jit(lambda p, layout, spec=spec: plan_step(spec, p, layout))(positions, layout)


@pytest.mark.parametrize("size", [0, -1, 2.0, "8", None, True, np.int32(0)])
def test_sizes_refused(size):
    for name, make in (
        ("batch", lambda: Contiguous(size, 8)),
        ("capacity", lambda: Contiguous(1, size)),
        ("batch", lambda: Ring(size, 5, 8)),
        ("sliding_window", lambda: Ring(1, size, 8)),
        ("max_new_tokens", lambda: Ring(1, 5, size)),
        ("num_pages", lambda: Paged(size, 16, np.zeros((1, 1), int))),
        ("page_size", lambda: Paged(1, size, np.zeros((1, 1), int))),
    ):
        with pytest.raises(ValueError, match=f"{name} is .*"):
            make()


@pytest.mark.parametrize("page_size", [1, 8, 15, 17, 24, 257, 272, 512])
def test_page_sizes_refused(page_size):
    message = f"page_size is {page_size!r}"
    with pytest.raises(ValueError, match=message):
        Paged(1, page_size, np.zeros((1, 1), int))


@pytest.mark.parametrize("page_size", range(16, 257, 16))
def test_page_sizes_accepted(page_size):
    assert Paged(1, page_size, np.zeros((1, 3), int)).capacity == 3 * page_size


@pytest.mark.parametrize(
    ("table", "given"),
    [
        ([[0], [1]], "a list"),
        (None, "None"),
        (np.zeros(2, int), r"\(2,\)"),
        (np.zeros((2, 1, 1), int), r"\(2, 1, 1\)"),
        (np.zeros((2, 0), int), r"\(2, 0\)"),
        (np.zeros((0, 2), int), r"\(0, 2\)"),
        (np.zeros((2, 1)), "dtype float64"),
        (np.zeros((2, 1), bool), "dtype bool"),
    ],
)
def test_page_tables_refused(table, given):
    layout = Paged(4, 16, table)
    message = rf"page_table .*{given}.*; accepted: "
    with pytest.raises(ValueError, match=message):
        plan_step(FULL, np.zeros((2, 1), int), layout)


def test_caches_of_2_31_slots_are_refused():
    assert Contiguous(1, 2**31 - 1).capacity == 2**31 - 1
    for make in (
        lambda: Contiguous(2, 2**30),
        lambda: Ring(2**20, 2040, 8),
        lambda: Paged(2**27, 16, np.zeros((1, 1), int)),
    ):
        with pytest.raises(ValueError, match=r"num_pages \* page_size is 2147483648"):
            make()


def test_what_is_no_layer_or_layout_is_refused():
    positions = np.zeros((2, 1), int)
    with pytest.raises(ValueError, match="spec is a Gemma4Config"):
        plan_step(K_EQ_V, positions, CONTIGUOUS)
    with pytest.raises(ValueError, match="layout is a tuple; accepted: Contiguous or Ring"):
        plan_step(FULL, positions, (2, 64))
