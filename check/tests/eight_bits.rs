//! Attention in 8 bits, computed by a plain program as the kernels compute it, lies within its
//! tolerances. Programs with a mistake do not.

use framestride::shapes::layout::{HeadType, ValidText};
use framestride::shapes::spec::{Dtype, Spec};
use framestride_check::compute_type::{ComputeType, cut_dot};
use framestride_check::reference::{Attended, Center, Head, distance, norm};
use framestride_check::tolerance;

const DIM: usize = 128;
const E4M3: ComputeType = ComputeType::E4m3;

/// A mistake that the program makes.
#[derive(Clone, Copy, Debug, PartialEq, Eq)]
enum Mistake {
    None,
    /// The mean of V is not added to the output.
    MeanIsForgotten,
    /// All products with V stay in one accumulator.
    OneAccumulator,
    /// Weights are rounded, multiplied by 1.4, and rounded again.
    WeightsAreRoundedTwice,
    /// Weights are cut off in place of rounded.
    WeightsAreCut,
    /// The output is divided by the sum of its first tiles' weights.
    SumMissesATile,
    /// Two neighbouring keys of V have changed places.
    KeysAreSwapped,
}

use Mistake::*;

/// The largest e4m3 that is not larger, of a normal number.
fn cut(value: f64) -> f64 {
    let rounded = E4M3.round(value);
    if rounded > value { E4M3.round(rounded * 15.0 / 16.0) } else { rounded }
}

/// A row of attention: its output, rounded to bf16, and its log-sum-exp. `values` are the rounded
/// values of `head`, times their factor.
fn attend(
    head: &Head,
    (values, factor_of_values): (&[f64], f64),
    row: usize,
    scale: f64,
    mistake: Mistake,
) -> (Vec<f64>, f64) {
    let query_scale = scale * std::f64::consts::LOG2_E;
    let query: Vec<f64> = head.queries[row * DIM..][..DIM].iter().map(|x| E4M3.round(x * query_scale)).collect();
    let scores: Vec<f64> = head.keys.chunks(DIM).map(|key| cut_dot(&query, key)).collect();
    let largest = scores.iter().copied().fold(f64::NEG_INFINITY, f64::max);
    let keys = head.mask(HeadType::Dense).key_order();
    let (mut weights, mut factors, mut sum) = (Vec::new(), Vec::new(), 0.0);
    for (tile, keys) in keys.chunks(128).enumerate() {
        // The largest weight of a tile becomes 4. In one accumulator, the row has one offset.
        let own = keys.iter().map(|&key| scores[key]).fold(f64::NEG_INFINITY, f64::max);
        let offset = 2.0 - if mistake == OneAccumulator { largest } else { own };
        let factor = (2.0 - largest - offset).exp2();
        for &key in keys {
            let weight = (scores[key] + offset).exp2();
            if mistake != SumMissesATile || tile > 0 {
                sum += weight * factor;
            }
            weights.push(match mistake {
                WeightsAreRoundedTwice => E4M3.round(E4M3.round(weight) * 1.4) / 1.4,
                WeightsAreCut => cut(weight),
                _ => E4M3.round(weight),
            });
        }
        factors.push(factor);
    }
    let out = (0..DIM).map(|channel| {
        let place = |index: usize| if mistake == KeysAreSwapped { index ^ 1 } else { index };
        let column: Vec<f64> = (0..keys.len()).map(|index| values[keys[place(index)] * DIM + channel]).collect();
        let total = if mistake == OneAccumulator {
            cut_dot(&weights, &column)
        } else {
            let tiles = weights.chunks(128).zip(column.chunks(128)).zip(&factors);
            tiles.map(|((weights, values), factor)| factor * cut_dot(weights, values)).sum::<f64>()
        };
        let mean = if mistake == MeanIsForgotten { 0.0 } else { head.center[channel] };
        ComputeType::Bf16.round(total / sum / factor_of_values + mean)
    });
    (out.collect(), (sum.log2() + largest - 2.0) * std::f64::consts::LN_2)
}

