//! The band. A query sees every key whose position is near its own, and the prefix of text and sink
//! frames that everyone sees.

use core::marker::PhantomData;

use super::{CANDIDATES, Mask};
use crate::cuda::warp;
use crate::model::Model;
use crate::softmax;
use framestride_shapes::blocks::PROFILE_KEY_ROWS as KEY_ROWS;
use framestride_shapes::layout::{HeadType, KeyTiles, Layout, RangeVisible, Visible};

/// The band of a head, for one query tile of **attention**.
pub struct Band<M> {
    head_type: HeadType,
    /// Half width in tokens.
    half_width: u32,
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
    /// Makes the band for the query tile whose first packed row is `first_row`. `half_widths` are
    /// those of all candidates.
    #[inline(always)]
    pub fn new(half_widths: [u32; CANDIDATES], head_type: HeadType, valid_text: u32, first_row: u32) -> Band<M> {
        let layout = M::layout().with_half_widths(half_widths);
        let half_width = layout.half_width(head_type);
        let range = layout.range_visible(head_type, first_row, M::TILES.query_rows, valid_text);
        let keys = layout.key_tiles(range, M::TILES.key_rows, M::TILES.key_step);
        Band { head_type, half_width, valid_text, keys, model: PhantomData }
    }

    /// First packed row of the key tile behind the one that begins at `first`.
    #[inline(always)]
    pub fn next_key(&self, first: u32) -> u32 {
        self.keys.next_row(first, M::TILES.key_rows)
    }

    /// The geometry, in which every band is as wide as this one.
    #[inline(always)]
    fn layout(&self) -> Layout {
        M::layout().with_half_widths([self.half_width; CANDIDATES])
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
    fn warp(&self, first_row: u32, rows: u32) -> RangeVisible {
        self.layout().range_visible(self.head_type, first_row, rows, self.valid_text)
    }

    #[inline(always)]
    fn thread(&self, rows: [u32; 2]) -> [Visible; 2] {
        rows.map(|row| self.layout().visible(self.head_type, row, self.valid_text))
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

/// Which keys of a tile of **profile** a sample sees through candidate `candidate`
/// ([`Visible::keys`]). The sample is row `video` of the video. Keys lie in the spatial layout,
/// where the temporal band is a run of each frame.
#[inline(always)]
pub fn sample_keys<M: Model>(
    half_widths: [u32; CANDIDATES],
    candidate: u32,
    video: u32,
    valid_text: u32,
    first: u32,
) -> u64 {
    let layout = M::layout().with_half_widths(half_widths);
    match super::candidate(candidate) {
        HeadType::Temporal => keys_by_frame(&layout, video, valid_text, first),
        head_type => layout.visible(head_type, valid_text + video, valid_text).keys(first),
    }
}

/// The same through the temporal band.
#[inline(always)]
fn keys_by_frame(layout: &Layout, video: u32, valid_text: u32, first: u32) -> u64 {
    let Layout { frames, tokens_per_frame, sink_frames, .. } = *layout;
    let (frame, patch) = tokens_per_frame.divide(video);
    let position = patch * frames.value + frame;
    let prefix = valid_text + layout.sink_tokens();
    let mut frame = tokens_per_frame.quotient(first.saturating_sub(valid_text)).max(sink_frames);
    let mut keys = 0;
    // Each frame in the tile has a run.
    loop {
        let first_token = valid_text + frame * tokens_per_frame.value;
        let [start, end] = layout.temporal_patches(position, frame);
        keys |= Visible { prefix, start: first_token + start, end: first_token + end }.keys(first);
        frame += 1;
        if frame >= frames.value || first_token + tokens_per_frame.value >= first + KEY_ROWS {
            return keys;
        }
    }
}
