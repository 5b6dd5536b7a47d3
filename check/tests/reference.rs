//! The f64 reference is compared with what can be worked out by hand. Inputs that are made for a
//! purpose serve it.

use framestride::shapes::arch::Arch;
use framestride::shapes::layout::{HeadType, ValidText};
use framestride::shapes::spec::{Dtype, Spec};
use framestride::shapes::tiling::{KeyTile, query_tiles};
use framestride_check::compute_type::ComputeType;
use framestride_check::reference::{Head, Mask, Operand, Reference, norm};
use framestride_check::rope::RopeTables;
use framestride_check::tensors::{Inputs, Norm, Tokens, narrow, widen};

fn tiny_specs() -> impl Iterator<Item = Spec> {
    let tiny = framestride::shapes::models().iter().filter(|(name, _)| name.starts_with("tiny_"));
    tiny.map(|(name, text)| Spec::parse(name, text).unwrap())
}

fn spec(name: &str) -> Spec {
    let (_, text) = framestride::shapes::models().iter().find(|(found, _)| *found == name).unwrap();
    Spec::parse(name, text).unwrap()
}

/// Two independent counts agree: pair by pair from the rule, and by the formula of the spec.
#[test]
fn visible_pairs_are_those_of_the_formula() {
    for spec in tiny_specs() {
        for head in HeadType::ALL {
            let mask = Mask::new(&spec.layout, head, spec.layout.all_text());
            assert_eq!(mask.visible_pairs(), spec.visible_pairs(head), "{} {head:?}", spec.name);
        }
    }
}

/// Two independent orders agree: sorted by the rule's positions, and computed by the layout that
/// the kernels use.
#[test]
fn packed_order_is_that_of_the_kernels() {
    for spec in tiny_specs() {
        for head in HeadType::ALL {
            let parts = |all: u32| [0, all / 2, all];
            let sides = |before| parts(spec.layout.after).map(|after| ValidText { before, after });
            for valid in parts(spec.layout.before).into_iter().flat_map(sides) {
                let mask = Mask::new(&spec.layout, head, valid);
                let orders = [(mask.key_order(), spec.layout), (mask.query_order(), spec.layout.query_order())];
                for (order, layout) in orders {
                    for (packed, row) in order.into_iter().enumerate() {
                        let by_layout = layout.model_row(head, packed as u32, valid);
                        assert_eq!(row, by_layout as usize, "{} {head:?} packed row {packed}", spec.name);
                    }
                }
            }
        }
    }
}

/// With Q zero, every seen key has the same weight.
#[test]
fn equal_scores_average_the_seen_values() {
    let spec = spec("tiny_plain");
    let mut inputs = Inputs::random(&spec, 1, 1, 1);
    inputs.q = Tokens::zeros(spec.dtype, inputs.q.shape());
    let head = Reference::new(&spec, &inputs).head(0, 0);
    for head_type in HeadType::ALL {
        for row in [0, 100, 383] {
            let seen: Vec<usize> = (0..head.rows()).filter(|&key| head.mask(head_type).sees(row, key)).collect();
            let attended = head.attend(head_type, row, inputs.scale());
            assert!((attended.lse - (seen.len() as f64).ln()).abs() < 1e-12);
            for (d, out) in attended.out.iter().enumerate() {
                let mean = seen.iter().map(|key| head.values[key * 128 + d]).sum::<f64>() / seen.len() as f64;
                assert!((out - mean).abs() < 1e-12);
            }
        }
    }
}

/// Every other key is the same one, so their weights are rounded alike. With equal values their
/// errors add up, though no two of them are neighbours.
#[test]
fn equal_keys_share_their_rounding_wherever_they_lie() {
    let spec = spec("tiny_plain");
    let mut inputs = Inputs::random(&spec, 1, 1, 2);
    let first = inputs.k.bits[..128].to_vec();
    inputs.k.bits.chunks_exact_mut(256).for_each(|pair| pair[..128].copy_from_slice(&first));
    inputs.v.bits.fill(narrow(spec.dtype, 1.0));
    let head = Reference::new(&spec, &inputs).head(0, 0);
    for row in [0, 101, 383] {
        let attended = head.attend(HeadType::Dense, row, inputs.scale());
        let weight = |key: usize| (inputs.scale() * dot(&head, row, key) - attended.lse).exp();
        let equal: f64 = (0..head.rows()).step_by(2).map(weight).sum();
        let others: f64 = (1..head.rows()).step_by(2).map(|key| weight(key).powi(2)).sum();
        let size = 128f64.sqrt();
        assert!(attended.spread >= (1.0 - 1e-9) * size * equal.hypot(others.sqrt()), "row {row}");
    }
}

