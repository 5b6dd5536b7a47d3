//! Specs made in code are those of the TOML file with the same values, right or wrong.

use framestride_shapes::models;
use framestride_shapes::spec::{
    Compute, Dtype, NormKind, NormOver, Pairs, Profile, QkNorm, Rope, Schedule, Spec, SpecBuilder, SpecError, Width,
};
use proptest::prelude::*;
use serde_json::Value;

/// Gives a builder the values of a spec that is written as JSON. Tables and keys may be missing.
fn builder(spec: &Value) -> SpecBuilder {
    let number = |path: &str| spec.pointer(path).map(|value| value.as_u64().expect("an integer"));
    let number32 = |path: &str| number(path).map(|value| u32::try_from(value).expect("it fits 32 bits"));
    let real = |path: &str| spec.pointer(path).map(|value| value.as_f64().expect("a number"));
    let flag = |path: &str| spec.pointer(path).map(|value| value.as_bool().expect("true or false"));
    let is = |path: &str, name: &str| spec.pointer(path).expect("a name") == name;
    let width = |table: &str| {
        let density = real(&format!("{table}/density")).map(Width::Density);
        let tokens = number32(&format!("{table}/half_width")).map(Width::Tokens);
        density.or(tokens).or(real(&format!("{table}/half_width_frames")).map(Width::Frames))
    };

    let mut builder = Spec::builder();
    if let Some(name) = spec["name"].as_str() {
        builder = builder.name(name);
    }
    for (path, set) in [
        ("/video/frames", SpecBuilder::frames as fn(SpecBuilder, u32) -> SpecBuilder),
        ("/video/tokens_per_frame", SpecBuilder::tokens_per_frame),
        ("/attention/heads", SpecBuilder::heads),
        ("/attention/head_dim", SpecBuilder::head_dim),
        ("/attention/batch", SpecBuilder::batch),
        ("/sink/frames", SpecBuilder::sink_frames),
        ("/before/tokens", SpecBuilder::before),
        ("/after/tokens", SpecBuilder::after),
    ] {
        if let Some(value) = number32(path) {
            builder = set(builder, value);
        }
    }
    if let Some([height, width]) = spec.pointer("/video/grid").and_then(Value::as_array).map(Vec::as_slice) {
        let extent = |value: &Value| value.as_u64().and_then(|value| u32::try_from(value).ok()).expect("an extent");
        builder = builder.grid([extent(height), extent(width)]);
    }
    if spec.pointer("/attention/dtype").is_some() {
        builder = builder.dtype(if is("/attention/dtype", "bf16") { Dtype::Bf16 } else { Dtype::F16 });
    }
    if spec.pointer("/attention/compute").is_some() {
        builder = builder.compute(if is("/attention/compute", "e4m3") { Compute::E4m3 } else { Compute::Dtype });
    }
    if let Some(eps) = real("/qk_norm/eps") {
        builder = builder.qk_norm(QkNorm {
            kind: if is("/qk_norm/kind", "rms") { NormKind::Rms } else { NormKind::Layer },
            over: if is("/qk_norm/over", "head") { NormOver::Head } else { NormOver::Heads },
            eps,
        });
    }
    if let Some(per_head) = flag("/rope/per_head") {
        let (before, after) = (flag("/rope/before") == Some(true), flag("/rope/after") == Some(true));
        let channels = number32("/rope/channels").expect("rotated channels");
        let pairs = if is("/rope/pairs", "half") { Pairs::Half } else { Pairs::Interleaved };
        builder = builder.rope(Rope { pairs, channels, before, after, per_head });
    }
    if let Some(width) = width("/masks/spatial") {
        builder = builder.spatial(width);
    }
    if let Some(width) = width("/masks/temporal") {
        builder = builder.temporal(width);
    }
    if let (Some(rows), Some(seed)) = (number32("/profile/rows"), number("/profile/seed")) {
        builder = builder.profile(Profile { rows, seed });
    }
    if let Some(error) = real("/precision/largest_error") {
        builder = builder.largest_error(error);
    }
    if let Some(steps) = number32("/schedule/steps") {
        let number = |key: &str| number32(&format!("/schedule/{key}")).expect("a number of the schedule");
        let (layers, dense_steps, dense_layers) = (number("layers"), number("dense_steps"), number("dense_layers"));
        builder = builder.schedule(Schedule { steps, layers, dense_steps, dense_layers });
    }
    builder
}

