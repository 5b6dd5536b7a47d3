//! A GPU through the CUDA driver.

use std::ffi::{CStr, CString, c_char, c_int, c_void};
use std::sync::Arc;

use cudarc::driver::sys;
use framestride_shapes::arch::Arch;

use super::{Stream, no_room};
use crate::error::{Error, Result};
use crate::launch::{Kernel, Launch};

/// The first driver that has `cuFuncLoad`.
const EAGER_LOADING: i32 = 12040;

/// The version of a driver as people write it: 12080 is "12.8".
#[must_use]
pub fn cuda_version(driver: i32) -> String {
    format!("{}.{}", driver / 1000, driver % 1000 / 10)
}

/// A GPU, by its context. The context is the GPU's primary one, or a borrowed one.
pub struct Gpu {
    context: sys::CUcontext,
    device: sys::CUdevice,
    retained: bool,
    name: String,
    capability: (u32, u32),
    multiprocessors: u32,
    /// Shared memory of a multiprocessor, in bytes.
    shared_bytes: u32,
    /// Whether kernels can use any memory of the process, also what the driver knows nothing of.
    uses_pageable: bool,
}

// SAFETY: a CUcontext may be made current on any thread, and the driver's functions are
// thread-safe.
unsafe impl Send for Gpu {}
// SAFETY: as above; nothing here changes after construction.
unsafe impl Sync for Gpu {}

/// Turns a driver's status into an error that names the call.
pub(super) fn check(call: &'static str, status: sys::CUresult) -> Result<()> {
    if status == sys::CUresult::CUDA_SUCCESS {
        return Ok(());
    }
    let mut text: *const c_char = std::ptr::null();
    // SAFETY: `text` outlives the call, which points it at a static string of the driver, or leaves
    // it null.
    let message = unsafe {
        let _ = sys::cuGetErrorString(status, &mut text);
        if text.is_null() { "unknown error".into() } else { CStr::from_ptr(text).to_string_lossy().into_owned() }
    };
    Err(Error::Driver { call, code: status as i32, message })
}

/// Loads and initialises the driver.
fn driver() -> Result<()> {
    // cudarc panics without the library, and has no probe of its own where an engine links it.
    let names = ["cuda", "nvcuda"].map(libloading::library_filename).into_iter().chain(["libcuda.so.1".into()]);
    // SAFETY: opening the driver's library runs nothing but its own initialisers.
    if !names.into_iter().any(|name| unsafe { libloading::Library::new(name) }.is_ok()) {
        return Err(Error::NoGpu("the CUDA driver (libcuda) is not installed".into()));
    }
    // SAFETY: cuInit may be called any number of times.
    check("cuInit", unsafe { sys::cuInit(0) }).map_err(|error| Error::NoGpu(error.to_string()))
}

/// The driver's handle of GPU `ordinal`.
fn device(ordinal: i32) -> Result<sys::CUdevice> {
    driver()?;
    let mut device = 0;
    // SAFETY: the pointer is to a live local.
    check("cuDeviceGet", unsafe { sys::cuDeviceGet(&mut device, ordinal) })
        .map_err(|error| Error::NoGpu(format!("GPU {ordinal}: {error}")))?;
    Ok(device)
}

/// The name that the driver gives a GPU.
fn name(device: sys::CUdevice) -> Result<String> {
    let mut name = [0 as c_char; 256];
    // SAFETY: the driver writes at most `len` bytes, terminated.
    unsafe {
        check("cuDeviceGetName", sys::cuDeviceGetName(name.as_mut_ptr(), name.len() as c_int, device))?;
        Ok(CStr::from_ptr(name.as_ptr()).to_string_lossy().into_owned())
    }
}