/// The product of a query and a key.
fn dot(head: &Head, query: usize, key: usize) -> f64 {
    let (query, key) = (&head.queries[query * 128..][..128], &head.keys[key * 128..][..128]);
    query.iter().zip(key).map(|(q, k)| q * k).sum()
}

/// A norm gives a row mean 0, if it is a layer norm, and mean square 1. Over all heads, it gives
/// them to the whole token.
#[test]
fn norms_normalise() {
    for spec in tiny_specs().filter(|spec| spec.qk_norm.is_some()) {
        let mut inputs = Inputs::random(&spec, 1, spec.heads as usize, 2);
        (inputs.q_norm, inputs.k_norm) = (Norm::default(), Norm::default());
        (inputs.before, inputs.after) = Default::default();
        let reference = Reference::new(&spec, &inputs);
        let over_heads = spec.name == "tiny_heads_sinks" || spec.name == "tiny_text_rope";
        for row in [0, 5, 100] {
            let squares: Vec<f64> = (0..spec.heads as usize)
                .map(|head| norm(&reference.row(Operand::Key, 0, row, head)).powi(2) / f64::from(spec.head_dim))
                .collect();
            let mean = squares.iter().sum::<f64>() / squares.len() as f64;
            // eps makes the mean square a little less.
            assert!((mean - 1.0).abs() < 1e-3, "{}: {squares:?}", spec.name);
            assert_eq!(squares.iter().all(|square| (square - 1.0).abs() < 1e-3), !over_heads, "{}", spec.name);
        }
    }
}

/// Products of rotated rows depend on the distance of their tokens alone, and rotating back undoes
/// it.
#[test]
fn rope_is_relative() {
    let spec = spec("tiny_text_last");
    let tables = RopeTables::from_grid(&spec, 2);
    let row: Vec<f64> = (0..64).map(|d| (d as f64 * 0.7).sin()).collect();
    let turned = |token: usize| {
        let mut row = row.clone();
        tables.rotate(&spec, 2, token, 0, &mut row, 1.0);
        row
    };
    let product = |a: usize, b: usize| turned(a).iter().zip(turned(b)).map(|(a, b)| a * b).sum::<f64>();
    // Frames have 23 tokens, so (0, 0) to (2, 4) is as far as (1, 7) to (3, 11).
    assert!((product(0, 50) - product(30, 80)).abs() < 1e-4);
    assert!((product(0, 50) - product(0, 51)).abs() > 1e-2);
    let mut back = turned(77);
    tables.rotate(&spec, 2, 77, 0, &mut back, -1.0);
    assert!(back.iter().zip(&row).all(|(a, b)| (a - b).abs() < 1e-6));
    assert_eq!(turned(115), row, "text is not rotated");
}

/// With cosines of 0 and sines of 1, the pair (a, b) becomes (-b, a). Channels behind the rotated
/// ones stay, and each batch item has its own tables.
#[test]
fn rope_turns_the_leading_channels_of_each_item() {
    for (pairs, step) in [("interleaved", 8), ("half", 16)] {
        for head_dim in [64, 128] {
            for channels in (step..=head_dim).step_by(step) {
                let text = format!(
                    "name = \"turned\"\n[video]\nframes = 2\ntokens_per_frame = 3\n[attention]\nheads = 1\nhead_dim = {head_dim}\n
                     [rope]\npairs = \"{pairs}\"\nchannels = {channels}\n
                     [masks.spatial]\nhalf_width = 1\n[masks.temporal]\nhalf_width = 1\n"
                );
                let spec = Spec::parse("turned", &text).unwrap();
                let mut inputs = Inputs::random(&spec, 2, 1, 9);
                let tables = inputs.rope.as_mut().unwrap();
                let length = 6 * channels / 2;
                assert_eq!((tables.items, tables.cos.len(), tables.sin.len()), (2, 2 * length, 2 * length));
                // The first item is not turned, and the second is.
                let of_items = |values: [f32; 2]| values.map(|value| vec![value; length]).concat();
                (tables.cos, tables.sin) = (of_items([1.0, 0.0]), of_items([0.0, 1.0]));
                let reference = Reference::new(&spec, &inputs);
                for token in 0..6 {
                    assert_eq!(reference.row(Operand::Query, 0, token, 0), inputs.q.row(0, token, 0));
                    let row = inputs.q.row(1, token, 0);
                    let mut turned = row.clone();
                    for first in 0..channels {
                        let (is_first, second) = match pairs {
                            "half" => (first < channels / 2, first + channels / 2),
                            _ => (first % 2 == 0, first + 1),
                        };
                        if is_first {
                            (turned[first], turned[second]) = (-row[second], row[first]);
                        }
                    }
                    assert_eq!(reference.row(Operand::Query, 1, token, 0), turned, "{text}");
                }
            }
        }
    }
}

