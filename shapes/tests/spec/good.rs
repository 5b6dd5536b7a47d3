//! Specs that are right.

use std::fmt::Write;

use framestride_shapes::arch::Arch;
use framestride_shapes::layout::{Divisor, HeadType, Layout};
use framestride_shapes::models;
use framestride_shapes::spec::{
    Compute, Dtype, NormKind, NormOver, Pairs, Profile, QkNorm, Rope, Schedule, Spec, SpecSource, Width,
};
use proptest::prelude::*;
use serde_json::{Value, json};

const HUNYUAN: &str = r#"
name = "hunyuan_video_720p"
[video]
frames = 33
tokens_per_frame = 3600
grid = [45, 80]
[text]
tokens = 256
position = "last"
[attention]
heads = 24
head_dim = 128
dtype = "bf16"
batch = 1
[qk_norm]
kind = "rms"
over = "head"
eps = 1e-6
[rope]
pairs = "interleaved"
text = false
per_head = false
[masks.spatial]
density = 0.25
[masks.temporal]
half_width = 15616
[sink]
frames = 0
[profile]
rows = 64
seed = 0
[schedule]
steps = 50
layers = 60
dense_steps = 5
dense_layers = 2
"#;

fn parse(text: &str) -> Spec {
    match Spec::parse("good.toml", text) {
        Ok(spec) => spec,
        Err(error) => panic!("{error}\nin\n{text}"),
    }
}

#[test]
fn every_key_is_read() {
    let spec = parse(HUNYUAN);
    let expected = Spec {
        name: "hunyuan_video_720p".into(),
        layout: Layout {
            frames: Divisor::new(33),
            tokens_per_frame: Divisor::new(3600),
            before: 0,
            after: 256,
            sink_frames: 0,
            spatial_half_width: 15695,
            temporal_half_width: 15616,
        },
        head_dim: 128,
        heads: 24,
        batch: 1,
        dtype: Dtype::Bf16,
        compute: Compute::Dtype,
        largest_error: None,
        grid: Some([45, 80]),
        qk_norm: Some(QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps: 1e-6 }),
        rope: Some(Rope { pairs: Pairs::Interleaved, channels: 128, before: false, after: false, per_head: false }),
        spatial: Width::Density(0.25),
        temporal: Width::Tokens(15616),
        profile: Profile { rows: 64, seed: 0 },
        schedule: Schedule { steps: 50, layers: 60, dense_steps: 5, dense_layers: 2 },
        source: SpecSource { file: "good.toml".into(), text: HUNYUAN.into() },
    };
    assert_eq!(spec, expected);
    assert_eq!(spec.source, expected.source);
    let elsewhere = Spec::parse("elsewhere.toml", &format!("# The same.\n{HUNYUAN}")).expect("a good spec");
    assert_eq!(spec, elsewhere, "neither comments nor names of files count");
    assert_ne!(spec, parse(&HUNYUAN.replace("heads = 24", "heads = 12")));
}

#[test]
fn what_is_not_written_has_its_default() {
    let spec = parse(
        r#"
        name = "least"
        video = { frames = 3, tokens_per_frame = 7 }
        attention = { heads = 2, head_dim = 64 }
        masks.spatial.half_width_frames = 1.5
        masks.temporal.density = 1
        "#,
    );
    let expected = Spec {
        name: "least".into(),
        layout: Layout {
            frames: Divisor::new(3),
            tokens_per_frame: Divisor::new(7),
            before: 0,
            after: 0,
            sink_frames: 0,
            // 10.5, rounded away from zero.
            spatial_half_width: 11,
            temporal_half_width: 21,
        },
        head_dim: 64,
        heads: 2,
        batch: 1,
        dtype: Dtype::Bf16,
        compute: Compute::Dtype,
        largest_error: None,
        grid: None,
        qk_norm: None,
        rope: None,
        spatial: Width::Frames(1.5),
        temporal: Width::Density(1.0),
        // As many as there are.
        profile: Profile { rows: 21, seed: 0 },
        schedule: Schedule { steps: 0, layers: 0, dense_steps: 0, dense_layers: 0 },
        source: spec.source.clone(),
    };
    assert_eq!(spec, expected);
    assert!(!spec.schedule.is_dense(0, 0));

    let spec = parse(
        r#"
        name = "tables"
        video = { frames = 30, tokens_per_frame = 7 }
        text = { tokens = 5 }
        attention = { heads = 2, head_dim = 128 }
        qk_norm = { kind = "layer" }
        rope = { pairs = "half" }
        masks = { spatial.half_width = 8, temporal.half_width = 9 }
        profile = {}
        sink = {}
        schedule = { steps = 10, layers = 20 }
        "#,
    );
    assert_eq!((spec.layout.before, spec.layout.after), (0, 5));
    assert_eq!(spec.qk_norm, Some(QkNorm { kind: NormKind::Layer, over: NormOver::Head, eps: 1e-6 }));
    assert_eq!(
        spec.rope,
        Some(Rope { pairs: Pairs::Half, channels: 128, before: false, after: false, per_head: false })
    );
    assert_eq!(spec.profile, Profile { rows: 64, seed: 0 });
    assert_eq!(spec.schedule, Schedule { steps: 10, layers: 20, dense_steps: 0, dense_layers: 0 });
}

