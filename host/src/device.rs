//! Where kernels run: a GPU through the CUDA driver, or the PTX emulator on the CPU.
//!
//! The driver is loaded when first asked for. Without it every path here gives [`Error::NoGpu`] with what was found. Contexts and
//! streams that come from outside are borrowed: they are never destroyed, and a thread's current context is what it was before.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::atomic::{AtomicU64, Ordering};
use std::sync::{Arc, RwLock};
use std::time::Instant;

use cudarc::driver::sys;
use framestride_shapes::arch::Arch;

use crate::error::{Error, Result};
use crate::launch::Launch;

/// A device. Cloning is cheap and refers to the same one.
#[derive(Clone)]
pub enum Device {
    /// An NVIDIA GPU.
    Gpu(Arc<Gpu>),
    /// The emulator, with its own memory.
    Emulator(Arc<Emulator>),
}

/// What to run on, as a command line says it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq, clap::ValueEnum)]
pub enum DeviceChoice {
    /// A GPU that can run the kernels if there is one, else the emulator.
    #[default]
    Auto,
    /// A GPU, or an error.
    Gpu,
    /// The emulator.
    Emulator,
}

/// A CUDA stream that belongs to the caller; the emulator has none and ignores it.
#[derive(Clone, Copy, Debug, Default, PartialEq, Eq)]
pub struct Stream(usize);

impl Stream {
    /// The default stream of the context.
    pub const DEFAULT: Stream = Stream(0);

    /// Borrows a `CUstream` (or `cudaStream_t`, which is the same) of the device's context.
    ///
    /// # Safety
    /// The handle is a live stream of the context that the work will be launched in, for as long as this value is used.
    pub unsafe fn from_raw(handle: *mut c_void) -> Stream {
        Stream(handle as usize)
    }

    fn raw(self) -> sys::CUstream {
        self.0 as sys::CUstream
    }
}

/// A driver's version as people write it.
pub fn cuda_version(driver: i32) -> String {
    format!("{}.{}", driver / 1000, driver % 1000 / 10)
}

/// A GPU's context: the device's primary one, retained, or a borrowed one.
pub struct Gpu {
    context: sys::CUcontext,
    device: sys::CUdevice,
    retained: bool,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
}

// SAFETY: a CUcontext may be made current on any thread, and the driver's functions are thread-safe.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing here changes after construction.
unsafe impl Sync for Gpu {}

/// The emulator's memory. Kernels of one process share it as kernels of one GPU share theirs.
pub struct Emulator {
    memory: RwLock<ptx_emulator::Memory>,
    /// Of the next launch: each runs the warps of its blocks in an order of its own.
    seed: AtomicU64,
}

