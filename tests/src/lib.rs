//! Tests across crates: what the builder makes of every shipped spec, down to the machine code.
//!
//! * `snapshots`: one reviewed file for each spec, `snapshots/NAME.snap`, with its manifest, launch
//!   table, report of ptxas and instructions. Of two small specs the whole PTX is kept.
//! * `machine_code`: what no kernel may have (stack, spills, calls, serialised products), and the
//!   softmax under the products, which [`sass`] reads.
//! * `documents`: links between the pages of the repository.
//! * `shipped`: `host/kernels` holds what the builder makes today.
//! * `engine`: the crates that an engine links, which are few.
//! * `own_crate`: a user's own device crate (`device/`), with a spelled-out shape and a kernel that
//!   is written by hand.
//!
//! The tests need a device compiler, ptxas and nvdisasm, which `cargo xtask test` sets up. The
//! kernels are built once for all tests.
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

use std::collections::BTreeMap;
use std::path::{Path, PathBuf};
use std::sync::OnceLock;

use framestride_builder::toolchain::{CudaTools, Inventory};
use framestride_builder::{Arch, Built, Kernels};
use framestride_shapes::spec::Spec;
use rayon::prelude::*;
use sass::Listing;

/// One shipped spec and everything made of it.
struct Model {
    spec: Spec,
    built: Built,
    machine_code: Listing,
}

/// Every shipped spec, in the order of their names, built by the first test that asks.
fn models() -> &'static [Model] {
    static MODELS: OnceLock<Result<Vec<Model>, String>> = OnceLock::new();
    match MODELS.get_or_init(make_models) {
        Ok(models) => models,
        Err(message) => panic!("{message}"),
    }
}

fn make_models() -> Result<Vec<Model>, String> {
    let tools = CudaTools::find();
    let names = framestride_shapes::models().iter().map(|(name, _)| name);
    let files: Vec<PathBuf> = names.map(|name| checkout(&format!("shapes/models/{name}.toml"))).collect();
    let built = Kernels::from_specs(&files).arch(Arch::SM_90A).build_all().map_err(|error| error.to_string())?;
    let model = |built: Built| {
        let machine_code = Listing::from_ptx(&built.name, &built.ptx, Arch::SM_90A, &tools)?;
        let spec = built.manifest.spec().map_err(|error| error.to_string())?;
        Ok(Model { spec, built, machine_code })
    };
    built.into_par_iter().map(model).collect()
}

/// The model of this name.
fn model(name: &str) -> &'static Model {
    models().iter().find(|model| model.built.name == name).unwrap_or_else(|| panic!("no shipped spec `{name}`"))
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

/// Everything that `check` finds wrong, each with the name of its model.
fn wrong_models(check: impl Fn(&Model) -> Vec<String> + Sync) -> Vec<String> {
    let models = models().par_iter();
    models
        .flat_map_iter(|model| check(model).into_iter().map(|wrong| format!("{}: {wrong}", model.built.name)))
        .collect()
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
