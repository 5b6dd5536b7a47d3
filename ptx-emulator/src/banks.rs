//! The banks of shared memory: how many wavefronts an access of a warp takes.
//!
//! Shared memory has 32 banks, each 4 bytes wide. In one wavefront each bank serves one word, to
//! any number of lanes. An access is served in phases, so that 32 words suffice for each: all lanes
//! at once for up to 4 bytes, 16 lanes for 8 bytes, and 8 lanes for 16 bytes.
//!
//! ```text
//! byte            0    4    8   ...  124
//! bank            0    1    2   ...   31
//! byte          128  132  136   ...  252       the same banks again
//! ```
//!
//! Lanes of a phase that need different words of one bank are a bank conflict. The phase then takes
//! as many wavefronts as the bank has words to serve.
//!
//! This is the model that NVIDIA's guides describe. A GPU may still combine phases whose lanes need
//! the same words, which is not counted here as less.

use std::collections::BTreeSet;

/// How many banks there are.
const BANKS: usize = 32;

/// How the banks served the accesses of one instruction.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
#[non_exhaustive]
pub struct SharedAccesses {
    /// How often a warp executed the instruction on shared memory.
    pub accesses: u64,
    /// How many wavefronts served them.
    pub wavefronts: u64,
    /// How many of these there were because of bank conflicts.
    pub conflicts: u64,
}

impl SharedAccesses {
    /// Adds others.
    pub(crate) fn add(&mut self, other: &SharedAccesses) {
        self.accesses += other.accesses;
        self.wavefronts += other.wavefronts;
        self.conflicts += other.conflicts;
    }

    /// Counts an access of `bytes` bytes by each of some lanes, at these offsets in shared memory.
    #[inline]
    pub(crate) fn count(&mut self, offsets: &[u32; 32], lanes: u32, bytes: usize) {
        if lanes == 0 {
            return;
        }
        let (wavefronts, phases) = wavefronts(offsets, lanes, bytes);
        self.accesses += 1;
        self.wavefronts += wavefronts as u64;
        self.conflicts += (wavefronts - phases) as u64;
    }
}

/// How many wavefronts an access takes, and how many phases it has.
#[inline]
fn wavefronts(offsets: &[u32; 32], lanes: u32, bytes: usize) -> (u32, u32) {
    // What a lane needs is one, two or four words. They lie in as many banks, which count as one
    // here.
    let shift = bytes.max(4).ilog2();
    let banks = (4 * BANKS) >> shift;
    let (mut wavefronts, mut phases) = (0, 0);
    for first in (0..32).step_by(banks) {
        let lanes = lanes & (u32::MAX >> (32 - banks)) << first;
        if lanes != 0 {
            wavefronts += 1 + conflicts(offsets, lanes, shift, banks);
            phases += 1;
        }
    }
    (wavefronts, phases)
}

/// The wavefronts of a phase beyond the first.
#[inline]
fn conflicts(offsets: &[u32; 32], lanes: u32, shift: u32, banks: usize) -> u32 {
    let needed = || (0..32).filter(|lane| lanes >> lane & 1 == 1).map(|lane| offsets[lane] >> shift);
    // Most phases have none: each bank has one place to serve.
    let mut served = [u32::MAX; BANKS];
    let one_each = needed().all(|place| {
        let bank = &mut served[place as usize % banks];
        let new = *bank == u32::MAX;
        *bank = if new { place } else { *bank };
        *bank == place
    });
    if one_each {
        return 0;
    }
    let places: BTreeSet<u32> = needed().collect();
    let mut counts = [0; BANKS];
    places.into_iter().for_each(|place| counts[place as usize % banks] += 1);
    counts.into_iter().max().unwrap_or(1) - 1
}