/// Turns a driver's status into an error that names the call.
fn check(call: &'static str, status: sys::CUresult) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: `text` outlives the call, which points it at a static string of the driver, or leaves it null.
    let message = unsafe {
        let _ = sys::cuGetErrorString(status, &mut text);
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(Error::Driver { call, code: status as i32, message })
}

/// Loads and initialises the driver.
fn driver() -> Result<()> {
    // SAFETY: probing for the library opens and closes it; cuInit may be called any number of times.
    unsafe {
        if !sys::is_culib_present() {
            return Err(Error::NoGpu("the CUDA driver (libcuda) is not installed".into()));
        }
        check("cuInit", sys::cuInit(0)).map_err(|error| Error::NoGpu(error.to_string()))
    }
}

impl Gpu {
    /// The primary context of GPU `ordinal`, which the CUDA runtime and PyTorch use too.
    pub fn primary(ordinal: i32) -> Result<Gpu> {
        driver()?;
        let (mut device, mut context) = (0, std::ptr::null_mut());
        // SAFETY: both pointers are to live locals; the retained context is released on drop.
        unsafe {
            check("cuDeviceGet", sys::cuDeviceGet(&mut device, ordinal))
                .map_err(|error| Error::NoGpu(format!("GPU {ordinal}: {error}")))?;
            check("cuDevicePrimaryCtxRetain", sys::cuDevicePrimaryCtxRetain(&mut context, device))
                .map_err(|error| Error::NoGpu(format!("GPU {ordinal}: {error}")))?;
        }
        Gpu::describe(context, device, true)
    }

    /// Borrows a context of the caller's.
    ///
    /// # Safety
    /// `context` is a live `CUcontext` that outlives this value and everything made with it.
    pub unsafe fn borrow(context: *mut c_void) -> Result<Gpu> {
        driver()?;
        let context = context as sys::CUcontext;
        let mut device = 0;
        let _current = Current::push(context)?;
        // SAFETY: the context is current, and `device` is a live local.
        check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&mut device) })?;
        Gpu::describe(context, device, false)
    }

    fn describe(context: sys::CUcontext, device: sys::CUdevice, retained: bool) -> Result<Gpu> {
        let mut gpu = Gpu { context, device, retained, name: String::new(), capability: (0, 0), multiprocessors: 0 };
        let attribute = |attribute| -> Result<i32> {
            let mut value = 0;
            // SAFETY: `value` is a live local and `device` came from the driver.
            check("cuDeviceGetAttribute", unsafe { sys::cuDeviceGetAttribute(&mut value, attribute, device) })?;
            Ok(value)
        };
        use sys::CUdevice_attribute_enum as Attribute;
        gpu.capability = (
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MAJOR)? as u32,
            attribute(Attribute::CU_DEVICE_ATTRIBUTE_COMPUTE_CAPABILITY_MINOR)? as u32,
        );
        gpu.multiprocessors = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MULTIPROCESSOR_COUNT)? as u32;
        let mut name = [0 as c_char; 256];
        // SAFETY: the driver writes at most `len` bytes, terminated.
        unsafe {
            check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
            gpu.name = CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned();
        }
        Ok(gpu)
    }

    /// Name of the GPU.
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, such as (9, 0).
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// Whether this GPU and its driver run the kernels: the error says what is missing.
    pub fn check(&self) -> Result<()> {
        let (major, minor) = self.capability;
        let Some(arch) = Arch::of_capability(self.capability) else {
            let all = |text: fn(Arch) -> String| Arch::ALL.map(text).join(", ");
            return Err(Error::input(
                "GPU",
                format!("{} of compute capability {major}.{minor}", self.name),
                format!("compute capability {}, for which the kernels are built", all(Arch::shown_capabilities)),
                format!("Use a GPU of {}, or the emulator", all(|arch| arch.gpus.into())),
            ));
        };
        let (driver, (major, minor)) = (self.driver_version(), arch.ptx_version);
        if driver < arch.least_driver {
            return Err(Error::input(
                "GPU driver",
                format!("one for CUDA {}, on {}", cuda_version(driver), self.name),
                format!("one for CUDA {} or later, which PTX {major}.{minor} needs", cuda_version(arch.least_driver)),
                "Update the driver, or use the emulator",
            ));
        }
        Ok(())
    }

    /// Version of the driver as CUDA counts it: 12080 is 12.8.
    pub fn driver_version(&self) -> i32 {
        let mut version = 0;
        // SAFETY: `version` is a live local. The call cannot fail once the driver is initialised; 0 would mean unknown.
        let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
        version
    }
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: retained once in `primary`. A failure at exit has nobody to be told to.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
        }
    }
}

/// Makes a context current until dropped.
struct Current;