/// `[text]` is `[before]` or `[after]`, and `rope.text` rotates the same rows.
#[test]
fn text_is_before_or_after() {
    let text = "[text]\ntokens = 256\nposition = \"last\"";
    let hunyuan = HUNYUAN.replace("text = false", "text = true");
    for (position, side, others) in [("first", "before", "after"), ("last", "after", "before")] {
        let with = |text_table: &str, rotated: &str| {
            let tables = format!("{text_table}\n[{others}]\ntokens = 7");
            parse(&hunyuan.replace(text, &tables).replace("text = true", rotated))
        };
        let as_text = format!("[text]\ntokens = 256\nposition = {position:?}");
        let as_side = format!("[{side}]\ntokens = 256");
        let spec = with(&as_text, "text = true");
        assert_eq!(spec, with(&as_side, &format!("{side} = true")));
        let tokens = if side == "before" { [256, 7] } else { [7, 256] };
        assert_eq!([spec.layout.before, spec.layout.after], tokens);
        let video = 33 * 3600;
        let rotated = if side == "before" { 0..256 + video } else { 7..7 + video + 256 };
        assert_eq!(spec.rope_rows(), rotated);
        let both = with(&as_text, &format!("text = true\n{others} = true"));
        assert_eq!(both.rope_rows(), 0..7 + video + 256);
        assert_eq!(with(&as_text, &format!("{others} = true")).rope_rows().len(), 7 + video as usize);
    }
}

/// All ways in which TOML writes a number.
#[test]
fn numbers_in_every_notation() {
    let text = HUNYUAN
        .replace("frames = 33", "frames = 0x21")
        .replace("tokens_per_frame = 3600", "tokens_per_frame = 3_600")
        .replace("heads = 24", "heads = +24")
        .replace("batch = 1", "batch = 0b1")
        .replace("density = 0.25", "density = 2.5e-1");
    assert_eq!(parse(&text), parse(HUNYUAN));
}

/// Of the numbers up to the head dim, those are accepted that the kernels rotate in whole chunks. Tables
/// have a column for each pair.
#[test]
fn rotated_channels() {
    for (pairs, step) in [(Pairs::Interleaved, 8), (Pairs::Half, 16)] {
        for head_dim in [64, 128] {
            for channels in 0..=head_dim + 16 {
                let rope = format!("pairs = \"{}\"\nchannels = {channels}", pairs.as_str());
                let text = HUNYUAN.replace("pairs = \"interleaved\"", &rope);
                let text = text.replace("head_dim = 128", &format!("head_dim = {head_dim}"));
                let allowed = channels > 0 && channels <= head_dim && channels % step == 0;
                match Spec::parse("rotated.toml", &text) {
                    Ok(spec) => {
                        assert!(allowed, "{pairs:?}, {channels} of {head_dim}");
                        assert_eq!(
                            spec.rope,
                            Some(Rope { pairs, channels, before: false, after: false, per_head: false })
                        );
                        assert_eq!(spec.rope_table_shape(24), [33 * 3600, channels / 2]);
                        assert_eq!(spec.rope_table_elements(24), u64::from(33 * 3600 * channels / 2));
                    }
                    Err(error) => assert!(!allowed, "{error}"),
                }
            }
        }
    }
}

#[test]
fn schedule() {
    let schedule = Schedule { steps: 50, layers: 60, dense_steps: 5, dense_layers: 2 };
    let dense = |step, layer| schedule.is_dense(step, layer);
    assert!(dense(0, 0) && dense(4, 59) && dense(5, 1) && dense(49, 0));
    assert!(!dense(5, 2) && !dense(49, 59));
}

