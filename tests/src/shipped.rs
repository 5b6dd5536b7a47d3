//! `host/kernels` holds the templates that the builder makes today.

use std::collections::BTreeSet;
use std::fs;
use std::io::Read;

use flate2::read::GzDecoder;
use framestride_builder::{Built, Manifest, ptx};

use crate::{checkout, listed, same_text, templates};

/// The most bytes that all shipped kernels may have.
const MOST_BYTES: u64 = 1 << 20;

#[test]
fn shipped_templates_are_what_the_builder_makes() {
    let mut wrong: Vec<String> = templates()
        .iter()
        .filter_map(|template| compare(template).err().map(|difference| format!("{}: {difference}", template.name)))
        .collect();
    let expected: BTreeSet<String> = templates()
        .iter()
        .flat_map(|template| ["ptx.gz", "json"].map(|extension| format!("{}.{extension}", template.name)))
        .chain(["README.md".to_string()])
        .collect();
    let folder = checkout("host/kernels");
    let entries = fs::read_dir(&folder).unwrap_or_else(|error| panic!("cannot read {}: {error}", folder.display()));
    let entries: Vec<fs::DirEntry> = entries.flatten().collect();
    let found: BTreeSet<String> =
        entries.iter().map(|entry| entry.file_name().to_string_lossy().into_owned()).collect();
    wrong.extend(found.difference(&expected).map(|file| format!("{file} belongs to no template")));
    let bytes: u64 = entries.iter().filter_map(|entry| Some(entry.metadata().ok()?.len())).sum();
    wrong.extend((bytes > MOST_BYTES).then(|| format!("all files have {bytes} bytes, more than {MOST_BYTES}")));
    assert!(
        wrong.is_empty(),
        "host/kernels is not what the builder makes today:\n{}\nmake it again: cargo xtask kernels",
        wrong.join("\n")
    );
}

/// What differs, if anything.
fn compare(template: &Built) -> Result<(), String> {
    let name = &template.name;
    let read = |extension: &str| {
        let file = format!("host/kernels/{name}.{extension}");
        fs::read(checkout(&file)).map_err(|error| format!("cannot read {file}: {error}"))
    };
    let (mut shipped_ptx, json) = (String::new(), read("json")?);
    let json = String::from_utf8_lossy(&json);
    GzDecoder::new(read("ptx.gz")?.as_slice()).read_to_string(&mut shipped_ptx).map_err(|error| error.to_string())?;
    let shipped = Manifest::parse(&format!("host/kernels/{name}.json"), &json).map_err(|error| error.to_string())?;
    let mut made = template.manifest.clone();
    if shipped.compiler == made.compiler {
        same_text("PTX", &shipped_ptx, &template.ptx)?;
    } else {
        // Another compiler must give the same instructions, each as often.
        let instructions = |ptx: &str| listed(&ptx::histogram(ptx));
        same_text("histogram of instructions", &instructions(&shipped_ptx), &instructions(&template.ptx))?;
        made.compiler = shipped.compiler.clone();
        made.ptx_sha256 = shipped.ptx_sha256.clone();
    }
    same_text("manifest", &json, &made.to_json())
}
