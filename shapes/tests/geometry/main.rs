//! Properties of the geometry that kernels and host share.
//!
//! On random small layouts, each is compared with the rule in its naive form (`rule`). The same
//! code runs on the shipped shapes and on the largest ones, where an overflow would panic.

mod blocks;
mod density;
mod image;
mod layout;
mod rule;
mod tiling;

use framestride_shapes::layout::{Divisor, HeadType, Layout, ValidText};
use proptest::prelude::*;

/// Cases are cheap and the edges of layouts many.
fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(2000)
}

/// Layouts of up to about 200 tokens, with everything that a layout can have.
fn layouts() -> impl Strategy<Value = Layout> {
    let text = || prop_oneof![Just(0), 1..=30u32];
    (1..=7u32, 1..=25u32, text(), text()).prop_flat_map(|(frames, tokens_per_frame, before, after)| {
        let video = frames * tokens_per_frame;
        // Narrow bands have the most edges.
        let width = move || prop_oneof![1..=video, 1..=video.div_ceil(4), Just(video)];
        (0..frames, width(), width()).prop_map(move |(sink_frames, spatial_half_width, temporal_half_width)| Layout {
            frames: Divisor::new(frames),
            tokens_per_frame: Divisor::new(tokens_per_frame),
            before,
            after,
            sink_frames,
            spatial_half_width,
            temporal_half_width,
        })
    })
}

/// A layout and how much of its text is valid.
fn layouts_with_text() -> impl Strategy<Value = (Layout, ValidText)> {
    layouts().prop_flat_map(|layout| {
        let valid = (0..=layout.before, 0..=layout.after).prop_map(|(before, after)| ValidText { before, after });
        (Just(layout), valid)
    })
}

fn heads() -> impl Strategy<Value = HeadType> {
    prop::sample::select(HeadType::ALL.to_vec())
}

/// The shipped shapes.
fn shipped() -> impl Iterator<Item = framestride_shapes::spec::Spec> {
    framestride_shapes::models().iter().map(|(name, text)| match framestride_shapes::spec::Spec::parse(name, text) {
        Ok(spec) => spec,
        Err(error) => panic!("{error}"),
    })
}
