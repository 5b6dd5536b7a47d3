//! Global memory: allocations that all blocks of a launch share.
//!
//! Words are relaxed atomics. So blocks on several CPU threads may race as they may on a GPU,
//! without undefined behaviour. Narrower stores update their word atomically. A 64-bit access is
//! two words, and a lock keeps 64-bit atomics apart.

use crate::isa::MODULE_BASE;
use std::collections::BTreeMap;
use std::sync::Mutex;
use std::sync::atomic::{AtomicU32, Ordering::Relaxed};

/// The first address that is given.
const FIRST: u64 = 0x10_0000_0000;
/// So many bytes between allocations stay free, so that an access beyond an end hits nothing.
const GAP: u64 = 64 * 1024;

/// No process has memory below this address, nor from the other one on. So null addresses of the
/// host are found.
const HOST_FIRST: u64 = 64 * 1024;
const HOST_END: u64 = 1 << 57;

/// A request that [`Memory`] cannot serve.
#[derive(Clone, Debug, PartialEq, Eq, thiserror::Error)]
#[non_exhaustive]
pub enum MemoryError {
    /// The alignment is not a power of two of at most 1 MiB.
    #[error("alignment {0} is not a power of two up to 1048576")]
    Alignment(u64),
    /// The allocation is larger than 1 TiB, or than what the system can give.
    #[error("{0} bytes are more than the emulator's memory can hold: at most 1 TiB, if the system has it")]
    Size(u64),
    /// The range does not lie in one allocation.
    #[error("[{address:#x}, {address:#x} + {bytes}) does not lie in one allocation{hint}")]
    Range {
        /// The first address that was asked for.
        address: u64,
        /// How many bytes were asked for.
        bytes: u64,
        /// What the message says of the nearest allocation below, if there is one.
        hint: String,
    },
    /// No allocation starts at this address.
    #[error("no allocation starts at {0:#x}: `free` takes an address that `alloc` gave")]
    NotAllocated(u64),
}

/// An allocation of `bytes` bytes, in whole words.
#[derive(Debug)]
struct Allocation {
    bytes: u64,
    words: Box<[AtomicU32]>,
}

/// The global memory of the emulated GPU.
///
/// A new allocation holds bytes of 0xff, which are NaN in every float format: so it shows when a
/// kernel reads what nobody wrote.
#[derive(Debug, Default)]
pub struct Memory {
    allocations: BTreeMap<u64, Allocation>,
    /// Where the next allocation may start.
    end: u64,
    /// Whether kernels may also use the memory of this process, at its own addresses.
    with_host: bool,
}

impl Memory {
    /// A memory without allocations.
    #[must_use]
    pub fn new() -> Memory {
        Memory::default()
    }

    /// A memory without allocations, to which all memory of this process belongs too. Kernels find
    /// it at its own addresses, so nothing is copied for them.
    ///
    /// # Safety
    /// Launches with this memory, and its methods, are given no address outside allocations that is
    /// not memory of this process. The whole 4-byte words that they touch of it stay there until they
    /// end. Nobody else writes those meanwhile, nor reads what they write.
    #[must_use]
    pub unsafe fn with_host_memory() -> Memory {
        Memory { with_host: true, ..Memory::default() }
    }

    /// Reserves `bytes` bytes and returns their address, a multiple of `alignment` and of 256.
    ///
    /// # Errors
    /// The alignment is not a power of two up to 1 MiB, or the size is beyond 1 TiB or what the
    /// system gives.
    pub fn alloc(&mut self, bytes: u64, alignment: u64) -> Result<u64, MemoryError> {
        if !alignment.is_power_of_two() || alignment > 1 << 20 {
            return Err(MemoryError::Alignment(alignment));
        }
        let mut words = Vec::new();
        let count = bytes.div_ceil(4) as usize;
        if bytes > 1 << 40 || words.try_reserve_exact(count).is_err() {
            return Err(MemoryError::Size(bytes));
        }
        words.extend((0..count).map(|_| AtomicU32::new(u32::MAX)));
        let address = self.end.max(FIRST).next_multiple_of(alignment.max(256));
        self.allocations.insert(address, Allocation { bytes, words: words.into() });
        self.end = address + bytes + GAP;
        Ok(address)
    }

