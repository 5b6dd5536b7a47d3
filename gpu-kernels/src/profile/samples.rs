//! The sampled rows of a block, and what they see of a tile of keys.

use super::{CANDIDATES, KEY_ROWS, SAMPLE_ROWS, number};
use crate::cuda::mma::Fragment;
use crate::cuda::{global, shared};
use crate::masks::each_candidate;
use crate::model::Model;
use crate::softmax;
use framestride_shapes::fragment::thread_keys;
use framestride_shapes::image::CHUNK_BYTES;
use framestride_shapes::layout::Visible;
use framestride_shapes::params::ProfileParams;

/// Copies the tile of a group's sampled rows to `query`. This is thread `thread` of `threads` that
/// take part.
#[inline(always)]
pub unsafe fn copy<M: Model>(params: &ProfileParams, [group, head]: [u32; 2], query: u32, [thread, threads]: [u32; 2]) {
    let bytes = const { M::IMAGE.bytes(SAMPLE_ROWS) };
    let tile = params.samples + (head * M::partials(1).groups + group) as u64 * bytes as u64;
    let mut byte = thread * CHUNK_BYTES;
    while byte < bytes {
        shared::store16(query + byte, global::load16(tile + byte as u64));
        byte += threads * CHUNK_BYTES;
    }
}

/// Which keys of a tile two samples see, through each candidate mask. It stands at `places`, with a
/// u64 for each candidate.
#[inline(always)]
pub unsafe fn seen(places: [u32; 2]) -> [[u64; 2]; CANDIDATES] {
    let word = |low: u32, high: u32| low as u64 | (high as u64) << 32;
    let [a, b, c, d] = shared::load16(places[0]);
    let [e, f, g, h] = shared::load16(places[1]);
    [[word(a, b), word(e, f)], [word(c, d), word(g, h)]]
}

/// What is seen through the mask of number `mask`, of what is seen through each candidate.
#[inline(always)]
pub fn through<T: Copy>(mask: u32, seen: [[T; 2]; CANDIDATES]) -> [T; 2] {
    let mut keys = seen[0];
    each_candidate(
        #[inline(always)]
        |candidate| {
            if mask == number(candidate) {
                keys = seen[candidate];
            }
        },
    );
    keys
}

/// Sets the scores of keys that a sweep leaves out to -inf, of the tile from packed row `first` on.
/// These are the keys from `end` on, which nobody sees, or (`MASKED`) those that `mask` hides.
/// `seen` is what [`seen`] says of the tile.
#[inline(always)]
pub fn hide<const MASKED: bool>(
    mask: u32,
    scores: &mut impl Fragment,
    first: u32,
    seen: [[u64; 2]; CANDIDATES],
    end: u32,
    lane: u32,
) {
    if MASKED {
        let keys = through(mask, seen);
        softmax::replace_unseen(scores, keys.map(|keys| thread_keys(keys, lane)), f32::NEG_INFINITY);
    } else if first + KEY_ROWS > end {
        let rows = [Visible { prefix: end, start: end, end }; 2];
        softmax::replace_unseen(scores, softmax::seen_keys(first, KEY_ROWS, lane, rows), f32::NEG_INFINITY);
    }
}
