//! What lies where in the shared memory of a block. `no_std`.
//!
//! Each kernel has a map, which an allocator makes at compile time. The kernel takes its addresses
//! from the map, and its launch table takes the size, so the two cannot disagree. Bytes are counted
//! from the first one of a block's dynamic shared memory, which is aligned to an atom of an image.

use crate::blocks::{
    CENTER_THREADS, PACK_STEP_BYTES, PROFILE_KEY_ROWS, SAMPLE_ROWS, Tiles, VALUES_ROW_BYTES, VALUES_STAGES,
    VALUES_THREADS, WARP_ROWS, WARPGROUP, WARPGROUP_ROWS, holds_queries, profile_stages,
};
use crate::dtype::Compute;
use crate::image::{ATOM_BYTES, CHUNK_BYTES, Image, e4m3};
use crate::layout::HeadType;

/// Bytes of an mbarrier.
const BARRIER_BYTES: u32 = 8;

/// Parts of shared memory at equal distances, in a region that may have others too: keys and values
/// share one.
///
/// The address of the region is a sum of its own, which parts of one region share. ptxas then keeps
/// it in one register.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Parts {
    /// Byte at which the region begins.
    pub region: u32,
    /// Bytes from there to the first part.
    pub offset: u32,
    /// Bytes from one part to the next.
    pub distance: u32,
}

impl Parts {
    /// Byte at which part `index` begins.
    #[inline(always)]
    pub const fn at(self, index: u32) -> u32 {
        self.region + (self.offset + index * self.distance)
    }

    /// The parts of the same region that begin `bytes` behind these.
    const fn behind(self, bytes: u32) -> Parts {
        Parts { offset: self.offset + bytes, ..self }
    }
}

/// mbarriers beside each other.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Barriers(Parts);

impl Barriers {
    /// Byte at which barrier `index` lies.
    #[inline(always)]
    pub const fn at(self, index: u32) -> u32 {
        self.0.at(index)
    }
}

/// Gives places one behind the other.
struct Allocator {
    /// Bytes given so far.
    bytes: u32,
}

impl Allocator {
    const fn new() -> Allocator {
        Allocator { bytes: 0 }
    }

    /// `count` parts of `bytes` bytes each, of which the first is aligned to `alignment` bytes.
    const fn parts(&mut self, count: u32, bytes: u32, alignment: u32) -> Parts {
        let region = self.bytes.next_multiple_of(alignment);
        self.bytes = region + count * bytes;
        Parts { region, offset: 0, distance: bytes }
    }

    const fn barriers(&mut self, count: u32) -> Barriers {
        Barriers(self.parts(count, BARRIER_BYTES, BARRIER_BYTES))
    }

    /// `count` tiles of `bytes` bytes each.
    const fn tiles(&mut self, count: u32, bytes: u32) -> Parts {
        self.parts(count, bytes, ATOM_BYTES)
    }
}

/// The map of **attention**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct AttentionShared {
    /// Each consumer warpgroup has one that says: its queries are there.
    pub query_full: Barriers,
    /// Each consumer warpgroup has one that says: it is done with its queries.
    pub query_free: Barriers,
    /// Each stage has one that says: its keys are there.
    pub key_full: Barriers,
    /// Each stage has one that says: all consumers are done with its keys.
    pub key_free: Barriers,
    /// Each stage has one that says: its values are there.
    pub value_full: Barriers,
    /// Each stage has one that says: all consumers are done with its values.
    pub value_free: Barriers,
    /// Each consumer warpgroup has a u32: the number of the query tile that its queries belong to.
    pub work: Parts,
    /// Each consumer warpgroup has a tile: its 64 rows of the query tile.
    pub query: Parts,
    /// Each stage has a key tile.
    pub key: Parts,
    /// Each stage has a value tile.
    pub value: Parts,
    /// Each four groups of 8 columns have a chunk for every consumer thread: the anchors of its
    /// accumulators.
    pub anchors: Parts,
    /// Each of a thread's two rows has an f32 for every consumer thread: the sum of weights with
    /// which they were put.
    pub anchor_sums: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl AttentionShared {
    /// Makes the map for these tiles, of rows of `row_bytes` bytes. In 8 bits there are no anchors.
    pub const fn new(tiles: Tiles, row_bytes: u32, compute: Compute) -> AttentionShared {
        let Tiles { key_rows, stages, .. } = tiles;
        let consumers = tiles.consumers();
        let mut memory = Allocator::new();
        let (query_full, query_free) = (memory.barriers(consumers), memory.barriers(consumers));
        let (key_full, key_free) = (memory.barriers(stages), memory.barriers(stages));
        let (value_full, value_free) = (memory.barriers(stages), memory.barriers(stages));
        let work = memory.parts(consumers, 4, 4);
        let query = memory.tiles(consumers, WARPGROUP_ROWS * row_bytes);
        // All key tiles come first, then all value tiles.
        let key = memory.tiles(2 * stages, key_rows * row_bytes);
        let value = key.behind(stages * key_rows * row_bytes);
        // A chunk has 8 anchors, those of 32 columns in a thread.
        let (chunks, rows) = match compute {
            Compute::Dtype => (row_bytes / (32 * 2), 2),
            Compute::E4m3 => (0, 0),
        };
        let anchors = memory.parts(chunks, consumers * WARPGROUP * CHUNK_BYTES, CHUNK_BYTES);
        let anchor_sums = memory.parts(rows, consumers * WARPGROUP * 4, 4);
        AttentionShared {
            query_full,
            query_free,
            key_full,
            key_free,
            value_full,
            value_free,
            work,
            query,
            key,
            value,
            anchors,
            anchor_sums,
            bytes: memory.bytes,
        }
    }
}