#[test]
fn rounding_is_to_nearest_even_and_carries_nan() {
    assert_eq!(widen(Dtype::Bf16, narrow(Dtype::Bf16, 1.0 + 1.0 / 256.0)), 1.0);
    assert_eq!(widen(Dtype::Bf16, narrow(Dtype::Bf16, 1.0 + 3.0 / 256.0)), 1.0 + 4.0 / 256.0);
    assert_eq!(widen(Dtype::F16, narrow(Dtype::F16, 1.0 + 1.0 / 2048.0)), 1.0);
    for dtype in Dtype::ALL {
        assert!(widen(dtype, narrow(dtype, f64::NAN)).is_nan());
    }
}

/// NaN in one key reaches every row that sees it, and no other.
#[test]
fn nan_is_carried_to_those_who_see_it() {
    let spec = spec("tiny_plain");
    let mut inputs = Inputs::random(&spec, 1, 1, 3);
    let poisoned = 200;
    let element = inputs.k.index(0, poisoned, 0);
    inputs.k.bits[element] = narrow(spec.dtype, f64::NAN);
    let head = Reference::new(&spec, &inputs).head(0, 0);
    for row in [0, 150, 199, 250, 383] {
        let out = head.attend(HeadType::Spatial, row, inputs.scale()).out;
        assert_eq!(out[0].is_nan(), head.mask(HeadType::Spatial).sees(row, poisoned), "row {row}");
    }
}

#[test]
fn planted_heads_are_of_their_type() {
    for spec in tiny_specs() {
        let inputs = Inputs::planted(&spec, 1, spec.heads as usize, 4);
        let reference = Reference::new(&spec, &inputs);
        for head in 0..spec.heads {
            let rows = reference.head(0, head as usize);
            let profile = rows.profile(&spec.layout, inputs.scale(), spec.profile.seed, head, spec.profile.rows);
            let planted = if head % 2 == 0 { HeadType::Spatial } else { HeadType::Temporal };
            assert_eq!(profile.head_type(), planted, "{} head {head}: {:?}", spec.name, profile.errors);
        }
    }
}

/// In about an eighth of the rows, the eps of a norm counts. Their mean squares and variances are
/// near eps or zero, for heads and for tokens alike.
#[test]
fn eps_counts_in_random_inputs() {
    for kind in ["rms", "layer"] {
        for eps in ["1e-6", "1e-3"] {
            let text = format!(
                "name = \"eps\"\n[video]\nframes = 4\ntokens_per_frame = 50\n[attention]\nheads = 3\nhead_dim = 64\n
                 [qk_norm]\nkind = \"{kind}\"\nover = \"heads\"\neps = {eps}\n
                 [masks.spatial]\nhalf_width = 9\n[masks.temporal]\nhalf_width = 9\n"
            );
            let spec = Spec::parse("eps", &text).unwrap();
            let eps: f64 = eps.parse().unwrap();
            let inputs = Inputs::random(&spec, 1, 3, 8);
            for tokens in [&inputs.q, &inputs.k] {
                let (mut near, mut zero) = (0, 0);
                for token in 0..200 {
                    let row: Vec<f64> = (0..3).flat_map(|head| tokens.row(0, token, head)).collect();
                    let mean = row.iter().sum::<f64>() / row.len() as f64;
                    let variance = row.iter().map(|x| (x - mean).powi(2)).sum::<f64>() / row.len() as f64;
                    near += usize::from((eps / 8.0..8.0 * eps).contains(&variance));
                    zero += usize::from(norm(&row) == 0.0);
                }
                assert!(near > 5 && zero > 1, "{kind} {eps}: {near} {zero}");
            }
        }
    }
}

/// Sums of the weights that each thread has of a row in a key tile: two keys of each eight. They
/// decide on offsets. The head is dense, without text.
fn thread_sums(spec: &Spec, keys: &[usize], scores: &[f64], tile: &KeyTile) -> [f64; 4] {
    let last = spec.layout.video_tokens().min(tile.first_row + tile.rows);
    let mut sums = [0.0; 4];
    for key in tile.first_row..last {
        sums[((key - tile.first_row) % 8 / 2) as usize] += scores[keys[key as usize]].exp2();
    }
    sums
}