impl Current {
    fn push(context: sys::CUcontext) -> Result<Current> {
        // SAFETY: the context is live: retained by, or lent to, the `Gpu` that calls this.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context) })?;
        Ok(Current)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: undoes the push of this value, on the same thread: the type is neither sent nor kept across calls.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

/// The kernels of one PTX text on one device.
pub(crate) enum Loaded {
    Gpu { functions: [sys::CUfunction; 4], _module: GpuModule },
    Emulator { module: ptx_emulator::Module },
}

/// A module in a context, unloaded on drop.
pub(crate) struct GpuModule {
    module: sys::CUmodule,
    gpu: Arc<Gpu>,
}

// SAFETY: modules and functions are handles that any thread may use while their context is current.
unsafe impl Send for Loaded {}
// SAFETY: as above; nothing here changes after construction.
unsafe impl Sync for Loaded {}

impl Drop for GpuModule {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(self.gpu.context) {
            // SAFETY: loaded once, in this context; its functions are kept beside it and used by nobody after this.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
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
    pub fn address(&self) -> u64 {
        self.address
    }

    /// Size.
    pub fn bytes(&self) -> u64 {
        self.bytes
    }
}

impl Drop for Buffer {
    fn drop(&mut self) {
        match &self.device {
            Device::Gpu(gpu) => {
                if let Ok(_current) = Current::push(gpu.context) {
                    // SAFETY: allocated once by `Device::allocate` in this context.
                    let _ = unsafe { sys::cuMemFree_v2(self.address) };
                }
            }
            Device::Emulator(emulator) => {
                let _ = write(&emulator.memory).free(self.address);
            }
        }
    }
}

/// A lock whose holder panicked still guards plain bytes: go on with them.
fn write(memory: &RwLock<ptx_emulator::Memory>) -> std::sync::RwLockWriteGuard<'_, ptx_emulator::Memory> {
    memory.write().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn read(memory: &RwLock<ptx_emulator::Memory>) -> std::sync::RwLockReadGuard<'_, ptx_emulator::Memory> {
    memory.read().unwrap_or_else(std::sync::PoisonError::into_inner)
}

fn emulator_error(error: impl std::fmt::Display) -> Error {
    Error::Emulator(error.to_string())
}

/// Multiprocessors that the emulator claims: enough for several persistent blocks, few enough for a small machine.
const EMULATED_MULTIPROCESSORS: u32 = 4;

impl Device {
    /// A new emulator with empty memory.
    pub fn emulator() -> Device {
        Device::emulator_from(1)
    }

    /// [`Device::emulator`] whose launches run the warps of their blocks in the orders of `seed`, `seed + 1` and so on. A fault tells
    /// the seed of its launch.
    pub fn emulator_from(seed: u64) -> Device {
        Device::Emulator(Arc::new(Emulator { memory: RwLock::default(), seed: AtomicU64::new(seed) }))
    }

    /// GPU `ordinal`.
    pub fn gpu(ordinal: i32) -> Result<Device> {
        Ok(Device::Gpu(Arc::new(Gpu::primary(ordinal)?)))
    }

    /// The device of a command line. `Auto` takes GPU 0 when it runs the kernels, else the emulator, and gives the reason.
    pub fn choose(choice: DeviceChoice) -> Result<(Device, Option<Error>)> {
        let gpu = || -> Result<Device> {
            let gpu = Gpu::primary(0)?;
            gpu.check()?;
            Ok(Device::Gpu(Arc::new(gpu)))
        };
        match (choice, gpu) {
            (DeviceChoice::Emulator, _) => Ok((Device::emulator(), None)),
            (DeviceChoice::Gpu, gpu) => Ok((gpu()?, None)),
            (DeviceChoice::Auto, gpu) => {
                Ok(gpu().map_or_else(|error| (Device::emulator(), Some(error)), |gpu| (gpu, None)))
            }
        }
    }

    /// Whether both are the same device, and so have the same memory.
    pub(crate) fn is(&self, other: &Device) -> bool {
        match (self, other) {
            (Device::Gpu(gpu), Device::Gpu(other)) => gpu.context == other.context,
            (Device::Emulator(emulator), Device::Emulator(other)) => Arc::ptr_eq(emulator, other),
            _ => false,
        }
    }

    /// Name for people: the GPU's, or "emulator".
    pub fn name(&self) -> String {
        match self {
            Device::Gpu(gpu) => gpu.name.clone(),
            Device::Emulator(_) => "emulator".into(),
        }
    }

    /// Multiprocessors, which persistent kernels fill.
    pub fn multiprocessors(&self) -> u32 {
        match self {
            Device::Gpu(gpu) => gpu.multiprocessors,
            Device::Emulator(_) => EMULATED_MULTIPROCESSORS,
        }
    }

    /// Allocates uninitialised memory at a multiple of 256 bytes. More than the device has left is an [`Error::Input`].
    pub fn allocate(&self, bytes: u64) -> Result<Buffer> {
        let bytes = bytes.max(1);
        let address = match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                let mut address = 0;
                // SAFETY: `address` is a live local.
                let status = unsafe { sys::cuMemAlloc_v2(&mut address, bytes as usize) };
                if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
                    return Err(no_room(bytes, self.free_memory().ok().flatten()));
                }
                check("cuMemAlloc", status)?;
                address
            }
            Device::Emulator(emulator) => {
                self.check_room(bytes)?;
                write(&emulator.memory).alloc(bytes, 256).map_err(|_| no_room(bytes, available_memory()))?
            }
        };
        Ok(Buffer { device: self.clone(), address, bytes })
    }

    /// Whether the emulator may take so much of this machine's memory. The system grants more than it has, and ends the process that
    /// uses it: so it is asked before. A GPU's driver answers when memory is asked for.
    pub fn check_room(&self, bytes: u64) -> Result<()> {
        match (self, available_memory()) {
            (Device::Emulator(_), Some(available)) if bytes > available => Err(no_room(bytes, Some(available))),
            _ => Ok(()),
        }
    }

    /// Allocates `count` pieces in the emulator, at addresses of equal distances, at least `apart` from each other. A GPU's addresses are
    /// not for the asking.
    pub(crate) fn scatter(&self, count: usize, bytes: u64, apart: u64) -> Result<Vec<Buffer>> {
        let Device::Emulator(emulator) = self else { return (0..count).map(|_| self.allocate(bytes)).collect() };
        self.check_room(bytes * count as u64)?;
        let mut memory = write(&emulator.memory);
        let pieces = (0..count).map(|_| {
            let address = memory.alloc(bytes, 256).map_err(|_| no_room(bytes, None))?;
            memory.skip(apart);
            Ok(address)
        });
        // Buffers are made without the lock, which they take when they are dropped.
        let addresses = pieces.collect::<Result<Vec<u64>>>();
        drop(memory);
        Ok(addresses?.into_iter().map(|address| Buffer { device: self.clone(), address, bytes }).collect())
    }

    /// Allocates and copies `bytes` to the device.
    pub fn upload(&self, bytes: &[u8]) -> Result<Buffer> {
        let buffer = self.allocate(bytes.len() as u64)?;
        self.write(&buffer, 0, bytes)?;
        Ok(buffer)
    }

    /// Copies `bytes` to `offset` in `buffer`, and waits.
    pub fn write(&self, buffer: &Buffer, offset: u64, bytes: &[u8]) -> Result<()> {
        self.check_range(buffer, offset, bytes.len() as u64)?;
        match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                // SAFETY: the range lies in a live allocation (checked above), the source is a live slice.
                check("cuMemcpyHtoD", unsafe {
                    sys::cuMemcpyHtoD_v2(buffer.address + offset, bytes.as_ptr().cast(), bytes.len())
                })
            }
            Device::Emulator(emulator) => {
                write(&emulator.memory).write(buffer.address + offset, bytes).map_err(emulator_error)
            }
        }
    }

    /// Copies `bytes` bytes from `offset` in `buffer` to the host, after all work launched before.
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
            Device::Gpu(gpu) => {
                self.synchronize()?;
                let _current = Current::push(gpu.context)?;
                let mut data = vec![0u8; bytes as usize];
                // SAFETY: `data` has room for `bytes`; the source is the caller's promise.
                check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), address, data.len()) })?;
                Ok(data)
            }
            Device::Emulator(emulator) => {
                read(&emulator.memory).read(address, bytes).map_err(emulator_error).map(|bytes| bytes.to_vec())
            }
        }
    }

    /// Sets every byte of `buffer`, and waits.
    pub fn fill(&self, buffer: &Buffer, byte: u8) -> Result<()> {
        self.check_range(buffer, 0, buffer.bytes)?;
        match self {
            Device::Gpu(gpu) => {
                {
                    let _current = Current::push(gpu.context)?;
                    // SAFETY: the range is a live allocation of this device (checked above).
                    check("cuMemsetD8", unsafe { sys::cuMemsetD8_v2(buffer.address, byte, buffer.bytes as usize) })?;
                }
                self.synchronize()
            }
            Device::Emulator(emulator) => {
                write(&emulator.memory).fill(buffer.address, buffer.bytes, byte).map_err(emulator_error)
            }
        }
    }

    /// Waits for all work of the device's context.
    pub fn synchronize(&self) -> Result<()> {
        match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                // SAFETY: the context is current.
                check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
            }
            Device::Emulator(_) => Ok(()),
        }
    }

    /// Loads PTX: the driver compiles it here, and its log is in the error. `entries` are the kernels with the dynamic shared
    /// memory that each needs.
    pub(crate) fn load(&self, name: &str, ptx: &str, entries: [(&str, u32); 4]) -> Result<Loaded> {
        match self {
            Device::Gpu(gpu) => load_on_gpu(gpu, name, ptx, entries),
            Device::Emulator(_) => {
                Ok(Loaded::Emulator { module: ptx_emulator::Module::parse(name, ptx).map_err(emulator_error)? })
            }
        }
    }

    /// Sets every whole word of `buffer`, in stream order.
    pub(crate) fn fill_words(&self, stream: Stream, buffer: &Buffer, value: u32) -> Result<()> {
        self.check_range(buffer, 0, buffer.bytes)?;
        let count = (buffer.bytes / 4) as usize;
        match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                // SAFETY: the words lie in a live allocation of this device (checked above).
                check("cuMemsetD32Async", unsafe { sys::cuMemsetD32Async(buffer.address, value, count, stream.raw()) })
            }
            Device::Emulator(emulator) => write(&emulator.memory)
                .write(buffer.address, &value.to_le_bytes().repeat(count))
                .map_err(emulator_error),
        }
    }

    /// Copies the bytes of one buffer to another of the same size, in stream order.
    pub(crate) fn copy(&self, stream: Stream, from: &Buffer, to: &Buffer) -> Result<()> {
        self.check_range(from, 0, from.bytes)?;
        self.check_range(to, 0, from.bytes)?;
        match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                // SAFETY: both are live allocations here, and the target is no smaller than the source (checked above).
                check("cuMemcpyDtoDAsync", unsafe {
                    sys::cuMemcpyDtoDAsync_v2(to.address, from.address, from.bytes as usize, stream.raw())
                })
            }
            Device::Emulator(_) => self.write(to, 0, &self.read(from, 0, from.bytes)?),
        }
    }

    /// Whether a range lies in a buffer, and the buffer on this device.
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

    /// Bytes of device memory that nobody has allocated; the emulator does not count them.
    pub(crate) fn free_memory(&self) -> Result<Option<u64>> {
        let Device::Gpu(gpu) = self else { return Ok(None) };
        let _current = Current::push(gpu.context)?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are live locals, and the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(Some(free as u64))
    }

    /// Launches one kernel: in stream order on a GPU; the emulator runs it to its end.
    ///
    /// # Safety
    /// Every address in the parameters is memory of this device that the kernel may use, and is live until it is done.
    pub(crate) unsafe fn launch(&self, stream: Stream, kernels: &Loaded, launch: &Launch) -> Result<()> {
        match (self, kernels) {
            (Device::Gpu(gpu), Loaded::Gpu { functions, .. }) => {
                let _current = Current::push(gpu.context)?;
                let [x, y, z] = launch.grid;
                let mut parameters = [launch.params.as_bytes().as_ptr() as *mut c_void];
                // SAFETY: the kernel takes one by-value struct of the size of `params` (checked at load), which the driver
                // copies during the call. What the addresses in it point to is the caller's promise.
                check("cuLaunchKernel", unsafe {
                    sys::cuLaunchKernel(
                        functions[launch.kernel as usize],
                        x,
                        y,
                        z,
                        launch.threads,
                        1,
                        1,
                        launch.shared_bytes,
                        stream.raw(),
                        parameters.as_mut_ptr(),
                        std::ptr::null_mut(),
                    )
                })
            }
            (Device::Emulator(emulator), Loaded::Emulator { module }) => {
                let shape = ptx_emulator::Launch {
                    grid: launch.grid,
                    block: [launch.threads, 1, 1],
                    shared_bytes: launch.shared_bytes,
                };
                let seed = emulator.seed.fetch_add(1, Ordering::Relaxed);
                let options = ptx_emulator::Options { seed, ..Default::default() };
                module
                    .launch_with(
                        &read(&emulator.memory),
                        launch.kernel.entry(),
                        shape,
                        launch.params.as_bytes(),
                        options,
                    )
                    .map_err(emulator_error)?;
                Ok(())
            }
            _ => Err(Error::input(
                "module",
                "kernels loaded on another device",
                "the device that the module was loaded on",
                "Load the module on this device",
            )),
        }
    }

    /// Milliseconds that `work` takes on the device: between two events on a GPU, by the clock in the emulator.
    pub(crate) fn time(&self, stream: Stream, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        match self {
            Device::Gpu(gpu) => {
                let _current = Current::push(gpu.context)?;
                let (start, end) = (Event::new()?, Event::new()?);
                start.record(stream)?;
                work()?;
                end.record(stream)?;
                let mut milliseconds = 0f32;
                // SAFETY: both events are live and recorded; `milliseconds` is a live local.
                unsafe {
                    check("cuEventSynchronize", sys::cuEventSynchronize(end.0))?;
                    check("cuEventElapsedTime", sys::cuEventElapsedTime(&mut milliseconds, start.0, end.0))?;
                }
                Ok(f64::from(milliseconds))
            }
            Device::Emulator(_) => {
                let start = Instant::now();
                work()?;
                Ok(start.elapsed().as_secs_f64() * 1e3)
            }
        }
    }
}

