//! From LLVM IR to PTX: the finishing step, LLVM's `opt` and `llc`, and a look at what came out.

use std::collections::BTreeMap;
use std::fs;
use std::path::Path;
use std::process::Command;

use framestride_shapes::manifest::{KernelResources, Param, Ptxas};
use framestride_shapes::numbers::{Numbers, PREFIX};
use serde::{Deserialize, Serialize};

use crate::device_crate::{DeviceCrate, digest};
use crate::error::{at, said};
use crate::files::write_atomically;
use crate::llvm_ir::{self, Finished, LaunchTable};
use crate::toolchain::{self, CudaTools, Toolchain};
use crate::{Arch, BuildError, convergence, ptx, ptxas};

/// PTX, and what is known of its kernels.
pub(crate) struct Translation {
    /// Launch tables of the entries.
    tables: Vec<LaunchTable>,
    /// The spec that the crate's `attention_kernels!` states.
    pub spec: Option<String>,
    /// The PTX. In a template, bounds of a launch that depend on the spec are literals with names.
    pub ptx: String,
    /// What ptxas says of each kernel, if there is one. It cannot compile a template.
    ptxas: Option<BTreeMap<String, Ptxas>>,
}

/// What is kept beside the IR, so that a build without changes ends here.
#[derive(Serialize, Deserialize)]
struct Kept {
    /// Digest of everything that the PTX is made from.
    made_from: String,
    ptx: String,
    /// Version of ptxas and its report, if there was one.
    ptxas: Option<(String, BTreeMap<String, Ptxas>)>,
}

impl Translation {
    /// Finishes the IR of a crate, optimises it and translates it to PTX, unless its PTX is already
    /// there.
    pub fn make(device: &DeviceCrate, ir: &Path, arch: Arch, toolchain: &Toolchain) -> Result<Translation, BuildError> {
        let text = fs::read_to_string(ir).map_err(at("read", ir))?;
        let finished =
            llvm_ir::finish(&text, arch).map_err(|source| BuildError::Finish { name: device.name.clone(), source })?;
        let (opt_flags, llc_flags) = (flags(arch, None), flags(arch, Some(arch.ptx_version)));
        let flags = opt_flags.iter().chain(&llc_flags).map(String::as_str);
        let made_from = digest([finished.ir.as_str(), &toolchain.llvm_version].into_iter().chain(flags));
        let file = device.work.join("translation.json");
        let found = fs::read(&file).ok().and_then(|bytes| serde_json::from_slice::<Kept>(&bytes).ok());
        let mut kept = match found.filter(|found| found.made_from == made_from) {
            Some(found) => found,
            None => {
                let path = |name: &str| device.work.join(name);
                let (finished_ir, optimised, ptx) = (path("finished.ll"), path("optimised.bc"), path("kernels.ptx"));
                fs::write(&finished_ir, &finished.ir).map_err(at("write", &finished_ir))?;
                translate(device, &toolchain.opt, &opt_flags, &finished_ir, &optimised)?;
                translate(device, &toolchain.llc, &llc_flags, &optimised, &ptx)?;
                let text = fs::read_to_string(&ptx).map_err(at("read", &ptx))?;
                // A look at these large files is of use only when something is wrong.
                for file in [finished_ir, optimised] {
                    fs::remove_file(&file).map_err(at("remove", &file))?;
                }
                Kept { made_from, ptx: text, ptxas: None }
            }
        };
        // What was kept is checked too, because it may come from a version that checked less.
        check(device, &kept.ptx, &finished.tables)?;
        let ptx = name_bounds(&kept.ptx, &finished);
        let tool = CudaTools::find().ptxas.filter(|_| finished.literals == 0);
        let version = tool.as_deref().and_then(toolchain::cuda_version);
        kept.ptxas = match (tool, version, kept.ptxas.take()) {
            (None, ..) => None,
            (Some(_), version, Some((known, report))) if version.as_ref() == Some(&known) => Some((known, report)),
            (Some(tool), version, _) => {
                let (ptx, cubin) = (device.work.join("kernels.ptx"), device.work.join("kernels.cubin"));
                let report = ptxas::assemble(&device.name, &tool, arch.name, &ptx, &cubin)?;
                Some((version.unwrap_or_default(), report))
            }
        };
        let json = serde_json::to_vec(&kept).map_err(|error| at("write", &file)(error.into()))?;
        write_atomically(&file, &json)?;
        Ok(Translation {
            tables: finished.tables,
            spec: finished.spec,
            ptx,
            ptxas: kept.ptxas.map(|(_, report)| report),
        })
    }