/// The least and the largest sum of a thread's weights in a tile for which no offset is needed. In 8
/// bits, a thread has 32 keys of a tile, whose mean is 1/32 at least.
fn tile_sums(spec: &Spec) -> [f64; 2] {
    match ComputeType::of(spec) {
        ComputeType::Bf16 | ComputeType::F16 => spec.dtype.tile_sums().map(f64::from),
        ComputeType::E4m3 => [1.0, 448.0],
    }
}

/// The attention kernel begins without offsets where the weights of a first tile allow it. For
/// every spec of more than one tile, `verify` has warpgroups for which weights become too large in
/// a later tile.
#[test]
fn sudden_scores_begin_plain_and_outgrow_it() {
    let long = |spec: &Spec| spec.layout.video_tokens() > spec.tiles(Arch::default()).key_rows;
    for spec in tiny_specs().filter(long).chain([spec("demo")]) {
        let [least, most] = tile_sums(&spec);
        let mut inputs = Inputs::sudden(&spec, 1, spec.heads as usize, 6);
        (inputs.before.lengths, inputs.after.lengths) = (Some(vec![0]), Some(vec![0]));
        let head = Reference::new(&spec, &inputs).head(0, 0);
        let mask = head.mask(HeadType::Dense);
        let (queries, keys) = (mask.query_order(), mask.key_order());
        let video = spec.layout.video_tokens() as usize;
        let mut outgrown = 0;
        for tile in query_tiles(&spec.layout, HeadType::Dense, spec.tiles(Arch::default()), 0) {
            for first in
                (tile.first_row as usize..video).step_by(64).take(spec.tiles(Arch::default()).consumers() as usize)
            {
                let sums = |key_tile: &KeyTile| -> Vec<f64> {
                    let scores = |row: usize| head.scores(queries[row], inputs.query_scale());
                    (first..video.min(first + 64))
                        .flat_map(|row| thread_sums(&spec, &keys, &scores(row), key_tile))
                        .collect()
                };
                let (first_tile, others) = tile.key_tiles.split_first().unwrap();
                let starts = sums(first_tile).iter().all(|sum| (least..=most).contains(sum));
                outgrown += usize::from(starts && others.iter().any(|tile| sums(tile).iter().any(|&sum| sum > most)));
            }
        }
        assert!(outgrown > 0, "{}", spec.name);
    }
}

/// Of each 64 queries, one alone cannot do without an offset, or two in different ways. Their
/// weights are too small, too large, or too large later on. They lie in either half of their warp's
/// rows. Every combination occurs.
#[test]
fn lone_rows_are_alone() {
    let long = |spec: &Spec| spec.layout.video_tokens() > spec.tiles(Arch::default()).key_rows;
    for spec in tiny_specs().filter(long).chain([spec("demo")]) {
        let [least, most] = tile_sums(&spec);
        let mut found = std::collections::BTreeSet::new();
        let mut inputs = Inputs::lone(&spec, 1, spec.heads as usize, 6);
        (inputs.before.lengths, inputs.after.lengths) = (Some(vec![0]), Some(vec![0]));
        let reference = Reference::new(&spec, &inputs);
        let video = spec.layout.video_tokens();
        for head in 0..spec.heads as usize {
            let head = reference.head(0, head);
            let mask = head.mask(HeadType::Dense);
            let (queries, keys) = (mask.query_order(), mask.key_order());
            for tile in query_tiles(&spec.layout, HeadType::Dense, spec.tiles(Arch::default()), 0) {
                for first in (tile.first_row..video.min(tile.first_row + tile.rows)).step_by(64) {
                    let mut group = Vec::new();
                    for row in first..video.min(first + 64) {
                        let scores = head.scores(queries[row as usize], inputs.query_scale());
                        let sums = |tile: &KeyTile| thread_sums(&spec, &keys, &scores, tile);
                        let (first_tile, others) = tile.key_tiles.split_first().unwrap();
                        let half = row % 16 / 8;
                        if sums(first_tile).iter().any(|&sum| sum < least) {
                            group.push(("small", half));
                        } else if sums(first_tile).iter().any(|&sum| sum > most) {
                            group.push(("large", half));
                        } else if others.iter().any(|tile| sums(tile).iter().any(|&sum| sum > most)) {
                            group.push(("later", half));
                        }
                    }
                    let alone = group.len() <= 1 || (group.len() == 2 && group[0].0 != group[1].0);
                    assert!(alone, "{}: {group:?}", spec.name);
                    found.extend(group);
                }
            }
        }
        let groups = spec.heads * video.div_ceil(64);
        assert!(found.len() == 6 || groups < 8, "{}: {found:?}", spec.name);
    }
}

