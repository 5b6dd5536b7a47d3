//! The shared memory of a block, and its shadow. The shadow knows of each byte whether it was
//! written, who accessed it last, and whether an asynchronous copy holds it.

use crate::fault::{FaultKind, Step, Trouble};
use crate::isa::SHARED_BASE;
use crate::race::{Access, Accesses, By, Clock, Clocks, check_proxy_read};
use std::collections::HashMap;

/// What the shadow marks a byte with. A byte without marks was written, and nothing holds it.
mod flag {
    /// Nobody has written the byte.
    pub const BLANK: u8 = 1;
    /// An asynchronous copy to it has not completed.
    pub const INCOMING: u8 = 2;
    /// It is part of an mbarrier.
    pub const BARRIER: u8 = 4;
    /// A bulk copy from it has not completed.
    pub const OUTGOING: u8 = 8;
}
pub(crate) use flag::{BARRIER, INCOMING, OUTGOING};

/// The flags that forbid a read.
const UNREADABLE: u8 = flag::BLANK | flag::INCOMING | flag::BARRIER;
/// The flags that forbid a write.
const UNWRITABLE: u8 = flag::INCOMING | flag::BARRIER | flag::OUTGOING;

/// Shared memory and its shadow. Addresses start at [`SHARED_BASE`], and offsets at zero.
pub(crate) struct Shared {
    words: Vec<u32>,
    flags: Vec<u8>,
    accesses: Accesses,
    pub clocks: Clocks,
    /// By word: what those knew who made strong accesses to it.
    strong: HashMap<usize, Clock>,
    /// How often each KiB has changed.
    versions: Vec<u32>,
    bytes: u32,
}

impl Shared {
    pub fn new(bytes: u32, warps: usize) -> Shared {
        let size = bytes.next_multiple_of(16) as usize;
        Shared {
            words: vec![0; size / 4],
            flags: vec![flag::BLANK; size],
            accesses: Accesses::new(size),
            clocks: Clocks::new(warps),
            strong: HashMap::new(),
            versions: vec![0; size.div_ceil(1024)],
            bytes,
        }
    }

    /// Makes all as new for the next block.
    pub fn reset(&mut self) {
        self.flags.fill(flag::BLANK);
        self.accesses.reset();
        self.clocks.reset();
        self.strong.clear();
        self.versions.iter_mut().for_each(|version| *version = version.wrapping_add(1));
    }

    /// The offset of an access. A fault if it is not inside and aligned.
    #[inline]
    pub fn offset(&self, address: u64, bytes: usize, align: usize, lane: usize) -> Step<usize> {
        let offset = address.wrapping_sub(SHARED_BASE as u64);
        if offset > self.bytes as u64 || bytes as u64 > self.bytes as u64 - offset {
            return Err(Trouble::lane(
                FaultKind::OutOfBounds,
                lane,
                format!(
                    "{bytes} bytes at shared address {address:#x}, outside the block's [{SHARED_BASE:#x}, {:#x})",
                    SHARED_BASE + self.bytes
                ),
            ));
        }
        if !address.is_multiple_of(align as u64) {
            return Err(misaligned(address, align, lane, "shared"));
        }
        Ok(offset as usize)
    }

    /// Whether a byte of a range has one of the flags of `mask`.
    #[inline]
    fn flagged(&self, offset: usize, bytes: usize, mask: u8) -> bool {
        let flags = &self.flags[offset..offset + bytes];
        match bytes {
            4 => u32::from_le_bytes(flags.try_into().unwrap()) & (0x0101_0101 * mask as u32) != 0,
            8 => u64::from_le_bytes(flags.try_into().unwrap()) & (0x0101_0101_0101_0101 * mask as u64) != 0,
            _ => flags.iter().fold(0, |all, flag| all | flag) & mask != 0,
        }
    }

    /// Why a range may not be read or written, in which some flag of `mask` is set.
    #[cold]
    fn refuse(&self, offset: usize, bytes: usize, mask: u8, lane: Option<usize>, doing: &str) -> Box<Trouble> {
        let at = (offset..offset + bytes).find(|at| self.flags[*at] & mask != 0).unwrap_or(offset);
        let flags = self.flags[at] & mask;
        let (kind, why) = if flags & flag::BARRIER != 0 {
            (FaultKind::Barrier, "belongs to an mbarrier, which only mbarrier instructions may touch")
        } else if flags & flag::INCOMING != 0 {
            (FaultKind::Race, "is the target of an asynchronous copy that no wait has seen complete")
        } else if flags & flag::OUTGOING != 0 {
            (FaultKind::Race, "is the source of a bulk copy that no wait has seen complete")
        } else {
            (FaultKind::Uninitialised, "was never written")
        };
        let what = format!("{doing} of {bytes} bytes at shared {:#x}: byte {:#x} {why}", address(offset), address(at));
        match lane {
            Some(lane) => Trouble::lane(kind, lane, what),
            None => Trouble::new(kind, what),
        }
    }

    /// Some lanes are about to make a strong access: volatile, relaxed, acquire, release or atomic.
    /// They learn what those knew who made one to the same word.
    ///
    /// A relaxed access promises less without fences. More is assumed here, so that no program in
    /// order is taken for a race.
    pub fn before_strong(&mut self, offset: usize, bytes: usize, by: By, lanes: u32) {
        for word in offset / 4..(offset + bytes).div_ceil(4) {
            if let Some(clock) = self.strong.get(&word) {
                self.clocks.acquire(by.warp, lanes, clock);
            }
        }
    }

    /// A strong access was made. Whoever makes the next one to the same word learns what `by`
    /// knows.
    pub fn after_strong(&mut self, offset: usize, bytes: usize, by: By) {
        for word in offset / 4..(offset + bytes).div_ceil(4) {
            self.clocks.release(by, self.strong.entry(word).or_default());
        }
    }

