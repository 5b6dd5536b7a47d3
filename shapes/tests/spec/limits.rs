//! The largest shapes: one below each limit is read and fits the kernels' arithmetic, one above is
//! refused and names the limit.

use framestride_shapes::arch::Arch;
use framestride_shapes::layout::{Divisor, HeadType, Layout, PAD_ROWS, ValidText};
use framestride_shapes::spec::Spec;

/// A spec of one frame, with the keys that `more` adds to it.
fn read(tokens: u32, text: u32, heads: u32, head_dim: u32, more: &str) -> Result<Spec, String> {
    let text = if text == 0 { String::new() } else { format!("[text]\ntokens = {text}\n") };
    let spec = format!(
        "name = \"large\"\n[video]\nframes = 1\ntokens_per_frame = {tokens}\n{text}[attention]\nheads = {heads}\nhead_dim = {head_dim}\n\
         [masks.spatial]\nhalf_width = {tokens}\n[masks.temporal]\nhalf_width = 1\n{more}"
    );
    Spec::parse("large.toml", &spec).map_err(|error| error.to_string())
}

#[track_caller]
fn refused(result: Result<Spec, String>, limit: &str) {
    let message = result.expect_err("it is too large");
    assert!(message.contains(limit), "{message}\n  does not say\n{limit}");
}

/// All that the kernels ask of a layout, at the ends of its rows: an overflow panics here.
fn ask(layout: &Layout) {
    for head in HeadType::ALL {
        let none = ValidText { before: 0, after: 0 };
        for valid in [none, layout.all_text()] {
            for row in [0, layout.sequence() / 2, layout.sequence() - 1] {
                assert_eq!(layout.model_row(head, layout.packed_row(head, row, valid), valid), row);
                let first = row / 192 * 192;
                let range = layout.range_visible(head, first, 192, valid.sum());
                let tiles = layout.key_tiles(range, 176, 8);
                for index in [0, tiles.tiles / 2, tiles.tiles.saturating_sub(1)] {
                    assert!(tiles.first_row(index, 176) + 176 <= layout.packed_rows());
                    range.sees_all(tiles.first_row(index, 176), 176);
                }
            }
        }
        for position in [0, layout.video_tokens() - 1] {
            layout.temporal_patches(position, layout.frames.value - 1);
        }
    }
    let last = layout.sampled_video_row(u64::MAX, u32::MAX, 1023, Divisor::new(1024));
    assert!(last < layout.video_tokens());
}

#[test]
fn bytes_of_a_packed_head_are_counted_in_32_bits() {
    for (head_dim, most) in [(64, 33_554_232), (128, 16_777_016)] {
        let limit = format!("a sequence of at most {most} tokens with head_dim {head_dim}");
        for text in [0, 1, 5000] {
            let spec = read(most - text, text, 1, head_dim, "").unwrap_or_else(|error| panic!("{error}"));
            let bytes = u64::from(spec.layout.packed_rows()) * u64::from(head_dim) * 2;
            assert!(u32::try_from(bytes).is_ok(), "{bytes}");
            ask(&spec.layout);
            // Without a walk over 10^10 tiles. Each query tile is looked at once, so that a
            // description of any spec takes some milliseconds.
            let dense = spec.tile_counts(Arch::default(), HeadType::Dense);
            assert!(dense.query_tiles < 175_000, "{} query tiles", dense.query_tiles);
            assert_eq!(
                dense.full + dense.edge,
                dense.query_tiles * u64::from(most.div_ceil(spec.tiles(Arch::default()).key_rows))
            );
            assert!(spec.tile_counts(Arch::default(), HeadType::Temporal).visited() < dense.visited());
            for above in [1, 7, 8] {
                refused(read(most - text + above, text, 1, head_dim, ""), &limit);
            }
        }
    }
    // Frames and tokens per frame may each be what no product of them may.
    refused(read(33_554_431, 0, 1, 64, ""), "33554232");
}

#[test]
fn rows_of_all_heads_are_counted_in_32_bits() {
    for (tokens, text) in [(1, 0), (65_336, 5), (1_000_000, 256), (16_777_016, 0)] {
        let layout = read(tokens, text, 1, 128, "").unwrap_or_else(|error| panic!("{error}")).layout;
        let most = (u32::MAX / layout.packed_rows()).min(65_535);
        let spec = read(tokens, text, most, 128, "").unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(spec.most_launch_heads(), most);
        assert!(most.checked_mul(layout.packed_rows()).is_some());
        // Partial results of the finest profiling, and the whole workspace.
        let groups =
            read(tokens, text, most, 128, "[profile]\nrows = 1024\n").map_or(1, |spec| spec.partials(32).groups);
        assert!(most.checked_mul(groups * 32).is_some());
        assert!(spec.workspace(1, most, 32).bytes > u64::from(most) * u64::from(layout.packed_rows()) * 3 * 256);
        refused(read(tokens, text, most + 1, 128, ""), &most.to_string());
    }
}

#[test]
fn tables_of_each_head_are_counted_in_32_bits() {
    let rope = "[rope]\npairs = \"half\"\ntext = true\nper_head = true\n";
    for (heads, head_dim) in [(1, 128), (24, 128), (40, 64)] {
        let most = u32::MAX / (heads * (head_dim / 2));
        let largest =
            most.min(if head_dim == 64 { 33_554_232 } else { 16_777_016 }).min(u32::MAX / heads - PAD_ROWS - 8);
        let spec = read(largest - 7, 7, heads, head_dim, rope).unwrap_or_else(|error| panic!("{error}"));
        assert!(u64::from(spec.layout.sequence()) * u64::from(heads * (head_dim / 2)) <= u64::from(u32::MAX));
        let message = read(largest - 6, 7, heads, head_dim, rope).expect_err("it is too large");
        assert!(message.contains("at most"), "{message}");
    }
}
