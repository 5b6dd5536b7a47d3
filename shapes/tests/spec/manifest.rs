//! The manifest beside a PTX file, and the workspace whose size it names.

use framestride_shapes::manifest::{Compiler, Densities, FORMAT, KernelResources, Manifest, Param, Ptxas};
use std::ops::Range;

use framestride_shapes::models;
use framestride_shapes::spec::{Compute, Spec};

fn demo() -> Spec {
    let (name, text) = models().iter().find(|(name, _)| *name == "demo").expect("the demo");
    Spec::parse(name, text).unwrap_or_else(|error| panic!("{error}"))
}

fn manifest() -> Manifest {
    let spec = demo();
    Manifest {
        format: FORMAT,
        name: spec.name.clone(),
        spec: Some(models().iter().find(|(name, _)| *name == "demo").expect("the demo").1.into()),
        arch: "sm_90a".into(),
        compiler: Compiler { rustc: "1.96.0 (0123456)".into(), llvm: "22.1.2".into() },
        ptx_sha256: "0123456789abcdef".repeat(4),
        kernels: vec![KernelResources {
            entry: "attention".into(),
            threads: 512,
            min_blocks: 1,
            shared_bytes: 156_672,
            params_bytes: 104,
            params: vec![Param { name: "params".into(), ty: "AttentionParams".into(), offset: 0, bytes: 104 }],
            ptxas: Some(Ptxas { registers: 128, stack: 0, spill_stores: 0, spill_loads: 0, messages: vec![] }),
        }],
        densities: Some(Densities::of(&spec)),
        workspace_bytes: Some(spec.workspace(spec.batch, spec.heads, 1).bytes),
    }
}

#[test]
fn manifests_are_read_as_written() {
    let manifest = manifest();
    let text = manifest.to_json();
    assert!(text.ends_with("}\n"));
    assert_eq!(Manifest::parse("demo.json", &text), Ok(manifest.clone()));
    assert_eq!(manifest.spec(), Ok(demo()));
    assert_eq!(manifest.kernel("attention"), manifest.kernels.first());
    assert_eq!(manifest.kernel("pack"), None);
    // What may be absent is null.
    let mut without = manifest;
    without.kernels[0].ptxas = None;
    (without.spec, without.densities, without.workspace_bytes) = (None, None, None);
    assert!(without.spec().is_err());
    assert_eq!(Manifest::parse("demo.json", &without.to_json()), Ok(without));
}

/// Numbers come back as they were, to the last bit: a manifest and a PTX that state one density
/// agree.
#[test]
fn densities_are_read_to_the_last_bit() {
    let mut manifest = manifest();
    for density in (1..2000).map(|part| f64::from(part) / 1999.7).chain([0.910066574839302]) {
        manifest.densities = Some(Densities { dense: 1.0, spatial: density, temporal: density.sqrt() });
        let read = Manifest::parse("demo.json", &manifest.to_json()).expect("a manifest");
        assert_eq!(read, manifest, "{density}");
        assert_eq!(read.mismatch(&manifest.statement()), None, "{density}");
    }
}

