//! The band: every key whose position is near the query's, and the prefix of text and sink frames
//! that everyone sees.

use core::marker::PhantomData;

use super::Mask;
use crate::cuda::warp;
use crate::model::Model;
use crate::softmax;
use framestride_shapes::layout::{HeadType, KeyTiles, RangeVisible, Visible};

/// The band of a head of type `head_type`, for the query tile of **attention** that begins at a
/// packed row.
pub struct Band<M> {
    head_type: HeadType,
    valid_text: u32,
    keys: KeyTiles,
    model: PhantomData<M>,
}

impl<M> Clone for Band<M> {
    #[inline(always)]
    fn clone(&self) -> Band<M> {
        *self
    }
}

impl<M> Copy for Band<M> {}

impl<M: Model> Band<M> {
    /// For the query tile whose first packed row is `first_row`.
    #[inline(always)]
    pub fn new(head_type: HeadType, valid_text: u32, first_row: u32) -> Band<M> {
        let range = M::LAYOUT.range_visible(head_type, first_row, M::TILES.query_rows, valid_text);
        let keys = M::LAYOUT.key_tiles(range, M::TILES.key_rows);
        Band { head_type, valid_text, keys, model: PhantomData }
    }
}

impl<M: Model> Mask for Band<M> {
    type Warp = RangeVisible;
    type Thread = [Visible; 2];

    #[inline(always)]
    fn tiles(&self) -> u32 {
        self.keys.tiles
    }

    #[inline(always)]
    fn first_key(&self, index: u32) -> u32 {
        self.keys.first_row(index, M::TILES.key_rows)
    }

    #[inline(always)]
    fn warp(&self, first_row: u32) -> RangeVisible {
        M::LAYOUT.range_visible(self.head_type, first_row, 16, self.valid_text)
    }

    #[inline(always)]
    fn thread(&self, rows: [u32; 2]) -> [Visible; 2] {
        rows.map(|row| M::LAYOUT.visible(self.head_type, row, self.valid_text))
    }

    #[inline(always)]
    fn sees_all(warp: &RangeVisible, first: u32) -> bool {
        warp.sees_all(first, M::TILES.key_rows)
    }

    #[inline(always)]
    fn seen_keys(thread: &[Visible; 2], first: u32, lane: u32) -> [u64; 2] {
        softmax::seen_keys(first, M::TILES.key_rows, lane, *thread)
    }

    #[inline(always)]
    unsafe fn uniform(self) -> Band<M> {
        let KeyTiles { prefix_tiles, body_start, tiles } = self.keys;
        let keys = KeyTiles {
            prefix_tiles: warp::uniform(prefix_tiles),
            body_start: warp::uniform(body_start),
            tiles: warp::uniform(tiles),
        };
        Band { keys, ..self }
    }
}
