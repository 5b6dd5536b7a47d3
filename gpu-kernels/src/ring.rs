//! Key tiles and value tiles on their way through a ring of slots in shared memory, where warps
//! multiply on their own. All threads of the block copy a part of each (`cp.async`).
//!
//! A key tile takes two **steps**, one with its keys and one with its values. Before each the threads
//! wait for each other. Then they start to copy the tile of a later step over that of the step
//! before.

use crate::cuda::{copy, math, shared, thread};
use framestride_shapes::image::{CHUNK_BYTES, Image};
use framestride_shapes::shared::Parts;

/// The tiles of a sweep, and where it is.
pub struct Ring<F> {
    /// The rows of the images.
    pub image: Image,
    /// Addresses of packed K and V.
    pub packed: [u64; 2],
    /// First row of the head, counted over all heads: memory has fewer than 2^32.
    pub head_row: u32,
    /// Number of key tiles.
    pub tiles: u32,
    /// Rows of a tile.
    pub rows: u32,
    /// First packed row of a tile, by its number.
    pub first_row: F,
    /// The slots.
    pub slots: Parts,
    /// Number of slots, 2 to 4.
    pub stages: u32,
    /// Threads of the block.
    pub threads: u32,
    /// The slot of the next step. It begins with 0.
    pub slot: u32,
}

impl<F: Fn(u32) -> u32> Ring<F> {
    /// Starts to copy the tiles of the first steps. What the thread has started to copy before will be
    /// there at the first step too.
    ///
    /// # Safety
    /// All threads of the block come here, and no warp is at work on what lies in the slots.
    #[inline(always)]
    pub unsafe fn start(&self) {
        let mut step = 0;
        while step < self.stages - 1 {
            self.copy_step(step, step);
            step += 1;
        }
    }

    /// Waits for the next step, which is that of the keys of tile `tile`, or (`VALUES`) of its values.
    /// Returns the address of the tile.
    ///
    /// # Safety
    /// All threads of the block come here.
    #[inline(always)]
    pub unsafe fn next<const VALUES: bool>(&mut self, tile: u32) -> u32 {
        if self.stages == 2 {
            copy::wait_groups::<0>();
        } else if self.stages == 3 {
            copy::wait_groups::<1>();
        } else {
            copy::wait_groups::<2>();
        }
        // Now the parts of all threads are there, and all are done with the step before.
        thread::sync_block();
        let own = self.slot;
        let last = if own == 0 { self.stages - 1 } else { own - 1 };
        self.copy_step(2 * tile + VALUES as u32 + self.stages - 1, last);
        self.slot = if own + 1 == self.stages { 0 } else { own + 1 };
        shared::address(self.slots, own)
    }

    /// Starts to copy the tile of a step to a slot, as one group. Behind the last step the group is
    /// empty.
    #[inline(always)]
    unsafe fn copy_step(&self, step: u32, slot: u32) {
        let (tile, operand) = (step / 2, step % 2);
        if tile < self.tiles {
            // The addresses of the head would take registers all through the products.
            let first = math::opaque(self.head_row) + (self.first_row)(tile);
            let from = if operand == 0 { self.packed[0] } else { self.packed[1] };
            copy_rows(self.image, self.threads, shared::address(self.slots, slot), from, first, self.rows);
        }
        copy::commit_group();
    }
}

/// Starts to copy `rows` rows of an image to shared memory, from row `first` on.
///
/// # Safety
/// All of the block's `threads` threads come here. The rows are those of atoms.
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
