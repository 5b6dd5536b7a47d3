//! What the machine code of the family of single warps (sm_80) must not have, on every kind of GPU
//! that it serves.

use framestride::{Kernels, Spec};
use framestride_builder::{Arch, ptx, toolchain::CudaTools};
use rayon::prelude::*;

use crate::sass::{Function, Listing};

/// GPUs since Ampere, one of each kind of machine code.
const TARGETS: [&str; 6] = ["sm_80", "sm_86", "sm_89", "sm_90", "sm_100", "sm_120"];

/// Specs that are looked at on every target: with text and without, of either head dim.
const SPECS: [&str; 4] = ["hunyuan_video_720p", "wan_14b_720p", "ltx_video_512x704", "tiny_text_rope"];

/// Each of [`SPECS`] on every target, and every other shipped spec of the family on one.
fn pairs() -> Vec<(&'static str, &'static str)> {
    let is_of = |name: &str| Spec::shipped(name).is_ok_and(|spec| spec.template().is_of(Arch::SM_80));
    let others = framestride_shapes::models().iter().map(|(name, _)| *name);
    let others = others.filter(|name| !SPECS.contains(name) && is_of(name));
    let others = others.zip(TARGETS.into_iter().cycle());
    SPECS.into_iter().flat_map(|name| TARGETS.map(|target| (name, target))).chain(others).collect()
}

/// What is wrong with the kernels of a spec on a target.
fn complaints(name: &str, target: &str) -> Result<Vec<String>, String> {
    let spec = Spec::shipped(name).map_err(|error| error.to_string())?;
    let kernels = Kernels::for_spec(&spec, Arch::SM_80).map_err(|error| error.to_string())?;
    let (listing, reports) = Listing::from_ptx(name, kernels.ptx(), target, &CudaTools::find())?;
    let mut wrong: Vec<String> = ptx::calls(kernels.ptx()).iter().map(|(_, call)| format!("calls {call}")).collect();
    for kernel in &kernels.manifest().kernels {
        let entry = &kernel.entry;
        let report = reports.get(entry).ok_or(format!("{entry} has no report"))?;
        for (what, bytes) in
            [("stack", report.stack), ("spill stores", report.spill_stores), ("spill loads", report.spill_loads)]
        {
            wrong.extend((bytes != 0).then(|| format!("{entry} has {bytes} bytes of {what}")));
        }
        // ptxas gives registers to threads by eights.
        let block = report.registers.next_multiple_of(8) * kernel.threads;
        if block * kernel.min_blocks > Arch::SM_80.registers {
            wrong.push(format!("{entry} has no room for {} blocks of {block} registers", kernel.min_blocks));
        }
        wrong.extend(report.messages.iter().map(|message| format!("{entry}: {message}")));
    }
    let attention = listing.function("attention").ok_or("attention has no machine code")?;
    let tiles = spec.tiles(Arch::SM_80);
    if spec.layout.sequence() > 2 * tiles.key_rows {
        wrong.extend(main_loop(attention, spec.head_dim, tiles.key_rows));
    }
    Ok(wrong)
}

/// What is wrong with the main loop, as far as it goes where weights fit. A warp has two blocks of 16
/// rows, and multiplies 8 columns by 16 at a time.
fn main_loop(attention: &Function, head_dim: u32, key_rows: u32) -> Vec<String> {
    let products = (2 * (head_dim / 16) * (key_rows / 8) + 2 * (key_rows / 16) * (head_dim / 8)) as usize;
    let exponentials = key_rows as usize;
    let count = |function: &Function, range: &std::ops::Range<usize>, name: &str| {
        function.instructions[range.clone()].iter().filter(|instruction| instruction.is(name)).count()
    };
    let loops: Vec<_> =
        attention.loops().into_iter().filter(|range| count(attention, range, "HMMA") == products).collect();
    let mut wrong = Vec::new();
    if loops.len() != 1 {
        wrong.push(format!("{} loops with {products} HMMA, expected 1", loops.len()));
    }
    for range in &loops {
        let found = count(attention, range, "MUFU.EX2");
        wrong.extend((found != exponentials).then(|| format!("{found} MUFU.EX2 in a loop, expected {exponentials}")));
    }
    wrong
}

/// There is no stack and no spill, no call, and no remark of ptxas. Registers leave room for the
/// blocks that a multiprocessor shall hold, and the main loops have nothing twice.
#[test]
fn every_gpu_since_ampere() {
    let check = |(name, target): (&str, &str)| {
        let wrong = complaints(name, target).unwrap_or_else(|error| vec![error]);
        wrong.into_iter().map(|wrong| format!("{name} on {target}: {wrong}")).collect::<Vec<_>>()
    };
    let wrong: Vec<String> = pairs().into_par_iter().flat_map_iter(check).collect();
    assert!(wrong.is_empty(), "{}", wrong.join("\n"));
}
