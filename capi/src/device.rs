//! Devices.

use std::ffi::{c_char, c_void};

use framestride::Device;
use framestride::device::Gpu;
use framestride::shapes::arch::Arch;

use crate::argument::{self, Structure};
use crate::handle;
use crate::status::framestride_status::FRAMESTRIDE_UNSUPPORTED;
use crate::status::{Failure, Result, framestride_status, guard};

/// A handle of a device: a GPU, or the emulator.
///
/// Any thread may use any handle, several threads at the same time too. What a handle was made of may
/// be freed before it: a module keeps its device, and an attention its module. A handle of zero
/// stands for nothing, and freeing it does nothing.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_device {
    /// A number for the library.
    pub handle: u64,
}

/// What a device is.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_device_details {
    /// sizeof(framestride_device_details), set by the caller.
    pub size: u64,
    /// The name that the driver gives the GPU, or "emulator".
    pub name: [c_char; 256],
    /// The family whose kernels it runs, such as "sm_90a". It is empty where there are no kernels
    /// for it, or its driver is too old for them.
    pub family: [c_char; 32],
    /// The compute capability: 9 and 0 for Hopper, and for the emulator.
    pub capability_major: u32,
    pub capability_minor: u32,
    /// How many multiprocessors it has.
    pub multiprocessors: u32,
    /// The driver as CUDA counts it: 12080 is 12.8. It is 0 for the emulator.
    pub driver: u32,
    /// 1 for the emulator, 0 for a GPU.
    pub is_emulator: u32,
    pub reserved: u32,
}

// SAFETY: it begins with its size, and consists of numbers.
unsafe impl Structure for framestride_device_details {
    const NAME: &str = "framestride_device_details";
}

/// Opens GPU `ordinal` in its primary context, which the CUDA runtime and PyTorch use too.
///
/// It loads the driver (libcuda) if nobody has. Any GPU can be opened;
/// framestride_device_info says whether there are kernels for it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_device_gpu(ordinal: i32, device: *mut framestride_device) -> framestride_status {
    // SAFETY: the pointer is null, or that of a variable.
    guard(|| unsafe { write_device(device, || Ok(Device::gpu(ordinal)?)) })
}

/// Opens the GPU of a context of the caller's, a CUcontext. It is borrowed: it must outlive the
/// device and all that is made of it, and is never destroyed. The context that is current on a
/// thread is the same after every call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_device_borrow(
    context: *mut c_void,
    device: *mut framestride_device,
) -> framestride_status {
    guard(|| {
        if context.is_null() {
            let mend = "Pass the CUcontext that cuCtxGetCurrent gives, or use framestride_device_gpu";
            return Err(Failure::argument("context", "NULL", "a CUcontext", mend));
        }
        // SAFETY: the caller lends a live context, and the pointer is null or that of a variable.
        unsafe { write_device(device, || Ok(Gpu::borrow(context)?.into())) }
    })
}

/// Opens an emulator, which runs the same kernels on the CPU. It is exact and slow, and for tests.
///
/// Its memory is that of the process: tensors and workspace are host memory, and every call is done
/// when it returns. It touches whole words of 4 bytes, so nobody may write the bytes beside a tensor
/// in the same word during a call.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_device_emulator(device: *mut framestride_device) -> framestride_status {
    // SAFETY: the pointer is null, or that of a variable.
    guard(|| unsafe { write_device(device, || Ok(Device::emulator_on_host_memory())) })
}

/// # Safety
/// The pointer is null, or that of a variable.
unsafe fn write_device(device: *mut framestride_device, open: impl FnOnce() -> Result<Device>) -> Result {
    let open = || Ok(framestride_device { handle: handle::insert(open()?) });
    // SAFETY: the caller's promise.
    unsafe { argument::write("device", device, open) }
}

/// Fills `details`, whose size is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_device_info(
    device: framestride_device,
    details: *mut framestride_device_details,
) -> framestride_status {
    guard(|| {
        let device: Device = handle::get(device.handle)?;
        let arch = Arch::default();
        let ((capability_major, capability_minor), driver, family, is_emulator) = match &device {
            Device::Gpu(gpu) => {
                (gpu.capability(), gpu.driver_version() as u32, gpu.arch().map_or("", |arch| arch.name), 0)
            }
            _ => (arch.capabilities[0], 0, arch.name, 1),
        };
        let found = framestride_device_details {
            size: 0,
            name: argument::field(&device.name()),
            family: argument::field(family),
            capability_major,
            capability_minor,
            multiprocessors: device.multiprocessors(),
            driver,
            is_emulator,
            reserved: 0,
        };
        // SAFETY: the pointer is null, or that of a structure with its size.
        unsafe { argument::write_sized(details, found) }
    })
}

/// Frees a device. What was made of it goes on working.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_device_free(device: framestride_device) -> framestride_status {
    guard(|| handle::remove::<Device>(device.handle))
}

/// Checks whether a device runs the kernels.
pub(crate) fn check(device: &Device) -> Result {
    match device {
        Device::Gpu(gpu) => gpu.arch().map(|_| ()).map_err(|error| Failure::new(FRAMESTRIDE_UNSUPPORTED, error)),
        _ => Ok(()),
    }
}
