//! Orders of the tokens of one head, and the keys that a query sees. `no_std`.
//!
//! Words: F is the number of latent frames (`frames`), and each has P tokens (`tokens_per_frame`).
//! There are N = F P video tokens, T text tokens, and S = N + T in all. **Text** is every row beside
//! the video: the prompt, but also frames of reference and what else a model puts there.
//!
//! * **Model order**: text stands on both **sides** of the video, before it and after it. Either side
//!   may have none. The video is frame-major.
//! * **Position** of video token (f, p): it is `f P + p` in the spatial layout, and `p F + f` in
//!   the temporal one.
//! * **Rule**: a query sees a key when either is text, when the key lies in a sink frame, or when
//!   their positions differ by less than the half width. Nobody sees text beyond the valid length
//!   of its side in its batch item.
//! * **Packed order of keys**: `[valid text | sink-frame tokens | the other video tokens | invalid
//!   text | padding]`. Text from before the video stands before that from after it. Video tokens
//!   stand by position, and those outside sink frames are the **body**. In this order a query sees a prefix (text and sinks) and one contiguous run of the
//!   body.
//! * **Packed order of queries** ([`Layout::query_order`]): it is the same, but does not set sinks
//!   apart. Neighbours in a query tile are neighbours in position and see nearly the same keys.
//!
//! All of it is `u32` arithmetic without panics and without a division by a number of the spec
//! ([`Divisor`]), so that kernels compile it. Valid lengths are arguments everywhere: they are known
//! only at launch and differ between batch items. What a row sees depends on their sum alone,
//! `valid_text`. Where a row stands depends on both ([`ValidText`]).

use crate::image::ATOM_ROWS;

/// How a head attends. Kernels read these values from the device array of head types.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[repr(u32)]
pub enum HeadType {
    /// The head sees every key. It is packed in the spatial layout.
    Dense = 0,
    /// The head sees a band in frame-major order.
    Spatial = 1,
    /// The head sees a band in token-major order.
    Temporal = 2,
}

impl HeadType {
    /// All types. Each stands at its own value.
    pub const ALL: [HeadType; 3] = [HeadType::Dense, HeadType::Spatial, HeadType::Temporal];

    /// The types that profiling chooses from. Of two with equal errors the first one wins.
    pub const CANDIDATES: [HeadType; 2] = [HeadType::Spatial, HeadType::Temporal];

    /// The name that specs, reports and files use.
    pub const fn name(self) -> &'static str {
        match self {
            HeadType::Dense => "dense",
            HeadType::Spatial => "spatial",
            HeadType::Temporal => "temporal",
        }
    }

    /// The type that a value of a device array means. Unknown values mean dense, which is right for
    /// any head.
    #[inline(always)]
    pub const fn from_u32(value: u32) -> HeadType {
        match value {
            1 => HeadType::Spatial,
            2 => HeadType::Temporal,
            _ => HeadType::Dense,
        }
    }
}

/// How many text tokens of one batch item are valid on each side. They come first there.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
pub struct ValidText {
    /// Of those before the video.
    pub before: u32,
    /// Of those after the video.
    pub after: u32,
}

impl ValidText {
    /// How many are valid on both sides together.
    #[inline(always)]
    pub const fn sum(self) -> u32 {
        self.before + self.after
    }
}

/// A number of a spec by which kernels divide: a multiplication and a shift.
///
/// ptxas divides by a literal as it divides by any register. So the reciprocal comes with the
/// number.
///
/// With shift = ceil(log2 d) and multiplier = ceil(2^(31 + shift) / d), x / d is the upper half of
/// 2 x multiplier, shifted right by shift. This holds for all x below 2^31: the multiplier is too
/// large by less than 1, which adds less than x / 2^(31 + shift) < 1 / d to the quotient.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Divisor {
    /// The number, at least 1.
    pub value: u32,
    multiplier: u32,
    shift: u32,
}

impl Default for Divisor {
    fn default() -> Divisor {
        Divisor::new(1)
    }
}

impl Divisor {
    /// Makes it for a number. 0 counts as 1.
    pub const fn new(value: u32) -> Divisor {
        let value = if value == 0 { 1 } else { value };
        let shift = if value == 1 { 0 } else { (value - 1).ilog2() + 1 };
        Divisor { value, multiplier: (1u64 << (31 + shift)).div_ceil(value as u64) as u32, shift }
    }

    /// Puts together again what [`Divisor::parts`] gave.
    #[inline(always)]
    pub const fn from_parts([value, multiplier, shift]: [u32; 3]) -> Divisor {
        Divisor { value, multiplier, shift }
    }

