//! Orders of the tokens of one head, and the keys that a query sees.
//!
//! Words: `frames` (F) latent frames of `tokens_per_frame` (P) tokens, N = F P video tokens, T text tokens, S = N + T.
//!
//! * **Model order**: text first or last, video frame-major.
//! * **Position** of video token (f, p): `f P + p` in the spatial layout, `p F + f` in the temporal one.
//! * **Rule**: a query sees a key when either is text, or the key lies in a sink frame, or their positions differ by less than
//!   the half width. Text beyond the valid length of its batch item is seen by nobody.
//! * **Packed order of keys**: `[valid text | sink-frame tokens | the other video tokens ("body") | invalid text | padding]`, video
//!   tokens by position. In it, what any query sees is a prefix (text and sinks) and one contiguous run of the body.
//! * **Packed order of queries**: the same without setting sinks apart, so that neighbours in a query tile are neighbours in
//!   position and see nearly the same keys: [`Layout::query_order`].
//!
//! Everything is plain `u32` arithmetic without panics, so that the kernels compile it with the shape as constants. The valid
//! text length is an argument everywhere: it is known only at launch, and differs between batch items.

use crate::image::ATOM_ROWS;

/// How a head attends. The values are what kernels read from the device array of head types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum HeadType {
    /// Every key; packed in the spatial layout.
    Dense = 0,
    /// A band in frame-major order.
    Spatial = 1,
    /// A band in token-major order.
    Temporal = 2,
}

impl HeadType {
    /// All types, indexed by their value.
    pub const ALL: [HeadType; 3] = [HeadType::Dense, HeadType::Spatial, HeadType::Temporal];

    /// The types that profiling chooses from, in the order in which it tries them: of equal errors the first wins.
    pub const CANDIDATES: [HeadType; 2] = [HeadType::Spatial, HeadType::Temporal];

    /// Name for people and reports.
    pub const fn name(self) -> &'static str {
        match self {
            HeadType::Dense => "dense",
            HeadType::Spatial => "spatial",
            HeadType::Temporal => "temporal",
        }
    }

    /// The type a device array holds; every value beyond the known ones means dense, which is right for any head.
    #[inline(always)]
    pub const fn from_u32(value: u32) -> HeadType {
        match value {
            1 => HeadType::Spatial,
            2 => HeadType::Temporal,
            _ => HeadType::Dense,
        }
    }
}

/// Where the text tokens stand in the model's order.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub enum TextPosition {
    /// Before the video tokens.
    First,
    /// After the video tokens.
    Last,
}

/// Zero rows behind each packed head, so that a tile that starts at any token may be copied whole: no tile has more rows.
pub const PAD_ROWS: u32 = 192;

/// The geometry of one attention layer. See the module's documentation for the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// F, at least 1.
    pub frames: u32,
    /// P, at least 1.
    pub tokens_per_frame: u32,
    /// T, 0 for none.
    pub text_tokens: u32,
    /// Place of the text in the model's order.
    pub text_position: TextPosition,
    /// Leading frames that every query sees; less than `frames`.
    pub sink_frames: u32,
    /// Half width of the spatial band in tokens, 1 to N.
    pub spatial_half_width: u32,
    /// Half width of the temporal band in tokens, 1 to N.
    pub temporal_half_width: u32,
}

/// What one query row sees: packed rows `[0, prefix)` and `[start, end)`, with `prefix <= start <= end`.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Visible {
    /// End of valid text and sink frames.
    pub prefix: u32,
    /// First visible row of the body.
    pub start: u32,
    /// End of the visible rows of the body.
    pub end: u32,
}

impl Visible {
    /// Whether packed row `key` is seen.
    #[inline(always)]
    pub const fn sees(self, key: u32) -> bool {
        key < self.prefix || (key >= self.start && key < self.end)
    }

