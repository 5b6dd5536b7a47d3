//! A user's own device crate, `device/`: attention of a spelled-out shape beside a kernel that is
//! written by hand.

use std::sync::OnceLock;

use framestride_builder::{Arch, Built, Kernels, ptx};
use ptx_emulator::{LaunchConfig, Memory, Module};

use crate::{checkout, entry_text, random, without_comments};

/// The crate, built once.
fn device() -> &'static Built {
    static BUILT: OnceLock<Result<Built, String>> = OnceLock::new();
    let build = || Kernels::from_crate(checkout("tests/device")).arch(Arch::SM_90A).build();
    match BUILT.get_or_init(|| build().map_err(|error| error.to_string())) {
        Ok(built) => built,
        Err(message) => panic!("{message}"),
    }
}

#[test]
fn own_kernels_stand_beside_generated_ones() {
    let built = device();
    let mut entries = ptx::entries(&built.ptx);
    entries.sort();
    assert_eq!(entries, ["attention", "change", "pack", "profile", "select"]);
    let change = built.manifest.kernel("change").expect("the manifest lists it");
    assert_eq!((change.threads, change.min_blocks, change.shared_bytes, change.params_bytes), (256, 4, 64, 28));
    let params: Vec<_> = change.params.iter().map(|p| (p.name.as_str(), p.ty.as_str(), p.offset, p.bytes)).collect();
    assert_eq!(
        params,
        [("before", "u64", 0, 8), ("after", "u64", 8, 8), ("sums", "u64", 16, 8), ("count", "u32", 24, 4)]
    );
    assert!(built.warnings.is_empty(), "{}", built.warnings.concat());
}

/// A shape that the macro spells out and the same shape in a TOML file give the same kernels,
/// launch tables and spec.
#[test]
fn spelled_out_is_the_same_as_toml() {
    let toml = Kernels::from_spec(checkout("shapes/models/tiny_text_rope.toml")).build();
    let (own, toml) = (device(), toml.unwrap_or_else(|error| panic!("{error}")));
    for kernel in &toml.manifest.kernels {
        let code = |built: &Built| {
            let text = without_comments(entry_text(&built.ptx, &kernel.entry));
            // Labels count the functions of the module, and this module has one more.
            let line = |line: &str| match line.split_once("$L__BB") {
                Some((head, tail)) => format!("{head}$L{}\n", tail.trim_start_matches(|c: char| c.is_ascii_digit())),
                None => format!("{line}\n"),
            };
            text.lines().map(line).collect::<String>()
        };
        let same = code(own) == code(&toml);
        assert!(same, "{}: the spelled-out shape gives other PTX than the TOML file", kernel.entry);
        assert_eq!(own.manifest.kernel(&kernel.entry), Some(kernel));
    }
    assert_eq!(own.manifest.spec(), toml.manifest.spec());
}

/// The emulator runs the kernel that is written by hand on odd sizes. Sums in f64 are the
/// reference.
#[test]
fn an_own_kernel_runs_in_the_emulator() {
    let built = device();
    let table = built.manifest.kernel("change").expect("the manifest lists it");
    let module = Module::parse("change.ptx", &built.ptx).unwrap_or_else(|error| panic!("{error}"));
    let seed = std::time::SystemTime::UNIX_EPOCH.elapsed().map_or(1, |time| time.as_nanos() as u64);
    println!("seed {seed}");
    let mut state = seed;
    // Some counts are below one round of a block, some need several, and some leave blocks without
    // work.
    for (count, blocks) in [(4, 1), (1020, 1), (1028, 2), (10_000, 3), (8, 4)] {
        let mut memory = Memory::new();
        let mut tensor = || -> (u64, Vec<f32>) {
            let values: Vec<f32> = (0..count).map(|_| uniform(&mut state)).collect();
            let address = memory.alloc(u64::from(count) * 4, 16).unwrap_or_else(|error| panic!("{error}"));
            let bytes: Vec<u8> = values.iter().flat_map(|value| value.to_le_bytes()).collect();
            memory.write(address, &bytes).unwrap_or_else(|error| panic!("{error}"));
            (address, values)
        };
        let ((before, old), (after, new)) = (tensor(), tensor());
        let bytes = u64::from(blocks) * 8;
        let sums = memory.alloc(bytes, 8).unwrap_or_else(|error| panic!("{error}"));
        // A sum that is not written stays NaN.
        memory.fill(sums, bytes, 0xff).unwrap_or_else(|error| panic!("{error}"));
        let mut params: Vec<u8> = [before, after, sums].iter().flat_map(|address| address.to_le_bytes()).collect();
        params.extend(u32::to_le_bytes(count));
        let launch =
            LaunchConfig { grid: [blocks, 1, 1], block: [table.threads, 1, 1], shared_bytes: table.shared_bytes };
        module.launch(&memory, "change", launch, &params).unwrap_or_else(|fault| panic!("{fault}"));
        let written = memory.read(sums, bytes).unwrap_or_else(|error| panic!("{error}"));
        let parts: Vec<f64> = written
            .chunks_exact(4)
            .map(|value| f32::from_le_bytes([value[0], value[1], value[2], value[3]]).into())
            .collect();
        let pairs = || old.iter().zip(&new).map(|(&old, &new)| (f64::from(old), f64::from(new)));
        let expected =
            [pairs().map(|(old, new)| (new - old).abs()).sum(), pairs().map(|(old, _)| old.abs()).sum::<f64>()];
        for (which, expected) in expected.into_iter().enumerate() {
            let found: f64 = parts.iter().skip(which).step_by(2).sum();
            // All terms have one sign, and f32 adds them in a tree of depth below 64.
            let tolerance = 64.0 * f64::from(f32::EPSILON) * expected;
            assert!((found - expected).abs() <= tolerance, "count {count}, sum {which}: {found}, expected {expected}");
        }
    }
}

/// A random number in -1..1.
fn uniform(state: &mut u64) -> f32 {
    (random(state) >> 40) as f32 / (1u32 << 23) as f32 - 1.0
}