    /// The number, its multiplier and its shift.
    pub const fn parts(self) -> [u32; 3] {
        [self.value, self.multiplier, self.shift]
    }

    /// x / value, for x below 2^31.
    #[inline(always)]
    pub const fn quotient(self, x: u32) -> u32 {
        (((2 * x) as u64 * self.multiplier as u64) >> 32) as u32 >> self.shift
    }

    /// x / value and x % value, for x below 2^31.
    #[inline(always)]
    pub const fn divide(self, x: u32) -> (u32, u32) {
        let quotient = self.quotient(x);
        (quotient, x - quotient * self.value)
    }

    /// x / value, rounded up, for x + value up to 2^31.
    #[inline(always)]
    pub const fn div_ceil(self, x: u32) -> u32 {
        self.quotient(x + (self.value - 1))
    }
}

/// Zero rows behind each packed head. No tile has more rows, so a tile that starts at any token can
/// be copied whole.
pub const PAD_ROWS: u32 = 192;

/// The geometry of one attention layer. The module's documentation explains the words.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct Layout {
    /// F, the number of latent frames.
    pub frames: Divisor,
    /// P, the tokens of a frame.
    pub tokens_per_frame: Divisor,
    /// Text tokens before the video. 0 means that there are none.
    pub before: u32,
    /// Text tokens after the video, likewise.
    pub after: u32,
    /// Leading frames that every query sees. There are fewer than `frames`.
    pub sink_frames: u32,
    /// Half width of the spatial band in tokens, 1 to N.
    pub spatial_half_width: u32,
    /// Half width of the temporal band in tokens, 1 to N.
    pub temporal_half_width: u32,
}

/// What one query row sees: packed rows `[0, prefix)` and `[start, end)`, where `prefix <= start <=
/// end`.
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

    /// Which of the 64 keys from packed row `first` on are seen. Bit b stands for packed row `first
    /// + b`.
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

/// What a range of query rows sees.
///
/// Every row sees the prefix `[0, prefix)`. Of the body, all that some row sees lies in `any`, and
/// `all` is exactly what every row sees.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct RangeVisible {
    /// End of valid text and sink frames.
    pub prefix: u32,
    /// Start of the run that holds every body row that some row sees. It is empty when it ends
    /// here.
    pub any_start: u32,
    /// End of that run.
    pub any_end: u32,
    /// Start of the body rows that every row sees. There are none when they end at or before it. It
    /// is 0 when they follow the prefix, which every row sees too.
    pub all_start: u32,
    /// End of the body rows that every row sees.
    pub all_end: u32,
    /// Whether any row of the range sees anything.
    pub live: bool,
}

impl RangeVisible {
    /// Whether every row of the range sees all of the `rows` keys from packed row `first` on. If
    /// so, no element has to be tested.
    #[inline(always)]
    pub const fn sees_all(self, first: u32, rows: u32) -> bool {
        let end = first + rows;
        end <= self.prefix || (first >= self.all_start && end <= self.all_end)
    }
}

/// The key tiles that a query tile reads: first `prefix_tiles` from packed row 0, then the others
/// from packed row `body_start`.
///
/// They are read from the middle one on, and from the first one when the last is done. In the
/// middle of a wide band are keys that nearly every row sees. A softmax that begins there knows how
/// large the weights of each row are.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyTiles {
    /// Tiles over text and sink frames. They begin at row 0.
    pub prefix_tiles: u32,
    /// First row of the first body tile, at or below the first visible body row.
    pub body_start: u32,
    /// Number of all tiles.
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

    /// First packed row of the tile that is read after the one that begins at `first`. Behind the
    /// last one it is the first one's again.
    #[inline(always)]
    pub const fn next_row(self, first: u32, key_rows: u32) -> u32 {
        let prefix_end = self.prefix_tiles * key_rows;
        let end = self.body_start + (self.tiles - self.prefix_tiles) * key_rows;
        let next = first + key_rows;
        if next == prefix_end {
            self.body_start
        } else if next == end {
            if self.prefix_tiles == 0 { self.body_start } else { 0 }
        } else {
            next
        }
    }
}

impl Layout {
    /// N, the video tokens.
    #[inline(always)]
    pub const fn video_tokens(&self) -> u32 {
        self.frames.value * self.tokens_per_frame.value
    }

    /// T, the text tokens of both sides.
    #[inline(always)]
    pub const fn text_tokens(&self) -> u32 {
        self.before + self.after
    }

