//! How the blocks of the kernels are made: their threads, tiles and stages. `no_std`. What
//! lies in their shared memory is said in [`shared`](crate::shared).

use crate::arch::{Arch, Products};
use crate::dtype::Compute;
use crate::image::{ATOM_ROWS, CHUNK_BYTES, Image, e4m3};
use crate::shared::PackShared;

/// Threads of a warpgroup, the four warps that multiply together.
pub const WARPGROUP: u32 = 128;

/// The third extent of a CUDA grid is at most this, and so is the number of heads over the batch of
/// a launch.
pub const GRID_Z: u64 = 65_535;

/// After so many key tiles an accumulator of **attention** on Hopper is moved near zero. Up to
/// there it loses 7e-5 of itself at most. A power of two takes no register to be asked for.
pub const ANCHOR_TILES: u32 = 64;

/// Rows that a warpgroup multiplies at once (m64).
pub const WARPGROUP_ROWS: u32 = 64;

/// Blocks of 16 rows of a query tile that a warp multiplies with every factor that it loads. Warps
/// of Hopper multiply as warpgroups instead.
pub const WARP_BLOCKS: usize = 2;

/// Rows of a query tile that a warp has.
pub const WARP_ROWS: u32 = 16 * WARP_BLOCKS as u32;

/// Whether a warp has registers for its rows of the query tile, where warps multiply on their own.
pub const fn holds_queries(head_dim: u32) -> bool {
    head_dim == 64
}

/// Tile sizes of **attention**.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Tiles {
    /// Rows of a query tile. On Hopper each consumer warpgroup has 64 of them, elsewhere each warp
    /// has [`WARP_ROWS`].
    pub query_rows: u32,
    /// Rows of a key tile, a multiple of 16 up to [`PAD_ROWS`](crate::layout::PAD_ROWS).
    pub key_rows: u32,
    /// Tiles in flight: of keys and as many of values on Hopper, of keys and values in turn
    /// elsewhere (3, or 4 where keys come with the values of the tile before).
    pub stages: u32,
    /// Key tiles begin at multiples of so many rows.
    pub key_step: u32,
}

impl Tiles {
    /// | family | head dim | query | key | stages | why |
    /// | --- | --- | --- | --- | --- | --- |
    /// | sm_90a | 128 | 128 | 176 | 2 | 5 to 10% faster than 128 keys; 192, where two stages still fit, are 1% faster but spill with text and sinks |
    /// | sm_90a, e4m3 | 128 | 128 | 128 | 4 | a second accumulator of 64 registers leaves room for no more keys |
    /// | sm_90a | 64 | 192 | 128 | 4 | three consumer warpgroups of 160 registers share each key tile; 152 KiB shared |
    /// | sm_80 | 128 | 128 | 48 | 3 | 70 KiB: a block has room on every GPU, and two have it where a multiprocessor has 164 KiB; 64 keys spill |
    /// | sm_80 | 64 | 128 | 64 | 4 | keys come with the values of the tile before, at one barrier; 42 KiB: two blocks have room on every GPU |
    pub const fn new(arch: Arch, head_dim: u32, compute: Compute) -> Tiles {
        let key_step = match compute {
            Compute::Dtype => ATOM_ROWS,
            Compute::E4m3 => e4m3::UNIT_KEYS,
        };
        match (arch.products, compute, head_dim) {
            (Products::Wgmma, Compute::E4m3, _) => Tiles { query_rows: 128, key_rows: 128, stages: 4, key_step },
            (Products::Wgmma, _, 64) => Tiles { query_rows: 192, key_rows: 128, stages: 4, key_step },
            (Products::Wgmma, ..) => Tiles { query_rows: 128, key_rows: 176, stages: 2, key_step },
            (Products::MmaSync, _, 64) => Tiles { query_rows: 128, key_rows: 64, stages: 4, key_step },
            (Products::MmaSync, ..) => Tiles { query_rows: 128, key_rows: 48, stages: 3, key_step },
        }
    }

    /// Consumer warpgroups on Hopper.
    pub const fn consumers(&self) -> u32 {
        self.query_rows / WARPGROUP_ROWS
    }

    /// Threads of a block. On Hopper they are the consumers and one producer warpgroup.
    pub const fn threads(&self, arch: Arch) -> u32 {
        match arch.products {
            Products::Wgmma => (self.consumers() + 1) * WARPGROUP,
            Products::MmaSync => self.query_rows / WARP_ROWS * 32,
        }
    }

    /// Blocks of a family that a multiprocessor holds by its registers.
    pub const fn min_blocks(arch: Arch) -> u32 {
        match arch.products {
            Products::Wgmma => 1,
            Products::MmaSync => 2,
        }
    }
}

/// Bytes that a warp of **pack** takes in one step, a chunk for each lane.
pub const PACK_STEP_BYTES: u32 = 32 * CHUNK_BYTES;

/// The most steps that a warp of **pack** holds in shared memory. They are 14 KiB, a whole row of
/// 56 heads of 128, and a multiprocessor then has room for two blocks.
const MOST_HELD_STEPS: u32 = 28;

