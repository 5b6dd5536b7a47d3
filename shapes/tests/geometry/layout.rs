//! The packed order and what its rows see.

use framestride_shapes::arch::Arch;
use framestride_shapes::fragment::{seen_keys, thread_keys};
use framestride_shapes::image::ATOM_ROWS;
use framestride_shapes::layout::{Divisor, HeadType, Layout, PAD_ROWS, ValidText, Visible};
use framestride_shapes::numbers::Numbers;
use proptest::prelude::*;

use crate::rule::{self, Token};
use crate::{cases, heads, layouts, layouts_with_text, shipped};

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn packed_order_is_a_bijection((layout, valid) in layouts_with_text(), head in heads()) {
        let mut seen = vec![false; layout.sequence() as usize];
        for row in 0..layout.sequence() {
            let packed = layout.packed_row(head, row, valid);
            prop_assert!(packed < layout.sequence(), "row {row} is packed at {packed}");
            prop_assert!(!core::mem::replace(&mut seen[packed as usize], true), "two rows are packed at {packed}");
            prop_assert_eq!(layout.model_row(head, packed, valid), row);
        }
    }

    /// Valid text, sinks, body, invalid text; video tokens by position, text in order.
    #[test]
    fn packed_order_is_as_documented((layout, valid) in layouts_with_text(), head in heads()) {
        let rank = |packed| match rule::token(&layout, layout.model_row(head, packed, valid)) {
            Token::Before(text) if text < valid.before => (0, i64::from(text)),
            Token::After(text) if text < valid.after => (1, i64::from(text)),
            Token::Video(frame, place) if frame < layout.sink_frames => (2, rule::position(&layout, head, frame, place)),
            Token::Video(frame, place) => (3, rule::position(&layout, head, frame, place)),
            Token::Before(text) => (4, i64::from(text)),
            Token::After(text) => (5, i64::from(text)),
        };
        for packed in 1..layout.sequence() {
            prop_assert!(rank(packed - 1) < rank(packed), "packed rows {} and {packed}", packed - 1);
        }
        let rows = layout.packed_rows();
        prop_assert!(rows.is_multiple_of(ATOM_ROWS) && rows >= layout.sequence() + PAD_ROWS);
    }

    /// Queries: valid text, video by position, invalid text.
    #[test]
    fn query_order_is_as_documented((layout, valid) in layouts_with_text(), head in heads()) {
        for packed in 0..layout.sequence() {
            match rule::token(&layout, layout.query_order().model_row(head, packed, valid)) {
                Token::Before(text) if text < valid.before => prop_assert_eq!(packed, text),
                Token::After(text) if text < valid.after => prop_assert_eq!(packed, valid.before + text),
                Token::Before(text) => prop_assert_eq!(packed, layout.video_tokens() + valid.after + text),
                Token::After(text) => prop_assert_eq!(packed, layout.video_tokens() + layout.before + text),
                Token::Video(frame, place) => {
                    prop_assert_eq!(i64::from(packed - valid.sum()), rule::position(&layout, head, frame, place))
                }
            }
        }
    }

    #[test]
    fn visible_is_the_rule((layout, valid) in layouts_with_text(), head in heads()) {
        let live = valid.sum() + layout.video_tokens();
        for query in 0..live {
            let visible = layout.visible(head, query, valid.sum());
            prop_assert!(visible.prefix <= visible.start && visible.start <= visible.end && visible.end <= live);
            let query_row = layout.query_order().model_row(head, query, valid);
            for key in 0..layout.sequence() {
                let key_row = layout.model_row(head, key, valid);
                let expected = rule::sees(&layout, head, query_row, key_row, valid);
                prop_assert_eq!(visible.sees(key), expected, "query {} and key {}", query, key);
            }
        }
    }

    #[test]
    fn temporal_patches_are_the_rule(layout in layouts()) {
        let rows = |video: u32| layout.before + video;
        for query in 0..layout.video_tokens() {
            let position = query % layout.tokens_per_frame.value * layout.frames.value + query / layout.tokens_per_frame.value;
            for frame in layout.sink_frames..layout.frames.value {
                let [start, end] = layout.temporal_patches(position, frame);
                prop_assert!(start <= end && end <= layout.tokens_per_frame.value);
                for patch in 0..layout.tokens_per_frame.value {
                    let key = rows(frame * layout.tokens_per_frame.value + patch);
                    let expected = rule::sees(&layout, HeadType::Temporal, rows(query), key, layout.all_text());
                    prop_assert_eq!((start..end).contains(&patch), expected, "query {}, frame {}, {}", query, frame, patch);
                }
            }
        }
    }

    /// Rows of invalid text and padding see no invalid key either.
    #[test]
    fn dead_rows_see_all_live_keys((layout, valid) in layouts_with_text(), head in heads()) {
        let live = valid.sum() + layout.video_tokens();
        for query in live..layout.packed_rows() {
            let visible = layout.visible(head, query, valid.sum());
            for key in 0..layout.packed_rows() {
                prop_assert_eq!(visible.sees(key), key < live);
            }
        }
    }

    /// `any` is the hull of the rows' runs and `all` their intersection.
    #[test]
    fn ranges_are_unions_and_intersections(
        (layout, valid) in layouts_with_text(),
        head in heads(),
        first in 0..240u32,
        rows in 1..=200u32,
    ) {
        let range = layout.range_visible(head, first, rows, valid.sum());
        let live_rows = first..(first + rows).min(valid.sum() + layout.video_tokens());
        prop_assert_eq!(range.live, !live_rows.is_empty());
        prop_assert_eq!(range.prefix, valid.sum() + layout.sink_tokens());
        if !range.live {
            return Ok(());
        }
        let runs: Vec<_> = live_rows.map(|row| layout.visible(head, row, valid.sum())).collect();
        prop_assert_eq!(Some(range.any_start), runs.iter().map(|run| run.start).min());
        prop_assert_eq!(Some(range.any_end), runs.iter().map(|run| run.end).max());
        let all_start = runs.iter().map(|run| run.start).max();
        prop_assert_eq!(Some(range.all_start), all_start.map(|start| if start <= range.prefix { 0 } else { start }));
        prop_assert_eq!(Some(range.all_end), runs.iter().map(|run| run.end).min());
    }

    /// One draw in each stratum, so all rows differ.
    #[test]
    fn samples_stay_in_their_strata(layout in layouts(), seed: u64, head in 0..100u32, samples in 1..=64u32) {
        let video = layout.video_tokens();
        let samples = samples.min(video);
        for index in 0..samples {
            let row = layout.sampled_video_row(seed, head, index, Divisor::new(samples));
            let stratum = index * video / samples..(index + 1) * video / samples;
            prop_assert!(stratum.contains(&row), "sample {index} of {samples} is row {row}, outside {stratum:?}");
        }
    }
}

