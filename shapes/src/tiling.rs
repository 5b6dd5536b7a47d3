//! Which tiles the attention kernel visits: for `describe`, for pictures, and to know how much of its arithmetic is useful.
//!
//! The kernel asks [`Layout`] the same questions at run time; nothing here is given to it.

use crate::launch::Tiles;
use crate::layout::{HeadType, Layout};

/// A query tile of one head, and the key tiles that it reads. All others are skipped.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct QueryTile {
    /// First packed row.
    pub first_row: u32,
    /// Rows, the last tile's padding included.
    pub rows: u32,
    /// Key tiles in the order of the kernel; none for a tile of invalid text.
    pub key_tiles: Vec<KeyTile>,
}

/// A key tile as one query tile reads it. Tiles need not lie on a grid: those of the body start where its visible run does.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
pub struct KeyTile {
    /// First packed row.
    pub first_row: u32,
    /// Rows, those beyond the visible run included.
    pub rows: u32,
    /// Whether every query row sees every key: full tiles test no element, the others ("edge") test each.
    pub full: bool,
}

/// Key tiles over all query tiles of one head.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct TileCounts {
    /// Query tiles.
    pub query_tiles: u64,
    /// Visited, and no element tested.
    pub full: u64,
    /// Visited, and every element tested.
    pub edge: u64,
    /// Not visited: what a dense head would visit besides.
    pub skipped: u64,
}

impl TileCounts {
    /// Tiles that cost arithmetic.
    pub const fn visited(&self) -> u64 {
        self.full + self.edge
    }

    /// (query, key) pairs that cost arithmetic, visible or not.
    pub const fn visited_pairs(&self, tiles: Tiles) -> u128 {
        self.visited() as u128 * tiles.query_rows as u128 * tiles.key_rows as u128
    }
}

/// The query tiles of one head over its S packed rows, with `valid_text` valid text tokens (at most T).
pub fn query_tiles(
    layout: &Layout,
    head: HeadType,
    tiles: Tiles,
    valid_text: u32,
) -> impl Iterator<Item = QueryTile> + use<> {
    let layout = *layout;
    (0..layout.sequence()).step_by(tiles.query_rows as usize).map(move |first_row| {
        let range = layout.range_visible(head, first_row, tiles.query_rows, valid_text);
        let keys = layout.key_tiles(range, tiles.key_rows);
        let key_tile = |index| {
            let first_row = keys.first_row(index, tiles.key_rows);
            KeyTile { first_row, rows: tiles.key_rows, full: range.sees_all(first_row, tiles.key_rows) }
        };
        QueryTile { first_row, rows: tiles.query_rows, key_tiles: (0..keys.tiles).map(key_tile).collect() }
    })
}

/// Counts the tiles of one head, with `valid_text` valid text tokens (at most T).
pub fn count_tiles(layout: &Layout, head: HeadType, tiles: Tiles, valid_text: u32) -> TileCounts {
    let all_keys = u64::from((valid_text + layout.video_tokens()).div_ceil(tiles.key_rows));
    let mut counts = TileCounts::default();
    for tile in query_tiles(layout, head, tiles, valid_text) {
        let visited = tile.key_tiles.len() as u64;
        let full = tile.key_tiles.iter().filter(|key_tile| key_tile.full).count() as u64;
        counts.query_tiles += 1;
        counts.full += full;
        counts.edge += visited - full;
        counts.skipped += all_keys - visited;
    }
    counts
}
