//! The manifest beside a PTX file, and the workspace whose size it names.

use framestride_shapes::manifest::{Compiler, Densities, FORMAT, KernelResources, Manifest, Param, Ptxas};
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

/// Parts are aligned, apart, in order, and as large as what they hold.
#[test]
fn workspaces() {
    for (name, text) in models() {
        let spec = Spec::parse(name, text).unwrap_or_else(|error| panic!("{error}"));
        for (batch, heads, splits) in [(1, 1, 1), (spec.batch, spec.heads, 8), (3, 5, 33)] {
            let workspace = spec.workspace(batch, heads, splits);
            let all_heads = u64::from(batch * heads);
            let packed = all_heads * u64::from(spec.layout.packed_rows()) * u64::from(spec.head_dim) * 2;
            let samples = u64::from(spec.profile.rows.div_ceil(64)) * 64;
            let sampled = all_heads * samples * u64::from(spec.head_dim) * 2;
            // The maximum of each sample, and for three masks its sum and output, in f32.
            let partials = all_heads * samples * u64::from(splits) * 3 * u64::from(2 + spec.head_dim) * 4;
            let only_8_bits = spec.compute == Compute::E4m3 && spec.largest_error.is_none();
            let std::ops::Range { start, end } = workspace.profiled_k;
            let queries = if only_8_bits {
                // A head's Q and K share the place of its K in 16 bits.
                let half = packed / all_heads / 2;
                assert_eq!((&workspace.packed_q, &workspace.packed_k), (&(start..end - half), &(start + half..end)));
                0..0
            } else {
                assert_eq!(workspace.packed_k, workspace.profiled_k);
                workspace.packed_q.clone()
            };
            assert_eq!(workspace.packed_v, workspace.profiled_v);
            let parts = [
                (&queries, if only_8_bits { 0 } else { packed }),
                (&workspace.profiled_k, packed),
                (&workspace.profiled_v, packed),
                (&workspace.samples, sampled),
                (&workspace.partials, partials),
                (&workspace.errors, all_heads * 2 * 4),
                (&workspace.head_types, all_heads * 4),
                (&workspace.schedule, 8),
                (&workspace.centers, if spec.compute == Compute::E4m3 { all_heads * 260 * 4 } else { 0 }),
                (&workspace.precision_errors, if spec.compute == Compute::E4m3 { all_heads * 4 } else { 0 }),
                (&workspace.precisions, if spec.compute == Compute::E4m3 { all_heads * 4 } else { 0 }),
            ];
            let mut end = 0;
            for (range, bytes) in parts {
                assert_eq!(range.end - range.start, bytes, "{name}: {workspace:?}");
                assert!(range.start.is_multiple_of(256) && range.start >= end && range.start < end + 256);
                end = range.end;
            }
            assert_eq!(workspace.bytes, end.next_multiple_of(256));
        }
    }
}