    /// How many are valid when all text is.
    #[inline(always)]
    pub const fn all_text(&self) -> ValidText {
        ValidText { before: self.before, after: self.after }
    }

    /// S, all tokens of the model's sequence.
    #[inline(always)]
    pub const fn sequence(&self) -> u32 {
        self.video_tokens() + self.text_tokens()
    }

    /// Rows of one packed head: S rounded up to whole atoms, and [`PAD_ROWS`] behind them.
    #[inline(always)]
    pub const fn packed_rows(&self) -> u32 {
        self.sequence().next_multiple_of(ATOM_ROWS) + PAD_ROWS
    }

    /// Video tokens in sink frames.
    #[inline(always)]
    pub const fn sink_tokens(&self) -> u32 {
        self.sink_frames * self.tokens_per_frame.value
    }

    /// Half width of a head type in tokens. A dense head has N, which covers every token.
    #[inline(always)]
    pub const fn half_width(&self, head: HeadType) -> u32 {
        match head {
            HeadType::Dense => self.video_tokens(),
            HeadType::Spatial => self.spatial_half_width,
            HeadType::Temporal => self.temporal_half_width,
        }
    }

    /// The same geometry with bands of other half widths in tokens, in the order of
    /// [`HeadType::CANDIDATES`].
    #[inline(always)]
    pub const fn with_half_widths(&self, [spatial, temporal]: [u32; HeadType::CANDIDATES.len()]) -> Layout {
        Layout { spatial_half_width: spatial, temporal_half_width: temporal, ..*self }
    }

    /// The layout whose packed order is that of queries: this one without sinks. Ask this one, not
    /// that one, what its rows see.
    #[inline(always)]
    pub const fn query_order(&self) -> Layout {
        Layout { sink_frames: 0, ..*self }
    }

    /// Packed row among keys of row `row` of the model's order. Padding stays where it is.
    #[inline(always)]
    pub const fn packed_row(&self, head: HeadType, row: u32, valid: ValidText) -> u32 {
        let valid_text = valid.sum();
        if row < self.before {
            return if row < valid.before { row } else { valid.after + self.video_tokens() + row };
        }
        let video = row - self.before;
        if video >= self.video_tokens() {
            // All rows before an invalid one are packed before it.
            let text = video - self.video_tokens();
            return if text < valid.after { valid.before + text } else { row };
        }
        match head {
            HeadType::Dense | HeadType::Spatial => valid_text + video,
            HeadType::Temporal => {
                let (frame, patch) = self.tokens_per_frame.divide(video);
                let sinks = self.sink_frames;
                if frame < sinks {
                    valid_text + patch * sinks + frame
                } else {
                    valid_text + self.sink_tokens() + patch * (self.frames.value - sinks) + (frame - sinks)
                }
            }
        }
    }

    /// Row of the model's order of packed row `packed < S`: the inverse of [`Layout::packed_row`].
    #[inline(always)]
    pub const fn model_row(&self, head: HeadType, packed: u32, valid: ValidText) -> u32 {
        let valid_text = valid.sum();
        if packed < valid_text {
            let is_before = packed < valid.before;
            return if is_before { packed } else { self.before + self.video_tokens() + packed - valid.before };
        }
        let order = packed - valid_text;
        if order >= self.video_tokens() {
            let text = packed - self.video_tokens() - valid.after;
            return if text < self.before { text } else { packed };
        }
        match head {
            HeadType::Dense | HeadType::Spatial => self.before + order,
            HeadType::Temporal => {
                let (patch, frame) = self.frames.divide(self.position(head, order));
                self.before + frame * self.tokens_per_frame.value + patch
            }
        }
    }

    /// Position in the head's layout of a video token. `order` is its place among the video tokens
    /// of the packed keys, sinks first.
    #[inline(always)]
    const fn position(&self, head: HeadType, order: u32) -> u32 {
        match head {
            HeadType::Dense | HeadType::Spatial => order,
            HeadType::Temporal => {
                let (frames, sinks) = (self.frames.value, self.sink_frames);
                if sinks == 0 {
                    // Kernels ask for nothing else, and so they do not divide here.
                    order
                } else if order < self.sink_tokens() {
                    order / sinks * frames + order % sinks
                } else {
                    let (body, others) = (order - self.sink_tokens(), frames - sinks);
                    body / others * frames + sinks + body % others
                }
            }
        }
    }

