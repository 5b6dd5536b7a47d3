//! Tiles visit every visible pair exactly once.

use framestride_shapes::arch::Arch;
use framestride_shapes::blocks::Tiles;
use framestride_shapes::image::{ATOM_ROWS, e4m3::UNIT_KEYS};
use framestride_shapes::layout::{HeadType, PAD_ROWS};
use framestride_shapes::numbers::Template;
use framestride_shapes::tiling::{TileCounts, count_tiles, key_tile, query_tiles};
use proptest::prelude::*;

use crate::{cases, heads, layouts_with_text, rule, shipped};

fn key_rows() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![16, 48, 64, 128, 176, 192])
}

fn key_step() -> impl Strategy<Value = u32> {
    prop::sample::select(vec![ATOM_ROWS, UNIT_KEYS])
}

/// Of the shipped models at most one warpgroup in fifty has a row that sees nothing of the first
/// tile that is read. These have both text and video, or stand at the end of a sequence with sinks.
#[test]
fn the_first_tile_is_for_nearly_every_row() {
    let models = shipped().filter(|spec| !spec.name.starts_with("tiny") && spec.name != "demo");
    for spec in models {
        let (layout, text) = (&spec.layout, spec.layout.text_tokens());
        for head in HeadType::ALL {
            let (mut warpgroups, mut blind) = (0, 0);
            for tile in query_tiles(layout, head, spec.tiles(Arch::default()), text) {
                let keys = tile.key_tiles[0].first_row..tile.key_tiles[0].first_row + tile.key_tiles[0].rows;
                for first in (tile.first_row..tile.first_row + tile.rows).step_by(64) {
                    let sees = |row| keys.clone().any(|key| layout.visible(head, row, text).sees(key));
                    warpgroups += 1;
                    blind += u32::from(!(first..(first + 64).min(layout.sequence())).all(sees));
                }
            }
            assert!(blind * 50 <= warpgroups, "{} {head:?}: {blind} of {warpgroups}", spec.name);
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn visible_pairs_lie_in_one_tile(
        (layout, valid) in layouts_with_text(),
        head in heads(),
        key_rows in key_rows(),
        key_step in key_step(),
        first in 0..240u32,
        rows in 1..=200u32,
    ) {
        let range = layout.range_visible(head, first, rows, valid.sum());
        let tiles = layout.key_tiles(range, key_rows, key_step);
        // How many tiles hold each key.
        let mut holders = vec![0u32; layout.packed_rows() as usize];
        let mut next_row = tiles.first_row(0, key_rows);
        for index in 0..tiles.tiles {
            let first_row = tiles.first_row(index, key_rows);
            prop_assert_eq!(next_row, first_row, "tile {}", index);
            next_row = tiles.next_row(first_row, key_rows);
            prop_assert!(first_row.is_multiple_of(key_step), "tile {index} starts at {first_row}");
            prop_assert!(first_row + key_rows <= layout.packed_rows(), "tile {index} ends at {}", first_row + key_rows);
            holders[first_row as usize..(first_row + key_rows) as usize].iter_mut().for_each(|count| *count += 1);
        }
        prop_assert!(holders.iter().all(|&count| count <= 1), "tiles overlap");
        prop_assert!(tiles.tiles == 0 || next_row == tiles.first_row(0, key_rows), "behind the last tile");
        for query in first..(first + rows).min(valid.sum() + layout.video_tokens()) {
            let query_row = layout.query_order().model_row(head, query, valid);
            for key in 0..layout.sequence() {
                if rule::sees(&layout, head, query_row, layout.model_row(head, key, valid), valid) {
                    prop_assert_eq!(holders[key as usize], 1, "query {} and key {}", query, key);
                }
            }
        }
        // No more tiles than a dense head visits, and none for rows that see nothing.
        prop_assert!(tiles.tiles <= (valid.sum() + layout.video_tokens()).div_ceil(key_rows));
        prop_assert_eq!(tiles.tiles > 0, range.live);
    }

    /// `sees_all` holds exactly when every live row sees every key of the tile.
    #[test]
    fn full_tiles_are_full(
        (layout, valid) in layouts_with_text(),
        head in heads(),
        key_rows in key_rows(),
        key_step in key_step(),
        first in 0..240u32,
        rows in 1..=200u32,
        tile in 0..240u32,
    ) {
        let range = layout.range_visible(head, first, rows, valid.sum());
        let tiles = layout.key_tiles(range, key_rows, key_step);
        let live = valid.sum() + layout.video_tokens();
        let queries = first..(first + rows).min(live);
        if queries.is_empty() {
            return Ok(());
        }
        let visited = (0..tiles.tiles).map(|index| (tiles.first_row(index, key_rows), key_rows));
        // Besides the tiles visited, a narrow one anywhere, which is full more often.
        for (first_key, keys) in visited.chain([(tile, 1), (tile, 8)]) {
            let full = first_key + keys <= live && queries.clone().all(|query| {
                let query_row = layout.query_order().model_row(head, query, valid);
                (first_key..first_key + keys).all(|key| {
                    rule::sees(&layout, head, query_row, layout.model_row(head, key, valid), valid)
                })
            });
            prop_assert_eq!(range.sees_all(first_key, keys), full, "keys {} to {}", first_key, first_key + keys);
        }
    }

    #[test]
    fn counts_add_up(
        (layout, valid) in layouts_with_text(),
        head in heads(),
        arch in prop::sample::select(Arch::ALL.to_vec()),
        template in prop::sample::select(Template::ALL.to_vec()),
    ) {
        let tiles = Tiles::new(arch, template.image.head_dim, template.compute);
        prop_assert!(tiles.key_rows <= PAD_ROWS && tiles.query_rows <= PAD_ROWS, "a tile may end beyond the packed head");
        let counts = count_tiles(&layout, head, tiles, valid.sum());
        let dense = count_tiles(&layout, HeadType::Dense, tiles, valid.sum());
        let live = valid.sum() + layout.video_tokens();
        let key_tiles = u64::from(live.div_ceil(tiles.key_rows));
        prop_assert_eq!(counts.query_tiles, u64::from(layout.sequence().div_ceil(tiles.query_rows)));
        prop_assert_eq!(counts.full + counts.edge + counts.skipped, counts.query_tiles * key_tiles);
        prop_assert_eq!(dense.visited(), u64::from(live.div_ceil(tiles.query_rows)) * key_tiles);
        prop_assert!(counts.visited() <= dense.visited());
    }

    /// Tiles are counted without a walk over them: here is the walk, with tiles of other sizes too.
    #[test]
    fn counts_are_those_of_a_walk(
        (layout, valid) in layouts_with_text(),
        head in heads(),
        key_rows in key_rows(),
        key_step in key_step(),
        query_rows in prop::sample::select(vec![8, 64, 128, 192]),
    ) {
        let tiles = Tiles { query_rows, key_rows, stages: 2, key_step };
        let key_tiles = u64::from((valid.sum() + layout.video_tokens()).div_ceil(key_rows));
        let mut walked = TileCounts::default();
        for tile in query_tiles(&layout, head, tiles, valid.sum()) {
            let (visited, full) = (tile.key_tiles.len() as u64, tile.key_tiles.iter().filter(|tile| tile.full).count() as u64);
            walked.query_tiles += 1;
            walked.full += full;
            walked.edge += visited - full;
            walked.skipped += key_tiles - visited;
            for row in [tile.first_row, tile.first_row + tile.rows - 1] {
                for key in 0..layout.packed_rows() {
                    let holder = tile.key_tiles.iter().find(|tile| (tile.first_row..tile.first_row + tile.rows).contains(&key));
                    prop_assert_eq!(key_tile(&layout, head, tiles, valid.sum(), row, key), holder.copied());
                }
            }
        }
        prop_assert_eq!(count_tiles(&layout, head, tiles, valid.sum()), walked);
    }
}