/// The map of **attention** of warps that multiply on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarpAttentionShared {
    /// There are two u32: the numbers of this query tile and of the next.
    pub work: Parts,
    /// Each row of the query tile has three u32, which say what it sees, and an f32, its offset.
    pub seen: Parts,
    /// Each warp has three u32: what all of its rows see.
    pub warp_seen: Parts,
    /// The query tile. Where warps hold queries in registers, it begins in the last slot of the
    /// ring, and is gone when that one is needed.
    pub query: Parts,
    /// The slots of a ring, of which each has a key tile or a value tile.
    pub ring: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl WarpAttentionShared {
    /// Makes the map for these tiles.
    pub const fn new(tiles: Tiles, image: Image) -> WarpAttentionShared {
        let Tiles { query_rows, key_rows, stages, .. } = tiles;
        let mut memory = Allocator::new();
        let (query_bytes, tile) = (image.bytes(query_rows), image.bytes(key_rows));
        let (query, ring) = if holds_queries(image.head_dim) {
            // The values of the second tile are the first to come to the last slot, behind a barrier.
            assert!(stages == 4);
            let before = (stages - 1) * tile;
            let all = memory.tiles(1, before + if query_bytes > tile { query_bytes } else { tile });
            (Parts { distance: query_bytes, ..all.behind(before) }, Parts { distance: tile, ..all })
        } else {
            (memory.tiles(1, query_bytes), memory.tiles(stages, tile))
        };
        let seen = memory.parts(query_rows, 16, 16);
        let (warp_seen, work) = (memory.parts(query_rows / WARP_ROWS, 16, 16), memory.parts(2, 4, 4));
        WarpAttentionShared { work, seen, warp_seen, query, ring, bytes: memory.bytes }
    }
}

/// The map of **pack**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackShared {
    /// Each warp has the steps of its row that it holds.
    pub held: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl PackShared {
    /// Makes the map of a block of so many warps.
    pub const fn new(warps: u32, held_steps: u32) -> PackShared {
        let mut memory = Allocator::new();
        PackShared { held: memory.parts(warps, held_steps * PACK_STEP_BYTES, CHUNK_BYTES), bytes: memory.bytes }
    }
}

/// The map of **center**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct CenterShared {
    /// Each warp has an f32 for each channel: the sum of its samples.
    pub sums: Parts,
    /// Each channel has an f32: the mean.
    pub means: Parts,
    /// Each warp has an f32: the sum of its squares.
    pub squares: Parts,
    /// Each warp has an f32: the largest of its values.
    pub most: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl CenterShared {
    /// Makes the map.
    #[expect(clippy::new_without_default, reason = "a default is not const")]
    pub const fn new() -> CenterShared {
        let mut memory = Allocator::new();
        let channels = e4m3::ROW_BYTES * 4;
        let (sums, means) = (memory.parts(CENTER_THREADS / 32, channels, 16), memory.parts(1, channels, 16));
        let squares = memory.parts(CENTER_THREADS / 32, 4, 4);
        let most = memory.parts(CENTER_THREADS / 32, 4, 4);
        CenterShared { sums, means, squares, most, bytes: memory.bytes }
    }
}

/// The map of **pack_values**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ValuesShared {
    /// Each warp has the rows of [`VALUES_STAGES`] units of keys.
    pub rows: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl ValuesShared {
    /// Makes the map.
    #[expect(clippy::new_without_default, reason = "a default is not const")]
    pub const fn new() -> ValuesShared {
        let mut memory = Allocator::new();
        let units = VALUES_THREADS / 32 * VALUES_STAGES;
        let rows = memory.parts(units, e4m3::UNIT_KEYS * VALUES_ROW_BYTES, CHUNK_BYTES);
        ValuesShared { rows, bytes: memory.bytes }
    }
}