/// A spec, or key, finding, range and mend of its problems.
type Outcome = Result<Spec, Vec<[String; 4]>>;

fn outcome(spec: Result<Spec, SpecError>) -> Outcome {
    spec.map_err(|error| {
        let problem =
            |problem: framestride_shapes::spec::Problem| [problem.key, problem.found, problem.allowed, problem.mend];
        let mut problems: Vec<_> = error.problems.into_iter().map(problem).collect();
        // Builder and file may have their tables in another order.
        problems.sort();
        problems
    })
}

fn built_and_read(value: &Value) -> (Outcome, Outcome) {
    (outcome(builder(value).build()), outcome(Spec::parse("file.toml", &crate::toml(value))))
}

proptest! {
    /// The builder's spec is the file's, with any of the optional tables left out. Another spec can
    /// be made from it.
    #[test]
    fn random_specs_are_those_of_the_file(
        mut spec in crate::good::specs(),
        left_out in prop::sample::subsequence(
            vec!["/video/grid", "/before", "/after", "/attention/dtype", "/attention/batch", "/qk_norm", "/rope", "/sink", "/profile",
                 "/precision", "/schedule"], 0..=11),
        frames in 1..=40u32,
    ) {
        for path in left_out {
            crate::schema::remove(&mut spec, path);
        }
        // Where text is left out, the file may rotate it in vain. Then both must say so.
        let (built, read) = built_and_read(&spec);
        prop_assert_eq!(&built, &read);
        if let Ok(built) = built {
            prop_assert_eq!(&built.source.text, &builder(&spec).to_toml());
            prop_assert_eq!(built.to_builder().build(), Ok(built.clone()));
            spec["video"]["frames"] = frames.into();
            let (another, read) = (outcome(built.to_builder().frames(frames).build()), built_and_read(&spec).1);
            // A file without rows has as many as there are, and the spec has their number.
            if spec.get("profile").is_some() {
                prop_assert_eq!(another, read);
            }
        }
    }

    /// Numbers of any size have the problems of the file.
    #[test]
    fn random_mistakes_are_those_of_the_file(
        mut spec in crate::good::specs(),
        mistakes in prop::collection::vec((prop::sample::select(INTEGERS), prop_oneof![
            0..=200u32, (0..32u32).prop_map(|bits| u32::MAX >> bits), any::<u32>(),
        ]), 1..=3),
    ) {
        for (path, value) in mistakes {
            // With these zeros a builder has no text or no schedule, and a file is wrong.
            let none = ["/before/tokens", "/after/tokens", "/schedule/layers"].contains(&path);
            let value = if none { value.max(1) } else { value };
            *spec.pointer_mut(path).expect("every table is there") = value.into();
        }
        let (built, read) = built_and_read(&spec);
        prop_assert_eq!(built, read);
    }
}

/// Paths of the integers that a builder takes.
const INTEGERS: &[&str] = &[
    "/video/frames",
    "/video/tokens_per_frame",
    "/video/grid/0",
    "/before/tokens",
    "/after/tokens",
    "/attention/heads",
    "/attention/head_dim",
    "/attention/batch",
    "/sink/frames",
    "/profile/rows",
    "/profile/seed",
    "/schedule/steps",
    "/schedule/layers",
    "/schedule/dense_steps",
    "/schedule/dense_layers",
];