/// Seeds, heads and strata each change the draw, and a stratum's rows are drawn about equally
/// often.
#[test]
fn samples_are_uniform() {
    let layout = Layout {
        frames: Divisor::new(8),
        tokens_per_frame: Divisor::new(8),
        before: 0,
        after: 0,
        sink_frames: 0,
        spatial_half_width: 1,
        temporal_half_width: 1,
    };
    let mut counts = [0u32; 64];
    for seed in 0..100 {
        for head in 0..40 {
            for index in 0..4 {
                counts[layout.sampled_video_row(seed, head, index, Divisor::new(4)) as usize] += 1;
            }
        }
    }
    // 4000 draws of 16 rows in each stratum: 250 each, with a standard deviation of 15.3; five of
    // them either way.
    let expected = 174..=326;
    assert!(counts.iter().all(|count| expected.contains(count)), "{counts:?}");
}

/// The widest layout that a spec may have: every step of the arithmetic is checked for overflow in
/// tests.
#[test]
fn largest_layouts_do_not_overflow() {
    let most = (1u32 << 24) - 257;
    for (frames, tokens_per_frame) in [(most, 1), (1, most), (3, most / 3), (most / 3, 3), (4095, 4096)] {
        let video = frames * tokens_per_frame;
        let text = most - video;
        for sink_frames in [0, 1, frames - 1] {
            let layout = Layout {
                frames: Divisor::new(frames),
                tokens_per_frame: Divisor::new(tokens_per_frame),
                before: text / 2,
                after: text - text / 2,
                sink_frames: sink_frames.min(frames - 1),
                spatial_half_width: video,
                temporal_half_width: video,
            };
            check_ends(&layout);
        }
    }
}