/// The map of **profile**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileShared {
    /// Each stage has one that says: its keys are there, and so is what the samples see of them.
    pub key_full: Barriers,
    /// Each stage has one that says: its values are there.
    pub value_full: Barriers,
    /// Each stage has one that says: all consumers are done with it.
    pub free: Barriers,
    /// There is one. It says: every thread with results of a sweep has said what the producers must
    /// know, and all are done with the stages.
    pub swept: Barriers,
    /// There is one. It says: the producers have judged the sums.
    pub judged: Barriers,
    /// Each producer warp has a u32: whether the sums of its samples have lost something.
    pub verdict: Parts,
    /// Each candidate mask and sample has an f32: the sum of the sample's weights under the mask.
    pub masked_sum: Parts,
    /// The tile of sampled rows.
    pub query: Parts,
    /// Each stage has a key tile.
    pub key: Parts,
    /// Each stage has a value tile.
    pub value: Parts,
    /// Each stage has, for each sample, a u64 for each candidate mask. It says which keys of the
    /// tile the sample sees through it.
    pub seen: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl ProfileShared {
    /// Makes the map for rows of an image.
    pub const fn new(image: Image) -> ProfileShared {
        let stages = profile_stages(image);
        let candidates = HeadType::CANDIDATES.len() as u32;
        let tile = image.bytes(PROFILE_KEY_ROWS);
        let mut memory = Allocator::new();
        let (key_full, value_full, free) = (memory.barriers(stages), memory.barriers(stages), memory.barriers(stages));
        let (swept, judged) = (memory.barriers(1), memory.barriers(1));
        let verdict = memory.parts(4, 4, 16);
        let masked_sum = memory.parts(candidates * SAMPLE_ROWS, 4, 4);
        let query = memory.tiles(1, image.bytes(SAMPLE_ROWS));
        // The two tiles of a stage lie beside each other.
        let key = memory.tiles(stages, 2 * tile);
        ProfileShared {
            key_full,
            value_full,
            free,
            swept,
            judged,
            verdict,
            masked_sum,
            query,
            key,
            value: key.behind(tile),
            seen: memory.parts(stages, SAMPLE_ROWS * candidates * PROFILE_KEY_ROWS / 8, 16),
            bytes: memory.bytes,
        }
    }
}

/// Bytes of a warp's weights of half a key tile of **profile**: eight registers of each lane.
pub const HALF_WEIGHTS_BYTES: u32 = 32 * 8 * 4;

/// The map of **profile** of warps that multiply on their own.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct WarpProfileShared {
    /// The tile of sampled rows. Weights come over it.
    pub query: Parts,
    /// Two tiles have, for each warp with a twin, the weights of its half of the keys, in
    /// [`HALF_WEIGHTS_BYTES`].
    pub weights: Parts,
    /// The slots of a ring, of which each has a key tile or a value tile.
    pub ring: Parts,
    /// [`SEEN_TILES`](WarpProfileShared::SEEN_TILES) have, for each half of their keys and each
    /// sample, a u32 for each candidate mask. It says which of the keys the sample sees through it.
    pub seen: Parts,
    /// Each mask, half of the keys and sample has an f32: what the other half must know.
    pub halves: Parts,
    /// Each candidate mask and sample have a u32: whether the sample sees any key.
    pub sees_any: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl WarpProfileShared {
    /// Tiles of which it is known what the samples see: the one that is multiplied, the next one,
    /// the one behind that, and one for the remainder of a division.
    pub const SEEN_TILES: u32 = 4;

    /// Slots of the ring. With more, and with tiles on their way to L2 before, it is no faster.
    pub const STAGES: u32 = 4;

    /// Makes the map for rows of an image.
    pub const fn new(image: Image) -> WarpProfileShared {
        let candidates = HeadType::CANDIDATES.len() as u32;
        let mut memory = Allocator::new();
        // Weights of two tiles need as much.
        let query = memory.tiles(1, image.bytes(SAMPLE_ROWS));
        let weights = Parts { distance: HALF_WEIGHTS_BYTES, ..query };
        let ring = memory.tiles(WarpProfileShared::STAGES, image.bytes(PROFILE_KEY_ROWS));
        let seen = memory.parts(WarpProfileShared::SEEN_TILES * 2 * SAMPLE_ROWS, 4 * candidates, 8);
        let halves = memory.parts(HeadType::ALL.len() as u32 * 2 * SAMPLE_ROWS, 4, 4);
        let sees_any = memory.parts(candidates * SAMPLE_ROWS, 4, 4);
        WarpProfileShared { query, weights, ring, seen, halves, sees_any, bytes: memory.bytes }
    }
}

/// The map of **select** and of **judge**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectShared {
    /// Each warp has an f32 for each candidate mask: a sum over the warp's samples.
    pub sums: Parts,
    /// The size of all, in bytes.
    pub bytes: u32,
}

impl SelectShared {
    /// Makes the map of a block of so many threads.
    pub const fn new(threads: u32) -> SelectShared {
        let mut memory = Allocator::new();
        SelectShared { sums: memory.parts(threads / 32, 4 * HeadType::CANDIDATES.len() as u32, 4), bytes: memory.bytes }
    }
}