/// An event, destroyed on drop while its context is current.
struct Event(sys::CUevent);

impl Event {
    fn new() -> Result<Event> {
        let mut event = std::ptr::null_mut();
        // SAFETY: `event` is a live local and a context is current.
        check("cuEventCreate", unsafe { sys::cuEventCreate(&mut event, 0) })?;
        Ok(Event(event))
    }

    fn record(&self, stream: Stream) -> Result<()> {
        // SAFETY: the event is live, and the stream is the caller's.
        check("cuEventRecord", unsafe { sys::cuEventRecord(self.0, stream.raw()) })
    }
}

impl Drop for Event {
    fn drop(&mut self) {
        // SAFETY: created once, in `new`.
        let _ = unsafe { sys::cuEventDestroy_v2(self.0) };
    }
}

/// A stream of this library's own, on which nothing waits for the default stream, nor that for it. Dropping it waits for its work, so
/// that no memory that outlives the stream is freed under a kernel.
pub(crate) struct OwnStream {
    gpu: Arc<Gpu>,
    stream: sys::CUstream,
}

impl OwnStream {
    pub(crate) fn new(gpu: &Arc<Gpu>) -> Result<OwnStream> {
        let _current = Current::push(gpu.context)?;
        let mut stream = std::ptr::null_mut();
        let flags = sys::CUstream_flags::CU_STREAM_NON_BLOCKING as u32;
        // SAFETY: `stream` is a live local and a context is current.
        check("cuStreamCreate", unsafe { sys::cuStreamCreate(&mut stream, flags) })?;
        Ok(OwnStream { gpu: Arc::clone(gpu), stream })
    }

