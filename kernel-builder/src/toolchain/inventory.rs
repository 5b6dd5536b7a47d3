//! The tools that a machine has, as a list for people.

use std::collections::BTreeSet;
use std::fmt;
use std::path::PathBuf;

use serde::Serialize;

use super::cuda_tools::{cuda_mend, cuda_version};
use super::{CudaTools, DEBIAN_INSTALL, RUSTUP_INSTALL, Rejected, Toolchain, find, list};
use crate::packages::Packages;

/// The tools that this machine has, for `framestride doctor`.
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Inventory {
    /// One for each tool.
    pub findings: Vec<Finding>,
    /// The compilers that were found but cannot be used, if none can.
    pub rejected: Vec<Rejected>,
}

/// One tool of a [`Inventory`].
#[derive(Clone, Debug, PartialEq, Eq, Serialize)]
pub struct Finding {
    /// Its name.
    pub tool: &'static str,
    /// What it is used for.
    pub purpose: &'static str,
    /// Whether building kernels needs it.
    pub required: bool,
    /// Where it is; `None` if it is missing.
    pub path: Option<PathBuf>,
    /// Its version, if it is there.
    pub version: Option<String>,
    /// How to get it, if it is missing.
    pub mend: Option<String>,
}

impl Inventory {
    /// Looks at this machine.
    pub fn new() -> Inventory {
        let (toolchain, rejected) = match find() {
            Ok(toolchain) => (Some(toolchain), Vec::new()),
            Err(error) => (None, error.rejected),
        };
        let compiler = |tool, purpose, path: fn(&Toolchain) -> &PathBuf, version: fn(&Toolchain) -> &str| Finding {
            tool,
            purpose,
            required: true,
            path: toolchain.as_ref().map(|toolchain| path(toolchain).clone()),
            version: toolchain.as_ref().map(|toolchain| version(toolchain).to_string()),
            mend: toolchain.is_none().then(|| format!("{RUSTUP_INSTALL}   (or: {DEBIAN_INSTALL})")),
        };
        let sources = Packages::find().map(|sources| sources.kernels().to_path_buf());
        let tools = CudaTools::find();
        let cuda = |tool, purpose, path: &Option<PathBuf>| Finding {
            tool,
            purpose,
            required: false,
            path: path.clone(),
            version: path.as_ref().and_then(|path| cuda_version(path)),
            mend: path.is_none().then(cuda_mend),
        };
        Inventory {
            findings: vec![
                compiler("rustc", "compiles the kernels, with rust-src", |t| &t.rustc, |t| &t.rustc_version),
                compiler("cargo", "builds core and the device crate", |t| &t.cargo, |t| &t.rustc_version),
                compiler("opt", "optimises the finished IR", |t| &t.opt, |t| &t.llvm_version),
                compiler("llc", "writes the PTX", |t| &t.llc, |t| &t.llvm_version),
                Finding {
                    tool: "sources",
                    purpose: "of the kernels, the macros, the shapes",
                    required: true,
                    path: sources.as_ref().ok().cloned(),
                    version: None,
                    mend: sources.err().map(|error| error.to_string()),
                },
                cuda("ptxas", "reports registers, stack and spills", &tools.ptxas),
                cuda("nvdisasm", "lists machine code, for tests", &tools.nvdisasm),
            ],
            rejected,
        }
    }

    /// Whether kernels can be built here.
    pub fn can_build(&self) -> bool {
        self.findings.iter().all(|finding| !finding.required || finding.path.is_some())
    }
}

impl Default for Inventory {
    fn default() -> Inventory {
        Inventory::new()
    }
}

impl fmt::Display for Inventory {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        for finding in &self.findings {
            let mark = match (&finding.path, finding.required) {
                (Some(_), _) => "found",
                (None, true) => "MISSING",
                (None, false) => "absent",
            };
            let version = finding.version.as_deref().unwrap_or("");
            let place =
                finding.path.as_deref().map(|path| format!("{version}  {}", path.display())).unwrap_or_default();
            let line = format!("{mark:<8}{:<10}{:<37}{place}", finding.tool, finding.purpose);
            writeln!(f, "{}", line.trim_end())?;
        }
        // Tools that are installed together are named together.
        let mends: BTreeSet<&str> = self.findings.iter().filter_map(|finding| finding.mend.as_deref()).collect();
        for mend in mends {
            let tools = self.findings.iter().filter(|finding| finding.mend.as_deref() == Some(mend));
            let tools: Vec<&str> = tools.map(|finding| finding.tool).collect();
            writeln!(f, "to get {}: {mend}", tools.join(", "))?;
        }
        // The tools of a compiler are found together or not at all.
        let no_compiler = self.findings.first().is_some_and(|finding| finding.path.is_none());
        if no_compiler { writeln!(f, "{}", list(&self.rejected)) } else { Ok(()) }
    }
}