/// The generator splitmix64 (Steele, Lea and Flood 2014), and normal numbers from it.
struct Random(u64);

impl Random {
    fn uniform(&mut self) -> f64 {
        self.0 = self.0.wrapping_add(0x9e37_79b9_7f4a_7c15);
        let mut x = self.0;
        x = (x ^ (x >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
        x = (x ^ (x >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
        ((x ^ (x >> 31)) >> 11) as f64 / (1u64 << 53) as f64
    }

    fn normal(&mut self) -> f64 {
        (0..12).map(|_| self.uniform()).sum::<f64>() - 6.0
    }
}

/// A dense head of `keys` tokens, with functions of token and channel that are given a normal
/// number.
struct Content {
    keys: usize,
    query: fn(usize, usize, f64) -> f64,
    key: fn(usize, usize, f64) -> f64,
    value: fn(usize, usize, f64, usize) -> f64,
}

const PLAIN: Content = Content { keys: 1024, query: |_, _, x| x, key: |_, _, x| x, value: |_, _, x, _| x };

/// What was found of some rows.
struct Found {
    /// The worst error of a row, relative to its tolerance.
    worst: f64,
    /// The same of the log-sum-exps.
    worst_sum: f64,
    /// The error of all rows, relative to their size.
    error: f64,
    /// The largest tolerance.
    tolerance: f64,
    /// The error of all rows, relative to what independent roundings are expected to make.
    of_expected: f64,
    outputs: Vec<Vec<f64>>,
}

/// Compares some rows of the program with the reference.
fn compare(content: &Content, mistake: Mistake) -> Found {
    let Content { keys, query, key, value } = *content;
    let text = format!(
        "name = \"eight_bits\"\n[video]\nframes = 4\ntokens_per_frame = {}\n[attention]\nheads = 1\nhead_dim = 128\n
         [masks.spatial]\nhalf_width = 9\n[masks.temporal]\nhalf_width = 9\n",
        keys / 4
    );
    let spec = Spec::parse("eight_bits", &text).unwrap();
    let mut random = Random(17);
    let mut rows = |make: &dyn Fn(usize, usize, f64) -> f64| -> Vec<f64> {
        (0..keys * DIM).map(|i| ComputeType::Bf16.round(make(i / DIM, i % DIM, random.normal()))).collect()
    };
    let rows = [rows(&query), rows(&key), rows(&|token, channel, x| value(token, channel, x, keys))];
    let valid = ValidText { before: 0, after: 0 };
    let scale = 1.0 / (DIM as f64).sqrt();
    let Center { size, most, .. } = Center::new(&spec.layout, valid, &rows[2], DIM);
    let [factor, _] = Center::powers(size, most);
    let plain = Head::new(&spec.layout, Dtype::Bf16.into(), valid, rows, vec![0.0; DIM]);
    let head = plain.rounded(&spec.layout, E4M3, scale * std::f64::consts::LOG2_E);
    let values: Vec<f64> = head.values.iter().map(|x| x * factor).collect();
    let mut found =
        Found { worst: 0.0, worst_sum: 0.0, error: 0.0, tolerance: 0.0, of_expected: 0.0, outputs: Vec::new() };
    let (mut size, mut expected_error) = (0.0, 0.0);
    for row in (0..8).map(|i| i * (keys / 8) + i) {
        let expected: Attended = head.attend(HeadType::Dense, row, scale);
        let (out, lse) = attend(&head, (&values, factor), row, scale, mistake);
        let tolerance = tolerance::attention_row(Dtype::Bf16, E4M3, &expected);
        let error = distance(&out, &expected.out);
        found.worst = found.worst.max(error / norm(&expected.out) / tolerance);
        let sum_error = (lse - expected.lse).exp_m1().abs() / tolerance::weight_sum(E4M3, &expected);
        found.worst_sum = found.worst_sum.max(sum_error);
        found.tolerance = found.tolerance.max(tolerance);
        found.error += error * error;
        size += norm(&expected.out).powi(2);
        expected_error += tolerance::expected_error(Dtype::Bf16, E4M3, &expected).powi(2);
        found.outputs.push(out);
    }
    found.of_expected = (found.error / expected_error).sqrt();
    found.error = (found.error / size).sqrt();
    println!(
        "{mistake:?}: {:.4} of {:.4}, worst {:.3}, sums {:.3}, of expected {:.3}",
        found.error, found.tolerance, found.worst, found.worst_sum, found.of_expected
    );
    found
}

/// Contents that models have, and those that are hard for 8 bits.
const CONTENTS: [(&str, Content); 9] = [
    ("normal", PLAIN),
    ("values of mean 1", Content { value: |_, _, x, _| 1.0 + x, ..PLAIN }),
    ("values of mean 4", Content { value: |_, _, x, _| 4.0 + x, ..PLAIN }),
    ("many keys", Content { keys: 8192, ..PLAIN }),
    ("large scores", Content { query: |_, _, x| 3.0 * x, ..PLAIN }),
    ("small queries", Content { query: |_, _, x| x / 50.0, ..PLAIN }),
    (
        "keys with means and an outlier",
        Content {
            key: |_, channel, x| if channel == 5 { 20.0 * x } else { x + if channel < 16 { 4.0 } else { 0.0 } },
            ..PLAIN
        },
    ),
    ("flat rows", Content { query: |_, _, _| 0.0, value: |_, _, x, _| 1.0 + x, ..PLAIN }),
    (
        "values whose mean changes along the keys",
        Content { keys: 4096, value: |token, _, x, keys| x + if token < keys / 4 { 7.0 } else { -1.0 }, ..PLAIN },
    ),
];

#[test]
fn a_right_program_is_within_its_tolerances() {
    for (name, content) in &CONTENTS {
        let found = compare(content, Mistake::None);
        assert!(found.worst < 1.0 && found.worst_sum < 1.0, "{name}: {} {}", found.worst, found.worst_sum);
        assert!(found.of_expected < tolerance::OF_EXPECTED, "{name}: {}", found.of_expected);
        assert!(found.tolerance < 0.5 * tolerance::BLIND, "{name}: {}", found.tolerance);
    }
}

#[test]
fn mistakes_are_seen() {
    let of = |wanted: &str| CONTENTS.iter().find(|(name, _)| *name == wanted).map(|(_, content)| content).unwrap();
    for (mistake, name) in [
        (MeanIsForgotten, "normal"),
        (MeanIsForgotten, "values of mean 1"),
        (MeanIsForgotten, "values of mean 4"),
        (MeanIsForgotten, "flat rows"),
        (OneAccumulator, "values whose mean changes along the keys"),
        (WeightsAreRoundedTwice, "normal"),
        (WeightsAreRoundedTwice, "many keys"),
        (WeightsAreCut, "many keys"),
        (SumMissesATile, "normal"),
        (SumMissesATile, "values whose mean changes along the keys"),
        (KeysAreSwapped, "normal"),
        (KeysAreSwapped, "keys with means and an outlier"),
    ] {
        let found = compare(of(name), mistake);
        let seen = found.worst > 1.0 || found.worst_sum > 1.0 || found.of_expected > tolerance::OF_EXPECTED;
        assert!(seen, "{mistake:?}, {name}: {} {} {}", found.worst, found.worst_sum, found.of_expected);
    }
}

/// The mean of constant values is that constant, and nothing is left to be rounded.
#[test]
fn constant_values_come_back() {
    for value in [|_: usize, _: usize, _: f64, _: usize| 1.0, |_, channel, _, _| 0.3 + channel as f64] {
        for query in [|_: usize, _: usize, x: f64| x, |_, _, _| 0.0] {
            let found = compare(&Content { query, value, ..PLAIN }, Mistake::None);
            for (channel, out) in found.outputs.iter().flat_map(|row| row.iter().enumerate()) {
                let exact = ComputeType::Bf16.round(value(0, channel, 0.0, 0));
                assert!((out - exact).abs() <= exact / 256.0, "channel {channel}: {out} for {exact}");
            }
        }
    }
}