    /// The stream, to launch on while this value lives.
    pub(crate) fn borrow(&self) -> Stream {
        Stream(self.stream as usize)
    }

    /// What `work` launches on this stream, as a graph: nothing of it runs here.
    pub(crate) fn capture(&self, work: impl FnOnce(Stream) -> Result<()>) -> Result<Graph> {
        let _current = Current::push(self.gpu.context)?;
        // Other threads may go on allocating and waiting: only this one's calls are held to what a capture allows.
        let mode = sys::CUstreamCaptureMode::CU_STREAM_CAPTURE_MODE_THREAD_LOCAL;
        // SAFETY: the stream is live, and it is no default stream.
        check("cuStreamBeginCapture", unsafe { sys::cuStreamBeginCapture_v2(self.stream, mode) })?;
        let worked = work(self.borrow());
        let mut captured = Captured(std::ptr::null_mut());
        // A capture is ended even where `work` failed: a stream that is left capturing is of no use to anybody.
        // SAFETY: the capture was begun on this thread; the graph is a live local's.
        let ended = check("cuStreamEndCapture", unsafe { sys::cuStreamEndCapture(self.stream, &mut captured.0) });
        worked?;
        ended?;
        let mut executable = std::ptr::null_mut();
        // SAFETY: the graph is live, and `executable` is a live local.
        check("cuGraphInstantiateWithFlags", unsafe {
            sys::cuGraphInstantiateWithFlags(&mut executable, captured.0, 0)
        })?;
        Ok(Graph { gpu: Arc::clone(&self.gpu), executable })
    }
}

