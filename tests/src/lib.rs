//! Tests across crates: what the templates are for every shipped spec, down to the machine code.
//!
//! * `snapshots`: one reviewed file for each spec, `snapshots/NAME.snap`, with its manifest, launch
//!   table, report of ptxas and instructions. Of one template the whole PTX is kept.
//! * `machine_code`: what no kernel may have (stack, spills, calls, serialised products), and the
//!   softmax under the products, which [`sass`] reads. Random specs are looked at too, and main
//!   loops are compared with those of kernels that know their spec.
//! * `warp_machine_code`: the same of the family of single warps, on every kind of GPU that it
//!   serves.
//! * `documents`: links between the pages of the repository.
//! * `shipped`: `host/kernels` holds the templates that the builder makes today.
//! * `engine`: the crates that an engine links, which are few.
//! * `own_crate`: a user's own device crate (`device/`), with a spelled-out shape and a kernel that
//!   is written by hand.
//!
//! The tests need a device compiler, ptxas and nvdisasm, which `cargo xtask test` sets up. The
//! kernels are assembled once for all tests.
//!
//! After a change to kernels, macros or specs, look at what it did to the generated code, and keep
//! it, with
//!
//! ```text
//! cargo xtask kernels
//! INSTA_UPDATE=always cargo test -p framestride-tests
//! git diff tests/snapshots
//! ```
//!
//! Whole texts are compared only under the compiler that they were recorded with, because another
//! one may name a register differently. Under another compiler, instructions and resources are
//! compared. What ptxas says is compared only under the recorded ptxas.
#![cfg(test)]

mod documents;
mod engine;
mod machine_code;
mod own_crate;
mod sass;
mod shipped;
mod snapshots;
mod warp_machine_code;

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use framestride::{Kernels, Spec};
use framestride_builder::toolchain::{CudaTools, Inventory};
use framestride_builder::{Arch, Built};
use framestride_shapes::manifest::Ptxas;
use rayon::prelude::*;
use sass::Listing;

/// A spec and everything made of it.
struct Model {
    kernels: Kernels,
    /// What ptxas says of each kernel.
    resources: BTreeMap<String, Ptxas>,
    machine_code: Listing,
}

impl Model {
    /// The shipped kernels of a spec, assembled.
    fn of(spec: &Spec) -> Result<Model, String> {
        let kernels = Kernels::for_spec(spec, Arch::SM_90A).map_err(|error| error.to_string())?;
        let (machine_code, resources) =
            Listing::from_ptx(&spec.name, kernels.ptx(), Arch::SM_90A.name, &CudaTools::find())?;
        Ok(Model { kernels, resources, machine_code })
    }
}

/// Every shipped spec, in the order of their names, assembled for the first test that asks.
fn models() -> &'static [Model] {
    static MODELS: OnceLock<Result<Vec<Model>, String>> = OnceLock::new();
    let make = |&(name, _): &(&str, &str)| Model::of(&Spec::shipped(name).map_err(|error| error.to_string())?);
    match MODELS.get_or_init(|| framestride_shapes::models().par_iter().map(make).collect()) {
        Ok(models) => models,
        Err(message) => panic!("{message}"),
    }
}

/// The shipped model of this name.
fn model(name: &str) -> &'static Model {
    let model = models().iter().find(|model| model.kernels.spec().name == name);
    model.unwrap_or_else(|| panic!("no shipped spec `{name}`"))
}

/// The templates, built by the first test that asks.
fn templates() -> &'static [Built] {
    static TEMPLATES: OnceLock<Result<Vec<Built>, String>> = OnceLock::new();
    let build = |arch| framestride_builder::Kernels::templates(arch).build_all().map_err(|e| e.to_string());
    let all = || Arch::ALL.into_iter().map(build).collect::<Result<Vec<_>, _>>().map(|families| families.concat());
    match TEMPLATES.get_or_init(all) {
        Ok(templates) => templates,
        Err(message) => panic!("{message}"),
    }
}

/// A path of the checkout.
fn checkout(path: &str) -> PathBuf {
    Path::new(env!("CARGO_MANIFEST_DIR")).join("..").join(path)
}

/// Version of the ptxas in use, as in `13.0.88`.
fn ptxas_version() -> String {
    let findings = Inventory::new().findings;
    let version = findings.into_iter().find(|finding| finding.tool == "ptxas").and_then(|finding| finding.version);
    version.expect("ptxas tells its version")
}

/// The text of one entry in a module's PTX, from its name to the next entry.
fn entry_text<'a>(ptx: &'a str, entry: &str) -> &'a str {
    let (_, rest) = ptx.split_once(&format!(".entry {entry}(")).unwrap_or_else(|| panic!("no entry `{entry}`"));
    rest.split_once(".entry ").map_or(rest, |(text, _)| text)
}

/// PTX without comments and empty lines. LLVM's comments hold mangled names, and with them hashes
/// of compiler and crate.
fn without_comments(ptx: &str) -> String {
    let lines =
        ptx.lines().map(|line| line.split("//").next().unwrap_or("").trim_end()).filter(|line| !line.is_empty());
    lines.flat_map(|line| [line, "\n"]).collect()
}

/// A random number (splitmix64).
fn random(state: &mut u64) -> u64 {
    *state = state.wrapping_add(0x9e37_79b9_7f4a_7c15);
    let mut z = *state;
    z = (z ^ (z >> 30)).wrapping_mul(0xbf58_476d_1ce4_e5b9);
    z = (z ^ (z >> 27)).wrapping_mul(0x94d0_49bb_1331_11eb);
    z ^ (z >> 31)
}

/// How often each instruction stands there, one instruction a line.
fn listed(histogram: &BTreeMap<String, usize>) -> String {
    histogram.iter().map(|(code, count)| format!("{count} {code}\n")).collect()
}

/// Names the first line in which the kept text differs from the one that is made today.
fn same_text(what: &str, kept: &str, made: &str) -> Result<(), String> {
    if kept == made {
        return Ok(());
    }
    let (mut old, mut new) = (kept.lines(), made.lines());
    let mut line = 1;
    loop {
        match (old.next(), new.next()) {
            (Some(old), Some(new)) if old == new => line += 1,
            (None, None) => return Err(format!("the {what} differs in its line ends")),
            (old, new) => {
                let shown = |line: Option<&str>| line.map_or("<end>".to_string(), |line| line.trim().to_string());
                return Err(format!(
                    "the {what} differs from line {line} on: kept `{}`, made `{}`",
                    shown(old),
                    shown(new)
                ));
            }
        }
    }
}