/// The family whose kernels suit a GPU and its driver best: the first in the table that both run.
///
/// # Errors
/// An [`Error::Input`] that says what is missing, where they run none.
fn best_arch(name: &str, capability: (u32, u32), driver: i32) -> Result<Arch> {
    let runs = |arch: &Arch| check_arch(*arch, name, capability, driver).is_ok();
    if let Some(arch) = Arch::ALL.into_iter().find(runs) {
        return Ok(arch);
    }
    // The family that the GPU could run says which driver it wants.
    if let Some(arch) = Arch::ALL.into_iter().rfind(|arch| arch.runs_on(capability)) {
        check_arch(arch, name, capability, driver)?;
    }
    let (major, minor) = capability;
    let all = |text: fn(Arch) -> String| Arch::ALL.map(text).join(", ");
    Err(Error::input(
        "GPU",
        format!("{name} of compute capability {major}.{minor}"),
        format!("compute capability {}, for which the kernels are built", all(Arch::shown_capabilities)),
        format!("Use a GPU of {}, or the emulator", all(|arch| arch.gpus.into())),
    ))
}

/// Checks whether a GPU and its driver run the kernels of a family.
fn check_arch(arch: Arch, name: &str, (major, minor): (u32, u32), driver: i32) -> Result<()> {
    if !arch.runs_on((major, minor)) {
        return Err(Error::input(
            "GPU",
            format!("{name} of compute capability {major}.{minor}"),
            format!("compute capability {}, for which these kernels are built", arch.shown_capabilities()),
            format!("Load kernels of another family, or use a GPU of {}", arch.gpus),
        ));
    }
    if driver < arch.least_driver {
        let (major, minor) = arch.ptx_version;
        return Err(Error::input(
            "GPU driver",
            format!("one for CUDA {}, on {name}", cuda_version(driver)),
            format!("one for CUDA {} or later, which PTX {major}.{minor} needs", cuda_version(arch.least_driver)),
            "Update the driver, or use the emulator",
        ));
    }
    Ok(())
}

/// Makes a context current until it is dropped.
pub(super) struct Current;

impl Current {
    pub(super) fn push(gpu: &Gpu) -> Result<Current> {
        Current::push_context(gpu.context)
    }

    fn push_context(context: sys::CUcontext) -> Result<Current> {
        // SAFETY: the context is live: retained by, or lent to, the `Gpu` that calls this.
        check("cuCtxPushCurrent", unsafe { sys::cuCtxPushCurrent_v2(context) })?;
        Ok(Current)
    }
}

impl Drop for Current {
    fn drop(&mut self) {
        let mut context = std::ptr::null_mut();
        // SAFETY: undoes the push of this value, on the same thread: the type is neither sent nor
        // kept across calls.
        let _ = unsafe { sys::cuCtxPopCurrent_v2(&mut context) };
    }
}

impl Gpu {
    /// The primary context of GPU `ordinal`, which the CUDA runtime and PyTorch use too.
    ///
    /// # Errors
    /// [`Error::NoGpu`] without a driver or a GPU of this number.
    pub fn primary(ordinal: i32) -> Result<Gpu> {
        let device = device(ordinal)?;
        let mut context = std::ptr::null_mut();
        // SAFETY: the pointer is to a live local; the retained context is released on drop.
        check("cuDevicePrimaryCtxRetain", unsafe { sys::cuDevicePrimaryCtxRetain(&mut context, device) })
            .map_err(|error| Error::NoGpu(format!("GPU {ordinal}: {error}")))?;
        Gpu::describe(context, device, true)
    }

    /// Name of GPU `ordinal`. No context is made for it, which would take a while.
    ///
    /// # Errors
    /// [`Error::NoGpu`] without a driver or a GPU of this number.
    pub fn name_of(ordinal: i32) -> Result<String> {
        name(device(ordinal)?)
    }

    /// Number of GPUs that the driver shows.
    ///
    /// # Errors
    /// [`Error::NoGpu`] without a driver.
    pub fn count() -> Result<i32> {
        driver()?;
        let mut count = 0;
        // SAFETY: the pointer is to a live local.
        check("cuDeviceGetCount", unsafe { sys::cuDeviceGetCount(&mut count) })?;
        Ok(count)
    }