impl Drop for OwnStream {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(self.gpu.context) {
            // SAFETY: created once, in `new`; whoever borrowed it launches nothing after this.
            unsafe {
                let _ = sys::cuStreamSynchronize(self.stream);
                let _ = sys::cuStreamDestroy_v2(self.stream);
            }
        }
    }
}

/// A captured graph, destroyed on drop while its context is current; null when the capture failed.
struct Captured(sys::CUgraph);

impl Drop for Captured {
    fn drop(&mut self) {
        if !self.0.is_null() {
            // SAFETY: made once, by the end of a capture; executables made from it stay.
            let _ = unsafe { sys::cuGraphDestroy(self.0) };
        }
    }
}

/// An executable graph, destroyed on drop.
pub(crate) struct Graph {
    gpu: Arc<Gpu>,
    executable: sys::CUgraphExec,
}

impl Graph {
    /// Launches all of it, in stream order.
    ///
    /// # Safety
    /// What was captured may run now: the modules and memory that its launches use are live, and stay so until it is done.
    pub(crate) unsafe fn launch(&self, stream: Stream) -> Result<()> {
        let _current = Current::push(self.gpu.context)?;
        // SAFETY: the graph is live; the rest is the caller's promise.
        check("cuGraphLaunch", unsafe { sys::cuGraphLaunch(self.executable, stream.raw()) })
    }
}

