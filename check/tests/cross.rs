//! Specs that are shipped nowhere, built on the spot. They sample the cross product of what a spec
//! can say. Every pair of values of any two keys occurs together in some spec: a pairwise covering,
//! found greedily from a fixed seed.
//!
//! Each spec runs three layers. So the pairs also meet dense, given and profiled types, random and
//! rising scores, all lengths of text on each side and all arrangements. Frame sizes are odd, so that every tile
//! is cut somewhere. Sequences have 60 to 400 tokens.

use std::fmt::Write;
use std::sync::Arc;

use framestride::shapes::spec::Spec;
use framestride::{Device, Module};
use framestride_check::device_tensors::{Arrangement, Placement};
use framestride_check::layer_run::{HeadResult, run_layer};
use framestride_check::tensors::{Inputs, narrow};
use framestride_check::verify::{Case, CaseContent, CaseText, CaseTypes, Effort, verify, verify_case};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// What a spec can say: the values that each key may have.
const FACTORS: [&[&str]; 11] = [
    &["head_dim = 64", "head_dim = 128"],
    &["dtype = \"bf16\"", "dtype = \"f16\""],
    &["", "rms head", "rms heads", "layer head", "layer heads"],
    &["", "interleaved", "half"],
    &["text = false", "text = true"],
    &["per_head = false", "per_head = true"],
    &["", "first", "last", "both"],
    &["frames = 0", "frames = 1", "frames = 2"],
    &["3 37", "7 51", "4 19", "5 73"],
    &["batch = 1\nheads = 3", "batch = 2\nheads = 1", "batch = 2\nheads = 2"],
    &["", "channels = 16", "channels = 48"],
];

type Choice = [usize; FACTORS.len()];

/// Rows that hold every pair of values. Each row is the best of 200 random ones at covering what is
/// still missing.
fn pairwise() -> Vec<Choice> {
    let mut missing: Vec<(usize, usize, usize, usize)> = Vec::new();
    for (a, first) in FACTORS.iter().enumerate() {
        for (b, second) in FACTORS.iter().enumerate().skip(a + 1) {
            missing.extend((0..first.len()).flat_map(|x| (0..second.len()).map(move |y| (a, x, b, y))));
        }
    }
    let mut generator = ChaCha8Rng::seed_from_u64(1);
    let mut rows = Vec::new();
    while !missing.is_empty() {
        let random = |generator: &mut ChaCha8Rng| -> Choice {
            std::array::from_fn(|factor| generator.random_range(0..FACTORS[factor].len()))
        };
        let covered = |row: &Choice| missing.iter().filter(|&&(a, x, b, y)| row[a] == x && row[b] == y).count();
        let best = (0..200).map(|_| random(&mut generator)).max_by_key(covered).unwrap();
        missing.retain(|&(a, x, b, y)| !(best[a] == x && best[b] == y));
        rows.push(best);
    }
    rows
}