/// Both masks hide the highest key from many rows. Weights relative to it vanish in the type, and
/// yet one mask is clearly better.
#[test]
fn a_hidden_key_is_above_all() {
    for spec in tiny_specs().chain([spec("demo")]) {
        let mut inputs = Inputs::hidden(&spec, 1, spec.heads as usize, 7);
        (inputs.before.lengths, inputs.after.lengths) = (Some(vec![0]), Some(vec![0]));
        let reference = Reference::new(&spec, &inputs);
        let vanishing = if spec.dtype == Dtype::F16 { 25.0 } else { 126.0 };
        let highest = (spec.layout.before + spec.layout.video_tokens() - 1) as usize;
        for number in 0..spec.heads {
            let head = reference.head(0, number as usize);
            let hidden = (0..head.rows()).step_by(5).filter(|&row| {
                [HeadType::Spatial, HeadType::Temporal].iter().all(|&mask| {
                    let scores = head.scores(row, inputs.query_scale());
                    let seen = (0..head.rows()).filter(|&key| head.mask(mask).sees(row, key));
                    let most = seen.map(|key| scores[key]).fold(f64::NEG_INFINITY, f64::max);
                    scores[highest] - most > vanishing
                })
            });
            let hidden = hidden.count();
            let profile = head.profile(&spec.layout, inputs.scale(), spec.profile.seed, number, spec.profile.rows);
            let [spatial, temporal] = profile.errors;
            let ratio = spatial.max(temporal) / spatial.min(temporal);
            assert!(hidden > 3 && ratio > 1.2, "{} head {number}: {hidden} {ratio}", spec.name);
        }
    }
}

/// The maxima of key tiles, in the order in which the attention kernel meets them, rise and fall as
/// they should. Many rise by more than a weight may grow before offsets are lowered, and some by
/// more than f32 holds. Some tiles lie below what f32 tells from zero. No mask hides the largest
/// score of most rows.
#[test]
fn rising_scores_rise_and_fall() {
    for spec in tiny_specs().chain([spec("demo")]) {
        let inputs = Inputs::rising(&spec, 1, spec.heads as usize, 5);
        let head = Reference::new(&spec, &inputs).head(0, 0);
        let growth = f64::from(spec.dtype.tile_sums()[1]).log2();
        for head_type in HeadType::ALL {
            let mask = head.mask(head_type);
            let (queries, keys) = (mask.query_order(), mask.key_order());
            let [mut risen, mut overflown, mut vanished, mut kept, mut rows] = [0.0; 5];
            for tile in query_tiles(&spec.layout, head_type, spec.tiles(Arch::default()), spec.layout.text_tokens()) {
                let last = (tile.first_row + tile.rows).min(spec.layout.sequence());
                for row in (tile.first_row.max(spec.layout.text_tokens())..last).step_by(7) {
                    let row = queries[row as usize];
                    let scores = head.scores(row, inputs.query_scale());
                    let (mut largest, mut most, mut least) = (f64::NEG_INFINITY, 0.0f64, 0.0f64);
                    for key_tile in &tile.key_tiles {
                        let rows = key_tile.first_row..(key_tile.first_row + key_tile.rows).min(spec.layout.sequence());
                        let seen = rows.map(|key| keys[key as usize]).filter(|&key| mask.sees(row, key));
                        let max = seen.map(|key| scores[key]).fold(f64::NEG_INFINITY, f64::max);
                        if max.is_finite() && largest.is_finite() {
                            (most, least) = (most.max(max - largest), least.min(max - largest));
                        }
                        largest = largest.max(max);
                    }
                    rows += 1.0;
                    risen += f64::from(most > growth);
                    overflown += f64::from(most > 128.0);
                    vanished += f64::from(least < -126.0);
                    kept += f64::from(scores.iter().all(|score| score - largest < 22.0));
                }
            }
            // Through a mask most rows meet their own key in their first tile, and its score is the
            // largest. Some still rise, but no fixed share of them.
            let is_dense = head_type == HeadType::Dense;
            let [risen, overflown, vanished, kept] = [risen, overflown, vanished, kept].map(|count| count / rows);
            let shares = format!("{} {head_type:?}: {risen:.2} {overflown:.2} {vanished:.2} {kept:.2}", spec.name);
            assert!(vanished > 0.05 && kept > if is_dense { 0.95 } else { 0.75 }, "{shares}");
            assert!(!is_dense || (risen > 0.2 && overflown > 0.05), "{shares}");
        }
    }
}