    /// Borrows a context of the caller. It is never destroyed, and a thread's current context is
    /// the same after each call.
    ///
    /// # Safety
    /// `context` is a live `CUcontext` that outlives this value and everything made with it.
    pub unsafe fn borrow(context: *mut c_void) -> Result<Gpu> {
        driver()?;
        let context = context as sys::CUcontext;
        let mut device = 0;
        let _current = Current::push_context(context)?;
        // SAFETY: the context is current, and `device` is a live local.
        check("cuCtxGetDevice", unsafe { sys::cuCtxGetDevice(&mut device) })?;
        Gpu::describe(context, device, false)
    }

    fn describe(context: sys::CUcontext, device: sys::CUdevice, retained: bool) -> Result<Gpu> {
        let (name, capability) = (String::new(), (0, 0));
        let mut gpu = Gpu {
            context,
            device,
            retained,
            name,
            capability,
            multiprocessors: 0,
            shared_bytes: 0,
            uses_pageable: false,
        };
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
        gpu.shared_bytes = attribute(Attribute::CU_DEVICE_ATTRIBUTE_MAX_SHARED_MEMORY_PER_MULTIPROCESSOR)? as u32;
        gpu.uses_pageable = attribute(Attribute::CU_DEVICE_ATTRIBUTE_PAGEABLE_MEMORY_ACCESS)? != 0;
        gpu.name = self::name(device)?;
        Ok(gpu)
    }

    /// Name of the GPU.
    #[must_use]
    pub fn name(&self) -> &str {
        &self.name
    }

    /// Compute capability, such as (9, 0).
    #[must_use]
    pub fn capability(&self) -> (u32, u32) {
        self.capability
    }

    /// The family whose kernels suit this GPU and its driver best.
    ///
    /// # Errors
    /// An [`Error::Input`] that says what is missing, where it runs none.
    pub fn arch(&self) -> Result<Arch> {
        best_arch(&self.name, self.capability, self.driver_version())
    }

    /// Checks whether this GPU and its driver run the kernels of a family.
    fn check(&self, arch: Arch) -> Result<()> {
        check_arch(arch, &self.name, self.capability, self.driver_version())
    }

    /// Version of the driver as CUDA counts it: 12080 is 12.8.
    #[must_use]
    pub fn driver_version(&self) -> i32 {
        let mut version = 0;
        // SAFETY: `version` is a live local. The call cannot fail once the driver is initialised; 0
        // would mean unknown.
        let _ = unsafe { sys::cuDriverGetVersion(&mut version) };
        version
    }

    /// Bytes of the GPU's memory that nobody has allocated.
    pub fn free_memory(&self) -> Result<u64> {
        let _current = Current::push(self)?;
        let (mut free, mut total) = (0, 0);
        // SAFETY: both are live locals, and the context is current.
        check("cuMemGetInfo", unsafe { sys::cuMemGetInfo_v2(&mut free, &mut total) })?;
        Ok(free as u64)
    }

    /// Whether both are the same context, and so have the same memory.
    pub(super) fn is(&self, other: &Gpu) -> bool {
        self.context == other.context
    }

    pub(super) fn multiprocessors(&self) -> u32 {
        self.multiprocessors
    }

    pub(super) fn shared_bytes(&self) -> u32 {
        self.shared_bytes
    }

    pub(super) fn allocate(&self, bytes: u64) -> Result<u64> {
        let _current = Current::push(self)?;
        let mut address = 0;
        // SAFETY: `address` is a live local.
        let status = unsafe { sys::cuMemAlloc_v2(&mut address, bytes as usize) };
        if status == sys::CUresult::CUDA_ERROR_OUT_OF_MEMORY {
            return Err(no_room(bytes, self.free_memory().ok()));
        }
        check("cuMemAlloc", status)?;
        Ok(address)
    }

