//! Modules: the kernels of a spec on a device.

use std::ffi::c_char;
use std::sync::Arc;

use framestride::{Device, Error, Kernels, Module, Spec};

use crate::argument::{self, Structure};
use crate::device::{self, framestride_device};
use crate::handle;
use crate::spec::{framestride_spec, write_spec};
use crate::status::framestride_status::{FRAMESTRIDE_INVALID_FILE, FRAMESTRIDE_UNSUPPORTED};
use crate::status::{Failure, Result, framestride_status, guard};

/// A handle of a module: the kernels of one spec, loaded on one device.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_module {
    /// A number for the library.
    pub handle: u64,
}

/// How long a module took to load.
#[repr(C)]
#[derive(Clone, Copy)]
pub struct framestride_module_details {
    /// sizeof(framestride_module_details), set by the caller.
    pub size: u64,
    /// Seconds that it took to fill in the template. It is 0 for kernels from a file.
    pub fill_seconds: f64,
    /// Seconds that the device took to load the kernels.
    pub load_seconds: f64,
    /// Seconds of these that the driver's compiler took. It is 0 when the driver found the kernels in
    /// its cache, and on the emulator.
    pub compile_seconds: f64,
}

// SAFETY: it begins with its size, and consists of numbers.
unsafe impl Structure for framestride_module_details {
    const NAME: &str = "framestride_module_details";
}

/// Loads the kernels of a spec. It needs no compiler: templates in the library are filled in with the
/// numbers of the spec.
///
/// On a GPU the driver compiles them now, which takes a second or two, unless it has them in its
/// cache. They are never compiled later.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_load(
    device: framestride_device,
    spec: framestride_spec,
    module: *mut framestride_module,
) -> framestride_status {
    guard(|| {
        let (device, spec): (Device, Arc<Spec>) = (handle::get(device.handle)?, handle::get(spec.handle)?);
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { write_module(module, &device, || Module::load(&device, &spec)) }
    })
}

/// Loads kernels that `framestride build` wrote: NAME.ptx at `path`, and NAME.json beside it.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_load_file(
    device: framestride_device,
    path: *const c_char,
    module: *mut framestride_module,
) -> framestride_status {
    guard(|| {
        let device: Device = handle::get(device.handle)?;
        // SAFETY: the pointer is null, or that of a text.
        let path = unsafe { argument::text("path", path)? };
        let kernels = Kernels::from_file(path).map_err(|error| Failure::new(FRAMESTRIDE_INVALID_FILE, error))?;
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { write_module(module, &device, || Module::load_kernels(&device, &kernels)) }
    })
}

/// # Safety
/// The pointer is null, or that of a variable.
unsafe fn write_module(
    module: *mut framestride_module,
    device: &Device,
    load: impl FnOnce() -> Result<Arc<Module>, Error>,
) -> Result {
    let load = || {
        device::check(device)?;
        // The kernels are right, so whatever is wrong with them is the driver's age.
        let loaded = load().map_err(|error| match error {
            Error::Input { .. } => Failure::new(FRAMESTRIDE_UNSUPPORTED, error),
            error => error.into(),
        })?;
        Ok(framestride_module { handle: handle::insert(loaded) })
    };
    // SAFETY: the caller's promise.
    unsafe { argument::write("module", module, load) }
}

/// Fills `details`, whose size is set.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_module_info(
    module: framestride_module,
    details: *mut framestride_module_details,
) -> framestride_status {
    guard(|| {
        let loading = handle::get::<Arc<Module>>(module.handle)?.loading();
        let found = framestride_module_details {
            size: 0,
            fill_seconds: loading.fill,
            load_seconds: loading.load,
            compile_seconds: loading.compile,
        };
        // SAFETY: the pointer is null, or that of a structure with its size.
        unsafe { argument::write_sized(details, found) }
    })
}

/// Gives the spec of a module a handle of its own, which is freed as any other.
#[unsafe(no_mangle)]
pub unsafe extern "C" fn framestride_module_spec(
    module: framestride_module,
    spec: *mut framestride_spec,
) -> framestride_status {
    guard(|| {
        let module: Arc<Module> = handle::get(module.handle)?;
        // SAFETY: the pointer is null, or that of a variable.
        unsafe { write_spec(spec, || Ok(module.spec().clone())) }
    })
}

/// Frees a module. An attention that was made of it goes on working, and the kernels are unloaded
/// when the last one is freed. By then no call that uses them may still run.
#[unsafe(no_mangle)]
pub extern "C" fn framestride_module_free(module: framestride_module) -> framestride_status {
    guard(|| handle::remove::<Arc<Module>>(module.handle))
}
