//! The memory that the products of a warpgroup read, while they are in flight and until their waits
//! are known.

use super::tile::{Decoded, Range, Tile};
use crate::fault::{FaultKind, Step, Trouble};
use crate::race::{By, Clocks};
use crate::shared;
use crate::tensor_core::sums::{Columns, Rows};
use std::collections::{HashMap, VecDeque};
use std::rc::Rc;

/// A product that not all four warps have waited for.
pub(crate) struct InFlight {
    /// The operation, and the descriptors of A (unless in registers) and B. All four warps must
    /// agree on them.
    pub(super) operation: usize,
    pub(super) descriptors: (Option<u64>, u64),
    /// The indices in [`Warpgroup::tiles`] of what it reads: B, and A unless in registers.
    pub(super) reads: [Option<usize>; 2],
    /// `None` if A lies in registers.
    pub(super) a: Option<Rc<Decoded<Rows>>>,
    pub(super) b: Rc<Decoded<Columns>>,
    /// The first warp that issued it.
    pub by: By,
}

/// Which products read a tile, or a KiB of shared memory.
#[derive(Clone, Copy, Default)]
struct Reads {
    /// How many products in flight read it.
    in_flight: u32,
    /// When, in its own time, each of the four warps last waited for a product that read it.
    times: [u32; 4],
}

impl Reads {
    /// The rank of a warp whose last wait `by` does not know.
    #[inline]
    fn unknown(&self, clocks: &Clocks, first: usize, by: By) -> Option<usize> {
        (0..4).find(|rank| !clocks.knows(by, first + rank, self.times[*rank]))
    }
}

/// A tile that products have read.
struct ReadTile {
    tile: Tile,
    range: Range,
    reads: Reads,
    /// The statement of the last product that read it.
    statement: u32,
}

/// The products of four warps.
#[derive(Default)]
pub(crate) struct Warpgroup {
    /// The first of the four warps.
    first: usize,
    /// Products in flight, the oldest first. The first of them has the number `released`.
    products: VecDeque<InFlight>,
    released: u64,
    /// How many products each warp has issued, and how many it has waited for.
    pub issued: [u64; 4],
    waited: [u64; 4],
    /// All tiles that products have read, and the index of each.
    tiles: Vec<ReadTile>,
    known: HashMap<Tile, usize>,
    /// The reads of each KiB of shared memory. Most writes are far from them, and ask no further.
    pages: Vec<Reads>,
}

impl Warpgroup {
    pub fn new(index: usize) -> Warpgroup {
        Warpgroup { first: 4 * index, ..Warpgroup::default() }
    }

    pub fn reset(&mut self) {
        *self = Warpgroup::new(self.first / 4);
    }

    /// The oldest product in flight.
    pub fn in_flight(&self) -> Option<&InFlight> {
        self.products.front()
    }

    /// The product with a number, if some warp has issued it. It must not be released.
    pub(super) fn product(&self, number: u64) -> Option<&InFlight> {
        self.products.get((number - self.released) as usize)
    }

    pub(super) fn push(&mut self, product: InFlight) {
        self.products.push_back(product);
    }

    /// Whether all four warps have issued the first `products`.
    pub fn reached(&self, products: u64) -> bool {
        self.issued.iter().all(|issued| *issued >= products)
    }

    /// A product that reads a tile has started. Returns the tile's index.
    pub(super) fn start_read(&mut self, tile: Tile, range: Range, statement: u32) -> usize {
        let index = *self.known.entry(tile).or_insert_with_key(|tile| {
            self.tiles.push(ReadTile { tile: tile.clone(), range, reads: Reads::default(), statement });
            self.tiles.len() - 1
        });
        self.tiles[index].statement = statement;
        self.tiles[index].reads.in_flight += 1;
        self.pages.resize(self.pages.len().max(range.pages().end), Reads::default());
        self.pages[range.pages()].iter_mut().for_each(|reads| reads.in_flight += 1);
        index
    }

    /// A warp has waited for the first `products`, at the time `now` of its own. Those that all
    /// four warps have waited for are complete.
    pub fn release(&mut self, warp: usize, products: u64, now: u32) {
        let rank = warp - self.first;
        for number in self.waited[rank]..products {
            for index in self.products[(number - self.released) as usize].reads.into_iter().flatten() {
                let tile = &mut self.tiles[index];
                tile.reads.times[rank] = now;
                self.pages[tile.range.pages()].iter_mut().for_each(|reads| reads.times[rank] = now);
            }
        }
        self.waited[rank] = self.waited[rank].max(products);
        let complete = self.waited.into_iter().min().unwrap_or(0);
        while self.released < complete {
            let product = self.products.pop_front().expect("all have issued what they waited for");
            for index in product.reads.into_iter().flatten() {
                let tile = &mut self.tiles[index];
                tile.reads.in_flight -= 1;
                self.pages[tile.range.pages()].iter_mut().for_each(|reads| reads.in_flight -= 1);
            }
            self.released += 1;
        }
    }

    /// Fails if a product in flight reads bytes that are to be written. Fails too if a product has
    /// read them, and the writer does not know that all four warps have waited for it.
    #[inline]
    pub fn check_write(&self, clocks: &Clocks, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        let touched = Range { low: offset, high: offset + bytes };
        let pages = touched.pages();
        let pages = self.pages.get(pages.start..pages.end.min(self.pages.len())).unwrap_or_default();
        let harmless = |reads: &Reads| reads.in_flight == 0 && reads.unknown(clocks, self.first, by).is_none();
        if pages.iter().all(harmless) { Ok(()) } else { self.check_tiles(clocks, touched, by, doing) }
    }

    /// Does what [`Warpgroup::check_write`] does, by each chunk of each tile.
    fn check_tiles(&self, clocks: &Clocks, touched: Range, by: By, doing: &str) -> Step {
        for ReadTile { tile, range, reads, statement } in &self.tiles {
            let unknown = reads.unknown(clocks, self.first, by);
            if touched.high <= range.low || range.high <= touched.low || reads.in_flight == 0 && unknown.is_none() {
                continue;
            }
            let Some(at) = tile.chunk_in(touched) else { continue };
            let why = if reads.in_flight > 0 {
                "a product in flight still reads: no wgmma.wait_group released it in all four warps"
            } else {
                "a product has read, and no barrier orders it after that product's wgmma.wait_group in all four warps"
            };
            let what = format!(
                "{doing} of {} bytes at shared {:#x} overwrites {:#x}, which {why}; the product is that of",
                touched.high - touched.low,
                shared::address(touched.low),
                shared::address(at),
            );
            let product = By { warp: self.first + unknown.unwrap_or(0), lane: None, statement: *statement };
            return Err(Trouble::by(FaultKind::Race, by, what).other(product));
        }
        Ok(())
    }
}