#[test]
fn models_are_the_files_of_the_folder() {
    let folder = concat!(env!("CARGO_MANIFEST_DIR"), "/models");
    let mut files = Vec::new();
    for entry in std::fs::read_dir(folder).expect("shapes/models") {
        let path = entry.expect("an entry of shapes/models").path();
        let name = path.file_name().and_then(|name| name.to_str()).expect("a UTF-8 name").to_owned();
        let name = name.strip_suffix(".toml").unwrap_or_else(|| panic!("{name} is not a spec")).to_owned();
        files.push((name, std::fs::read_to_string(&path).expect("a spec")));
    }
    files.sort();
    let listed: Vec<_> = models().iter().map(|&(name, text)| (name.to_owned(), text.to_owned())).collect();
    assert_eq!(
        listed, files,
        "`models()` in shapes/src/lib.rs and the files of shapes/models must agree, sorted by name"
    );
    for (name, text) in models() {
        assert_eq!(parse(text).name, *name, "the file is called as its spec");
    }
}

/// The shipped shapes and all that follows from them, for a person to review.
#[test]
fn shapes() {
    let mut table = String::new();
    for (_, text) in models() {
        let spec = parse(text);
        let layout = &spec.layout;
        let text = match (layout.before, layout.after) {
            (0, 0) => "no text".into(),
            (before, 0) => format!("{before} text first"),
            (0, after) => format!("{after} text last"),
            (before, after) => format!("{before} text first + {after} text last"),
        };
        let _ = writeln!(
            table,
            "{}: batch {}, {} heads x {} {}, {} x {} video + {text} = {} tokens, {} sink frames",
            spec.name,
            spec.batch,
            spec.heads,
            spec.head_dim,
            spec.dtype.as_str(),
            layout.frames.value,
            layout.tokens_per_frame.value,
            layout.sequence(),
            layout.sink_frames,
        );
        for head in HeadType::ALL {
            let (counts, tiles) = (spec.tile_counts(Arch::default(), head), spec.tiles(Arch::default()));
            let visited_pairs = counts.visited() * u64::from(tiles.query_rows * tiles.key_rows);
            let _ = writeln!(
                table,
                "    {:9}half width {:6}, density {:.6}, {:8.3} TFLOP a layer; key tiles: {:6} full, {:4} edge, {:6} skipped, {:.1}% of the visited pairs visible",
                format!("{head:?}").to_lowercase(),
                layout.half_width(head),
                spec.density(head),
                (spec.flops(head) * u128::from(spec.heads) * u128::from(spec.batch)) as f64 / 1e12,
                counts.full,
                counts.edge,
                counts.skipped,
                100.0 * spec.visible_pairs(head) as f64 / visited_pairs as f64,
            );
        }
        let workspace = spec.workspace(spec.batch, spec.heads, 8);
        let _ = writeln!(table, "    workspace {:.1} MiB", workspace.bytes as f64 / f64::from(1 << 20));
    }
    insta::assert_snapshot!(table);
}

