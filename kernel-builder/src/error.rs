//! What can go wrong on the way from a spec to PTX.

use std::io;
use std::path::{Path, PathBuf};

use framestride_shapes::spec::SpecError;
use framestride_shapes::text::{MESSAGE_BYTES, plain};

use crate::convergence::Parted;
use crate::llvm_ir::FinishError;
use crate::toolchain::ToolchainError;

/// Why there is no PTX. The message names the file, says what was found, and how to mend it. It has
/// at most [`MESSAGE_BYTES`] bytes and no control characters.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum BuildError {
    /// The spec is wrong. All its problems are listed.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// There is nothing to build.
    #[error("there is no spec to build: name one")]
    NoSpec,
    /// Two specs have the same name, and so would their files.
    #[error(
        "{} and {} are both named `{name}`, as their files would be: rename one of them",
        plain(first, 300),
        plain(second, 300)
    )]
    SameName {
        /// The name.
        name: String,
        /// The first file.
        first: String,
        /// The other one.
        second: String,
    },
    /// The family has no kernels of the spec's `compute`.
    #[error(
        "{name}: attention.compute is \"{compute}\", of which there are kernels for {families}, not for {family}: build for one of these families, or write compute = \"dtype\" in the spec"
    )]
    NotOfFamily {
        /// Name of the spec.
        name: String,
        /// Its `compute`.
        compute: &'static str,
        /// The families that have it.
        families: String,
        /// The one to build for.
        family: &'static str,
    },
    /// There is no device compiler on this machine.
    #[error(transparent)]
    Toolchain(#[from] ToolchainError),
    /// The device crate does not compile.
    #[error("{name}: the device crate {} does not compile:\n{}{}", shown(manifest), message.trim_end(), hint(kept))]
    Compile {
        /// Name of the kernels.
        name: String,
        /// Its Cargo.toml.
        manifest: PathBuf,
        /// The message of the compiler, as it prints it.
        message: String,
        /// Folder of what earlier builds left, if damage there may be the reason.
        kept: Option<PathBuf>,
    },
    /// The IR is not what the finishing step expects.
    #[error("{name}: {source}")]
    Finish {
        /// Name of the kernels.
        name: String,
        /// What differs.
        source: FinishError,
    },
    /// `opt`, `llc` or `ptxas` refused its input.
    #[error("{name}: `{}` refused {}:\n{}", shown(tool), shown(input), message.trim_end())]
    Tool {
        /// Name of the kernels.
        name: String,
        /// The tool.
        tool: PathBuf,
        /// What it was given. The file is kept.
        input: PathBuf,
        /// What it said.
        message: String,
    },
    /// The PTX lacks something that the launch tables promise.
    #[error(
        "{name}: the PTX of entry `{entry}` {problem}; this compiler does something new: please report it with {}",
        shown(ptx)
    )]
    Ptx {
        /// Name of the kernels.
        name: String,
        /// The entry.
        entry: String,
        /// What is wrong.
        problem: String,
        /// The PTX. The file is kept.
        ptx: PathBuf,
    },
    /// An instruction for all lanes of a warp stands where lanes may be apart. On a GPU it would
    /// wait for ever, or give any result.
    #[error("{name}: {parted}; the PTX is {}", shown(ptx))]
    Convergence {
        /// Name of the kernels.
        name: String,
        /// The instruction, and the branch that parts the lanes.
        parted: Box<Parted>,
        /// The PTX, kept for a look.
        ptx: PathBuf,
    },
    /// The sources of the kernels are not where they were when this crate was compiled.
    #[error(
        "the device crate's sources are not at {}: set FRAMESTRIDE_SOURCE to a checkout of framestride",
        shown(path)
    )]
    NoSource {
        /// Where they were expected.
        path: PathBuf,
    },
    /// A cargo configuration from which no build can be kept away.
    #[error(
        "{} changes how every crate is compiled ({}): move it to the CARGO_HOME of those who need it",
        shown(file),
        plain(tables, 300)
    )]
    RootConfiguration {
        /// The file.
        file: PathBuf,
        /// Its tables that say more than where crates come from.
        tables: String,
    },
    /// The folder for builds has a name that cargo or rustc cannot take.
    #[error(
        "builds cannot be kept in {}: rustc splits its options at `,` and cargo lists of paths at `{}`; set FRAMESTRIDE_CACHE to a folder without either",
        shown(folder),
        crate::device_crate::PATH_SEPARATOR
    )]
    CacheName {
        /// The folder.
        folder: PathBuf,
    },
    /// There is no folder to keep builds in.
    #[error("no folder to keep builds in: set FRAMESTRIDE_CACHE to one (or XDG_CACHE_HOME, or HOME)")]
    NoCache,
    /// A user's device crate cannot be used.
    #[error("{}: {problem}", shown(path))]
    Crate {
        /// Its folder or Cargo.toml.
        path: PathBuf,
        /// What is wrong, and how to mend it.
        problem: String,
    },
    /// A file or folder cannot be read, written or locked.
    #[error("cannot {action} {}: {source}", shown(path))]
    Io {
        /// What was tried, as a verb: "write", "create", "start".
        action: &'static str,
        /// The file.
        path: PathBuf,
        /// Why it failed.
        source: io::Error,
    },
    /// Several builds failed.
    #[error("{} builds failed:\n{}", .0.len(), list(.0))]
    Several(Vec<BuildError>),
}