    /// Frees what `allocate` gave, once.
    pub(super) fn free(&self, address: u64) {
        if let Ok(_current) = Current::push(self) {
            // SAFETY: a buffer has its address from `allocate` of this context, and frees it when
            // it is dropped.
            let _ = unsafe { sys::cuMemFree_v2(address) };
        }
    }

    /// # Safety
    /// The bytes at `address` are live memory of this GPU.
    pub(super) unsafe fn write(&self, address: u64, bytes: &[u8]) -> Result<()> {
        let _current = Current::push(self)?;
        // SAFETY: the source is a live slice; the target is the caller's promise.
        check("cuMemcpyHtoD", unsafe { sys::cuMemcpyHtoD_v2(address, bytes.as_ptr().cast(), bytes.len()) })
    }

    /// # Safety
    /// The bytes at `address` are live memory of this GPU.
    pub(super) unsafe fn read(&self, address: u64, bytes: u64) -> Result<Vec<u8>> {
        self.synchronize()?;
        let _current = Current::push(self)?;
        let mut data = vec![0u8; bytes as usize];
        // SAFETY: `data` has room for `bytes`; the source is the caller's promise.
        check("cuMemcpyDtoH", unsafe { sys::cuMemcpyDtoH_v2(data.as_mut_ptr().cast(), address, data.len()) })?;
        Ok(data)
    }

    /// # Safety
    /// The bytes at `address` are live memory of this GPU until the work is done.
    pub(super) unsafe fn fill(&self, stream: Stream, address: u64, bytes: u64, byte: u8) -> Result<()> {
        let _current = Current::push(self)?;
        // SAFETY: the caller's promise.
        check("cuMemsetD8Async", unsafe { sys::cuMemsetD8Async(address, byte, bytes as usize, stream.raw()) })
    }

    /// # Safety
    /// Both ranges are live memory of this GPU until the work is done.
    pub(super) unsafe fn copy(&self, stream: Stream, from: u64, to: u64, bytes: u64) -> Result<()> {
        let _current = Current::push(self)?;
        // SAFETY: the caller's promise.
        check("cuMemcpyDtoDAsync", unsafe { sys::cuMemcpyDtoDAsync_v2(to, from, bytes as usize, stream.raw()) })
    }

    pub(super) fn synchronize(&self) -> Result<()> {
        let _current = Current::push(self)?;
        // SAFETY: the context is current.
        check("cuCtxSynchronize", unsafe { sys::cuCtxSynchronize() })
    }