fn good() -> SpecBuilder {
    let width = Width::Tokens(3);
    Spec::builder().frames(6).tokens_per_frame(4).heads(2).head_dim(64).spatial(width).temporal(width)
}

/// The only problem of a builder: its key, and what was found.
fn problem(builder: &SpecBuilder) -> (String, String) {
    let error = builder.build().expect_err("the values are wrong");
    let [problem] = &error.problems[..] else { panic!("{error}") };
    (problem.key.clone(), problem.found.clone())
}

/// What numbers and names of JSON cannot be.
#[test]
fn odd_values_are_refused_by_name() {
    let norm = |eps| good().qk_norm(QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps });
    for (builder, key, found) in [
        (good().name("Two\nlines \"\\\u{7f}é"), "name", "is \"Two\\nlines \\\"\\\\\\u{7f}é\""),
        (good().spatial(Width::Density(f64::NAN)), "masks.spatial.density", "is nan"),
        (good().spatial(Width::Density(-0.0)), "masks.spatial.density", "is -0.0"),
        (good().temporal(Width::Density(-f64::INFINITY)), "masks.temporal.density", "is -inf"),
        (good().temporal(Width::Frames(f64::INFINITY)), "masks.temporal.half_width_frames", "is inf"),
        (good().temporal(Width::Frames(1e300)), "masks.temporal.half_width_frames", "is 1e300"),
        (norm(1e-320), "qk_norm.eps", "is 1e-320"),
        (good().profile(Profile { rows: 4, seed: u64::MAX }), "profile.seed", "is 18446744073709551615"),
    ] {
        assert_eq!(problem(&builder), (key.into(), found.into()));
    }
}

/// What a value replaces, and what it takes away.
#[test]
fn last_value_counts() {
    let least = good().build().expect("a good spec");
    assert_eq!((&*least.name, &*least.source.file), ("unnamed", "Spec::builder()"));
    assert_eq!(least.spatial, Width::Tokens(3));
    let norm = QkNorm { kind: NormKind::Rms, over: NormOver::Head, eps: 1e-6 };
    let rope = Rope { pairs: Pairs::Half, channels: 48, before: true, after: false, per_head: false };
    let schedule = Schedule { steps: 5, layers: 4, dense_steps: 3, dense_layers: 2 };
    let full = good().grid([2, 2]).before(7).after(5).qk_norm(norm).rope(rope).schedule(schedule);
    let spec = full.build().expect("a good spec");
    assert_eq!((spec.grid, spec.layout.text_tokens(), spec.schedule), (Some([2, 2]), 12, schedule));
    let without = full.clone().grid(None).before(0).after(0).qk_norm(None).rope(None);
    assert_eq!(without.schedule(Schedule::default()).build(), Ok(least));
    let wider = full.clone().spatial(Width::Density(0.5)).spatial(Width::Frames(2.0)).build().expect("a good spec");
    assert_eq!((wider.spatial, wider.layout.spatial_half_width), (Width::Frames(2.0), 8));
}

/// The order of the calls makes no difference to the text.
#[test]
fn equal_values_have_equal_texts() {
    let turned = Spec::builder().temporal(Width::Tokens(3)).spatial(Width::Tokens(3)).head_dim(64).heads(2);
    let turned = turned.tokens_per_frame(4).frames(6);
    assert_eq!(turned, good());
    let text = "name = \"unnamed\"\n[video]\nframes = 6\ntokens_per_frame = 4\n[attention]\nheads = 2\nhead_dim = 64\n\
                [masks.spatial]\nhalf_width = 3\n[masks.temporal]\nhalf_width = 3\n";
    assert_eq!(turned.to_toml(), text);
}

#[test]
fn shipped_specs_can_be_built() {
    for (name, text) in models() {
        let spec = Spec::parse(name, text).unwrap_or_else(|error| panic!("{error}"));
        assert_eq!(spec.to_builder().build(), Ok(spec.clone()));
    }
}
