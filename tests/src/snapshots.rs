//! What the templates are for every shipped spec, in files that a person reads:
//! `snapshots/NAME.snap`.

use std::collections::{BTreeMap, BTreeSet};
use std::fmt::Write;
use std::panic::catch_unwind;
use std::{env, fs};

use framestride_builder::ptx;
use framestride_shapes::manifest::Manifest;

use crate::{Model, checkout, entry_text, listed, models, ptxas_version, same_text, templates, without_comments};

/// The template whose whole PTX is kept. The others differ in tiles and element type.
const WHOLE: &str = "sm_90a_bf16_64";

/// Sections that ptxas writes. They are compared only under the ptxas that they were recorded with.
const OF_PTXAS: [&str; 2] = ["Resources (ptxas)", "Machine code (ptxas)"];

#[test]
fn every_spec() {
    let ptxas = ptxas_version();
    check_all(models().iter().map(|model| {
        let text = report(model, &ptxas);
        check(&model.kernels.manifest().name, &text, |recorded, text| {
            let keep_ptxas = tools(recorded).rsplit("ptxas ").next() == Some(&ptxas);
            same_text("report", &comparable(recorded, keep_ptxas), &comparable(text, keep_ptxas))
        })
    }));
}

#[test]
fn whole_ptx() {
    let template = templates().iter().find(|template| template.name == WHOLE).expect("is a template");
    let text = format!("// {}\n{}", compiler(&template.manifest), without_comments(&template.ptx));
    check_all(std::iter::once(check(&format!("{WHOLE}_ptx"), &text, |recorded, text| {
        same_text("histogram of instructions", &listed(&ptx::histogram(recorded)), &listed(&ptx::histogram(text)))
    })));
}

/// Compares `text` with `snapshots/NAME.snap`. If other tools recorded it, which the first line
/// names, `same` compares the two texts.
fn check(name: &str, text: &str, same: impl Fn(&str, &str) -> Result<(), String>) -> Result<(), String> {
    let recorded = fs::read_to_string(checkout(&format!("tests/snapshots/{name}.snap")));
    let recorded = recorded.ok().and_then(|file| Some(file.splitn(3, "---\n").nth(2)?.to_string()));
    let updates = env::var("INSTA_UPDATE").is_ok_and(|update| update == "always" || update == "force");
    if let Some(recorded) = recorded.filter(|recorded| !updates && tools(recorded) != tools(text)) {
        let tools = format!("recorded with {}, now {}", tools(&recorded), tools(text));
        return same(&recorded, text).map_err(|difference| format!("{name}: {difference} ({tools})"));
    }
    let compared = catch_unwind(|| {
        let mut settings = insta::Settings::clone_current();
        settings.set_prepend_module_to_snapshot(false);
        settings.set_omit_expression(true);
        settings.set_snapshot_path("../snapshots");
        settings.bind(|| insta::assert_snapshot!(name, text));
    });
    compared.map_err(|_| format!("{name}: is not snapshots/{name}.snap, see above"))
}

/// Fails with everything that differs, after all has been compared.
fn check_all(results: impl Iterator<Item = Result<(), String>>) {
    let wrong: Vec<String> = results.filter_map(Result::err).collect();
    let mend =
        "if that is what you want: INSTA_UPDATE=always cargo test -p framestride-tests, and review the difference";
    assert!(wrong.is_empty(), "{}\n{mend}", wrong.join("\n"));
}

/// The first line of a snapshot, which names the tools.
fn tools(text: &str) -> &str {
    text.lines().next().unwrap_or("")
}

fn compiler(manifest: &Manifest) -> String {
    format!("rustc {}, LLVM {}", manifest.compiler.rustc, manifest.compiler.llvm)
}

/// The sections that must be the same under any tools. Those of ptxas belong to them if
/// `keep_ptxas`.
fn comparable(text: &str, keep_ptxas: bool) -> String {
    let sections = text.split("\n\n").skip(1);
    let kept = sections.filter(|section| keep_ptxas || !OF_PTXAS.iter().any(|title| section.starts_with(title)));
    kept.flat_map(|section| [section, "\n\n"]).collect()
}