impl Drop for Graph {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(self.gpu.context) {
            // SAFETY: made once, in `capture`; the driver frees one that still runs when it is done.
            let _ = unsafe { sys::cuGraphExecDestroy(self.executable) };
        }
    }
}

/// What a device that has too little memory says.
fn no_room(bytes: u64, free: Option<u64>) -> Error {
    let mib = |bytes: u64| format!("{:.1} MiB", bytes as f64 / f64::from(1 << 20));
    Error::input(
        "device memory",
        format!("{} asked for", mib(bytes)),
        free.map_or("what the device has left".into(), |free| format!("the {} that the device has left", mib(free))),
        "Take a smaller spec, fewer heads or a smaller batch, or a device with more memory",
    )
}

/// Bytes that this process can still use, where the system tells: the emulator's memory is the machine's.
pub(crate) fn available_memory() -> Option<u64> {
    let read = |path: &str| std::fs::read_to_string(path).ok();
    let machine = read("/proc/meminfo").and_then(|text| {
        let line = text.lines().find_map(|line| line.strip_prefix("MemAvailable:"))?;
        Some(line.trim().strip_suffix("kB")?.trim().parse::<u64>().ok()? * 1024)
    });
    // A container's own limit, which the machine's numbers do not show. Cached files make way for whoever needs their memory.
    let group = |name: &str| read(&format!("/sys/fs/cgroup/memory.{name}"));
    let number = |name: &str| group(name)?.trim().parse::<u64>().ok();
    let cached = || group("stat")?.lines().find_map(|line| line.strip_prefix("inactive_file "))?.parse::<u64>().ok();
    let container = number("max")
        .zip(number("current"))
        .map(|(most, current)| most.saturating_sub(current.saturating_sub(cached().unwrap_or(0))));
    machine.into_iter().chain(container).min()
}