/// Layouts whose sequence is the longest that a spec may have, or a little less.
fn largest_layouts() -> impl Strategy<Value = Layout> {
    // Head dims 128 and 64.
    let most = prop::sample::select(vec![16_777_016u32, 33_554_232]);
    (most, 0..=25u32, any::<[u32; 2]>()).prop_flat_map(|(most, bits, [low, side])| {
        let frames = ((1 << bits) | (low & ((1 << bits) - 1))).min(most);
        let tokens = most / frames;
        let tokens = prop_oneof![Just(tokens), 1..=tokens, tokens.saturating_sub(3).max(1)..=tokens];
        (Just((most, frames)), tokens, any::<[u32; 4]>(), Just(side)).prop_map(
            |((most, frames), tokens, [text, sinks, spatial, temporal], side)| {
                let video = frames * tokens;
                // A number up to `most`. Small numbers are as likely as large ones.
                let up_to = |most: u32, random: u32| (random >> 5 >> (random % 27)) % (most + 1);
                let text = if text % 3 == 0 { most - video } else { up_to(most - video, text) };
                let before = [0, text, up_to(text, side)][side as usize % 3];
                let half_width = |random| if random % 5 == 0 { video } else { 1 + up_to(video - 1, random) };
                Layout {
                    frames: Divisor::new(frames),
                    tokens_per_frame: Divisor::new(tokens),
                    before,
                    after: text - before,
                    sink_frames: if sinks % 4 == 0 { frames - 1 } else { up_to(frames - 1, sinks) },
                    spatial_half_width: half_width(spatial),
                    temporal_half_width: half_width(temporal),
                }
            },
        )
    })
}

proptest! {
    #![proptest_config(cases())]

    /// The same rules at the largest sizes, for random rows and at every end of what they see.
    #[test]
    fn largest_layouts_follow_the_rule(
        layout in largest_layouts(),
        head in heads(),
        text in (0..=4u32, 0..=4u32),
        rows: [u32; 8],
        seed: u64,
    ) {
        let quarters = |all: u32, quarters: u32| (u64::from(all) * u64::from(quarters) / 4) as u32;
        let valid = ValidText { before: quarters(layout.before, text.0), after: quarters(layout.after, text.1) };
        let (sequence, live) = (layout.sequence(), valid.sum() + layout.video_tokens());
        for row in rows.map(|row| row % sequence) {
            let packed = layout.packed_row(head, row, valid);
            prop_assert!(packed < sequence);
            prop_assert_eq!(layout.model_row(head, packed, valid), row);
            let query = layout.query_order().packed_row(head, row, valid);
            prop_assert_eq!(layout.query_order().model_row(head, query, valid), row);
            if query >= live {
                continue;
            }
            let visible = layout.visible(head, query, valid.sum());
            prop_assert!(visible.prefix <= visible.start && visible.start <= visible.end && visible.end <= live);
            let ends = [0, visible.prefix, visible.start, visible.end, live, sequence, row, packed];
            for key in ends.into_iter().chain(rows).flat_map(|end| end.saturating_sub(1)..=end.saturating_add(1)) {
                let key = key % sequence;
                let key_row = layout.model_row(head, key, valid);
                let expected = rule::sees(&layout, head, row, key_row, valid);
                prop_assert_eq!(visible.sees(key), expected, "query {} and key {}", query, key);
                let [query_video, video] = [row, key_row].map(|row| row.wrapping_sub(layout.before));
                let tokens = layout.tokens_per_frame.value;
                let is_body = video < layout.video_tokens() && video / tokens >= layout.sink_frames;
                if head == HeadType::Temporal && query_video < layout.video_tokens() && is_body {
                    let [start, end] = layout.temporal_patches(query - valid.sum(), video / tokens);
                    prop_assert_eq!((start..end).contains(&(video % tokens)), expected, "query {} and key {}", query, key);
                }
            }
        }
        let samples = (1 + rows[0] % 1024).min(layout.video_tokens());
        for index in rows.map(|row| row % samples) {
            let drawn = layout.sampled_video_row(seed, rows[1] % 65535, index, Divisor::new(samples));
            let end = |index: u32| u64::from(index) * u64::from(layout.video_tokens()) / u64::from(samples);
            prop_assert!((end(index)..end(index + 1)).contains(&drawn.into()));
        }
    }
}

#[test]
fn shipped_layouts() {
    for spec in shipped() {
        check_ends(&spec.layout);
    }
}

