//! Which tiles the attention kernel visits. Descriptions and pictures show it, and it says how much
//! of the kernel's arithmetic is useful.
//!
//! The kernel asks [`Layout`] the same questions at run time. Nothing here is given to it.

use crate::blocks::Tiles;
use crate::layout::{HeadType, Layout, RangeVisible};

/// A query tile of one head, and the key tiles that it reads. It skips all others.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryTile {
    /// First packed row.
    pub first_row: u32,
    /// Number of rows. The last tile's padding counts too.
    pub rows: u32,
    /// Key tiles in the order in which the kernel reads them. A tile of invalid text has none.
    pub key_tiles: Vec<KeyTile>,
}

/// A key tile as one query tile reads it. Tiles do not lie on a grid: those of the body start where
/// its visible run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyTile {
    /// First packed row.
    pub first_row: u32,
    /// Number of rows. Those beyond the visible run count too.
    pub rows: u32,
    /// Whether every query row sees every key. The kernel tests no element of such a "full" tile,
    /// and each element of an "edge" tile.
    pub full: bool,
}

/// Number of key tiles over all query tiles of one head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileCounts {
    /// Number of query tiles.
    pub query_tiles: u64,
    /// Tiles that are visited without a test of elements.
    pub full: u64,
    /// Tiles that are visited with a test of every element.
    pub edge: u64,
    /// Tiles that are not visited, but would be by a dense head.
    pub skipped: u64,
}

impl TileCounts {
    /// Number of tiles that cost arithmetic.
    pub const fn visited(&self) -> u64 {
        self.full + self.edge
    }
}

/// The query tiles of one head over its S packed rows. `valid_text` text tokens are valid, at most
/// T.
pub fn query_tiles(
    layout: &Layout,
    head: HeadType,
    tiles: Tiles,
    valid_text: u32,
) -> impl Iterator<Item = QueryTile> + use<> {
    let layout = *layout;
    (0..layout.sequence()).step_by(tiles.query_rows as usize).map(move |first_row| {
        let range = layout.range_visible(head, first_row, tiles.query_rows, valid_text);
        let keys = layout.key_tiles(range, tiles.key_rows, tiles.key_step);
        let key_tile = |index| {
            let first_row = keys.first_row(index, tiles.key_rows);
            KeyTile { first_row, rows: tiles.key_rows, full: range.sees_all(first_row, tiles.key_rows) }
        };
        QueryTile { first_row, rows: tiles.query_rows, key_tiles: (0..keys.tiles).map(key_tile).collect() }
    })
}

/// The key tile in which packed row `key` lies when the query tile of packed row `query` reads it.
/// `None` means that it does not read it.
pub fn key_tile(
    layout: &Layout,
    head: HeadType,
    tiles: Tiles,
    valid_text: u32,
    query: u32,
    key: u32,
) -> Option<KeyTile> {
    let rows = tiles.key_rows;
    let range = layout.range_visible(head, query / tiles.query_rows * tiles.query_rows, tiles.query_rows, valid_text);
    let keys = layout.key_tiles(range, rows, tiles.key_step);
    let (start, count) = if key < keys.prefix_tiles * rows {
        (0, keys.prefix_tiles)
    } else {
        (keys.body_start, keys.tiles - keys.prefix_tiles)
    };
    let index = key.checked_sub(start)? / rows;
    let first_row = start + index * rows;
    (index < count).then(|| KeyTile { first_row, rows, full: range.sees_all(first_row, rows) })
}

/// Counts the tiles of one head, with `valid_text` valid text tokens (at most T). It looks at each
/// query tile once, and at no key tile. So the largest spec takes some milliseconds.
pub fn count_tiles(layout: &Layout, head: HeadType, tiles: Tiles, valid_text: u32) -> TileCounts {
    let all_keys = u64::from((valid_text + layout.video_tokens()).div_ceil(tiles.key_rows));
    let mut counts = TileCounts::default();
    for first_row in (0..layout.sequence()).step_by(tiles.query_rows as usize) {
        let range = layout.range_visible(head, first_row, tiles.query_rows, valid_text);
        let keys = layout.key_tiles(range, tiles.key_rows, tiles.key_step);
        let (visited, body_tiles) = (u64::from(keys.tiles), keys.tiles - keys.prefix_tiles);
        let full = full_tiles(range, 0, keys.prefix_tiles, tiles.key_rows)
            + full_tiles(range, keys.body_start, body_tiles, tiles.key_rows);
        counts.query_tiles += 1;
        counts.full += full;
        counts.edge += visited - full;
        counts.skipped += all_keys - visited;
    }
    counts
}

/// How many tiles every row sees whole ([`RangeVisible::sees_all`]), of `count` tiles of `rows`
/// keys that follow each other from packed row `first` on.
///
/// These are the tiles that end within the prefix, and a run of those that end within what all rows
/// see.
fn full_tiles(range: RangeVisible, first: u32, count: u32, rows: u32) -> u64 {
    let end_within = |bound: u32| (bound.saturating_sub(first) / rows).min(count);
    let (prefix, start) = (end_within(range.prefix), range.all_start.saturating_sub(first).div_ceil(rows));
    u64::from(prefix + end_within(range.all_end).saturating_sub(start.max(prefix)))
}
