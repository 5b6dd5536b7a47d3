//! `host/kernels` holds what the builder makes today.

use std::collections::BTreeSet;
use std::fs;

use framestride_builder::toolchain::CUDA_PACKAGES;
use framestride_builder::{Manifest, ptx};

use crate::{Model, checkout, listed, ptxas_version, same_text, wrong_models};

#[test]
fn shipped_kernels_are_what_the_builder_makes() {
    let ptxas_counts = is_the_packages_ptxas(&ptxas_version());
    let mut wrong = wrong_models(|model| compare(model, ptxas_counts).err().into_iter().collect());
    let expected: BTreeSet<String> = framestride_shapes::models()
        .iter()
        .flat_map(|(name, _)| [format!("{name}.ptx"), format!("{name}.json")])
        .chain(["README.md".to_string()])
        .collect();
    let folder = checkout("host/kernels");
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let found: BTreeSet<String> =
        entries.flatten().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    wrong.extend(found.difference(&expected).map(|file| format!("{file} belongs to no spec of shapes/models")));
    assert!(
        wrong.is_empty(),
        "host/kernels is not what the builder makes today:\n{}\nmake it again: cargo xtask kernels",
        wrong.join("\n")
    );
}

/// What differs, if anything. `ptxas_counts` says whether this ptxas made the shipped reports.
fn compare(model: &Model, ptxas_counts: bool) -> Result<(), String> {
    let name = &model.built.name;
    let read = |extension: &str| {
        let file = format!("host/kernels/{name}.{extension}");
        fs::read_to_string(checkout(&file)).map_err(|error| format!("cannot read {file}: {error}"))
    };
    let (shipped_ptx, json) = (read("ptx")?, read("json")?);
    let shipped = Manifest::parse(&format!("host/kernels/{name}.json"), &json).map_err(|error| error.to_string())?;
    let mut made = model.built.manifest.clone();
    if !ptxas_counts {
        for (made, shipped) in made.kernels.iter_mut().zip(&shipped.kernels) {
            made.ptxas = shipped.ptxas.clone();
        }
    }
    if shipped.compiler == made.compiler {
        same_text("PTX", &shipped_ptx, &model.built.ptx)?;
    } else {
        // Another compiler must give the same instructions, each as often.
        let instructions = |ptx: &str| listed(&ptx::histogram(ptx));
        same_text("histogram of instructions", &instructions(&shipped_ptx), &instructions(&model.built.ptx))?;
        made.compiler = shipped.compiler.clone();
        made.ptx_sha256 = shipped.ptx_sha256.clone();
    }
    same_text("manifest", &json, &made.to_json())
}

/// Whether this ptxas is of the series that `cargo xtask kernels` installs, as the shipped reports
/// are.
fn is_the_packages_ptxas(version: &str) -> bool {
    let packages = CUDA_PACKAGES.iter().find_map(|package| package.split_once("=="));
    let (_, series) = packages.expect("the packages of ptxas have a version");
    version.starts_with(series.trim_end_matches('*'))
}