/// Round trip and visibility at both ends of every group of rows, and at places between.
fn check_ends(layout: &Layout) {
    for head in HeadType::ALL {
        let of = |part: u32, all: u32| [0, all / 2, all][part as usize];
        let lengths =
            (0..9).map(|parts| ValidText { before: of(parts / 3, layout.before), after: of(parts % 3, layout.after) });
        for valid in lengths {
            let (sequence, live) = (layout.sequence(), valid.sum() + layout.video_tokens());
            let ends = [0, valid.sum(), valid.sum() + layout.sink_tokens(), live, sequence];
            let between = (0..97).map(|i| (u64::from(sequence) * i / 97) as u32);
            let rows = ends.into_iter().flat_map(|end| end.saturating_sub(1)..=end).chain(between);
            for packed in rows.filter(|&row| row < sequence) {
                let row = layout.model_row(head, packed, valid);
                assert!(row < sequence);
                assert_eq!(layout.packed_row(head, row, valid), packed, "{layout:?} {head:?} {valid:?}");
                let query_row = layout.query_order().model_row(head, packed, valid);
                let visible = layout.visible(head, packed, valid.sum());
                for key in [0, packed, visible.start, visible.end, visible.start.wrapping_sub(1), sequence - 1] {
                    if key < sequence && packed < live {
                        let key_row = layout.model_row(head, key, valid);
                        let expected = rule::sees(layout, head, query_row, key_row, valid);
                        assert_eq!(visible.sees(key), expected, "{layout:?} {head:?} {valid:?}: {packed} and {key}");
                    }
                }
            }
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    /// Bit by bit, up to the widest tile of wgmma, wherever its first key lies among the bounds.
    #[test]
    fn keys_of_a_fragment(
        bounds in [0..400u32, 0..400, 0..400],
        first in 0..400u32,
        far in any::<bool>(),
        groups in 1..=31u32,
    ) {
        let far = if far { u32::MAX - 1000 } else { 0 };
        let [prefix, start, end] = bounds.map(|bound| bound + far);
        let (visible, first) = (Visible { prefix, start, end }, first + far);
        for lane in 0..32 {
            let bits = seen_keys(visible, first, groups * 8, lane);
            for key in 0..64 {
                let seen = key < groups * 2 && visible.sees(first + lane % 4 * 2 + key / 2 * 8 + key % 2);
                prop_assert_eq!(bits >> key & 1 != 0, seen, "lane {}, key {}", lane, key);
            }
        }
    }

    /// The same tile by whole rows, and of those what a lane has.
    #[test]
    fn keys_of_a_row(bounds in [0..400u32, 0..400, 0..400], first in 0..400u32, far in any::<bool>()) {
        let far = if far { u32::MAX - 1000 } else { 0 };
        let [prefix, start, end] = bounds.map(|bound| bound + far);
        let (visible, first) = (Visible { prefix, start, end }, first + far);
        let keys = visible.keys(first);
        for key in 0..64 {
            prop_assert_eq!(keys >> key & 1 != 0, visible.sees(first + key), "key {}", key);
        }
        for lane in 0..32 {
            prop_assert_eq!(thread_keys(keys, lane), seen_keys(visible, first, 64, lane), "lane {}", lane);
        }
    }
}

proptest! {
    #![proptest_config(cases())]

    /// A divisor divides as `/` and `%` do, around multiples and at the largest numbers too.
    #[test]
    fn divisors_divide(value in prop_oneof![1..=100u32, 1..1u32 << 25], x in 0..1u32 << 31, near in -2..=2i64) {
        let divisor = Divisor::new(value);
        let multiple = i64::from(x / value * value) + near;
        let largest = (1u32 << 31) - 1;
        for x in [x, largest, largest - x % 100, multiple.clamp(0, i64::from(largest)) as u32] {
            prop_assert_eq!(divisor.divide(x), (x / value, x % value), "{} by {}", x, value);
            prop_assert_eq!(divisor.quotient(x), x / value);
            if x + value <= 1 << 31 {
                prop_assert_eq!(divisor.div_ceil(x), x.div_ceil(value), "{} by {}, rounded up", x, value);
            }
        }
        prop_assert_eq!(Divisor::from_parts(divisor.parts()), divisor);
    }
}

/// Kernels get the geometry of a spec as numbers, and half widths at launch.
#[test]
fn numbers_hold_the_layout() {
    for (arch, spec) in Arch::ALL.into_iter().flat_map(|arch| super::shipped().map(move |spec| (arch, spec))) {
        let numbers = Numbers::of(&spec, arch);
        let half_widths = [spec.layout.spatial_half_width, spec.layout.temporal_half_width];
        assert_eq!(numbers.layout().with_half_widths(half_widths), spec.layout, "{}", spec.name);
        assert_eq!(numbers.partials(spec.head_dim, 3), spec.partials(3), "{}", spec.name);
        let names: Vec<String> = numbers.literals().into_iter().map(|(name, _)| name).collect();
        let unique: std::collections::BTreeSet<&String> = names.iter().collect();
        assert_eq!(unique.len(), names.len(), "two literals have one name: {names:?}");
    }
}