    /// The kernels for the manifest, in the order of the PTX.
    pub fn kernels(&self) -> Vec<KernelResources> {
        let kernel = |table: &LaunchTable| {
            let places = ptx::params(&self.ptx, &table.entry).unwrap_or_default();
            let params = table.params.iter().zip(&places).map(|(param, &(offset, bytes))| Param {
                name: param.name.clone(),
                ty: param.ty.clone(),
                offset,
                bytes,
            });
            KernelResources {
                entry: table.entry.clone(),
                threads: table.threads,
                min_blocks: table.min_blocks,
                shared_bytes: table.shared_bytes,
                params_bytes: places.last().map_or(0, |(offset, bytes)| offset + bytes),
                params: params.collect(),
                ptxas: self.ptxas.as_ref().and_then(|reports| reports.get(&table.entry).cloned()),
            }
        };
        let order = ptx::entries(&self.ptx);
        order.iter().filter_map(|name| self.tables.iter().find(|table| table.entry == *name)).map(kernel).collect()
    }
}

/// In a template, gives names to those bounds of a launch that are among the numbers of a spec: the
/// threads of an entry and its blocks on a multiprocessor.
fn name_bounds(text: &str, finished: &Finished) -> String {
    let mut text = text.to_string();
    if finished.literals > 0 {
        let names: Vec<&str> = Numbers::default().fields().into_iter().map(|(name, _)| name).collect();
        for table in &finished.tables {
            for (directive, bound) in [("maxntid", "threads"), ("minnctapersm", "min_blocks")] {
                // The same kernel in 8 bits has the same bounds.
                let name = format!("{}_{bound}", table.entry.trim_end_matches("_e4m3"));
                if names.contains(&name.as_str()) {
                    text = ptx::with_name(&text, &table.entry, directive, &format!("{PREFIX}{name}"));
                }
            }
        }
    }
    text
}

/// Options of `opt` and `llc`.
fn flags(arch: Arch, ptx_version: Option<(u32, u32)>) -> Vec<String> {
    let mut flags = vec!["-O3".to_string(), format!("-mcpu={}", arch.name)];
    if let Some((major, minor)) = ptx_version {
        // LLVM's comments name functions with hashes, which a new version of any dependency
        // changes.
        flags.extend([format!("-mattr=+ptx{major}{minor}"), "-asm-verbose=false".to_string()]);
    }
    flags
}

fn translate(
    device: &DeviceCrate,
    tool: &Path,
    flags: &[String],
    input: &Path,
    output: &Path,
) -> Result<(), BuildError> {
    let answer = Command::new(tool).args(flags).arg(input).arg("-o").arg(output).output().map_err(at("start", tool))?;
    if answer.status.success() {
        return Ok(());
    }
    Err(BuildError::Tool {
        name: device.name.clone(),
        tool: tool.into(),
        input: input.into(),
        message: said(&String::from_utf8_lossy(&answer.stderr)),
    })
}

/// Checks that the PTX has every entry with the bounds of its launch table, and no other entry.
/// Checks that the lanes of a warp stay together.
fn check(device: &DeviceCrate, text: &str, tables: &[LaunchTable]) -> Result<(), BuildError> {
    let path = device.work.join("kernels.ptx");
    let entries = ptx::entries(text);
    let wrong = |entry: &str, problem: String| BuildError::Ptx {
        name: device.name.clone(),
        entry: entry.into(),
        problem,
        ptx: path.clone(),
    };
    if let Some(extra) = entries.iter().find(|entry| !tables.iter().any(|table| table.entry == **entry)) {
        return Err(wrong(extra, "is there without a launch table".into()));
    }
    for table in tables {
        if !entries.contains(&table.entry) {
            return Err(wrong(&table.entry, "is missing".into()));
        }
        let params = ptx::params(text, &table.entry).map(|places| places.len());
        if params != Some(table.params.len()) {
            let found =
                params.map_or("parameters of an unknown form".to_string(), |count| format!("{count} parameters"));
            return Err(wrong(&table.entry, format!("has {found}, its launch table {}", table.params.len())));
        }
        for (directive, expected) in [("maxntid", table.threads), ("minnctapersm", table.min_blocks)] {
            let found = ptx::bound(text, &table.entry, directive);
            if found != Some(expected) {
                let found = found.map_or("nothing".to_string(), |found| found.to_string());
                return Err(wrong(&table.entry, format!("says {found} for .{directive}, not {expected}")));
            }
        }
    }
    match convergence::parted(text).into_iter().next() {
        Some(parted) => Err(BuildError::Convergence { name: device.name.clone(), parted: Box::new(parted), ptx: path }),
        None => Ok(()),
    }
}