    /// Checks that kernels in this context can use memory, each by its name and its first address.
    ///
    /// A kernel that cannot would end with an error from which the context never recovers. Where the
    /// driver does not tell, the launch will.
    pub(super) fn check_memory(&self, regions: impl Iterator<Item = (&'static str, u64)>) -> Result<()> {
        use sys::CUpointer_attribute as Attribute;
        let _current = Current::push(self)?;
        // Whether the driver says that it does not know a fact about an address.
        let is_unknown = |attribute, address| {
            let mut fact = 0u64;
            // SAFETY: `fact` is a live local, no smaller than what the attributes below have. The driver
            // looks the address up and does not follow it.
            let status = unsafe { sys::cuPointerGetAttribute((&raw mut fact).cast(), attribute, address) };
            status == sys::CUresult::CUDA_ERROR_INVALID_VALUE
        };
        for (name, address) in regions {
            let is_usable = !is_unknown(Attribute::CU_POINTER_ATTRIBUTE_DEVICE_POINTER, address)
                || self.uses_pageable && is_unknown(Attribute::CU_POINTER_ATTRIBUTE_MEMORY_TYPE, address);
            if !is_usable {
                return Err(Error::input(
                    name,
                    format!("address {address:#x}, which kernels on {} cannot use", self.name),
                    "memory of the module's GPU, or memory that it can use",
                    "Allocate it in the context that the module was loaded in",
                ));
            }
        }
        Ok(())
    }

    /// # Safety
    /// Every address in the parameters is memory of this GPU that the kernel may use, and is live
    /// until it is done.
    pub(super) unsafe fn launch(&self, stream: Stream, module: &GpuModule, launch: &Launch) -> Result<()> {
        let _current = Current::push(self)?;
        let [x, y, z] = launch.grid;
        let mut parameters = [launch.params.as_bytes().as_ptr() as *mut c_void];
        // SAFETY: the kernel takes one by-value struct of the size of `params` (checked at load),
        // which the driver copies during the call. What the addresses in it point to is the
        // caller's promise.
        let status = unsafe {
            sys::cuLaunchKernel(
                module.functions[launch.kernel as usize],
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
        };
        // The kernel is this module's, so the handle that the driver does not take is the stream's.
        if status == sys::CUresult::CUDA_ERROR_INVALID_HANDLE {
            return Err(Error::input(
                "stream",
                format!("{:#x}, which is none of this context on {}", stream.raw() as usize, self.name),
                "a stream of the context that the module was loaded in, or 0",
                "Make the stream in that context",
            ));
        }
        check("cuLaunchKernel", status)
    }

    /// Milliseconds between two events around `work`.
    pub(super) fn time(&self, stream: Stream, work: impl FnOnce() -> Result<()>) -> Result<f64> {
        let _current = Current::push(self)?;
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
}

impl Drop for Gpu {
    fn drop(&mut self) {
        if self.retained {
            // SAFETY: retained once in `primary`. A failure at exit has nobody to be told to.
            let _ = unsafe { sys::cuDevicePrimaryCtxRelease_v2(self.device) };
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

/// The kernels of one PTX text in a context, unloaded on drop.
pub(crate) struct GpuModule {
    module: sys::CUmodule,
    /// The entries, indexed by [`Kernel`]. One that the module does not have is null.
    functions: [sys::CUfunction; Kernel::ALL.len()],
    /// Milliseconds that the driver's compiler took. The driver says 0 when it found the kernels in
    /// its cache.
    pub compile_ms: f32,
    gpu: Arc<Gpu>,
}

// SAFETY: modules and functions are handles that any thread may use while their context is current.
unsafe impl Send for GpuModule {}
// SAFETY: as above; nothing here changes after construction.
unsafe impl Sync for GpuModule {}

impl GpuModule {
    /// Compiles PTX and loads the kernels that it has, each with the dynamic shared memory that it
    /// needs. The compiler's log is in the error.
    pub(super) fn load(
        gpu: &Arc<Gpu>,
        arch: Arch,
        name: &str,
        ptx: &str,
        shared_bytes: [Option<u32>; Kernel::ALL.len()],
    ) -> Result<GpuModule> {
        gpu.check(arch)?;
        let text = |subject: &str, text: &str| {
            CString::new(text)
                .map_err(|_| Error::input(subject, "a zero byte", "text", "The file is damaged: build it again"))
        };
        let image = text(&format!("PTX of {name}"), ptx)?;
        let _current = Current::push(gpu)?;
        let mut log = vec![0u8; 16 * 1024];
        let mut options = [
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER,
            sys::CUjit_option::CU_JIT_ERROR_LOG_BUFFER_SIZE_BYTES,
            sys::CUjit_option::CU_JIT_WALL_TIME,
        ];
        let mut values = [log.as_mut_ptr().cast::<c_void>(), log.len() as *mut c_void, std::ptr::null_mut()];
        let mut module = std::ptr::null_mut();
        // SAFETY: the image is terminated, and both option arrays have the given length; the log
        // buffer outlives the call. The driver writes the wall time into its place among the values.
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
        let functions = [std::ptr::null_mut(); Kernel::ALL.len()];
        let compile_ms = f32::from_bits(values[2] as usize as u32);
        let mut loaded = GpuModule { module, functions, compile_ms, gpu: Arc::clone(gpu) };
        for ((kernel, function), shared_bytes) in Kernel::ALL.into_iter().zip(&mut loaded.functions).zip(shared_bytes) {
            let Some(shared_bytes) = shared_bytes else { continue };
            let entry = text("entry", kernel.entry())?;
            // SAFETY: the module is loaded, the name terminated, `function` live; the function is
            // used with its own module.
            unsafe {
                check("cuModuleGetFunction", sys::cuModuleGetFunction(function, module, entry.as_ptr()))?;
                let attribute = sys::CUfunction_attribute::CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES;
                check("cuFuncSetAttribute", sys::cuFuncSetAttribute(*function, attribute, shared_bytes as c_int))?;
                // Lazy loading would allocate during the first launch, which a graph may capture.
                if gpu.driver_version() >= EAGER_LOADING {
                    check("cuFuncLoad", sys::cuFuncLoad(*function))?;
                }
            }
        }
        Ok(loaded)
    }
}

impl Drop for GpuModule {
    fn drop(&mut self) {
        if let Ok(_current) = Current::push(&self.gpu) {
            // SAFETY: loaded once, in this context; its functions are kept here and used by nobody
            // after this.
            let _ = unsafe { sys::cuModuleUnload(self.module) };
        }
    }
}

#[cfg(test)]
mod tests {
    use super::*;

    /// Which family GPUs take: a name, a compute capability, a driver, and the family or what is missing.
    #[test]
    fn gpus_take_the_family_that_suits_them() {
        let table = [
            ("NVIDIA H100 80GB HBM3", (9, 0), 12080, Ok("sm_90a")),
            ("NVIDIA H200", (9, 0), 12030, Ok("sm_90a")),
            // The driver is too old for what only Hopper has.
            ("NVIDIA GH200 480GB", (9, 0), 12020, Ok("sm_80")),
            ("NVIDIA A100-SXM4-80GB", (8, 0), 12000, Ok("sm_80")),
            ("NVIDIA GeForce RTX 3090", (8, 6), 12040, Ok("sm_80")),
            ("Orin", (8, 7), 12060, Ok("sm_80")),
            ("NVIDIA GeForce RTX 4090", (8, 9), 12080, Ok("sm_80")),
            ("NVIDIA B200", (10, 0), 12080, Ok("sm_80")),
            ("NVIDIA B300", (10, 3), 13000, Ok("sm_80")),
            ("NVIDIA Thor", (11, 0), 13000, Ok("sm_80")),
            ("NVIDIA GeForce RTX 5090", (12, 0), 12080, Ok("sm_80")),
            ("NVIDIA GB10", (12, 1), 13000, Ok("sm_80")),
            ("a later GPU", (13, 0), 14000, Ok("sm_80")),
            ("NVIDIA GeForce RTX 2080 Ti", (7, 5), 12080, Err("compute capability 7.5")),
            ("Tesla V100-SXM2-16GB", (7, 0), 12080, Err("8.0 or later (sm_80)")),
            ("NVIDIA H100 PCIe", (9, 0), 11080, Err("CUDA 12.0 or later, which PTX 8.0 needs")),
            ("NVIDIA A100-SXM4-40GB", (8, 0), 11080, Err("CUDA 12.0 or later")),
        ];
        for (name, capability, driver, expected) in table {
            match (best_arch(name, capability, driver), expected) {
                (Ok(arch), Ok(family)) => assert_eq!(arch.name, family, "{name}"),
                (Err(error), Err(part)) => {
                    assert!(error.to_string().contains(part) && error.to_string().contains(name), "{error}")
                }
                (found, _) => panic!("{name}: {found:?}"),
            }
        }
    }

    /// Kernels of a family are refused where they do not run.
    #[test]
    fn kernels_of_another_family_are_refused() {
        assert!(check_arch(Arch::SM_80, "NVIDIA H100", (9, 0), 12080).is_ok());
        let error = check_arch(Arch::SM_90A, "NVIDIA GeForce RTX 4090", (8, 9), 12080).unwrap_err().to_string();
        assert!(error.contains("9.0 (sm_90a)") && error.contains("of another family"), "{error}");
    }
}