/// Random specs as JSON of the same structure.
pub fn specs() -> impl Strategy<Value = Value> {
    let width = || {
        prop_oneof![
            (0.9..=1.0f64).prop_map(|density| json!({ "density": density })),
            (1..=6u32).prop_map(|half_width| json!({ "half_width": half_width })),
            (1.0..=2.0f64).prop_map(|frames| json!({ "half_width_frames": frames })),
        ]
    };
    let name = |names: [&'static str; 2]| prop::sample::select(names.to_vec());
    // At least as many tokens as the widths and rows below ask for.
    let video = (6..=40u32, 1..=6u32, 1..=7u32).prop_map(|(frames, height, width)| {
        json!({ "frames": frames, "tokens_per_frame": height * width, "grid": [height, width] })
    });
    let side = || (1..=4u32).prop_map(|tokens| json!({ "tokens": tokens }));
    let text = (side(), side());
    let products = prop::sample::select(vec![(64, "dtype"), (128, "dtype"), (128, "e4m3")]);
    let attention = (1..=99u32, products, name(["bf16", "f16"]), 1..=9u32).prop_map(
        |(heads, (dim, compute), dtype, batch)| {
            json!({ "heads": heads, "head_dim": dim, "dtype": dtype, "batch": batch, "compute": compute })
        },
    );
    let norm = (name(["rms", "layer"]), name(["head", "heads"]), 1e-12..=1e-2f64)
        .prop_map(|(kind, over, eps)| json!({ "kind": kind, "over": over, "eps": eps }));
    let channels = prop::sample::select(vec![16, 32, 48, 64]);
    let rope = (name(["interleaved", "half"]), channels, any::<[bool; 3]>()).prop_map(
        |(pairs, channels, [before, after, per_head])| {
            json!({ "pairs": pairs, "channels": channels, "before": before, "after": after, "per_head": per_head })
        },
    );
    let rest = (0..=1u32, 1..=2u32, 0..=i64::MAX as u64, 5..=9u32, 5..=9u32, 0..=5u32, 0..=5u32);
    ("[a-z0-9_]{1,64}", video, text, attention, norm, rope, width(), width(), rest).prop_map(
        |(name, video, (before, after), attention, norm, rope, spatial, temporal, rest)| {
            let (sinks, rows, seed, steps, layers, dense_steps, dense_layers) = rest;
            // Only heads in 8 bits have an error.
            let precision = attention["compute"] == "e4m3";
            let precision = precision.then(|| json!({ "largest_error": f64::from(rows) / 16.0 }));
            let spec = json!({
                "name": name, "video": video, "before": before, "after": after, "attention": attention, "qk_norm": norm,
                "rope": rope,
                "masks": { "spatial": spatial, "temporal": temporal },
                "sink": { "frames": sinks }, "profile": { "rows": rows, "seed": seed },
                "schedule": {
                    "steps": steps, "layers": layers, "dense_steps": dense_steps, "dense_layers": dense_layers,
                },
                "precision": precision,
            });
            without_nulls(spec)
        },
    )
}

/// A table without what is null, which TOML has not.
fn without_nulls(mut table: Value) -> Value {
    table.as_object_mut().expect("a table").retain(|_, value| !value.is_null());
    table
}

/// The spec as JSON again.
fn written(spec: &Spec) -> Value {
    let width = |width| match width {
        Width::Density(density) => json!({ "density": density }),
        Width::Tokens(tokens) => json!({ "half_width": tokens }),
        Width::Frames(frames) => json!({ "half_width_frames": frames }),
    };
    without_nulls(json!({
        "name": spec.name,
        "video": { "frames": spec.layout.frames.value, "tokens_per_frame": spec.layout.tokens_per_frame.value, "grid": spec.grid },
        "before": { "tokens": spec.layout.before },
        "after": { "tokens": spec.layout.after },
        "attention": {
            "heads": spec.heads, "head_dim": spec.head_dim, "dtype": spec.dtype.as_str(), "batch": spec.batch,
            "compute": spec.compute.as_str(),
        },
        "qk_norm": spec.qk_norm.map(|norm| json!({
            "kind": norm.kind.as_str(), "over": norm.over.as_str(), "eps": norm.eps,
        })),
        "rope": spec.rope.map(|rope| json!({
            "pairs": rope.pairs.as_str(), "channels": rope.channels, "before": rope.before, "after": rope.after,
            "per_head": rope.per_head,
        })),
        "masks": { "spatial": width(spec.spatial), "temporal": width(spec.temporal) },
        "sink": { "frames": spec.layout.sink_frames },
        "profile": { "rows": spec.profile.rows, "seed": spec.profile.seed },
        "precision": spec.largest_error.map(|error| json!({ "largest_error": error })),
        "schedule": {
            "steps": spec.schedule.steps, "layers": spec.schedule.layers,
            "dense_steps": spec.schedule.dense_steps, "dense_layers": spec.schedule.dense_layers,
        },
    }))
}

proptest! {
    /// Every value arrives where it belongs.
    #[test]
    fn random_specs_are_read_as_written(spec in specs()) {
        prop_assert_eq!(written(&parse(&crate::toml(&spec))), spec);
    }

    /// Whatever the text, there is an answer and no panic.
    #[test]
    fn any_text_has_an_answer(text in "(\\[[a-z.]{0,8}\\]\n|[a-z_]{0,6} ?= ?[-0-9a-z\"'{}.]{0,6}\n|\\PC{0,12}\n|\u{feff}){0,12}") {
        if let Err(error) = Spec::parse("any.toml", &text) {
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.to_string().contains("any.toml"));
        }
    }

    /// A good spec with characters replaced, which gets further than any text.
    #[test]
    fn any_damage_has_an_answer(edits in prop::collection::vec((0..HUNYUAN.len(), "[ -~\n]"), 1..6)) {
        let mut bytes = HUNYUAN.as_bytes().to_vec();
        for (at, with) in edits {
            bytes[at] = with.as_bytes()[0];
        }
        let text = String::from_utf8(bytes).expect("ASCII");
        if let Err(error) = Spec::parse("any.toml", &text) {
            prop_assert!(!error.problems.is_empty());
            prop_assert!(error.problems.iter().all(|problem| problem.line > 0 && problem.column > 0));
        }
    }
}