/// The PTX says what it was made for: whatever else a manifest says of the spec and of launches is
/// found, and named.
#[test]
fn what_the_ptx_was_made_for() {
    let mut manifest = manifest();
    // A line of a comment that is no ASCII, and one that would end a line.
    manifest.spec.as_mut().expect("the demo's").push_str("# é \u{1F40B} \u{7f}\n");
    let ptx = format!("{}\n.version 8.3\n", manifest.statement());
    assert!(ptx.is_ascii() && ptx.lines().count() == 2, "{ptx}");
    assert_eq!(manifest.mismatch(&ptx), None);
    // What compilers say is no part of it.
    let mut elsewhere = manifest.clone();
    elsewhere.kernels[0].ptxas = None;
    elsewhere.compiler.llvm = "22.1.8".into();
    elsewhere.ptx_sha256 = "f".repeat(64);
    assert_eq!(elsewhere.mismatch(&ptx), None);

    let json = manifest.to_json();
    for (from, to, place, found, made_for) in [
        ("frames = 16", "frames = 15", "spec, line 5", "\"frames = 15\"", "\"frames = 16\""),
        ("\"min_blocks\": 1", "\"min_blocks\": 0", "kernels, attention, min_blocks", "0", "1"),
        ("\"threads\": 512", "\"threads\": 128", "kernels, attention, threads", "128", "512"),
        ("\"shared_bytes\": 156672", "\"shared_bytes\": 1", "kernels, attention, shared_bytes", "1", "156672"),
        ("\"bytes\": 104", "\"bytes\": 96", "kernels, attention, params, params, bytes", "96", "104"),
        ("\"entry\": \"attention\"", "\"entry\": \"pack\"", "kernels, attention, entry", "\"pack\"", "\"attention\""),
        ("\"sm_90a\"", "\"sm_100a\"", "arch", "\"sm_100a\"", "\"sm_90a\""),
        ("\"name\": \"demo\"", "\"name\": \"omed\"", "name", "\"omed\"", "\"demo\""),
        ("\"dense\": 1.0", "\"dense\": 0.5", "densities, dense", "0.5", "1.0"),
        ("\"workspace_bytes\": ", "\"workspace_bytes\": 1", "workspace_bytes", "", ""),
    ] {
        assert!(json.contains(from), "nothing to replace: {from}");
        let other = Manifest::parse("demo.json", &json.replacen(from, to, 1)).unwrap_or_else(|error| panic!("{error}"));
        let mismatch = other.mismatch(&ptx).unwrap_or_else(|| panic!("{to} was not seen"));
        assert_eq!(mismatch.place, place);
        if !found.is_empty() {
            assert_eq!((mismatch.manifest.as_str(), mismatch.ptx.as_str()), (found, made_for), "{place}");
        }
    }
    let mut fewer = manifest.clone();
    fewer.kernels.clear();
    assert_eq!(fewer.mismatch(&ptx).map(|mismatch| mismatch.place), Some("kernels".into()));
    let mut without = manifest.clone();
    without.spec = None;
    assert_eq!(without.mismatch(&ptx).map(|mismatch| mismatch.manifest), Some("null".into()));
    for old in ["", ".version 8.3\n", "// framestride {\n"] {
        assert_eq!(manifest.mismatch(old).map(|mismatch| mismatch.place), Some("first line of the PTX".into()));
    }
}

#[test]
fn bad_manifests() {
    let good = manifest().to_json();
    let cases: &[(&str, &str, &str)] = &[
        ("not JSON", "{", "["),
        ("cut off", "\"workspace_bytes\"", "\u{0}"),
        ("no format", "\"format\": 3,", ""),
        ("another format", "\"format\": 3,", "\"format\": 2, \"kernel_ids\": [],"),
        ("field missing", "\"arch\": \"sm_90a\",", ""),
        ("unknown field", "\"arch\"", "\"target\": 1, \"arch\""),
        ("wrong type", "\"threads\": 512", "\"threads\": \"512\""),
        ("negative size", "\"shared_bytes\": 156672", "\"shared_bytes\": -1"),
        ("digest", "0123456789abcdef", "0123456789ABCDEF"),
        ("no threads", "\"threads\": 512", "\"threads\": 0"),
        ("parameter outside", "\"offset\": 0", "\"offset\": 8"),
        ("parameter at the end of the numbers", "\"offset\": 0", "\"offset\": 4294967295"),
    ];
    let mut report = String::new();
    for (name, from, to) in cases {
        assert!(good.contains(from), "{name}: nothing to replace");
        let text = match *to {
            "\u{0}" => good[..good.find(from).expect("found above")].to_owned(),
            to => good.replacen(from, to, 1),
        };
        let error = Manifest::parse("demo.json", &text).expect_err(name);
        report.push_str(&format!("## {name}\n\n{error}\n\n"));
    }
    let mut twice = manifest();
    twice.kernels.push(twice.kernels[0].clone());
    let error = Manifest::parse("demo.json", &twice.to_json()).expect_err("one kernel twice");
    report.push_str(&format!("## one kernel twice\n\n{error}\n"));
    insta::assert_snapshot!(report);
}

/// Specs of the shipped models in 16 bits, and where they may be, in 8 bits and with a bound.
fn specs_of_all_precisions() -> Vec<Spec> {
    let mut specs = Vec::new();
    for (name, text) in models() {
        let spec = Spec::parse(name, text).unwrap_or_else(|error| panic!("{error}"));
        if spec.head_dim == 128 {
            for bound in [None, Some(0.05)] {
                let builder = spec.to_builder().compute(Compute::E4m3).largest_error(bound);
                specs.push(builder.build().unwrap_or_else(|error| panic!("{error}")));
            }
        }
        specs.push(spec);
    }
    specs
}

