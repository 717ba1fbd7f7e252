"""Shape of a launch of the attention kernel, and whether a GPU holds it."""

from typing import NamedTuple, Self

from g4attn_jax.ops import float8_cache
from g4attn_jax.ops.gpu import Gpu, gpu
from g4attn_jax.ops.padding import pad


class AttentionLaunch(NamedTuple):
    """Shape of a launch."""

    block_rows: int  # query rows of a program: tokens x query heads of a KV head
    block_keys: int  # keys of a tile
    num_splits: int  # programs that share the keys of a block of rows
    # programs that share the columns of their values; 1 where those are keys too
    value_blocks: int
    num_warps: int
    num_stages: int

    @property
    def warps_share_rows(self) -> bool:
        """Whether several warps share the scores of a row.

        From 64 rows on an instruction takes 16 rows a warp; here there are more warps than that.
        """
        return 64 <= self.block_rows < 16 * self.num_warps


class HeadSizes(NamedTuple):
    """Sizes of a query head, and of a key and a value in the cache.

    Attributes:
        key_widths: of the arrays that queries are multiplied with.
        value_width: D if values are an array of their own, None if they are the first of those.
        q_bytes: of a number of q.
        cache_bytes: of a number of the cache.
    """

    key_widths: tuple[int, ...]
    value_width: int | None
    q_bytes: int
    cache_bytes: int

    @classmethod
    def of(cls, q, cache) -> Self:
        """Sizes of arguments of an attention op."""
        return cls(
            key_widths=tuple(part.width for part in cache.key_parts),
            value_width=None if cache.values_are_keys else cache.value_part.width,
            q_bytes=q.dtype.itemsize,
            cache_bytes=cache.value_part.array.dtype.itemsize,
        )

    @property
    def head_dim(self) -> int:
        """D."""
        return self.value_width or self.key_widths[0]

    def tile_bytes(self, block_keys: int, value_blocks: int) -> int:
        """Bytes of the keys and values of a tile that a program loads."""
        width = sum(map(pad, self.key_widths))
        if self.value_width is not None:
            width += pad(self.value_width) // value_blocks
        return block_keys * width * self.cache_bytes

    def shared_memory(self, gpu: Gpu, launch: AttentionLaunch) -> int:
        """Bytes that a program of a launch has for queries, weights and tiles."""
        rows, keys = launch.block_rows, launch.block_keys
        tile = self.tile_bytes(keys, launch.value_blocks)
        queries = rows * sum(map(pad, self.key_widths)) * self.q_bytes
        shared = queries + (launch.num_stages - 1) * tile
        if rows < 64 or gpu.compute_capability < 9:
            shared += rows * keys * self.q_bytes  # weights, from the warps that made them to all
        elif gpu.compute_capability < 10:
            shared += tile  # these instructions read a tile while the next is being asked for
        else:
            shared += 2 * tile + rows * keys * 4
        if launch.warps_share_rows:  # weights from warp to warp, and the zeros of what is unseen
            shared += 2 * rows * keys * self.q_bytes
        if self.cache_bytes == 1:
            shared += tile * self.q_bytes  # converted for the tensor cores
        return shared

    def fits(self, gpu: Gpu, launch: AttentionLaunch) -> bool:
        """Whether the GPU holds a program of a launch."""
        return self.shared_memory(gpu, launch) <= gpu.shared_memory


# No launch needs less shared memory.
LEAST = AttentionLaunch(
    block_rows=16, block_keys=16, num_splits=1, value_blocks=1, num_warps=4, num_stages=2
)


def triton_refusal(q, cache, *_, interpret: bool, **static) -> str | None:
    """Reason for which the Triton kernel cannot take arguments of an attention op, or None."""
    refusal = float8_cache.refusal(cache, interpret=interpret)
    return refusal or (None if interpret else launch_refusal(q, cache))


def launch_refusal(q, cache) -> str | None:
    """Reason for which the GPU holds no launch for arguments of an attention op, or None."""
    sizes, target = HeadSizes.of(q, cache), gpu()
    if sizes.fits(target, LEAST):
        return None
    return (
        f"attention of {sum(sizes.key_widths)} numbers a key, {sizes.q_bytes} bytes each, needs "
        f"more shared memory than the {target.shared_memory} bytes of this GPU"
    )