/// A path as a message shows it.
fn shown(path: &Path) -> String {
    plain(&path.display().to_string(), 300).into_owned()
}

/// How to remove damaged builds, if they may be the reason of an error.
fn hint(kept: &Option<PathBuf>) -> String {
    let text = |kept: &PathBuf| {
        format!("\nif nothing else explains this, kept builds are damaged: delete {} and build again", shown(kept))
    };
    kept.as_ref().map(text).unwrap_or_default()
}

/// Several messages in one. Each is shorter the more there are.
fn list(errors: &[BuildError]) -> String {
    let most = ((MESSAGE_BYTES - 100) / errors.len().max(1)).max(64);
    let texts: Vec<String> = errors.iter().map(|error| plain(&error.to_string(), most).into_owned()).collect();
    plain(&texts.join("\n"), MESSAGE_BYTES - 100).into_owned()
}

/// What a compiler or a tool says, cut to the length of a message.
pub(crate) fn said(text: &str) -> String {
    plain(text.trim_end(), MESSAGE_BYTES - 800).into_owned()
}

/// Gives an I/O error the name of its file.
pub(crate) fn at<'a>(action: &'static str, path: &'a Path) -> impl FnOnce(io::Error) -> BuildError + 'a {
    move |source| BuildError::Io { action, path: path.to_path_buf(), source }
}

#[cfg(test)]
mod tests {
    use super::*;

    #[test]
    fn messages_are_short_and_plain_whatever_they_name() {
        let long = "\u{1b}[31m\u{7}é".repeat(1 << 20);
        let path = PathBuf::from(format!("/{long}"));
        let error = || BuildError::Compile {
            name: "a".into(),
            manifest: path.clone(),
            message: said(&long),
            kept: Some(path.clone()),
        };
        let mut errors = vec![
            error(),
            BuildError::SameName { name: "a".into(), first: long.clone(), second: long.clone() },
            BuildError::Tool { name: "a".into(), tool: path.clone(), input: path.clone(), message: said(&long) },
            BuildError::Crate { path: path.clone(), problem: said(&long) },
            BuildError::NoSource { path: path.clone() },
            BuildError::CacheName { folder: path.clone() },
            BuildError::RootConfiguration { file: path.clone(), tables: long.clone() },
            at("read", &path)(io::Error::other("no")),
        ];
        errors.push(BuildError::Several((0..100).map(|_| error()).collect()));
        for error in errors {
            let message = error.to_string();
            assert!(message.len() <= MESSAGE_BYTES, "{} bytes of {:.80}", message.len(), message);
            assert!(!message.chars().any(|c| c.is_control() && c != '\n'), "{message:.80?}");
        }
    }
}