/// The kernels of a spec.
fn module(text: &str) -> Arc<Module> {
    let spec = Spec::parse("a spec", text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    Module::load(&Device::emulator(), &spec).unwrap_or_else(|error| panic!("{text}\n{error}"))
}

/// The spec of one row.
fn toml(index: usize, row: &Choice) -> String {
    let value = |factor: usize| FACTORS[factor][row[factor]];
    let (frames, tokens) = value(8).split_once(' ').unwrap();
    let mut text = format!("name = \"cross_{index}\"\n[video]\nframes = {frames}\ntokens_per_frame = {tokens}\n");
    match value(6) {
        "" => {}
        "both" => text += "[before]\ntokens = 12\n[after]\ntokens = 19\n",
        position => write!(text, "[text]\ntokens = 21\nposition = \"{position}\"\n").unwrap(),
    }
    write!(text, "[attention]\n{}\n{}\n{}\n", value(0), value(1), value(9)).unwrap();
    if let Some((kind, over)) = value(2).split_once(' ') {
        write!(text, "[qk_norm]\nkind = \"{kind}\"\nover = \"{over}\"\neps = 1e-5\n").unwrap();
    }
    if !value(3).is_empty() {
        // Rotated text needs text. Of that on both sides, one is rotated.
        let rotates_text = match (value(6), value(4)) {
            ("", _) => "text = false",
            ("both", "text = false") => "before = true",
            ("both", _) => "after = true",
            (_, rotates_text) => rotates_text,
        };
        write!(text, "[rope]\npairs = \"{}\"\n{rotates_text}\n{}\n{}\n", value(3), value(5), value(10)).unwrap();
    }
    // Half widths differ from spec to spec.
    write!(text, "[masks.spatial]\nhalf_width = {}\n[masks.temporal]\nhalf_width_frames = 0.8\n", 2 + 11 * index % 60)
        .unwrap();
    write!(text, "[sink]\n{}\n[profile]\nrows = {}\nseed = {index}\n", value(7), 1 + 24 * (index % 4)).unwrap();
    text
}

#[test]
fn every_pair_of_values_occurs() {
    let rows = pairwise();
    for (index, row) in rows.iter().enumerate() {
        let text = toml(index, row);
        Spec::parse(&format!("cross_{index}"), &text).unwrap_or_else(|error| panic!("{text}\n{error}"));
    }
    assert!(rows.len() < 40, "{} specs take too long", rows.len());
}

#[test]
fn kernels_of_sampled_specs_match_the_reference() {
    use Arrangement::{HeadsFirst, PackedQkv, TokensFirst, Unaligned};
    let seed: u64 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into();
    println!("seed {seed}");
    let failures: Vec<String> = pairwise()
        .par_iter()
        .enumerate()
        .flat_map_iter(|(index, row)| {
            let text = toml(index, row);
            let module = module(&text);
            let layout = module.spec().layout;
            let lengths = [CaseText::Full, CaseText::Partial, CaseText::Empty];
            let arrangements = [TokensFirst, HeadsFirst, PackedQkv, Unaligned];
            let cases = [CaseTypes::Mixed, CaseTypes::Profiled, CaseTypes::Dense].into_iter().enumerate();
            cases
                .flat_map(|(number, types)| {
                    let case = Case {
                        text: [(layout.before, index + number), (layout.after, index + 2 * number)]
                            .map(|(tokens, which)| if tokens > 0 { lengths[which % 3] } else { CaseText::Full }),
                        placement: Placement {
                            inputs: arrangements[(index + number) % 4],
                            text: [(layout.before, index / 2 + number), (layout.after, index / 3 + number)]
                                .map(|(tokens, which)| (tokens > 0 && which % 2 == 1).then(|| arrangements[which % 4])),
                            out: arrangements[(index / 4 + number) % 4],
                        },
                        ..Case::new(types, [CaseContent::Random, CaseContent::Rising][(index + number) % 2])
                    };
                    verify_case(&module, &case, seed, Effort::default())
                        .unwrap_or_else(|error| panic!("{text}\nseed {seed}, {case:?}: {error}"))
                })
                .filter(|check| !check.ok)
                .map(|check| format!("{text}\nseed {seed}: {check:?}"))
                .collect::<Vec<_>>()
        })
        .collect();
    assert!(failures.is_empty(), "{} checks failed, the first:\n{}", failures.len(), failures[0]);
}

/// A key of minus infinity has no weight for queries that are positive there. It stands behind the
/// rotated channels, where a product with a sine of zero would make NaN of it.
#[test]
fn channels_behind_the_rotated_ones_are_carried() {
    for pairs in ["interleaved", "half"] {
        let text = format!(
            "name = \"carried\"\n[video]\nframes = 3\ntokens_per_frame = 50\n[attention]\nheads = 2\nhead_dim = 64\n
             [rope]\npairs = \"{pairs}\"\nchannels = 48\n[masks.spatial]\nhalf_width = 40\n[masks.temporal]\nhalf_width = 40\n"
        );
        let module = module(&text);
        let mut inputs = Inputs::random(module.spec(), 1, 2, 4);
        for row in 0..150 {
            let element = inputs.q.index(0, row, 1) + 50;
            inputs.q.bits[element] = narrow(inputs.q.dtype, 0.5);
        }
        let element = inputs.k.index(0, 70, 1) + 50;
        inputs.k.bits[element] = narrow(inputs.k.dtype, f64::NEG_INFINITY);
        let report = run_layer(&module, &inputs, &[], &|_, _| ()).unwrap().report;
        // No tolerance is known for such a key.
        let is_right = |head: &HeadResult| head.nan_rows == 0 && head.rel_error < 0.02;
        assert!(report.heads.iter().all(is_right), "{pairs}: {report:?}");
    }
}

/// Specs that once met faults, and specs with next to nothing in them. They have one frame, in
/// which both masks have the same tokens, a mask that hides nothing, or one token.
const EDGES: [&str; 4] = [
    "name = \"one_frame\"\n[video]\nframes = 1\ntokens_per_frame = 35\n[attention]\nheads = 2\nhead_dim = 64\n
     [masks.spatial]\nhalf_width = 3\n[masks.temporal]\nhalf_width = 35\n",
    "name = \"one_frame_and_text\"\n[video]\nframes = 1\ntokens_per_frame = 193\n[text]\ntokens = 17\nposition = \"first\"\n
     [attention]\nheads = 2\nhead_dim = 128\ndtype = \"f16\"\nbatch = 2\n[qk_norm]\nkind = \"layer\"\neps = 1e-30\n[rope]\npairs = \"half\"\n
     [masks.spatial]\ndensity = 0.27\n[masks.temporal]\nhalf_width = 2\n[profile]\nrows = 153\nseed = 9223372036854775807\n",
    "name = \"one_mask_dense\"\n[video]\nframes = 2\ntokens_per_frame = 65\n[text]\ntokens = 100\nposition = \"first\"\n
     [attention]\nheads = 2\nhead_dim = 64\nbatch = 3\n[qk_norm]\nkind = \"layer\"\n[rope]\npairs = \"half\"\ntext = true\n
     [masks.spatial]\nhalf_width = 65\n[masks.temporal]\ndensity = 1.0\n[sink]\nframes = 1\n[profile]\nrows = 83\n",
    "name = \"one_token\"\n[video]\nframes = 1\ntokens_per_frame = 1\n[attention]\nheads = 2\nhead_dim = 128\n
     [masks.spatial]\nhalf_width = 1\n[masks.temporal]\nhalf_width = 1\n",
];

/// A spec whose every key is drawn at random, until one is accepted.
fn random_spec(name: &str, generator: &mut ChaCha8Rng) -> String {
    fn pick<'a>(generator: &mut ChaCha8Rng, values: &[&'a str]) -> &'a str {
        values[generator.random_range(0..values.len())]
    }
    loop {
        let (frames, tokens) = (generator.random_range(1..7u32), generator.random_range(1..120u32));
        let mut text = format!("name = \"{name}\"\n[video]\nframes = {frames}\ntokens_per_frame = {tokens}\n");
        let mut rotated = Vec::new();
        if generator.random() {
            for side in ["before", "after"] {
                writeln!(text, "[{side}]\ntokens = {}", generator.random_range(1..50)).unwrap();
                rotated.push(side);
            }
        } else if generator.random() {
            rotated.push("text");
            let position = pick(generator, &["first", "last"]);
            let tokens = generator.random_range(1..100);
            write!(text, "[text]\ntokens = {tokens}\nposition = \"{position}\"\n").unwrap();
        }
        let (dim, dtype) = (pick(generator, &["64", "128"]), pick(generator, &["bf16", "f16"]));
        let (batch, heads) = (generator.random_range(1..4), generator.random_range(1..4));
        write!(text, "[attention]\nheads = {heads}\nbatch = {batch}\nhead_dim = {dim}\ndtype = \"{dtype}\"\n").unwrap();
        if generator.random() {
            let (kind, over) = (pick(generator, &["rms", "layer"]), pick(generator, &["head", "heads"]));
            let eps = pick(generator, &["1e-7", "1e-6", "1e-5", "1e-3"]);
            write!(text, "[qk_norm]\nkind = \"{kind}\"\nover = \"{over}\"\neps = {eps}\n").unwrap();
        }
        if generator.random() {
            let per_head: bool = generator.random();
            let (pairs, step) = [("interleaved", 8), ("half", 16)][generator.random_range(0..2)];
            let channels = step * generator.random_range(1..=128 / step);
            write!(text, "[rope]\npairs = \"{pairs}\"\nper_head = {per_head}\n").unwrap();
            for side in rotated {
                writeln!(text, "{side} = {}", generator.random::<bool>()).unwrap();
            }
            // More than a head of 64 has are refused, and another spec is drawn.
            writeln!(text, "channels = {channels}").unwrap();
        }
        for mask in ["spatial", "temporal"] {
            let width = match generator.random_range(0..4) {
                0 => format!("density = {:.3}", generator.random_range(0.1..=1.0)),
                1 => format!("half_width = {}", [1, 2, frames * tokens][generator.random_range(0..3)]),
                _ => format!("half_width = {}", generator.random_range(1..=frames * tokens)),
            };
            write!(text, "[masks.{mask}]\n{width}\n").unwrap();
        }
        let (sinks, rows) = (generator.random_range(0..frames), generator.random_range(1..200));
        let seed = generator.random_range(0..i64::MAX);
        write!(text, "[sink]\nframes = {sinks}\n[profile]\nrows = {rows}\nseed = {seed}\n").unwrap();
        if Spec::parse(name, &text).is_ok() {
            return text;
        }
    }
}

/// `verify` passes for specs at the edges, and for two random specs.
#[test]
fn edges_and_random_specs_match_the_reference() {
    let seed: u64 = std::time::SystemTime::now().duration_since(std::time::UNIX_EPOCH).unwrap().subsec_nanos().into();
    println!("seed {seed}");
    let mut generator = ChaCha8Rng::seed_from_u64(seed);
    let random = (0..2).map(|index| random_spec(&format!("random_{index}"), &mut generator));
    let specs: Vec<String> = EDGES.into_iter().map(String::from).chain(random).collect();
    let failures: Vec<String> = specs
        .par_iter()
        .flat_map_iter(|text| {
            let module = module(text);
            let report = verify(&module, seed, Effort::default(), &|_, _| ())
                .unwrap_or_else(|error| panic!("{text}\nseed {seed}: {error}"));
            let failed = report.checks.into_iter().filter(|check| !check.ok);
            failed.map(move |check| format!("{text}\nseed {seed}: {check:?}")).collect::<Vec<_>>()
        })
        .collect();
    assert!(failures.is_empty(), "{} checks failed, the first:\n{}", failures.len(), failures[0]);
}