    /// Leaves `bytes` addresses unused. What is reserved next lies beyond them.
    pub fn skip(&mut self, bytes: u64) {
        self.end = self.end.max(FIRST) + bytes;
    }

    /// Frees the allocation that starts at `address`.
    ///
    /// # Errors
    /// No allocation starts there.
    pub fn free(&mut self, address: u64) -> Result<(), MemoryError> {
        self.allocations.remove(&address).map(|_| ()).ok_or(MemoryError::NotAllocated(address))
    }

    /// The words that hold a range, and where it begins in the first of them. Host memory is all
    /// there is outside allocations.
    fn find(&self, address: u64, bytes: u64) -> Result<(&[AtomicU32], usize), MemoryError> {
        let below = self.allocations.range(..=address).next_back();
        let own = below.map(|(base, a)| Span { base: *base, bytes: a.bytes, words: Some(&a.words) });
        let span = own.into_iter().chain(self.host()).find(|span| span.holds(address, bytes));
        if let Some(span) = span {
            let start = address % 4;
            return Ok((span.words(address - start, (start + bytes) as usize), start as usize));
        }
        let hint = below.map(|(base, a)| format!("; the nearest below is [{base:#x}, {base:#x} + {})", a.bytes));
        Err(MemoryError::Range { address, bytes, hint: hint.unwrap_or_default() })
    }

    /// The memory of this process, where it belongs to this memory.
    fn host<'a>(&self) -> Option<Span<'a>> {
        self.with_host.then_some(Span { base: HOST_FIRST, bytes: HOST_END - HOST_FIRST, words: None })
    }

    /// Copies `data` to `address`.
    ///
    /// # Errors
    /// The range does not lie in one allocation.
    pub fn write(&self, address: u64, data: &[u8]) -> Result<(), MemoryError> {
        let (words, offset) = self.find(address, data.len() as u64)?;
        write_bytes(words, offset, data);
        Ok(())
    }

    /// Returns the `bytes` bytes at `address`.
    ///
    /// # Errors
    /// The range does not lie in one allocation.
    pub fn read(&self, address: u64, bytes: u64) -> Result<Vec<u8>, MemoryError> {
        let (words, offset) = self.find(address, bytes)?;
        let mut out: Vec<u8> = words.iter().flat_map(|word| word.load(Relaxed).to_le_bytes()).collect();
        out.drain(..offset);
        out.truncate(bytes as usize);
        Ok(out)
    }

    /// Sets `bytes` bytes at `address` to `byte`.
    ///
    /// # Errors
    /// The range does not lie in one allocation.
    pub fn fill(&self, address: u64, bytes: u64, byte: u8) -> Result<(), MemoryError> {
        let (words, offset) = self.find(address, bytes)?;
        write_bytes(words, offset, &vec![byte; bytes as usize]);
        Ok(())
    }
}

/// Writes bytes at an offset of words.
fn write_bytes(words: &[AtomicU32], offset: usize, data: &[u8]) {
    let mut at = 0;
    while at < data.len() {
        let byte = offset + at;
        if byte.is_multiple_of(4) && data.len() - at >= 4 {
            words[byte / 4].store(u32::from_le_bytes([data[at], data[at + 1], data[at + 2], data[at + 3]]), Relaxed);
            at += 4;
        } else {
            store_part(&words[byte / 4], byte % 4, 1, data[at] as u32);
            at += 1;
        }
    }
}

/// Stores the low `bytes` bytes of `value`, 1 or 2, at byte `at` of a word. Others may write the
/// other bytes at the same time.
#[inline]
pub(crate) fn store_part(word: &AtomicU32, at: usize, bytes: usize, value: u32) {
    let mask = if bytes == 1 { 0xff } else { 0xffff } << (8 * at);
    let value = value << (8 * at) & mask;
    let _ = word.fetch_update(Relaxed, Relaxed, |old| Some(old & !mask | value));
}

/// The global and constant variables of a module.
#[derive(Debug, Default)]
pub(crate) struct ModuleData {
    spans: Vec<(u64, Allocation)>,
}