/// Registers of a thread of **pack**.
const PACK_REGISTERS: u32 = 64;

/// A block of **pack**, whose warps take one row each.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct PackBlock {
    /// Steps that a warp holds in shared memory: a whole row, if it has room.
    pub held_steps: u32,
    /// Warps of the block. There are eight, or four where a multiprocessor has room for more rows
    /// that way.
    pub warps: u32,
    /// Blocks that a multiprocessor holds.
    pub min_blocks: u32,
}

impl PackBlock {
    /// What no block has more of: the bounds of a template, before a spec's are filled in.
    pub const LARGEST: PackBlock = PackBlock { held_steps: MOST_HELD_STEPS, warps: 8, min_blocks: 1 };

    /// Makes the block for a model of so many heads, on GPUs of a family.
    pub const fn new(arch: Arch, heads: u32, image: Image) -> PackBlock {
        let steps = (heads * image.bytes(1)).div_ceil(PACK_STEP_BYTES);
        let held_steps = if steps < MOST_HELD_STEPS { steps } else { MOST_HELD_STEPS };
        let (four, eight) = (PackBlock::of_warps(arch, 4, held_steps), PackBlock::of_warps(arch, 8, held_steps));
        if four.warps * four.min_blocks > eight.warps * eight.min_blocks { four } else { eight }
    }

    /// A block of so many warps. A multiprocessor holds as many as have room in its shared memory
    /// and in its registers.
    const fn of_warps(arch: Arch, warps: u32, held_steps: u32) -> PackBlock {
        let Arch { shared_bytes, reserved_shared_bytes, registers, .. } = arch;
        let room = shared_bytes / (reserved_shared_bytes + PackShared::new(warps, held_steps).bytes);
        let most = registers / PACK_REGISTERS / (32 * warps);
        PackBlock { held_steps, warps, min_blocks: if room < most { room } else { most } }
    }

    /// Threads of a block.
    pub const fn threads(&self) -> u32 {
        32 * self.warps
    }
}

/// Threads of a block of **center**. All samples of a head are in flight at once.
pub const CENTER_THREADS: u32 = 1024;

/// Rows of V that **center** looks at.
pub const CENTER_ROWS: u32 = 512;

/// Rows of valid text that it looks at.
pub const CENTER_TEXT_ROWS: u32 = 64;

/// Threads of a block of **pack_values**.
pub const VALUES_THREADS: u32 = 128;

/// Blocks of **pack_values** that a multiprocessor holds.
pub const VALUES_MIN_BLOCKS: u32 = 4;

/// Units of keys that a warp of **pack_values** takes.
pub const VALUES_UNITS: u32 = 8;

/// Units whose rows a warp of **pack_values** holds in shared memory: one that it works on, and the
/// next.
pub const VALUES_STAGES: u32 = 2;

/// Bytes of a row of V in a 16-bit type, with head dim 128.
pub const VALUES_ROW_BYTES: u32 = 2 * e4m3::ROW_BYTES;

/// Sampled rows of one block of **profile**, which a warpgroup multiplies at once.
pub const SAMPLE_ROWS: u32 = WARPGROUP_ROWS;

/// Consumer warpgroups of **profile**.
pub const PROFILE_CONSUMERS: u32 = 2;

/// Threads of a block of **profile**: the consumers and one producer warpgroup.
pub const PROFILE_THREADS: u32 = (PROFILE_CONSUMERS + 1) * WARPGROUP;

/// Keys of a tile of **profile**.
pub const PROFILE_KEY_ROWS: u32 = 64;

/// Warps of a block of **profile** that have the same 16 samples, where warps multiply on their
/// own. With head dim 128 they are two. Each weighs half of the keys, and has half of the columns
/// of V.
pub const fn profile_parts(image: Image) -> u32 {
    if image.head_dim == 128 { 2 } else { 1 }
}

/// Warps of a block of **profile** whose warps multiply on their own.
pub const fn profile_warps(image: Image) -> u32 {
    profile_parts(image) * SAMPLE_ROWS / 16
}

/// Blocks of **profile** that a multiprocessor holds by its registers.
pub const fn profile_min_blocks(arch: Arch, head_dim: u32) -> u32 {
    match (arch.products, head_dim) {
        (Products::MmaSync, 64) => 2,
        _ => 1,
    }
}

/// Columns of V of one consumer warpgroup of **profile**, which has registers for three outputs of
/// that width.
pub const PROFILE_COLUMNS: u32 = 64;

/// The most parts that **profile** splits the keys of a head into. **select** gives each to a lane.
pub const MOST_SPLITS: u32 = 32;

/// Key and value tiles of **profile** in flight, which take 192 KiB.
pub const fn profile_stages(image: Image) -> u32 {
    192 * 1024 / (2 * image.bytes(PROFILE_KEY_ROWS))
}

/// Threads of a block of **select**.
pub const SELECT_THREADS: u32 = 1024;