/// Parts are aligned, as large as what they hold, and apart where they live at the same time. The
/// whole is no larger than that asks for.
#[test]
fn workspaces() {
    for spec in specs_of_all_precisions() {
        for (batch, heads, splits) in [(1, 1, 2), (spec.batch, spec.heads, 8), (3, 5, 32)] {
            let workspace = spec.workspace(batch, heads, splits);
            let all_heads = u64::from(batch * heads);
            let rows = u64::from(spec.layout.packed_rows());
            let row = u64::from(spec.head_dim) * 2;
            let samples = u64::from(spec.profile.rows.div_ceil(64)) * 64;
            // The maximum of each sample, and for three masks its sum and output, in f32.
            let partials = all_heads * samples * u64::from(splits) * 3 * u64::from(2 + spec.head_dim) * 4;
            let [in_16_bits, in_8_bits] = spec.precisions();
            let profiled_rows = u64::from(workspace.profiled_rows);
            if in_16_bits {
                assert_eq!(profiled_rows, rows);
                assert_eq!(
                    [&workspace.profiled_k, &workspace.profiled_v],
                    [&workspace.packed[1], &workspace.packed[2]]
                );
            } else {
                assert!(profiled_rows.is_multiple_of(64) && 2 * profiled_rows >= u64::from(spec.layout.sequence()));
            }
            let whole = |part: &Range<u64>, bytes: u64| {
                assert_eq!(part.end - part.start, bytes, "{}: {workspace:?}", spec.name);
                assert!(part.start.is_multiple_of(256));
                vec![part.clone()]
            };
            // An image of `bytes` bytes for each head.
            let images = |part: &Range<u64>, distance: u64, bytes: u64| -> Vec<Range<u64>> {
                assert!(part.start.is_multiple_of(256) && part.start + (all_heads - 1) * distance + bytes <= part.end);
                let starts = (0..all_heads).map(|head| part.start + head * distance);
                starts.map(|start| start..start + bytes).collect()
            };
            let profiled = |part| images(part, rows * row, profiled_rows * row);
            let (distance_e4m3, bytes_e4m3) =
                (u64::from(spec.e4m3_image_rows()) * 128, rows.next_multiple_of(16) * 128);
            let of_8_bits = |words: u64| if in_8_bits { all_heads * words * 4 } else { 0 };
            let always = [
                whole(&workspace.errors, all_heads * 2 * 4),
                whole(&workspace.head_types, all_heads * 4),
                whole(&workspace.schedule, 8),
                whole(&workspace.centers, of_8_bits(260)),
                whole(&workspace.precision_errors, of_8_bits(1)),
                whole(&workspace.precisions, of_8_bits(1)),
            ];
            let partials = whole(&workspace.partials, partials);
            let mut times = vec![vec![
                whole(&workspace.samples, all_heads * samples * row),
                partials.clone(),
                profiled(&workspace.profiled_k),
                profiled(&workspace.profiled_v),
            ]];
            if in_8_bits {
                let mut parts = vec![];
                for (operand, part) in workspace.packed_e4m3.iter().enumerate() {
                    // Only an image of V has whole units of 16 keys.
                    let bytes = if operand == 2 { bytes_e4m3 } else { rows * 128 };
                    parts.push(images(part, distance_e4m3, bytes));
                }
                // They are judged by what profiling found.
                parts.extend(in_16_bits.then_some(partials));
                times.push(parts);
            }
            if in_16_bits {
                times.push(workspace.packed.iter().map(|part| images(part, rows * row, rows * row)).collect());
            }
            let mut needed = 0;
            for mut parts in times {
                parts.extend(always.clone());
                let count = parts.len() as u64;
                let mut pieces = parts.concat();
                pieces.sort_by_key(|piece| (piece.start, piece.end));
                for pair in pieces.windows(2) {
                    assert!(pair[0].end <= pair[1].start, "{}: {pair:?} of {workspace:?}", spec.name);
                }
                assert!(pieces.iter().all(|piece| piece.end <= workspace.bytes));
                let bytes: u64 = pieces.iter().map(|piece| piece.end - piece.start).sum();
                // Images of halves may have less than all rows, and parts are aligned.
                needed = needed.max(bytes + all_heads * (rows - profiled_rows.min(rows / 2) * 2) * row + 256 * count);
            }
            assert!(workspace.bytes <= needed, "{}: {} of {needed}", spec.name, workspace.bytes);
        }
    }
}

/// Without heads in 16 bits, a workspace is half as large.
#[test]
fn workspaces_in_8_bits_are_half_as_large() {
    for name in ["hunyuan_video_720p", "wan_14b_720p", "minimax_h3_15s_768x1344"] {
        let spec = Spec::shipped(name).unwrap_or_else(|error| panic!("{error}"));
        let in_8_bits = spec.to_builder().compute(Compute::E4m3).build().unwrap_or_else(|error| panic!("{error}"));
        let bytes = |spec: &Spec| spec.workspace(spec.batch, spec.heads, 16).bytes as f64;
        let ratio = bytes(&in_8_bits) / bytes(&spec);
        assert!((0.5..0.501).contains(&ratio), "{name}: {ratio}");
    }
}