/// First driver with `cuFuncLoad`.
const EAGER_LOADING: i32 = 12040;

fn load_on_gpu(gpu: &Arc<Gpu>, name: &str, ptx: &str, entries: [(&str, u32); 4]) -> Result<Loaded> {
    let text = |subject: &str, text: &str| {
        CString::new(text)
            .map_err(|_| Error::input(subject, "a zero byte", "text", "The file is damaged: build it again"))
    };
    let image = text(&format!("PTX of {name}"), ptx)?;
    let _current = Current::push(gpu.context)?;
    let mut log = vec![0u8; 16 * 1024];
    let mut options =
        [sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER, sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES];
    let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void];
    let mut module = std::ptr::null_mut();
    // SAFETY: the image is terminated, and both option arrays have the given length; the log buffer outlives the call.
    let status = unsafe {
        sys::cuModuleLoadDataEx(
            &mut module,
            image.as_ptr().cast(),
            options.len() as u32,
            options.as_mut_ptr(),
            values.as_mut_ptr(),
        )
    };
    let end = log.iter().position(|&byte| byte == 0).unwrap_or(log.len());
    let log = String::from_utf8_lossy(&log[..end]).trim().to_owned();
    if status == sys::CUresult::CUDA_ERROR_UNSUPPORTED_PTX_VERSION {
        let arch = Arch::of_capability(gpu.capability).unwrap_or_default();
        let (major, minor) = arch.ptx_version;
        return Err(Error::input(
            format!("kernels of {name}"),
            format!("PTX that the driver, for CUDA {}, does not know ({log})", cuda_version(gpu.driver_version())),
            format!("PTX {major}.{minor} and a driver for CUDA {} or later", cuda_version(arch.least_driver)),
            "Update the driver, or build the kernels again with this version of framestride",
        ));
    }
    check("cuModuleLoadDataEx", status).map_err(|error| match error {
        Error::Driver { call, code, message } => {
            Error::Driver { call, code, message: format!("{message} (kernels of {name}). JIT log: {log}") }
        }
        other => other,
    })?;
    let module = GpuModule { module, gpu: Arc::clone(gpu) };
    let mut functions = [std::ptr::null_mut(); 4];
    for (function, (entry, shared_bytes)) in functions.iter_mut().zip(entries) {
        let entry = text("entry", entry)?;
        // SAFETY: the module is loaded, the name terminated, `function` live; the function is used with its own module.
        unsafe {
            check("cuModuleGetFunction", sys::cuModuleGetFunction(function, module.module, entry.as_ptr()))?;
            let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
            check("cuFuncSetAttribute", sys::cuFuncSetAttribute(*function, attribute, shared_bytes as c_int))?;
            // Lazy loading would put an allocation into the first launch, which may be under graph capture.
            if gpu.driver_version() >= EAGER_LOADING {
                check("cuFuncLoad", sys::cuFuncLoad(*function))?;
            }
        }
    }
    Ok(Loaded::Gpu { functions, _module: module })
}