    /// Checks and remembers an ordinary read.
    #[inline]
    pub fn read(&mut self, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        self.readable(offset, bytes, by, doing)?;
        self.accesses.read(&self.clocks, offset, bytes, by, doing)
    }

    /// Remembers a read by a copy that has been waited for. Nobody could write the bytes meanwhile.
    pub fn was_read(&mut self, offset: usize, bytes: usize, by: By) {
        self.accesses.note_read(&self.clocks, offset, bytes, by);
    }

    /// Checks that the flags of bytes allow a read.
    #[inline]
    fn readable(&self, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        if self.flagged(offset, bytes, UNREADABLE) {
            return Err(self.refuse(offset, bytes, UNREADABLE, by.lane, doing));
        }
        Ok(())
    }

    /// Checks that flags and earlier accesses allow a write.
    #[inline]
    pub fn writable(&self, offset: usize, bytes: usize, by: By, doing: &str) -> Step {
        if self.flagged(offset, bytes, UNWRITABLE) {
            return Err(self.refuse(offset, bytes, UNWRITABLE, by.lane, doing));
        }
        self.accesses.check_write(&self.clocks, offset, bytes, by, doing)
    }

    /// Checks that the asynchronous proxy may read a range, and adds those who wrote it to
    /// `writers`.
    pub fn readable_by_proxy(
        &self,
        offset: usize,
        bytes: usize,
        by: By,
        doing: &str,
        writers: &mut Vec<Access>,
    ) -> Step {
        self.readable(offset, bytes, by, doing)?;
        let known = writers.len();
        self.accesses.writers(offset, bytes, writers);
        check_proxy_read(&self.clocks, &writers[known..], by, || {
            format!("{doing} of {bytes} bytes at shared {:#x}", address(offset))
        })
    }

    /// The word that holds an offset.
    #[inline]
    pub fn word(&self, offset: usize) -> u32 {
        self.words[offset / 4]
    }

    /// The 16 bytes at a 16-byte aligned offset.
    #[inline]
    pub fn chunk(&self, offset: usize) -> [u32; 4] {
        let words = &self.words[offset / 4..offset / 4 + 4];
        [words[0], words[1], words[2], words[3]]
    }

    /// Stores the first `bytes` of `words`: 1, 2, or a multiple of 4. They were found writable.
    #[inline]
    pub fn store(&mut self, offset: usize, bytes: usize, words: &[u32; 8], by: By) {
        if bytes < 4 {
            let (shift, mask) = (8 * (offset % 4), if bytes == 1 { 0xff } else { 0xffff });
            let word = &mut self.words[offset / 4];
            *word = *word & !(mask << shift) | (words[0] & mask) << shift;
        } else {
            self.words[offset / 4..(offset + bytes) / 4].copy_from_slice(&words[..bytes / 4]);
        }
        self.flags[offset..offset + bytes].fill(0);
        self.accesses.write(&self.clocks, offset, bytes, by);
        self.versions[offset / 1024] = self.versions[offset / 1024].wrapping_add(1);
    }

    /// Marks a range as the target of a bulk copy. Its bytes are there for those who know the time
    /// `time` of the mbarrier with the index `whose` in clocks.
    pub fn expect(&mut self, offset: usize, bytes: usize, whose: usize, time: u32, by: By) {
        self.accesses.put(whose, time, offset, bytes, by);
        self.mark(offset, bytes, INCOMING);
    }

    /// Writes what a bulk copy brought, and clears all flags.
    pub fn land(&mut self, offset: usize, words: impl Iterator<Item = u32>, bytes: usize) {
        for (to, from) in self.words[offset / 4..(offset + bytes) / 4].iter_mut().zip(words) {
            *to = from;
        }
        self.flags[offset..offset + bytes].fill(0);
        self.changed(offset, bytes);
    }

    /// Sets a flag on a range.
    pub fn mark(&mut self, offset: usize, bytes: usize, flag: u8) {
        self.flags[offset..offset + bytes].iter_mut().for_each(|flags| *flags |= flag);
        self.changed(offset, bytes);
    }

    /// Clears a flag on a range.
    pub fn unmark(&mut self, offset: usize, bytes: usize, flag: u8) {
        self.flags[offset..offset + bytes].iter_mut().for_each(|flags| *flags &= !flag);
    }

    /// Forgets what a range held. It must be written before it is read again.
    pub fn blank(&mut self, offset: usize, bytes: usize, by: By) {
        self.accesses.write(&self.clocks, offset, bytes, by);
        self.flags[offset..offset + bytes].fill(flag::BLANK);
        self.changed(offset, bytes);
    }

    /// Counts a change of a range.
    fn changed(&mut self, offset: usize, bytes: usize) {
        if bytes > 0 {
            let range = offset / 1024..(offset + bytes - 1) / 1024 + 1;
            self.versions[range].iter_mut().for_each(|version| *version = version.wrapping_add(1));
        }
    }

    /// A number that changes when a byte of the range does, or of the KiB that it lies in.
    pub fn version(&self, offset: usize, bytes: usize) -> u64 {
        self.versions[offset / 1024..(offset + bytes).div_ceil(1024)].iter().map(|version| *version as u64).sum()
    }
}

/// The shared address of an offset.
pub(crate) fn address(offset: usize) -> usize {
    offset + SHARED_BASE as usize
}

#[cold]
pub(crate) fn misaligned(address: u64, align: usize, lane: usize, space: &str) -> Box<Trouble> {
    let what = format!("{space} address {address:#x} is not a multiple of {align}");
    Trouble::lane(FaultKind::Misaligned, lane, what)
}