impl ModuleData {
    /// Reserves bytes of zero. Addresses grow from [`MODULE_BASE`].
    pub fn alloc(&mut self, bytes: u64, align: u64) -> u64 {
        let end = self.spans.last().map_or(MODULE_BASE, |(base, allocation)| base + allocation.bytes + 256);
        let address = end.next_multiple_of(align.max(16));
        self.spans
            .push((address, Allocation { bytes, words: (0..bytes.div_ceil(4)).map(|_| AtomicU32::new(0)).collect() }));
        address
    }

    /// Writes the initial value of the variable at an address.
    pub fn write(&self, address: u64, data: &[u8]) {
        let (base, allocation) = self.spans.iter().find(|(base, _)| *base == address).expect("an address it gave");
        write_bytes(&allocation.words, (address - base) as usize, data);
    }
}

/// An allocation, or the memory of this process, as kernels see it.
#[derive(Clone, Copy)]
pub(crate) struct Span<'a> {
    pub base: u64,
    pub bytes: u64,
    /// `None` for the memory of this process, whose words lie at their addresses.
    words: Option<&'a [AtomicU32]>,
}

impl<'a> Span<'a> {
    /// Whether `[address, address + bytes)` lies inside.
    #[inline]
    pub fn holds(&self, address: u64, bytes: u64) -> bool {
        let offset = address.wrapping_sub(self.base);
        offset <= self.bytes && bytes <= self.bytes - offset
    }

    /// The word that holds an address inside.
    #[inline]
    pub fn word(&self, address: u64) -> &'a AtomicU32 {
        &self.words(address, 1)[0]
    }

    /// The words that hold `bytes` bytes inside, which begin a word or lie within one.
    #[inline]
    pub fn words(&self, address: u64, bytes: usize) -> &'a [AtomicU32] {
        let count = bytes.div_ceil(4);
        let Some(words) = self.words else {
            let first = std::ptr::with_exposed_provenance::<AtomicU32>(address as usize & !3);
            // SAFETY: only a memory that was made by `Memory::with_host_memory` has such a span. So
            // these words are memory of this process, and nobody but launches uses them now.
            return unsafe { std::slice::from_raw_parts(first, count) };
        };
        let first = ((address - self.base) / 4) as usize;
        &words[first..first + count]
    }
}

/// Everything a launch can address in the global space.
pub(crate) struct Global<'a> {
    spans: Vec<Span<'a>>,
    /// The memory of this process, where it belongs to the launch.
    host: Option<Span<'a>>,
    /// Whoever executes a 64-bit atomic holds this lock.
    pub wide: Mutex<()>,
}

impl<'a> Global<'a> {
    pub fn new(memory: &'a Memory, data: &'a ModuleData) -> Global<'a> {
        let span = |(base, a): (&u64, &'a Allocation)| Span { base: *base, bytes: a.bytes, words: Some(&a.words) };
        let spans = memory.allocations.iter().chain(data.spans.iter().map(|(base, a)| (base, a))).map(span);
        // The order is ascending, because the module's data lie above every address that `Memory`
        // gives.
        Global { spans: spans.collect(), host: memory.host(), wide: Mutex::new(()) }
    }

    /// The span that holds a range, and its index. The span with the index `hint` is tried first.
    #[inline]
    pub fn find(&self, address: u64, bytes: u64, hint: usize) -> Option<(usize, Span<'a>)> {
        if let Some(span) = self.spans.get(hint)
            && span.holds(address, bytes)
        {
            return Some((hint, *span));
        }
        let at = self.spans.partition_point(|span| span.base <= address).wrapping_sub(1);
        let own = self.spans.get(at).filter(|span| span.holds(address, bytes));
        let span = own.or_else(|| self.host.as_ref().filter(|host| host.holds(address, bytes)))?;
        Some((at, *span))
    }

    /// Where an address lies beside the nearest allocation below, for messages.
    pub fn describe(&self, address: u64) -> String {
        let at = self.spans.partition_point(|span| span.base <= address);
        let below = at.checked_sub(1).map(|at| self.spans[at]);
        match below {
            Some(span) => format!(
                "{} bytes past the start of the allocation [{:#x}, {:#x} + {})",
                address - span.base,
                span.base,
                span.base,
                span.bytes
            ),
            None => "below every allocation".into(),
        }
    }
}
