//! What a head sees. **attention** asks a mask four questions, and nothing else:
//!
//! 1. which key tiles does this query tile read ([`Mask::tiles`]),
//! 2. in which order ([`Mask::first_key`]),
//! 3. is a tile seen whole ([`Mask::sees_all`]),
//! 4. which keys of a tile does this row see ([`Mask::seen_keys`]).
//!
//! [`band`] has the one mask that there is: a prefix and one run of the packed order.

use framestride_shapes::layout::HeadType;

pub mod band;

/// Number of candidate masks, from which profiling chooses. Arrays over them are in the order of
/// [`HeadType::CANDIDATES`].
pub const CANDIDATES: usize = HeadType::CANDIDATES.len();

/// Calls `f` with the index of each candidate. The calls are unrolled, so that fragments which the
/// index chooses stay in registers.
#[inline(always)]
pub fn each_candidate(mut f: impl FnMut(usize)) {
    const { assert!(CANDIDATES == 2, "there is one call for each candidate") };
    f(0);
    f(1);
}

/// The candidate at `index`, without a table in memory.
#[inline(always)]
pub fn candidate(index: u32) -> HeadType {
    let mut chosen = HeadType::CANDIDATES[0];
    each_candidate(
        #[inline(always)]
        |candidate| {
            if candidate as u32 == index {
                chosen = HeadType::CANDIDATES[candidate];
            }
        },
    );
    chosen
}

/// The mask of one head for one query tile.
pub trait Mask: Copy {
    /// What the rows of a warp see.
    type Warp: Copy;
    /// What the two rows of a thread see.
    type Thread: Copy;

    /// Number of key tiles that the query tile reads.
    fn tiles(&self) -> u32;

    /// First packed row of the key tile that is read after `index` others.
    fn first_key(&self, index: u32) -> u32;

    /// What the `rows` rows of a warp see, of which `first_row` is the first packed row.
    fn warp(&self, first_row: u32, rows: u32) -> Self::Warp;

    /// What the two rows of a thread see, which are packed rows `rows`.
    fn thread(&self, rows: [u32; 2]) -> Self::Thread;

    /// Whether every row of the warp sees every key of the tile from packed row `first` on.
    fn sees_all(warp: &Self::Warp, first: u32) -> bool;

    /// Which of its keys of that tile the thread in lane `lane` sees with each of its rows, as
    /// [`fragment::seen_keys`](framestride_shapes::fragment::seen_keys) says it.
    fn seen_keys(thread: &Self::Thread, first: u32, lane: u32) -> [u64; 2];

    /// The same mask, in registers of which ptxas sees that all lanes have the same
    /// ([`uniform`](crate::cuda::warp::uniform)).
    ///
    /// # Safety
    /// All lanes of the warp come here with the mask of one query tile.
    unsafe fn uniform(self) -> Self;
}