    /// Which of the 64 keys from packed row `first` on are seen: bit b is for packed row `first + b`.
    #[inline(always)]
    pub const fn keys(self, first: u32) -> u64 {
        /// The keys before packed row `bound`.
        #[inline(always)]
        const fn before(bound: u32, first: u32) -> u64 {
            let rows = bound.saturating_sub(first);
            if rows < 64 { (1 << rows) - 1 } else { u64::MAX }
        }
        before(self.prefix, first) | (before(self.end, first) & !before(self.start, first))
    }
}

/// What a range of query rows sees: `[0, prefix)`, and of the body `any` (the rows' runs and what lies between them) and `all`
/// (what every row sees, exactly).
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeVisible {
    /// End of valid text and sink frames.
    pub prefix: u32,
    /// Body rows seen by some row lie in `[any_start, any_end)`, empty when equal.
    pub any_start: u32,
    /// End of that run.
    pub any_end: u32,
    /// Body rows seen by every row: `[all_start, all_end)`, empty when `all_end <= all_start`.
    pub all_start: u32,
    /// End of the intersection.
    pub all_end: u32,
    /// Whether the range holds a row that sees anything.
    pub live: bool,
}

impl RangeVisible {
    /// Whether every row of the range sees all of the `rows` keys from packed row `first`: then no element is tested.
    #[inline(always)]
    pub const fn sees_all(self, first: u32, rows: u32) -> bool {
        let end = first + rows;
        end <= self.prefix || (end <= self.all_end && (first >= self.all_start || self.all_start <= self.prefix))
    }
}

/// The key tiles that a query tile reads: `prefix_tiles` from packed row 0, the rest from packed row `body_start`. They are read from the
/// middle one on, and from the first when the last is done: in the middle of a band much wider than the tiles are keys that nearly every
/// row sees, so that a softmax which begins there knows how large the weights of each row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyTiles {
    /// Tiles over text and sink frames, from row 0.
    pub prefix_tiles: u32,
    /// First row of the first body tile, a multiple of [`ATOM_ROWS`] at or below the first visible body row.
    pub body_start: u32,
    /// All tiles.
    pub tiles: u32,
}

impl KeyTiles {
    /// First packed row of the tile of `key_rows` rows that is read after `index` others.
    #[inline(always)]
    pub const fn first_row(self, index: u32, key_rows: u32) -> u32 {
        let middle = self.tiles / 2;
        let index = if index < self.tiles - middle { index + middle } else { index + middle - self.tiles };
        if index < self.prefix_tiles {
            index * key_rows
        } else {
            self.body_start + (index - self.prefix_tiles) * key_rows
        }
    }
}

impl Layout {
    /// N, video tokens.
    #[inline(always)]
    pub const fn video_tokens(&self) -> u32 {
        self.frames * self.tokens_per_frame
    }

    /// S, all tokens of the model's sequence.
    #[inline(always)]
    pub const fn sequence(&self) -> u32 {
        self.video_tokens() + self.text_tokens
    }

    /// Rows of one packed head: S rounded up to whole atoms, and [`PAD_ROWS`].
    #[inline(always)]
    pub const fn packed_rows(&self) -> u32 {
        self.sequence().next_multiple_of(ATOM_ROWS) + PAD_ROWS
    }

    /// Video tokens in sink frames.
    #[inline(always)]
    pub const fn sink_tokens(&self) -> u32 {
        self.sink_frames * self.tokens_per_frame
    }

    /// Half width of a head type in tokens; N, which is every token, for a dense one.
    #[inline(always)]
    pub const fn half_width(&self, head: HeadType) -> u32 {
        match head {
            HeadType::Dense => self.video_tokens(),
            HeadType::Spatial => self.spatial_half_width,
            HeadType::Temporal => self.temporal_half_width,
        }
    }

    /// Row of the model's order at which the video starts.
    #[inline(always)]
    pub const fn first_video_row(&self) -> u32 {
        match self.text_position {
            TextPosition::First => self.text_tokens,
            TextPosition::Last => 0,
        }
    }

    /// Row of the model's order at which the text starts.
    #[inline(always)]
    pub const fn first_text_row(&self) -> u32 {
        match self.text_position {
            TextPosition::First => 0,
            TextPosition::Last => self.video_tokens(),
        }
    }

