//! What can go wrong, and how it is said: what was found, what is allowed, and how to mend it.

use std::fmt::{self, Display};
use std::path::PathBuf;

use framestride_shapes::manifest::ManifestError;
use framestride_shapes::spec::SpecError;
use framestride_shapes::text::{MESSAGE_BYTES, plain};

/// An error of this library. Nothing panics on bad input, a missing GPU or a broken file.
///
/// A message has at most [`MESSAGE_BYTES`] bytes, and no control characters but line ends, whatever
/// file it is about.
#[derive(thiserror::Error)]
#[non_exhaustive]
pub enum Error {
    /// The spec is wrong. The message lists every problem with file, line and key.
    #[error(transparent)]
    Spec(#[from] SpecError),
    /// A manifest cannot be read, or is of another version.
    #[error(transparent)]
    Manifest(#[from] ManifestError),
    /// An argument, a tensor or a key of a file is not what it must be.
    #[error(
        "{}: found {}\n = allowed: {}\n = mend: {}",
        plain(subject, PART_BYTES),
        plain(found, PART_BYTES),
        plain(allowed, PART_BYTES),
        plain(mend, PART_BYTES)
    )]
    Input {
        /// What it is about: an argument, or a file and a key.
        subject: String,
        /// What was found there.
        found: String,
        /// What is allowed there.
        allowed: String,
        /// How to mend it.
        mend: String,
    },
    /// A file could not be read or written.
    #[error("{}: {source}", plain(&path.display().to_string(), PART_BYTES))]
    File {
        /// Path of the file.
        path: PathBuf,
        /// What the system said.
        source: std::io::Error,
    },
    /// There is no usable GPU.
    #[error("no GPU: {}", plain(.0, MESSAGE_BYTES - 10))]
    NoGpu(String),
    /// A call of the CUDA driver failed.
    #[error("{call} failed with {code}: {}", plain(message, MESSAGE_BYTES - 100))]
    Driver {
        /// The driver's function that failed.
        call: &'static str,
        /// The driver's error code.
        code: i32,
        /// The driver's message, with the log of its compiler where there is one.
        message: String,
    },
    /// The emulator stopped a kernel, or could not read its PTX.
    #[error("emulator: {}", plain(.0, MESSAGE_BYTES - 10))]
    Emulator(String),
}

impl fmt::Debug for Error {
    /// As `Display`, because a `main` that returns an error shows it so.
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        write!(f, "{self}")
    }
}

/// A part of an [`Error::Input`] has at most so many bytes.
const PART_BYTES: usize = 480;

impl Error {
    /// Makes an [`Error::Input`].
    #[must_use]
    pub fn input(subject: impl Display, found: impl Display, allowed: impl Display, mend: impl Display) -> Error {
        Error::Input {
            subject: subject.to_string(),
            found: found.to_string(),
            allowed: allowed.to_string(),
            mend: mend.to_string(),
        }
    }

    /// Makes an [`Error::File`].
    #[must_use]
    pub fn file(path: impl Into<PathBuf>, source: std::io::Error) -> Error {
        Error::File { path: path.into(), source }
    }
}

/// The result of a function of this library.
pub type Result<T, E = Error> = std::result::Result<T, E>;
