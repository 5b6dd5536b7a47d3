//! What lies where in the shared memory of a block. `no_std`.
//!
//! Each kernel has a map, which an [`Allocator`] makes at compile time: the kernel takes its addresses from it, and its launch table
//! the size. Bytes are counted from the first one of a block's dynamic shared memory, which is aligned to an atom of an image.

use crate::blocks::{
    PACK_STEP_BYTES, PROFILE_KEY_ROWS, SAMPLE_ROWS, SELECT_THREADS, Tiles, WARPGROUP_ROWS, profile_stages,
};
use crate::image::{ATOM_BYTES, CHUNK_BYTES, Image};
use crate::layout::HeadType;

/// Bytes of an mbarrier.
const BARRIER_BYTES: u32 = 8;

/// Parts of shared memory at equal distances, in a region that may have others too: keys and values share one.
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
    /// Of each consumer warpgroup: its queries are there.
    pub query_full: Barriers,
    /// Of each consumer warpgroup: it is done with its queries.
    pub query_free: Barriers,
    /// Of each stage: its keys are there.
    pub key_full: Barriers,
    /// Of each stage: all are done with its keys.
    pub key_free: Barriers,
    /// Of each stage: its values are there.
    pub value_full: Barriers,
    /// Of each stage: all are done with its values.
    pub value_free: Barriers,
    /// Of each consumer warpgroup, a u32: the number of the query tile that its queries belong to.
    pub work: Parts,
    /// Of each consumer warpgroup: its 64 rows of the query tile.
    pub query: Parts,
    /// Of each stage: a key tile.
    pub key: Parts,
    /// Of each stage: a value tile.
    pub value: Parts,
    /// Size of all.
    pub bytes: u32,
}

impl AttentionShared {
    /// The map for these tiles.
    pub const fn new(tiles: Tiles, image: Image) -> AttentionShared {
        let Tiles { key_rows, stages, .. } = tiles;
        let consumers = tiles.consumers();
        let mut memory = Allocator::new();
        let (query_full, query_free) = (memory.barriers(consumers), memory.barriers(consumers));
        let (key_full, key_free) = (memory.barriers(stages), memory.barriers(stages));
        let (value_full, value_free) = (memory.barriers(stages), memory.barriers(stages));
        let work = memory.parts(consumers, 4, 4);
        let query = memory.tiles(consumers, image.bytes(WARPGROUP_ROWS));
        // All keys, then all values.
        let key = memory.tiles(2 * stages, image.bytes(key_rows));
        let value = key.behind(stages * image.bytes(key_rows));
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
            bytes: memory.bytes,
        }
    }
}

/// The map of **pack**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackShared {
    /// Of each warp: the steps of its row that it holds.
    pub held: Parts,
    /// Size of all.
    pub bytes: u32,
}

impl PackShared {
    /// The map of a block of so many warps.
    pub const fn new(warps: u32, held_steps: u32) -> PackShared {
        let mut memory = Allocator::new();
        PackShared { held: memory.parts(warps, held_steps * PACK_STEP_BYTES, CHUNK_BYTES), bytes: memory.bytes }
    }
}

/// The map of **profile**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct ProfileShared {
    /// Of each stage: its keys are there, and what the samples see of them.
    pub key_full: Barriers,
    /// Of each stage: its values are there.
    pub value_full: Barriers,
    /// Of each stage: all are done with it.
    pub free: Barriers,
    /// One: every thread that has results of a sweep has said what the producers must know, and all are done with the stages.
    pub swept: Barriers,
    /// One: the producers have judged the sums.
    pub judged: Barriers,
    /// Of each producer warp, a u32: whether the sums of its samples have lost something.
    pub verdict: Parts,
    /// Of each candidate mask and sample, an f32: the sum of the sample's weights under the mask.
    pub masked_sum: Parts,
    /// The sampled rows.
    pub query: Parts,
    /// Of each stage: a key tile.
    pub key: Parts,
    /// Of each stage: a value tile.
    pub value: Parts,
    /// Of each stage: for each sample a u64 for each candidate mask, which of the tile's keys the sample sees through it.
    pub seen: Parts,
    /// Size of all.
    pub bytes: u32,
}

impl ProfileShared {
    /// The map for rows of an image.
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

/// The map of **select**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct SelectShared {
    /// Of each warp: an f32 for each candidate mask, the squared error of the warp's samples.
    pub error: Parts,
    /// Size of all.
    pub bytes: u32,
}

impl SelectShared {
    /// The map.
    pub const fn new() -> SelectShared {
        let mut memory = Allocator::new();
        SelectShared {
            error: memory.parts(SELECT_THREADS / 32, 4 * HeadType::CANDIDATES.len() as u32, 4),
            bytes: memory.bytes,
        }
    }
}