    /// The layout whose packed order is that of the queries: this one without sinks. What its rows see is asked of this one.
    #[inline(always)]
    pub const fn query_order(&self) -> Layout {
        Layout { sink_frames: 0, ..*self }
    }

    /// Packed row, among keys, of row `row` of the model's order, with `valid_text` valid text tokens.
    #[inline(always)]
    pub const fn packed_row(&self, head: HeadType, row: u32, valid_text: u32) -> u32 {
        let text = row.wrapping_sub(self.first_text_row());
        if text < self.text_tokens {
            return if text < valid_text { text } else { self.video_tokens() + text };
        }
        let video = row - self.first_video_row();
        match head {
            HeadType::Dense | HeadType::Spatial => valid_text + video,
            HeadType::Temporal => {
                let (frame, patch) = (video / self.tokens_per_frame, video % self.tokens_per_frame);
                let sinks = self.sink_frames;
                if frame < sinks {
                    valid_text + patch * sinks + frame
                } else {
                    valid_text + self.sink_tokens() + patch * (self.frames - sinks) + (frame - sinks)
                }
            }
        }
    }

    /// Row of the model's order of packed row `packed < S`: the inverse of [`Layout::packed_row`].
    #[inline(always)]
    pub const fn model_row(&self, head: HeadType, packed: u32, valid_text: u32) -> u32 {
        if packed < valid_text {
            return self.first_text_row() + packed;
        }
        let order = packed - valid_text;
        if order >= self.video_tokens() {
            return self.first_text_row() + (packed - self.video_tokens());
        }
        match head {
            HeadType::Dense | HeadType::Spatial => self.first_video_row() + order,
            HeadType::Temporal => {
                let position = self.position(head, order);
                let (patch, frame) = (position / self.frames, position % self.frames);
                self.first_video_row() + frame * self.tokens_per_frame + patch
            }
        }
    }

    /// Position in the head's layout of the video token at `order` in the packed order of the keys' video tokens (sinks, then body).
    #[inline(always)]
    const fn position(&self, head: HeadType, order: u32) -> u32 {
        match head {
            HeadType::Dense | HeadType::Spatial => order,
            HeadType::Temporal => {
                let sinks = self.sink_frames;
                if order < self.sink_tokens() {
                    // `| (sinks == 0)`: never taken without sinks, but the divisor must not be a constant zero.
                    let sinks = sinks | (sinks == 0) as u32;
                    order / sinks * self.frames + order % sinks
                } else {
                    let (body, others) = (order - self.sink_tokens(), self.frames - sinks);
                    body / others * self.frames + sinks + body % others
                }
            }
        }
    }

    /// Body tokens whose position is below `position <= N`.
    #[inline(always)]
    const fn body_rank(&self, head: HeadType, position: u32) -> u32 {
        match head {
            HeadType::Dense | HeadType::Spatial => position.saturating_sub(self.sink_tokens()),
            HeadType::Temporal => {
                position / self.frames * (self.frames - self.sink_frames)
                    + (position % self.frames).saturating_sub(self.sink_frames)
            }
        }
    }

    /// What the query at packed row `row` (in [`Layout::query_order`]) sees. A row of invalid text or padding is told that it sees everything: its result is
    /// discarded, and so it never forces an element test on its neighbours.
    #[inline(always)]
    pub const fn visible(&self, head: HeadType, row: u32, valid_text: u32) -> Visible {
        let prefix = valid_text + self.sink_tokens();
        let end = valid_text + self.video_tokens();
        if row < valid_text || row >= end || matches!(head, HeadType::Dense) {
            return Visible { prefix, start: prefix, end };
        }
        let position = row - valid_text;
        let half_width = self.half_width(head);
        let past = position + half_width;
        let past = if past < self.video_tokens() { past } else { self.video_tokens() };
        Visible {
            prefix,
            start: prefix + self.body_rank(head, (position + 1).saturating_sub(half_width)),
            end: prefix + self.body_rank(head, past),
        }
    }

