//! What can go wrong on the way from a spec to PTX.

use std::io;
use std::path::{Path, PathBuf};

use framestride_shapes::spec::SpecError;

use crate::convergence::Parted;
use crate::finish::FinishError;
use crate::toolchain::ToolchainError;

/// Why there is no PTX. The message names the file, says what was found, and how to mend it.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The spec is wrong; all its problems are listed.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// Nothing to build.
    #[error("there is no spec to build: name one")]
    NoSpec,
    /// Two specs whose files would have one name.
    #[error("{first} and {second} are both named `{name}`, as their files would be: rename one of them")]
    SameName {
        /// The name.
        name: String,
        /// The first file.
        first: String,
        /// The other one.
        second: String,
    },
    /// No device compiler on this machine.
    #[error(transparent)]
    Toolchain(#[from] ToolchainError),
    /// An architecture that no kernels exist for.
    #[error("there are no kernels for `{found}`: the architectures are {}", crate::Arch::names())]
    UnknownArch {
        /// What was asked for.
        found: String,
    },
    /// The device crate does not compile.
    #[error("{name}: the device crate {} does not compile:\n{}", manifest.display(), message.trim_end())]
    Compile {
        /// Name of the kernels.
        name: String,
        /// Its Cargo.toml.
        manifest: PathBuf,
        /// The compiler's own message, rendered as it prints it.
        message: String,
    },
    /// The IR is not what the finishing step expects.
    #[error("{name}: {source}")]
    Finish {
        /// Name of the kernels.
        name: String,
        /// What is surprising.
        source: FinishError,
    },
    /// `opt`, `llc` or `ptxas` refused its input.
    #[error("{name}: `{}` refused {}:\n{}", tool.display(), input.display(), message.trim_end())]
    Tool {
        /// Name of the kernels.
        name: String,
        /// The tool.
        tool: PathBuf,
        /// What it was given; kept for a look.
        input: PathBuf,
        /// What it said.
        message: String,
    },
    /// A tool of NVIDIA's that is needed to look at machine code.
    #[error("{tool} was not found: {mend}")]
    MissingTool {
        /// Its name.
        tool: &'static str,
        /// How to get it.
        mend: String,
    },
    /// The PTX lacks what the launch tables promise.
    #[error("{name}: the PTX of entry `{entry}` {problem}; this compiler does something new: please report it with {}", ptx.display())]
    Ptx {
        /// Name of the kernels.
        name: String,
        /// The entry.
        entry: String,
        /// What is wrong.
        problem: String,
        /// The PTX, kept for a look.
        ptx: PathBuf,
    },
    /// An instruction for all lanes of a warp stands where they may be apart: on a GPU it would wait for ever, or give anything.
    #[error("{name}: {parted}; the PTX is {}", ptx.display())]
    Convergence {
        /// Name of the kernels.
        name: String,
        /// The instruction, and what parts the lanes.
        parted: Parted,
        /// The PTX, kept for a look.
        ptx: PathBuf,
    },
    /// The sources of the device crates are not where this crate was built.
    #[error("the device crate's sources are not at {}: set FRAMESTRIDE_SOURCE to a checkout of framestride", path.display())]
    NoSource {
        /// Where they were expected.
        path: PathBuf,
    },
    /// A configuration of cargo that no build can be kept from.
    #[error("{} changes how every crate is compiled ({tables}): move it to the CARGO_HOME of those who need it", file.display())]
    RootConfiguration {
        /// The file.
        file: PathBuf,
        /// Its tables that are not about where crates come from.
        tables: String,
    },
    /// A folder for builds whose name cargo or rustc cannot take.
    #[error("builds cannot be kept in {}: rustc splits its options at `,` and cargo lists of paths at `{}`; set FRAMESTRIDE_CACHE to a folder without either", folder.display(), crate::device_crate::PATH_SEPARATOR)]
    CacheName {
        /// The folder.
        folder: PathBuf,
    },
    /// No folder to keep builds in.
    #[error("no folder to keep builds in: set FRAMESTRIDE_CACHE to one (or XDG_CACHE_HOME, or HOME)")]
    NoCache,
    /// A user's device crate that cannot be used.
    #[error("{}: {problem}", path.display())]
    Crate {
        /// Its folder or Cargo.toml.
        path: PathBuf,
        /// What is wrong, and the mend.
        problem: String,
    },
    /// A file or folder cannot be read, written or locked.
    #[error("cannot {action} {}: {source}", path.display())]
    Io {
        /// What was tried: "write", "create", "start".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Several builds failed.
    #[error("{} builds failed:\n{}", .0.len(), .0.iter().map(|error| error.to_string()).collect::<Vec<_>>().join("\n"))]
    Several(Vec<BuildError>),
}

/// Gives an I/O error its file.
pub(crate) fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BuildError + 'a {
    move |source| BuildError::Io { action, path: path.to_path_buf(), source }
}
