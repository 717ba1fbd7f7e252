"""State and plan of a model's step: `ModelCache` is donated, `Step` is not."""

from collections.abc import Mapping
from typing import NamedTuple, Self

from jaxtyping import Array, Int

from g4attn_jax.cache import Cache
from g4attn_jax.config import AttentionSpec
from g4attn_jax.layout import Layout, Paged, SegmentIds, StepPlan, plan_step, select_tokens


class ModelCache(NamedTuple):
    """The caches of all layers that have one: arrays, and the sizes that programs are compiled for.

    Donate it to a jitted step to update it in place.

    Attributes:
        layers: of every layer that is not Q_ONLY; these come first, so layer i has `layers[i]`.
        layouts: of each layer type, `Paged` without a page table.
    """

    layers: tuple[Cache, ...]
    layouts: dict[str, Layout]


class Step(NamedTuple):
    """Positions of the new tokens of a step, and the plan of each layer type that follows.

    It is not donated: a step may be planned inside the jitted program, or once for several.

    Attributes:
        positions: integer [B, T], in their sequences; -1 is padding.
        plans: of each layer type.
    """

    positions: Int[Array, "B T"]
    plans: dict[str, StepPlan]

    @classmethod
    def plan(
        cls,
        specs: Mapping[str, AttentionSpec],
        positions: Int[Array, "B T"],
        layouts: Mapping[str, Layout],
        page_tables: Mapping[str, Int[Array, "B pages"]] | None = None,
        segment_ids: SegmentIds | None = None,
    ) -> Self:
        """Plans the layers of each type, see `plan_step`.

        Args:
            specs: of a layer of each type.
            positions: integer [B, T].
            layouts: of each type.
            page_tables: of each type whose layout is `Paged`.
            segment_ids: of rows with several sequences.

        Raises:
            ValueError: a page table is missing or surplus, or as `plan_step` raises.
        """
        layouts = _with_page_tables(layouts, page_tables or {})
        plans = {
            layer_type: plan_step(spec, positions, layouts[layer_type], segment_ids)
            for layer_type, spec in specs.items()
        }
        return cls(positions, plans)

    def select(self, at: Int[Array, "B n"]) -> Self:
        """The step of tokens `at` alone, for layers that write nothing."""
        plans = {layer_type: plan.select(at) for layer_type, plan in self.plans.items()}
        return Step(select_tokens(self.positions, at), plans)


def _with_page_tables(layouts, page_tables):
    """The layouts with their page tables."""
    paged = [key for key, layout in layouts.items() if isinstance(layout, Paged)]
    missing = [key for key in paged if key not in page_tables]
    surplus = [key for key in page_tables if key not in paged]
    if missing:
        raise ValueError(f"page_tables lacks {', '.join(missing)}; these layers have pages")
    if surplus:
        raise ValueError(
            f"page_tables has {surplus[0]!r}; accepted: {', '.join(paged) or 'none, without pages'}"
        )
    tables = {
        key: Paged(layouts[key].num_pages, layouts[key].page_size, page_tables[key])
        for key in paged
    }
    return dict(layouts) | tables
