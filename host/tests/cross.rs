//! Specs that are shipped nowhere, built on the spot: the cross product of what a spec can say, sampled so that every pair of
//! values of any two keys occurs together in some spec (a pairwise covering, found greedily from a fixed seed).
//!
//! Each spec runs three layers, so that the pairs also meet dense, given and profiled types, random and rising scores, all lengths
//! of text and all arrangements. Frame sizes are odd, so that every tile is cut somewhere. Sequences have 60 to 400 tokens.

use std::fmt::Write;

use framestride::place::Arrangement;
use framestride::shapes::spec::Spec;
use framestride::verify::{Case, CaseContent, CaseText, CaseTypes, Effort, verify_case};
use framestride::{Device, Kernels, Module};
use rand::{RngExt, SeedableRng};
use rand_chacha::ChaCha8Rng;
use rayon::prelude::*;

/// What a spec can say: the keys of a table, and the values each may have.
const FACTORS: [&[&str]; 10] = [
    &["head_dim = 64", "head_dim = 128"],
    &["dtype = \"bf16\"", "dtype = \"f16\""],
    &["", "rms head", "rms heads", "layer head", "layer heads"],
    &["", "interleaved", "half"],
    &["text = false", "text = true"],
    &["per_head = false", "per_head = true"],
    &["", "first", "last"],
    &["frames = 0", "frames = 1", "frames = 2"],
    &["3 37", "7 51", "4 19", "5 73"],
    &["batch = 1\nheads = 3", "batch = 2\nheads = 1", "batch = 2\nheads = 2"],
];

type Choice = [usize; FACTORS.len()];

/// Rows that hold every pair of values. Each row is the best of 200 random ones at covering what is still missing.
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

/// The spec of one row.
fn toml(index: usize, row: &Choice) -> String {
    let value = |factor: usize| FACTORS[factor][row[factor]];
    let (frames, tokens) = value(8).split_once(' ').unwrap();
    let mut text = format!("name = \"cross_{index}\"\n[video]\nframes = {frames}\ntokens_per_frame = {tokens}\n");
    if !value(6).is_empty() {
        write!(text, "[text]\ntokens = 21\nposition = \"{}\"\n", value(6)).unwrap();
    }
    write!(text, "[attention]\n{}\n{}\n{}\n", value(0), value(1), value(9)).unwrap();
    if let Some((kind, over)) = value(2).split_once(' ') {
        write!(text, "[qk_norm]\nkind = \"{kind}\"\nover = \"{over}\"\neps = 1e-5\n").unwrap();
    }
    if !value(3).is_empty() {
        // Rotated text needs text.
        let rotates_text = if value(6).is_empty() { "text = false" } else { value(4) };
        write!(text, "[rope]\npairs = \"{}\"\n{rotates_text}\n{}\n", value(3), value(5)).unwrap();
    }
    // A narrow band and a wide one.
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
            let kernels =
                Kernels::for_spec(&format!("cross_{index}"), &text).unwrap_or_else(|error| panic!("{text}\n{error}"));
            let module = Module::load(&Device::emulator(), &kernels).unwrap();
            let has_text = module.spec().layout.text_tokens > 0;
            let lengths = [CaseText::Full, CaseText::Partial, CaseText::Empty];
            let arrangements = [TokensFirst, HeadsFirst, PackedQkv, Unaligned];
            let cases = [CaseTypes::Mixed, CaseTypes::Profiled, CaseTypes::Dense].into_iter().enumerate();
            cases
                .flat_map(|(number, types)| {
                    let case = Case {
                        types,
                        text: if has_text { lengths[(index + number) % 3] } else { CaseText::Full },
                        inputs: arrangements[(index + number) % 4],
                        out: arrangements[(index / 4 + number) % 4],
                        content: [CaseContent::Random, CaseContent::Rising][(index + number) % 2],
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
