//! The PTX emulator as a device.

use std::collections::BTreeMap;
use std::fmt::Display;
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, Mutex, PoisonError, RwLock, RwLockReadGuard, RwLockWriteGuard};

use ptx_emulator::{LaunchConfig, Memory, Module, Options, Stats};

use super::{Buffer, Device, no_room};
use crate::error::{Error, Result};
use crate::launch::Launch;

/// How many multiprocessors the emulator claims to have. They hold several persistent blocks, and a
/// small machine can run them. The number is odd, so that profiling splits the keys of few heads,
/// and unevenly.
pub(super) const MULTIPROCESSORS: u32 = 3;

/// The emulator's memory. Kernels of one emulator share it as kernels of one GPU share theirs.
pub struct Emulator {
    memory: RwLock<Memory>,
    /// The seed of the next launch. Each launch runs the warps of its blocks in an order of its
    /// own, and a fault tells its seed.
    seed: AtomicU64,
    /// What the launches of each entry did.
    statistics: Mutex<BTreeMap<String, Stats>>,
}

impl Emulator {
    pub(super) fn new() -> Emulator {
        Emulator::with(Memory::new())
    }

    pub(super) fn on_host_memory() -> Emulator {
        // SAFETY: whoever calls `Device::launch` or `Device::read_address` promises that their
        // addresses are memory of this device, which is allocations and this process's memory.
        Emulator::with(unsafe { Memory::with_host_memory() })
    }

    fn with(memory: Memory) -> Emulator {
        Emulator { memory: RwLock::new(memory), seed: AtomicU64::new(1), statistics: Mutex::default() }
    }

    /// The memory. A lock whose holder panicked still guards plain bytes, so its poison is ignored.
    fn memory(&self) -> RwLockReadGuard<'_, Memory> {
        self.memory.read().unwrap_or_else(PoisonError::into_inner)
    }

    fn memory_mut(&self) -> RwLockWriteGuard<'_, Memory> {
        self.memory.write().unwrap_or_else(PoisonError::into_inner)
    }

    /// Checks that this machine has so much memory left.
    ///
    /// The system grants more memory than it has, and ends the process that uses it. So it is asked
    /// before.
    ///
    /// # Errors
    /// An [`Error::Input`] that says how much is left.
    #[doc(hidden)]
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        match available_memory() {
            Some(available) if bytes > available => Err(no_room(bytes, Some(available))),
            _ => Ok(()),
        }
    }

    /// What all launches so far did, by entry: instructions, bytes, conflicts of shared memory's
    /// banks.
    #[doc(hidden)]
    #[must_use]
    pub fn statistics(&self) -> BTreeMap<String, Stats> {
        self.statistics.lock().unwrap_or_else(PoisonError::into_inner).clone()
    }

    pub(super) fn allocate(&self, bytes: u64) -> Result<u64> {
        self.check_room(bytes)?;
        self.memory_mut().alloc(bytes, 256).map_err(|_| no_room(bytes, available_memory()))
    }

    /// Allocates `count` pieces of `bytes` bytes at addresses of equal distances, at least `apart`
    /// bytes from each other.
    ///
    /// With it, tensors can be tested whose offsets do not fit 32 bits. A GPU's addresses cannot be
    /// chosen.
    #[doc(hidden)]
    pub fn scatter(self: &Arc<Emulator>, count: usize, bytes: u64, apart: u64) -> Result<Vec<Buffer>> {
        self.check_room(bytes * count as u64)?;
        let mut memory = self.memory_mut();
        let pieces = (0..count).map(|_| {
            let address = memory.alloc(bytes, 256).map_err(|_| no_room(bytes, None))?;
            memory.skip(apart);
            Ok(address)
        });
        // Buffers are made without the lock, since a buffer that is dropped takes it.
        let addresses = pieces.collect::<Result<Vec<u64>>>();
        drop(memory);
        let device = Device::Emulator(Arc::clone(self));
        Ok(addresses?.into_iter().map(|address| Buffer { device: device.clone(), address, bytes }).collect())
    }

    pub(super) fn free(&self, address: u64) {
        // Only an address that was never allocated is an error, and buffers have none.
        let _ = self.memory_mut().free(address);
    }

    pub(super) fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        self.memory_mut().write(address, bytes).map_err(emulator_error)
    }

    pub(super) fn read(&self, address: u64, bytes: u64) -> Result<Vec<u8>> {
        self.memory().read(address, bytes).map_err(emulator_error)
    }

    pub(super) fn fill(&self, address: u64, bytes: u64, byte: u8) -> Result<()> {
        self.memory_mut().fill(address, bytes, byte).map_err(emulator_error)
    }

    pub(super) fn launch(&self, module: &Module, launch: &Launch) -> Result<()> {
        let config =
            LaunchConfig { grid: launch.grid, block: [launch.threads, 1, 1], shared_bytes: launch.shared_bytes };
        let options = Options { seed: self.seed.fetch_add(1, Ordering::Relaxed), ..Default::default() };
        let entry = launch.kernel.entry();
        let stats = module
            .launch_with(&self.memory(), entry, config, launch.params.as_bytes(), options)
            .map_err(emulator_error)?;
        let mut statistics = self.statistics.lock().unwrap_or_else(PoisonError::into_inner);
        statistics.entry(entry.to_string()).or_default().add(&stats);
        Ok(())
    }
}

pub(super) fn parse(name: &str, ptx: &str) -> Result<Module> {
    Module::parse(name, ptx).map_err(emulator_error)
}

fn emulator_error(error: impl Display) -> Error {
    Error::Emulator(error.to_string())
}

/// Bytes of memory that this process can still use, where the system tells.
#[doc(hidden)]
#[must_use]
pub fn available_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    });
    // A container has a limit of its own, which the machine's numbers do not show. Cached files
    // make way for whoever needs their memory.
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let number = |name: &str| group(name)?.trim().parse::<u64>().ok();
    let cached = || group("stat")?.lines().find_map(|line| line.strip_prefix("inactive_file "))?.parse::<u64>().ok();
    let container = number("max")
        .zip(number("current"))
        .map(|(most, current)| most.saturating_sub(current.saturating_sub(cached().unwrap_or(0))));
    machine.into_iter().chain(container).min()
}
