//! The order in which blocks take the query tiles of a launch.
//!
//! Tiles with text come first, since they read the most. The others follow head by head, so that
//! the tiles in flight share keys in the L2 cache.

use crate::cuda::{global, thread};
use crate::model::Model;
use framestride_shapes::params::AttentionParams;

/// Query tiles of a launch.
#[inline(always)]
pub fn count<M: Model>(params: &AttentionParams) -> u32 {
    M::layout().sequence().div_ceil(M::TILES.query_rows) * params.batch * params.heads
}

/// Head (over batch x heads) and number in that head of query tile `index` of a launch.
#[inline(always)]
pub fn head_and_tile<M: Model>(params: &AttentionParams, index: u32) -> (u32, u32) {
    let numbers = M::numbers();
    let text_tiles = M::layout().text_tokens().div_ceil(M::TILES.query_rows);
    let with_text = text_tiles * params.batch * params.heads;
    if index < with_text {
        numbers.text_tiles.divide(index)
    } else {
        let (head, tile) = numbers.video_tiles.divide(index - with_text);
        (head, text_tiles + tile)
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
