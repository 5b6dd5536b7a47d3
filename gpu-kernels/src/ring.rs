//! Key tiles and value tiles on their way through a ring of slots in shared memory, where warps
//! multiply on their own. Threads copy a part of each (`cp.async`).
//!
//! A key tile takes two **steps**, one with its keys and one with its values. Each has the next
//! slot. When a step begins, threads start to copy the tile of the step after the next one.
//!
//! Tensor cores wait while other instructions issue, so there are few here: a thread finds its part
//! of every tile at the same distance from the tile's beginning.

use crate::cuda::{copy, math, shared, thread};
use framestride_shapes::image::{CHUNK_BYTES, Image};
use framestride_shapes::shared::Parts;

/// Bytes that a warp copies with one instruction.
const PIECE_BYTES: u32 = 32 * CHUNK_BYTES;

/// The most pieces of a tile that a warp copies.
const MOST_PIECES: u32 = 8;

/// Bytes from a warp's first piece to where its addresses point. Instructions add no more than 2047
/// bytes and no less than -2048 to a global address.
const MIDDLE: u32 = MOST_PIECES / 2 * PIECE_BYTES;

/// What the tiles of a ring are, and who copies them.
#[derive(Clone, Copy)]
pub struct RingShape {
    image: Image,
    rows: u32,
    stages: u32,
    warps: u32,
}

impl RingShape {
    /// A ring of 3 or 4 slots (`stages`), each for `rows` rows of an image. The first `warps` warps
    /// of the block copy.
    pub const fn new(image: Image, rows: u32, stages: u32, warps: u32) -> RingShape {
        assert!(stages == 3 || stages == 4);
        let shape = RingShape { image, rows, stages, warps };
        assert!(shape.pieces() * warps * PIECE_BYTES == shape.tile_bytes(), "warps copy whole pieces");
        assert!(shape.pieces() <= MOST_PIECES);
        shape
    }

    #[inline(always)]
    const fn tile_bytes(self) -> u32 {
        self.image.bytes(self.rows)
    }

    /// How many pieces of a tile a warp copies.
    #[inline(always)]
    const fn pieces(self) -> u32 {
        self.tile_bytes() / self.warps / PIECE_BYTES
    }
}

/// The tiles of a head, and the slot of the next step.
pub struct Ring {
    shape: RingShape,
    /// Address of this thread's part of the keys from row 0 on, and [`MIDDLE`] more.
    keys: u64,
    /// From there to the values.
    values_behind: u64,
    /// Address of its part of the first slot, and as much more.
    to: u32,
    /// Bytes from the first slot to that of the next step.
    slot: u32,
}

/// The slot of a step, and that of the step after the next one. They are counted in bytes from the
/// first slot.
#[derive(Clone, Copy)]
pub struct Slots {
    /// The step's own.
    pub own: u32,
    /// What is copied now goes here.
    pub later: u32,
}

impl Ring {
    /// The ring of a thread, whose first step is next. `packed` are the addresses of packed K and
    /// V, and `head_row` is the first row of the head, counted over all heads. Memory has fewer
    /// than 2^32.
    #[inline(always)]
    pub fn new(shape: RingShape, packed: [u64; 2], head_row: u32, slots: Parts, own_warp: u32, lane: u32) -> Ring {
        let own = own_warp * (shape.tile_bytes() / shape.warps) + lane * CHUNK_BYTES + MIDDLE;
        Ring {
            shape,
            keys: packed[0] + head_row as u64 * shape.image.bytes(1) as u64 + own as u64,
            values_behind: packed[1].wrapping_sub(packed[0]),
            to: math::opaque(shared::address(slots, 0) + own),
            slot: 0,
        }
    }

    /// Begins with the next step.
    #[inline(always)]
    pub fn begin(&mut self) -> Slots {
        let bytes = self.shape.tile_bytes();
        let (own, all) = (self.slot, self.shape.stages * bytes);
        self.slot = if own + bytes == all { 0 } else { own + bytes };
        let later = own + 2 * bytes;
        Slots { own, later: if later >= all { later - all } else { later } }
    }

    /// The slot of step `step`, one of the first.
    #[inline(always)]
    pub fn first_slot(&self, step: u32) -> u32 {
        step * self.shape.tile_bytes()
    }

    /// Starts to copy the keys from row `row` of the head on.
    ///
    /// # Safety
    /// The warps that copy come here. The rows are those of atoms, and no warp is at work on what
    /// lies in the slot.
    #[inline(always)]
    pub unsafe fn copy_keys(&self, row: u32, slot: u32) {
        self.copy(self.keys, row, slot);
    }

    /// The same of the values.
    ///
    /// # Safety
    /// As for [`Ring::copy_keys`].
    #[inline(always)]
    pub unsafe fn copy_values(&self, row: u32, slot: u32) {
        self.copy(self.keys.wrapping_add(self.values_behind), row, slot);
    }

    #[inline(always)]
    unsafe fn copy(&self, from: u64, row: u32, slot: u32) {
        let (from, to) = (from + row as u64 * self.shape.image.bytes(1) as u64, self.to + slot);
        macro_rules! start {
            ($($piece:literal)*) => {$(
                if $piece < self.shape.pieces() {
                    copy::start16_at::<{ ($piece * PIECE_BYTES) as i32 - MIDDLE as i32 }>(to, from);
                }
            )*};
        }
        start!(0 1 2 3 4 5 6 7);
    }
}

/// Starts to copy `rows` rows of an image to shared memory, from row `first` on.
///
/// # Safety
/// The block's first `threads` threads come here. The rows are those of atoms.
#[inline(always)]
pub unsafe fn copy_rows(image: Image, threads: u32, to: u32, from: u64, first: u32, rows: u32) {
    let own = thread::index() * CHUNK_BYTES;
    let (to, from) = (to + own, from + first as u64 * image.bytes(1) as u64 + own as u64);
    let mut bytes = 0;
    while bytes < image.bytes(rows) {
        copy::start16(to + bytes, from + bytes as u64);
        bytes += threads * CHUNK_BYTES;
    }
}