    /// What the query rows `[first, first + rows)` see. Start and end of a row's run grow with the row within the video, and text
    /// sees everything, so the ends of these two groups decide.
    #[inline(always)]
    pub const fn range_visible(&self, head: HeadType, first: u32, rows: u32, valid_text: u32) -> RangeVisible {
        let prefix = valid_text + self.sink_tokens();
        let end = valid_text + self.video_tokens();
        let none = RangeVisible { prefix, any_start: end, any_end: 0, all_start: prefix, all_end: end, live: false };
        let text = self.extend(none, head, first, rows, 0, valid_text, valid_text);
        self.extend(text, head, first, rows, valid_text, end, valid_text)
    }

    /// [`RangeVisible`] extended by the rows of `[first, first + rows)` that lie in the group `[from, to)`.
    #[inline(always)]
    #[allow(clippy::too_many_arguments)]
    const fn extend(
        &self,
        range: RangeVisible,
        head: HeadType,
        first: u32,
        rows: u32,
        from: u32,
        to: u32,
        valid_text: u32,
    ) -> RangeVisible {
        const fn min(a: u32, b: u32) -> u32 {
            if a < b { a } else { b }
        }
        const fn max(a: u32, b: u32) -> u32 {
            if a > b { a } else { b }
        }
        let (low, high) = (max(first, from), min(first + rows, to));
        if low >= high {
            return range;
        }
        let (top, bottom) = (self.visible(head, low, valid_text), self.visible(head, high - 1, valid_text));
        RangeVisible {
            prefix: range.prefix,
            any_start: min(range.any_start, top.start),
            any_end: max(range.any_end, bottom.end),
            all_start: max(range.all_start, bottom.start),
            all_end: min(range.all_end, top.end),
            live: true,
        }
    }

    /// The key tiles of `key_rows` rows that query rows seeing `range` read: each visible pair lies in exactly one of them.
    #[inline(always)]
    pub const fn key_tiles(&self, range: RangeVisible, key_rows: u32) -> KeyTiles {
        if !range.live {
            return KeyTiles { prefix_tiles: 0, body_start: 0, tiles: 0 };
        }
        let prefix_tiles = range.prefix.div_ceil(key_rows);
        let body_start = range.any_start / ATOM_ROWS * ATOM_ROWS;
        if range.any_start >= range.any_end {
            return KeyTiles { prefix_tiles, body_start: 0, tiles: prefix_tiles };
        }
        if body_start < prefix_tiles * key_rows {
            // The run begins inside the last prefix tile: one run from row 0.
            return KeyTiles { prefix_tiles: 0, body_start: 0, tiles: range.any_end.div_ceil(key_rows) };
        }
        KeyTiles { prefix_tiles, body_start, tiles: prefix_tiles + (range.any_end - body_start).div_ceil(key_rows) }
    }

    /// The patches of frame `frame` whose tokens a query sees through the temporal mask, itself at `position` of the temporal layout:
    /// `[start, end)`. They are a run, since positions grow by `frames` from patch to patch.
    #[inline(always)]
    pub const fn temporal_patches(&self, position: u32, frame: u32) -> [u32; 2] {
        let half_width = self.half_width(HeadType::Temporal);
        let start = (position + 1).saturating_sub(half_width + frame).div_ceil(self.frames);
        let end = (position + half_width).saturating_sub(frame).div_ceil(self.frames);
        [start, if end < self.tokens_per_frame { end } else { self.tokens_per_frame }]
    }

    /// Row of the video, in the model's frame-major order, that profiling draws as sample `index` of `samples` for one head: one
    /// uniform draw from each of `samples` equal strata, so that all of the video is looked at. `head` counts over batch x heads.
    #[inline(always)]
    pub const fn sampled_video_row(&self, seed: u64, head: u32, index: u32, samples: u32) -> u32 {
        let video = self.video_tokens() as u64;
        let low = index as u64 * video / samples as u64;
        let high = (index as u64 + 1) * video / samples as u64;
        let width = if high > low { high - low } else { 1 };
        // The finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom number generators, 2014).
        let mut x = seed.wrapping_add(((head as u64) << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        (low + (((x >> 32) * width) >> 32)) as u32
    }
}
