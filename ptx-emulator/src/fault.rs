//! What can go wrong: [`Error`] in a module's text, [`Fault`] in a launch.

use crate::race::By;
use std::fmt;

/// A module that cannot be run: something in its text is unknown or malformed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{module}:{line}: {what}")]
pub struct Error {
    /// Name given to [`crate::Module::parse`].
    pub module: String,
    /// Line of the PTX text, from 1.
    pub line: u32,
    /// What was found, and what is known.
    pub what: String,
}

impl Error {
    pub(crate) fn at(module: &str, line: u32, what: impl Into<String>) -> Error {
        Error { module: module.to_string(), line, what: what.into() }
    }
}

/// What kind of mistake a [`Fault`] is.
#[derive(Clone, Copy, Debug, PartialEq, Eq, Hash)]
#[non_exhaustive]
pub enum FaultKind {
    /// The launch itself: unknown entry, sizes that do not fit.
    Launch,
    /// An address outside every allocation of its space.
    OutOfBounds,
    /// An address that is not a multiple of the size accessed.
    Misaligned,
    /// Shared memory read before anything was written to it.
    Uninitialised,
    /// Memory touched while an asynchronous copy or matrix product still uses it, or with no order to another warp's access.
    Race,
    /// A register touched while a `wgmma` may still read or write it.
    Fragment,
    /// A fence that the PTX memory model asks for is missing.
    MissingFence,
    /// A bulk copy with a bad size, alignment or barrier.
    BulkCopy,
    /// An mbarrier or named barrier used against its rules.
    Barrier,
    /// Lanes of a warp that had to execute an instruction together did not.
    Divergence,
    /// An operand value that the instruction does not allow.
    Operand,
    /// No warp can ever go on.
    Deadlock,
    /// Warps run, but nothing has happened for too long, or more than the limit was executed.
    Livelock,
    /// A `trap` instruction.
    Trap,
}

/// A mistake of a running kernel, with the place where it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
pub struct Fault {
    /// What kind of mistake.
    pub kind: FaultKind,
    /// Entry that was launched.
    pub kernel: String,
    /// Block index.
    pub block: [u32; 3],
    /// Order in which the warps of the block ran: [`crate::Options::seed`] of the launch.
    pub seed: u64,
    /// Warp of the block; `None` when the whole block or launch is meant.
    pub warp: Option<u32>,
    /// Lane of the warp, when one lane is at fault.
    pub lane: Option<u32>,
    /// Line of the PTX text, from 1; 0 when no instruction is meant.
    pub line: u32,
    /// Text of the instruction.
    pub instruction: String,
    /// What was wrong.
    pub what: String,
}

impl fmt::Display for Fault {
    fn fmt(&self, f: &mut fmt::Formatter<'_>) -> fmt::Result {
        let [x, y, z] = self.block;
        write!(f, "kernel {}, block ({x}, {y}, {z})", self.kernel)?;
        if let Some(warp) = self.warp {
            write!(f, ", warp {warp}")?;
        }
        if let Some(lane) = self.lane {
            write!(f, ", lane {lane}")?;
        }
        if self.line != 0 {
            write!(f, ", line {}: `{}`", self.line, shorten(&self.instruction))?;
        }
        write!(f, ": {}", self.what)?;
        if self.seed != 0 {
            write!(f, " (seen in the order of seed {})", self.seed)?;
        }
        Ok(())
    }
}

impl std::error::Error for Fault {}

/// An instruction's text, cut where an operand list grows long.
pub(crate) fn shorten(text: &str) -> String {
    const LIMIT: usize = 160;
    if text.len() <= LIMIT {
        return text.to_string();
    }
    let head: String = text.chars().take(LIMIT / 2).collect();
    let tail: String = text.chars().skip(text.chars().count() - LIMIT / 2).collect();
    format!("{head} ... {tail}")
}

/// A fault before its place is known: made deep in an instruction, placed by the warp that runs it.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub kind: FaultKind,
    pub lane: Option<u32>,
    /// Who it is, when it is not the running instruction that is at fault.
    pub place: Option<By>,
    /// Somebody else, with whom `what` ends.
    pub other: Option<By>,
    pub what: String,
}

impl Trouble {
    #[cold]
    pub fn new(kind: FaultKind, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: None, place: None, other: None, what: what.into() })
    }

    #[cold]
    pub fn lane(kind: FaultKind, lane: usize, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: Some(lane as u32), place: None, other: None, what: what.into() })
    }

    #[cold]
    pub fn by(kind: FaultKind, by: By, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: by.lane.map(|lane| lane as u32), place: None, other: None, what: what.into() })
    }

    pub fn at(mut self: Box<Trouble>, by: By) -> Box<Trouble> {
        self.place = Some(by);
        self
    }

    pub fn other(mut self: Box<Trouble>, by: By) -> Box<Trouble> {
        self.other = Some(by);
        self
    }
}

/// Result of an instruction's step.
pub(crate) type Step<T = ()> = Result<T, Box<Trouble>>;
