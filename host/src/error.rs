//! What can go wrong, said so that it can be mended.

use std::fmt::Display;
use std::path::PathBuf;

use framestride_shapes::manifest::ManifestError;
use framestride_shapes::spec::SpecError;

/// Errors of the library. Nothing here panics on bad input, a missing GPU or a broken file.
#[derive(Debug, thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec file is wrong; the message lists every problem with file, line and key.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A manifest cannot be read, or is of another version.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// An argument, a tensor or a key of a file is not what it must be.
    #[error("{subject}: found {found}\n = allowed: {allowed}\n = mend: {mend}")]
    Input {
        /// The argument, or file and key.
        subject: String,
        /// What was found there.
        found: String,
        /// What would have been right.
        allowed: String,
        /// What to do about it.
        mend: String,
    },
    /// A file could not be read or written.
    #[error("{path}: {source}")]
    File {
        /// The file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no usable GPU.
    #[error("no GPU: {0}")]
    NoGpu(String),
    /// A call of the CUDA driver failed.
    #[error("{call} failed with {code}: {message}")]
    Driver {
        /// The driver's function.
        call: &'static str,
        /// Its error code.
        code: i32,
        /// Its message, and the JIT compiler's log where there is one.
        message: String,
    },
    /// The emulator stopped a kernel, or could not read its PTX.
    #[error("emulator: {0}")]
    Emulator(String),
    /// The kernels of a spec could not be built.
    #[error("{0}")]
    Build(String),
}

impl Error {
    /// An [`Error::Input`].
    pub fn input(subject: impl Display, found: impl Display, allowed: impl Display, mend: impl Display) -> Error {
        Error::Input {
            subject: subject.to_string(),
            found: found.to_string(),
            allowed: allowed.to_string(),
            mend: mend.to_string(),
        }
    }

    /// An [`Error::File`].
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        Error::File { path: path.into(), source }
    }
}

/// Results of this crate.
pub type Result<T, E = Error> = std::result::Result<T, E>;
