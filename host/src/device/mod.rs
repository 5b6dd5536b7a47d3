//! Where kernels run: a GPU through the CUDA driver, or the PTX emulator on the CPU.
//!
//! [`Device`] also allocates, copies and waits, for programs that have no CUDA library of their
//! own.
//!
//! The driver is loaded when it is first asked for. Without it, every way to a GPU gives
//! [`Error::NoGpu`] with what was found. A context or a stream of the caller's is borrowed: it is
//! never destroyed. A thread's current context is restored after each call.

#[cfg(feature = "emulator")]
mod emulator;
mod gpu;
mod stream;

use std::sync::Arc;
#[cfg(feature = "emulator")]
use std::time::Instant;

#[cfg(feature = "emulator")]
pub use emulator::{Emulator, available_memory};
use framestride_shapes::arch::Arch;
pub use gpu::{Gpu, cuda_version};
pub use stream::{Graph, OwnedStream, Stream};

use crate::error::{Error, Result};
use crate::launch::{Kernel, Launch};

/// A device. Cloning is cheap, and the clone is the same device.
#[derive(Clone)]
#[non_exhaustive]
pub enum Device {
    /// An NVIDIA GPU.
    Gpu(Arc<Gpu>),
    /// The emulator, with its own memory.
    #[cfg(feature = "emulator")]
    Emulator(Arc<Emulator>),
}

impl From<Gpu> for Device {
    fn from(gpu: Gpu) -> Device {
        Device::Gpu(Arc::new(gpu))
    }
}

/// The kernels of one PTX text on one device.
pub(crate) enum Loaded {
    Gpu(gpu::GpuModule),
    #[cfg(feature = "emulator")]
    Emulator(ptx_emulator::Module),
}

impl Loaded {
    /// Milliseconds that the driver's compiler took.
    pub(crate) fn compile_ms(&self) -> f32 {
        match self {
            Loaded::Gpu(module) => module.compile_ms,
            #[cfg(feature = "emulator")]
            Loaded::Emulator(_) => 0.0,
        }
    }
}

/// Device memory, freed on drop.
pub struct Buffer {
    device: Device,
    address: u64,
    bytes: u64,
}

impl Buffer {
    /// Address of the first byte, a multiple of 256.
    #[must_use]
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size in bytes.
    #[must_use]
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.device {
            Device::Gpu(gpu) => gpu.free(self.address),
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.free(self.address),
        }
    }
}

impl Device {
    /// GPU `ordinal`, in its primary context.
    ///
    /// # Errors
    /// [`Error::NoGpu`] without a driver or a GPU of this number.
    pub fn gpu(ordinal: i32) -> Result<Device> {
        Ok(Gpu::primary(ordinal)?.into())
    }

    /// A new emulator with empty memory.
    #[cfg(feature = "emulator")]
    #[must_use]
    pub fn emulator() -> Device {
        Device::Emulator(Arc::new(Emulator::new()))
    }

    /// A new emulator whose memory is that of this process. Tensors and workspace lie where the
    /// program has them, and nothing is copied.
    ///
    /// The emulator touches whole words of 4 bytes. So the bytes beside a tensor in the same word are
    /// memory too, and nobody writes them during a launch.
    #[cfg(feature = "emulator")]
    #[must_use]
    pub fn emulator_on_host_memory() -> Device {
        Device::Emulator(Arc::new(Emulator::on_host_memory()))
    }