    /// Number of body tokens whose position is below `position`, which is at most N.
    #[inline(always)]
    const fn body_rank(&self, head: HeadType, position: u32) -> u32 {
        if self.sink_frames == 0 {
            // ptxas folds a branch on a literal, but not max(0, x), nor x / n * n + x % n.
            return position;
        }
        match head {
            HeadType::Dense | HeadType::Spatial => position.saturating_sub(self.sink_tokens()),
            HeadType::Temporal => {
                let (patch, frame) = self.frames.divide(position);
                patch * (self.frames.value - self.sink_frames) + frame.saturating_sub(self.sink_frames)
            }
        }
    }

    /// What the query at packed row `row` of [`Layout::query_order`] sees.
    ///
    /// A row of invalid text or of padding is told that it sees everything. Its result is
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

    /// What the query rows `[first, first + rows)` see.
    ///
    /// Text sees everything. In the video the start and the end of a row's run grow with the row, so
    /// its first and its last row decide.
    #[inline(always)]
    pub const fn range_visible(&self, head: HeadType, first: u32, rows: u32, valid_text: u32) -> RangeVisible {
        let prefix = valid_text + self.sink_tokens();
        let end = valid_text + self.video_tokens();
        let has_text = first < valid_text;
        let text = RangeVisible { prefix, any_start: prefix, any_end: end, all_start: 0, all_end: end, live: has_text };
        let low = if has_text { valid_text } else { first };
        let high = if first + rows < end { first + rows } else { end };
        if low >= high {
            return text;
        }
        let (top, bottom) = (self.visible(head, low, valid_text), self.visible(head, high - 1, valid_text));
        RangeVisible {
            prefix,
            any_start: if has_text { prefix } else { top.start },
            any_end: if has_text { end } else { bottom.end },
            all_start: if bottom.start == prefix { 0 } else { bottom.start },
            all_end: top.end,
            live: true,
        }
    }

    /// The tiles of `key_rows` keys that query rows read which see `range`. They begin at multiples of
    /// `key_step` rows. Each visible pair lies in exactly one of them.
    #[inline(always)]
    pub const fn key_tiles(&self, range: RangeVisible, key_rows: u32, key_step: u32) -> KeyTiles {
        if !range.live {
            return KeyTiles { prefix_tiles: 0, body_start: 0, tiles: 0 };
        }
        let prefix_tiles = range.prefix.div_ceil(key_rows);
        let body_start = range.any_start / key_step * key_step;
        if range.any_start >= range.any_end {
            return KeyTiles { prefix_tiles, body_start: 0, tiles: prefix_tiles };
        }
        if body_start < prefix_tiles * key_rows {
            // The run begins inside the last prefix tile, so one run begins at row 0.
            return KeyTiles { prefix_tiles: 0, body_start: 0, tiles: range.any_end.div_ceil(key_rows) };
        }
        KeyTiles { prefix_tiles, body_start, tiles: prefix_tiles + (range.any_end - body_start).div_ceil(key_rows) }
    }

    /// The patches of frame `frame` that a query sees through the temporal mask, `[start, end)`.
    /// The query is at `position` of the temporal layout.
    ///
    /// They are one run, since positions grow by `frames` from patch to patch.
    #[inline(always)]
    pub const fn temporal_patches(&self, position: u32, frame: u32) -> [u32; 2] {
        let half_width = self.half_width(HeadType::Temporal);
        let start = self.frames.div_ceil((position + 1).saturating_sub(half_width + frame));
        let end = self.frames.div_ceil((position + half_width).saturating_sub(frame));
        let patches = self.tokens_per_frame.value;
        [start, if end < patches { end } else { patches }]
    }

    /// Row of the video, in the model's frame-major order, that profiling draws as sample `index`
    /// of `samples` for one head. `head` counts over batch x heads.
    ///
    /// The video is divided into `samples` equal strata, and one row is drawn uniformly from each.
    /// So all of the video is looked at.
    #[inline(always)]
    pub const fn sampled_video_row(&self, seed: u64, head: u32, index: u32, samples: Divisor) -> u32 {
        let (share, rest) = samples.divide(self.video_tokens());
        // Where a stratum begins is index x video / samples, rounded down.
        let (low, high) = (
            index * share + samples.quotient(index * rest),
            (index + 1) * share + samples.quotient((index + 1) * rest),
        );
        let width = if high > low { high - low } else { 1 };
        // This is the finaliser of splitmix64 (Steele, Lea, Flood: Fast splittable pseudorandom
        // number generators, 2014).
        let mut x = seed.wrapping_add(((head as u64) << 32 | index as u64).wrapping_mul(0x9e37_79b9_7f4a_7c15));
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        x ^= x >> 31;
        low + (((x >> 32) * width as u64) >> 32) as u32
    }
}
