//! Densities by formula and by counting.

use framestride_shapes::density::{half_width_of_density, least_density, visible_pairs, visible_pairs_of_width};
use framestride_shapes::layout::{Divisor, HeadType, Layout};
use proptest::prelude::*;

use crate::{cases, layouts, rule, shipped};

/// Visible pairs, one after the other.
fn count(layout: &Layout, head: HeadType, half_width: u32) -> u128 {
    let rows = || 0..layout.sequence();
    let sees = |query, key| rule::sees_with(layout, head, half_width, query, key, layout.all_text());
    rows().map(|query| rows().filter(|&key| sees(query, key)).count() as u128).sum()
}

fn masks() -> impl Strategy<Value = HeadType> {
    prop::sample::select(vec![HeadType::Spatial, HeadType::Temporal])
}

proptest! {
    #![proptest_config(cases())]

    #[test]
    fn formula_is_the_count(layout in layouts(), head in prop::sample::select(HeadType::ALL.to_vec())) {
        prop_assert_eq!(visible_pairs(&layout, head), count(&layout, head, layout.half_width(head)));
    }

    #[test]
    fn widths_grow(layout in layouts(), head in masks()) {
        let pairs = |half_width| visible_pairs_of_width(&layout, head, half_width);
        for half_width in 2..=layout.video_tokens() {
            prop_assert!(pairs(half_width - 1) <= pairs(half_width));
        }
        prop_assert_eq!(pairs(layout.video_tokens()), visible_pairs(&layout, HeadType::Dense));
    }

    /// No width counted one by one is nearer, and no smaller one as near.
    #[test]
    fn solved_width_is_the_nearest(layout in layouts(), head in masks(), density in 0.0..=1.0f64) {
        let wanted = density * f64::from(layout.sequence()).powi(2);
        let distance = |half_width| (visible_pairs_of_width(&layout, head, half_width) as f64 - wanted).abs();
        let solved = half_width_of_density(&layout, head, density);
        for half_width in 1..=layout.video_tokens() {
            let nearer = distance(half_width) < distance(solved);
            let smaller = half_width < solved && distance(half_width) == distance(solved);
            prop_assert!(!nearer && !smaller, "{half_width} is nearer than {solved} to {density}");
        }
    }

    #[test]
    fn least_density_is_the_narrowest_mask(layout in layouts(), head in masks()) {
        let least = count(&layout, head, 1) as f64 / f64::from(layout.sequence()).powi(2);
        prop_assert_eq!(least_density(&layout, head), least);
        prop_assert_eq!(half_width_of_density(&layout, head, least), 1);
    }
}

/// Exactly between two widths the smaller is taken. Four tokens see 4, 10, 14 or 16 pairs.
#[test]
fn ties_go_to_the_smaller_width() {
    let layout = Layout {
        frames: Divisor::new(1),
        tokens_per_frame: Divisor::new(4),
        before: 0,
        after: 0,
        sink_frames: 0,
        spatial_half_width: 1,
        temporal_half_width: 1,
    };
    let pairs: Vec<u128> = (1..=4).map(|width| visible_pairs_of_width(&layout, HeadType::Spatial, width)).collect();
    assert_eq!(pairs, [4, 10, 14, 16]);
    // 7 / 16, 12 / 16 and 15 / 16 are exact in binary.
    assert_eq!(
        [7.0, 12.0, 15.0].map(|wanted| half_width_of_density(&layout, HeadType::Spatial, wanted / 16.0)),
        [1, 2, 3]
    );
    assert_eq!(
        [7.5, 12.5, 15.5].map(|wanted| half_width_of_density(&layout, HeadType::Spatial, wanted / 16.0)),
        [2, 3, 4]
    );
}

/// A shape of full size has the density that it asks for, but for half a token. One more token of
/// half width adds at most two pairs for each row.
#[test]
fn shipped_densities_are_met() {
    use framestride_shapes::spec::Width;
    for spec in shipped().filter(|spec| spec.layout.sequence() > 5_000) {
        for (head, width) in [(HeadType::Spatial, spec.spatial), (HeadType::Temporal, spec.temporal)] {
            if let Width::Density(wanted) = width {
                let density = spec.density(head);
                let half_token = 1.0 / f64::from(spec.layout.sequence());
                assert!((density - wanted).abs() <= half_token, "{} {head:?}: {density}", spec.name);
            }
        }
    }
}

/// Dense arithmetic of one layer, TFLOP, as the literature counts it: 4 S² heads head_dim.
#[test]
fn arithmetic_of_known_models() {
    for (name, expected) in [
        ("cogvideox_1_5_5b_768x1360", 25.0),
        ("hunyuan_video_720p", 174.2),
        ("minimax_h3_5s_768x1344", 40.8),
        ("minimax_h3_14s_768x1344", 310.4),
        ("wan_14b_720p", 117.1),
        ("wan_2_2_ti2v_5b_704x1280", 9.1),
    ] {
        let spec = shipped().find(|spec| spec.name == name).expect("a shipped spec");
        let dense = spec.flops(HeadType::Dense) * u128::from(spec.heads);
        assert!((dense as f64 / 1e12 - expected).abs() < 0.05, "{name}: {dense}");
        let sparse = spec.flops(HeadType::Spatial) as f64 / spec.flops(HeadType::Dense) as f64;
        assert!((sparse - spec.density(HeadType::Spatial)).abs() < 1e-12);
    }
}