/// Everything about one spec, in sections that an empty line divides.
fn report(model: &Model, ptxas: &str) -> String {
    let manifest = model.kernels.manifest();
    let (_, toml) = framestride_shapes::models().iter().find(|(name, _)| *name == manifest.name).expect("is shipped");
    assert_eq!(manifest.spec.as_deref(), Some(*toml), "the manifest must carry the spec as it was written");
    let densities = manifest.densities.as_ref().expect("a spec has densities");

    let manifest_rows = [
        ["name".to_string(), manifest.name.clone()],
        ["format".to_string(), manifest.format.to_string()],
        ["arch".to_string(), manifest.arch.clone()],
        ["spec".to_string(), format!("shapes/models/{}.toml", manifest.name)],
        ["density, dense".to_string(), densities.dense.to_string()],
        ["density, spatial".to_string(), densities.spatial.to_string()],
        ["density, temporal".to_string(), densities.temporal.to_string()],
        ["workspace".to_string(), format!("{} bytes", manifest.workspace_bytes.expect("a spec has a workspace"))],
    ];
    let mut launch = vec![row(["kernel", "threads", "min_blocks", "shared_bytes", "parameters: type at bytes"])];
    let mut resources = vec![row(["kernel", "registers", "stack", "spill stores", "spill loads", "messages"])];
    let mut machine_code = vec![row(["kernel", "instructions", "GMMA", "MUFU", "BAR", "SYNCS", "LDG", "STG", "BRA"])];
    for kernel in &manifest.kernels {
        let params =
            kernel.params.iter().map(|p| format!("{}: {} at {}..{}", p.name, p.ty, p.offset, p.offset + p.bytes));
        launch.push(row([
            kernel.entry.clone(),
            kernel.threads.to_string(),
            kernel.min_blocks.to_string(),
            kernel.shared_bytes.to_string(),
            params.collect::<Vec<_>>().join(", "),
        ]));
        let report = model.resources.get(&kernel.entry).expect("ptxas has reported");
        let messages = if report.messages.is_empty() { "none".into() } else { report.messages.join("; ") };
        resources.push(row([
            kernel.entry.clone(),
            report.registers.to_string(),
            report.stack.to_string(),
            report.spill_stores.to_string(),
            report.spill_loads.to_string(),
            messages,
        ]));
        let function = model.machine_code.function(&kernel.entry).expect("every entry has machine code");
        let products = function.count("HGMMA") + function.count("QGMMA");
        let counts = ["MUFU", "BAR", "SYNCS", "LDG", "STG", "BRA"].map(|code| function.count(code).to_string());
        let first = [kernel.entry.clone(), function.instructions.len().to_string(), products.to_string()];
        machine_code.push(first.into_iter().chain(counts).collect());
    }
    let mut text = format!("{}, ptxas {ptxas}\n", compiler(manifest));
    section(&mut text, "Manifest", &manifest_rows.map(Vec::from));
    section(&mut text, "Launch table", &launch);
    section(&mut text, OF_PTXAS[0], &resources);
    section(&mut text, OF_PTXAS[1], &machine_code);
    let attentions = ["attention", "attention_e4m3"].into_iter().filter_map(|name| model.machine_code.function(name));
    for (attention, overlap) in
        attentions.flat_map(|function| function.overlaps().into_iter().map(move |o| (function, o)))
    {
        let _ = writeln!(
            text,
            "main loop of {}: {} instructions, {} GMMA, {} MUFU.EX2, {} of them between its two waits",
            attention.name,
            overlap.main_loop.len(),
            overlap.products,
            overlap.exponentials,
            overlap.between_waits
        );
    }
    section(&mut text, "Instructions (PTX)", &instructions(model.kernels.ptx(), manifest));
    text
}

/// A table of how often each instruction stands in each kernel.
fn instructions(text: &str, manifest: &Manifest) -> Vec<Vec<String>> {
    let entries: Vec<&str> = manifest.kernels.iter().map(|kernel| kernel.entry.as_str()).collect();
    let counts: Vec<BTreeMap<String, usize>> =
        entries.iter().map(|entry| ptx::histogram(entry_text(text, entry))).collect();
    let opcodes: BTreeSet<&String> = counts.iter().flat_map(BTreeMap::keys).collect();
    let number = |count: Option<&usize>| count.map_or(".".to_string(), usize::to_string);
    let line = |name: &str, cells: Vec<String>| [name.to_string()].into_iter().chain(cells).collect();
    let mut table = vec![line("", entries.iter().map(ToString::to_string).collect())];
    table
        .extend(opcodes.iter().map(|code| line(code, counts.iter().map(|kernel| number(kernel.get(*code))).collect())));
    table.push(line("all", counts.iter().map(|kernel| kernel.values().sum::<usize>().to_string()).collect()));
    table
}

fn row<const N: usize>(cells: [impl Into<String>; N]) -> Vec<String> {
    cells.map(Into::into).into()
}

/// A title, and aligned columns. Words stand to the left and numbers to the right.
fn section(text: &mut String, title: &str, rows: &[Vec<String>]) {
    let columns = rows.iter().map(Vec::len).max().unwrap_or(0);
    let widths: Vec<usize> = (0..columns)
        .map(|column| rows.iter().filter_map(|row| row.get(column)).map(String::len).max().unwrap_or(0))
        .collect();
    let is_number = |cell: &str| cell == "." || cell.bytes().all(|byte| byte.is_ascii_digit());
    let numbers: Vec<bool> =
        (0..columns).map(|column| rows.iter().skip(1).all(|row| is_number(&row[column]))).collect();
    let _ = writeln!(text, "\n{title}");
    for row in rows {
        let cells = row.iter().zip(&widths).zip(&numbers).map(|((cell, &width), &number)| {
            if number { format!("{cell:>width$}") } else { format!("{cell:<width$}") }
        });
        let _ = writeln!(text, "{}", cells.collect::<Vec<_>>().join("  ").trim_end());
    }
}
