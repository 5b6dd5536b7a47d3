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

use framestride_shapes::layout::{Divisor, HeadType, Layout, TextPosition};
use proptest::prelude::*;

/// Cases are cheap and the edges of layouts many.
fn cases() -> ProptestConfig {
    ProptestConfig::with_cases(2000)
}

/// Layouts of up to about 200 tokens, with everything that a layout can have.
fn layouts() -> impl Strategy<Value = Layout> {
    (1..=7u32, 1..=25u32, prop_oneof![Just(0), 1..=30u32], any::<bool>()).prop_flat_map(
        |(frames, tokens_per_frame, text_tokens, first)| {
            let video = frames * tokens_per_frame;
            // Narrow bands have the most edges.
            let width = move || prop_oneof![1..=video, 1..=video.div_ceil(4), Just(video)];
            (0..frames, width(), width()).prop_map(move |(sink_frames, spatial_half_width, temporal_half_width)| {
                Layout {
                    frames: Divisor::new(frames),
                    tokens_per_frame: Divisor::new(tokens_per_frame),
                    text_tokens,
                    text_position: if first { TextPosition::First } else { TextPosition::Last },
                    sink_frames,
                    spatial_half_width,
                    temporal_half_width,
                }
            })
        },
    )
}

/// A layout and a valid length of its text.
fn layouts_with_text() -> impl Strategy<Value = (Layout, u32)> {
    layouts().prop_flat_map(|layout| (Just(layout), 0..=layout.text_tokens))
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
