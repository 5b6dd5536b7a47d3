//! The order in which blocks take the query tiles of a launch.
//!
//! Tiles with text come first, since they read the most. The others follow head by head, so that
//! the tiles in flight share keys in the L2 cache.

use crate::cuda::{global, thread};
use crate::model::Model;
use framestride_shapes::params::AttentionParams;

/// Query tiles of a head.
const fn head_tiles<M: Model>() -> u32 {
    M::LAYOUT.sequence().div_ceil(M::TILES.query_rows)
}

/// Query tiles of a launch.
#[inline(always)]
pub fn count<M: Model>(params: &AttentionParams) -> u32 {
    head_tiles::<M>() * params.batch * params.heads
}

/// Head (over batch x heads) and number in that head of query tile `index` of a launch.
#[inline(always)]
pub fn head_and_tile<M: Model>(params: &AttentionParams, index: u32) -> (u32, u32) {
    let text_tiles = M::LAYOUT.text_tokens.div_ceil(M::TILES.query_rows);
    let video_tiles = head_tiles::<M>() - text_tiles;
    let with_text = text_tiles * params.batch * params.heads;
    if index < with_text {
        (index / text_tiles.max(1), index % text_tiles.max(1))
    } else {
        ((index - with_text) / video_tiles.max(1), text_tiles + (index - with_text) % video_tiles.max(1))
    }
}

/// The query tile that this block takes after those it has. Each block begins with the tile of its
/// own number.
///
/// # Safety
/// One thread of the block asks; `params.schedule` is as its documentation says.
#[inline(always)]
pub unsafe fn take_next(params: &AttentionParams) -> u32 {
    thread::blocks_x() + global::add_u32(params.schedule, 1)
}

/// Says that this block takes no more. The last one leaves the schedule as it was.
///
/// # Safety
/// As [`take_next`], after its last call.
#[inline(always)]
pub unsafe fn leave(params: &AttentionParams) {
    if global::add_u32(params.schedule + 4, 1) == thread::blocks_x() - 1 {
        global::store_u32(params.schedule, 0);
        global::store_u32(params.schedule + 4, 0);
    }
}
