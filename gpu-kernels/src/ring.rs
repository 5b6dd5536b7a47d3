//! Key tiles and value tiles on their way through a ring of slots in shared memory, where warps
//! multiply on their own. Threads copy a part of each (`cp.async`).
//!
//! A key tile takes two **steps**, one with its keys and one with its values. At every barrier of
//! the block one step or two begin. Behind it the threads start to copy the tiles of later steps
//! over those of as many steps before.

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
    /// Number of slots: 2 to 4 times `at_once`.
    pub stages: u32,
    /// Steps that begin at a barrier, 1 or 2.
    pub at_once: u32,
    /// How many of the block's first threads copy.
    pub threads: u32,
    /// Whether this thread is one of them.
    pub copies: bool,
    /// The slot of the next step. It begins with 0, or with 1 where the caller takes the keys of
    /// the first tile from slot 0.
    pub slot: u32,
}

impl<F: Fn(u32) -> u32> Ring<F> {
    /// Starts to copy the tiles of the first steps. What the thread has started to copy before will
    /// be there at the first step too.
    ///
    /// # Safety
    /// All threads of the block come here, and no warp is at work on what lies in the slots.
    #[inline(always)]
    pub unsafe fn start(&self) {
        let mut step = 0;
        while step < self.stages - 1 {
            self.copy_step(step, step);
            // With two steps at once the first one is a group by itself.
            if step % self.at_once == 0 {
                copy::commit_group();
            }
            step += 1;
        }
    }

    /// Waits for the thread's parts of the next steps. Behind a barrier of the block the parts of
    /// all threads are there, and all are done with the steps before.
    ///
    /// # Safety
    /// All threads of the block come here.
    #[inline(always)]
    pub unsafe fn wait(&self) {
        match self.stages / self.at_once {
            2 => copy::wait_groups::<0>(),
            3 => copy::wait_groups::<1>(),
            _ => copy::wait_groups::<2>(),
        }
    }

    /// Begins with step `step`: 2 t for the keys of tile t, and 2 t + 1 for its values. Returns the
    /// address of the tile.
    ///
    /// # Safety
    /// All threads of the block come here, after [`Ring::wait`] and a barrier.
    #[inline(always)]
    pub unsafe fn take(&mut self, step: u32) -> u32 {
        let own = self.slot;
        let last = if own == 0 { self.stages - 1 } else { own - 1 };
        self.copy_step(step + self.stages - 1, last);
        copy::commit_group();
        self.slot = if own + 1 == self.stages { 0 } else { own + 1 };
        shared::address(self.slots, own)
    }

    /// Begins with two steps, the values of a tile (`step` is odd) and the keys of the next one.
    /// Returns the addresses of both tiles.
    ///
    /// `THREADS` is the ring's number of threads. Of a tile, each has a multiple of four chunks.
    ///
    /// # Safety
    /// As for [`Ring::take`].
    #[inline(always)]
    pub unsafe fn take_two<const THREADS: u32>(&mut self, step: u32) -> [u32; 2] {
        // An odd slot, and the next one.
        let own = self.slot;
        let next = if own + 1 == self.stages { 0 } else { own + 1 };
        let before = if own == 1 { self.stages - 1 } else { own - 2 };
        if self.copies {
            self.copy_fours::<THREADS>(step + self.stages - 2, before);
            self.copy_fours::<THREADS>(step + self.stages - 1, own - 1);
        }
        copy::commit_group();
        self.slot = next + 1;
        [own, next].map(|slot| shared::address(self.slots, slot))
    }

    /// Starts to copy the tile of a step to a slot. There is none behind the last step.
    #[inline(always)]
    unsafe fn copy_step(&self, step: u32, slot: u32) {
        if self.copies && step / 2 < self.tiles {
            // The addresses of the head would take registers all through the products.
            let (from, first) = self.tile(math::opaque(self.head_row), step);
            copy_rows(self.image, self.threads, shared::address(self.slots, slot), from, first, self.rows);
        }
    }

    /// The same by a thread that copies, in fours.
    #[inline(always)]
    unsafe fn copy_fours<const THREADS: u32>(&self, step: u32, slot: u32) {
        if step / 2 < self.tiles {
            let (from, first) = self.tile(self.head_row, step);
            let own = thread::index() * CHUNK_BYTES;
            let from = from + first as u64 * self.image.bytes(1) as u64 + own as u64;
            let to = shared::address(self.slots, slot) + own;
            let mut bytes = 0;
            while bytes < self.image.bytes(self.rows) {
                copy::start_four::<THREADS>(to + bytes, from + bytes as u64);
                bytes += 4 * THREADS * CHUNK_BYTES;
            }
        }
    }

    /// Where the tile of a step lies, of a head that begins with row `head_row`: the address of
    /// packed K or V, and the first row.
    #[inline(always)]
    fn tile(&self, head_row: u32, step: u32) -> (u64, u32) {
        let (tile, operand) = (step / 2, step % 2);
        let packed = if operand == 0 { self.packed[0] } else { self.packed[1] };
        (packed, head_row + (self.first_row)(tile))
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
