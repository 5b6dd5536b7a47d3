//! What can go wrong: an [`Error`] in the text of a module, or a [`Fault`] in a launch.

use crate::race::By;
use std::fmt;

/// A module that cannot run, because something in its text is unknown or malformed.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[error("{module}:{line}: {what}")]
#[non_exhaustive]
pub struct Error {
    /// The name that was given to [`Module::parse`](crate::Module::parse).
    pub module: String,
    /// The line of the PTX text, from 1.
    pub line: u32,
    /// What was found, and what is allowed in its place.
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
    /// The launch itself is wrong: its entry is unknown, or its sizes do not fit.
    Launch,
    /// An address lies outside every allocation of its space.
    OutOfBounds,
    /// An address is not a multiple of the size of the access.
    Misaligned,
    /// Shared memory was read before anything was written to it.
    Uninitialised,
    /// Shared memory was accessed while a copy or matrix product still uses it. Or no barrier
    /// orders the access after that of another warp or lane.
    Race,
    /// A register was used while a `wgmma` may still read or write it.
    Fragment,
    /// A fence that the PTX memory model asks for is missing.
    MissingFence,
    /// A bulk copy has a bad size, or its mbarrier expects another number of bytes.
    BulkCopy,
    /// An mbarrier or named barrier was used against its rules.
    Barrier,
    /// Lanes of a warp, or warps of a warpgroup, had to execute an instruction together and did
    /// not.
    Divergence,
    /// An operand has a value that the instruction does not allow.
    Operand,
    /// No warp can ever go on.
    Deadlock,
    /// Warps run, but nothing has happened for too long, or they executed more than the limit. See
    /// [`Options`](crate::Options).
    Livelock,
    /// The kernel executed a `trap`.
    Trap,
}

/// A mistake of a running kernel, with the place where it was seen.
#[derive(Clone, Debug, PartialEq, Eq)]
#[non_exhaustive]
pub struct Fault {
    /// The kind of the mistake.
    pub kind: FaultKind,
    /// The entry that was launched.
    pub kernel: String,
    /// The index of the block.
    pub block: [u32; 3],
    /// The order in which the warps of the block ran: the launch's
    /// [`Options::seed`](crate::Options::seed).
    pub seed: u64,
    /// The warp of the block; `None` when the whole block or launch is meant.
    pub warp: Option<u32>,
    /// The lane of the warp, when one lane is at fault.
    pub lane: Option<u32>,
    /// The line of the PTX text, from 1; 0 when no instruction is meant.
    pub line: u32,
    /// The text of the instruction.
    pub instruction: String,
    /// What was found, and what is allowed or missing.
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

/// The text of an instruction; a long one is cut in its middle.
pub(crate) fn shorten(text: &str) -> String {
    const LIMIT: usize = 160;
    if text.len() <= LIMIT {
        return text.to_string();
    }
    let head: String = text.chars().take(LIMIT / 2).collect();
    let tail: String = text.chars().skip(text.chars().count() - LIMIT / 2).collect();
    format!("{head} ... {tail}")
}

/// A fault whose place in the text is not known yet. An instruction makes it, and
/// [`crate::schedule`] adds the place.
#[derive(Debug)]
pub(crate) struct Trouble {
    pub kind: FaultKind,
    pub lane: Option<u32>,
    /// Who is at fault, when it is not the running instruction.
    pub culprit: Option<By>,
    /// Who else is part of it. The message is completed with this warp and statement.
    pub other: Option<By>,
    pub what: String,
}

impl Trouble {
    #[cold]
    pub fn new(kind: FaultKind, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: None, culprit: None, other: None, what: what.into() })
    }

    #[cold]
    pub fn lane(kind: FaultKind, lane: usize, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: Some(lane as u32), culprit: None, other: None, what: what.into() })
    }

    #[cold]
    pub fn by(kind: FaultKind, by: By, what: impl Into<String>) -> Box<Trouble> {
        Box::new(Trouble { kind, lane: by.lane.map(|lane| lane as u32), culprit: None, other: None, what: what.into() })
    }

    /// Says that another than the running instruction is at fault.
    pub fn at(mut self: Box<Trouble>, by: By) -> Box<Trouble> {
        self.culprit = Some(by);
        self
    }

    /// Adds who else is part of it.
    pub fn other(mut self: Box<Trouble>, by: By) -> Box<Trouble> {
        self.other = Some(by);
        self
    }
}

/// What a step of an instruction returns.
pub(crate) type Step<T = ()> = Result<T, Box<Trouble>>;