    /// Whether both are the same device, and so have the same memory.
    pub(crate) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Gpu(gpu), Device::Gpu(other)) => gpu.is(other),
            #[cfg(feature = "emulator")]
            (Device::Emulator(emulator), Device::Emulator(other)) => Arc::ptr_eq(emulator, other),
            #[cfg(feature = "emulator")]
            _ => false,
        }
    }

    /// A name for people: the GPU's, or "emulator".
    #[must_use]
    pub fn name(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.name().to_owned(),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => "emulator".into(),
        }
    }

    /// The family whose kernels suit it best ([`Gpu::arch`]). The emulator runs those of any family,
    /// and takes the default one.
    ///
    /// # Errors
    /// As [`Gpu::arch`].
    pub fn arch(&self) -> Result<Arch> {
        match self {
            Device::Gpu(gpu) => gpu.arch(),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => Ok(Arch::default()),
        }
    }

    /// Number of multiprocessors, which persistent kernels fill.
    #[must_use]
    pub fn multiprocessors(&self) -> u32 {
        match self {
            Device::Gpu(gpu) => gpu.multiprocessors(),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => emulator::MULTIPROCESSORS,
        }
    }

    /// How many blocks a multiprocessor holds that ask for `shared_bytes` bytes of shared memory, at
    /// most `most`.
    pub(crate) fn resident_blocks(&self, arch: Arch, shared_bytes: u32, most: u32) -> u32 {
        let all = match self {
            Device::Gpu(gpu) => gpu.shared_bytes(),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => arch.shared_bytes,
        };
        (all / (shared_bytes + arch.reserved_shared_bytes)).clamp(1, most)
    }

    /// Allocates uninitialised memory at a multiple of 256 bytes.
    ///
    /// # Errors
    /// More than the device has left is an [`Error::Input`].
    pub fn allocate(&self, bytes: u64) -> Result<Buffer> {
        let bytes = bytes.max(1);
        let address = match self {
            Device::Gpu(gpu) => gpu.allocate(bytes)?,
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.allocate(bytes)?,
        };
        Ok(Buffer { device: self.clone(), address, bytes })
    }

    /// Allocates memory and copies `bytes` to it.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.allocate(bytes.len() as u64)?;
        self.write(&buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// Copies `bytes` to `offset` in `buffer`, in the order of the default stream.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_range(buffer, offset, bytes.len() as u64)?;
        let address = buffer.address + offset;
        match self {
            // SAFETY: the range lies in a live allocation of this device (checked above).
            Device::Gpu(gpu) => unsafe { gpu.write(address, bytes) },
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.write(address, bytes),
        }
    }

    /// Copies `bytes` bytes from `offset` in `buffer` to the host, after all work that was launched
    /// before.
    pub fn read(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<Vec<u8>> {
        self.check_range(buffer, offset, bytes)?;
        // SAFETY: the range lies in a live allocation of this device (checked above).
        unsafe { self.read_address(buffer.address + offset, bytes) }
    }

    /// [`Device::read`] of an address.
    ///
    /// # Safety
    /// The range lies in live memory of this device.
    pub(crate) unsafe fn read_address(&self, address: u64, bytes: u64) -> Result<Vec<u8>> {
        match self {
            // SAFETY: the caller's promise.
            Device::Gpu(gpu) => unsafe { gpu.read(address, bytes) },
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.read(address, bytes),
        }
    }

    /// Sets every byte of `buffer`, in stream order.
    pub fn fill(&self, stream: Stream, buffer: &Buffer, byte: u8) -> Result<()> {
        self.check_range(buffer, 0, buffer.bytes)?;
        match self {
            // SAFETY: the range is a live allocation of this device (checked above).
            Device::Gpu(gpu) => unsafe { gpu.fill(stream, buffer.address, buffer.bytes, byte) },
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.fill(buffer.address, buffer.bytes, byte),
        }
    }

    /// Copies all of `from` to the start of `to`, which is no smaller, in stream order.
    pub fn copy(&self, stream: Stream, from: &Buffer, to: &Buffer) -> Result<()> {
        self.check_range(from, 0, from.bytes)?;
        self.check_range(to, 0, from.bytes)?;
        match self {
            // SAFETY: both are live allocations here, and the target is no smaller than the source
            // (checked above).
            Device::Gpu(gpu) => unsafe { gpu.copy(stream, from.address, to.address, from.bytes) },
            #[cfg(feature = "emulator")]
            Device::Emulator(emulator) => emulator.write(to.address, &emulator.read(from.address, from.bytes)?),
        }
    }

    /// Waits for all work of the device's context.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Gpu(gpu) => gpu.synchronize(),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => Ok(()),
        }
    }

    /// The milliseconds that `work` takes on the device. A GPU measures between two events, the
    /// emulator by the clock.
    pub fn time(&self, stream: Stream, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        match self {
            Device::Gpu(gpu) => gpu.time(stream, work),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            }
        }
    }

    /// Checks that a range lies in a buffer, and the buffer on this device.
    fn check_range(&self, buffer: &Buffer, offset: u64, bytes: u64) -> Result<()> {
        if !self.is(&buffer.device) {
            return Err(Error::input(
                "device buffer",
                format!("memory of another device ({})", buffer.device.name()),
                format!("memory of this one ({})", self.name()),
                "Use the device that allocated it",
            ));
        }
        if offset.checked_add(bytes).is_none_or(|end| end > buffer.bytes) {
            return Err(Error::input(
                "device buffer",
                format!("bytes {offset} to {offset} + {bytes}"),
                format!("up to {}", buffer.bytes),
                "Stay inside the allocation",
            ));
        }
        Ok(())
    }

    /// Checks that kernels on this device can use memory, each by its name and its first address. The
    /// emulator finds out when it runs them.
    pub(crate) fn check_memory(&self, regions: impl Iterator<Item = (&'static str, u64)>) -> Result<()> {
        match self {
            Device::Gpu(gpu) => gpu.check_memory(regions),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => Ok(()),
        }
    }

    /// Loads PTX of a family, which the driver compiles here. `shared_bytes` is the dynamic shared
    /// memory of each kernel that there is.
    pub(crate) fn load(
        &self,
        arch: Arch,
        name: &str,
        ptx: &str,
        shared_bytes: [Option<u32>; Kernel::ALL.len()],
    ) -> Result<Loaded> {
        match self {
            Device::Gpu(gpu) => Ok(Loaded::Gpu(gpu::GpuModule::load(gpu, arch, name, ptx, shared_bytes)?)),
            #[cfg(feature = "emulator")]
            Device::Emulator(_) => Ok(Loaded::Emulator(emulator::parse(name, ptx)?)),
        }
    }

    /// Launches one kernel. A GPU runs it in stream order, the emulator runs it to its end now.
    ///
    /// # Safety
    /// Every address in the parameters is memory of this device that the kernel may use, and is
    /// live until it is done.
    pub(crate) unsafe fn launch(&self, stream: Stream, kernels: &Loaded, launch: &Launch) -> Result<()> {
        match (self, kernels) {
            // SAFETY: the caller's promise.
            (Device::Gpu(gpu), Loaded::Gpu(module)) => unsafe { gpu.launch(stream, module, launch) },
            #[cfg(feature = "emulator")]
            (Device::Emulator(emulator), Loaded::Emulator(module)) => emulator.launch(module, launch),
            #[cfg(feature = "emulator")]
            _ => Err(Error::input(
                "module",
                "kernels loaded on another device",
                "the device that the module was loaded on",
                "Load the module on this device",
            )),
        }
    }
}

/// The error of a device that has too little memory. It has `free` bytes, where that is known.
fn no_room(bytes: u64, free: Option<u64>) -> Error {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Error::input(
        "device memory",
        format!("{} asked for", mib(bytes)),
        free.map_or("what the device has left".into(), |free| format!("the {} that the device has left", mib(free))),
        "Take a smaller spec, fewer heads or a smaller batch, or a device with more memory",
    )
}
